"""Whether each edge of a circuit is needed, and which only look as if they were not.

An edge whose removal costs nothing may be useless, or another may stand in for it, as the two inputs of an OR gate do.
So edges that cost little alone are also taken out two by two: a pair that costs what neither does alone is redundant,
and neither of the two is called useless. Where three or more edges stand in for each other, taking out two of them
costs nothing either: that is not looked for, and such edges read as of little effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.experiment import Experiment
from circuits.memoised import circuit_values
from workbench.intervals import ratio_bootstrap
from workbench.tables import Table

TOLERANCE = 0.02
"""Share of the headroom below which a removal counts as costing nothing."""
MOST_PAIRED = 40
"""Edges that are tried two by two at most, those that cost least first."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Minimality:
    """What taking out each edge of a circuit costs."""

    edges: tuple[str, ...]
    cost: Float[Tensor, " edge"]
    """Share of the headroom that the circuit loses without the edge: F(C) - F(C without it)."""
    low: Float[Tensor, " edge"]
    high: Float[Tensor, " edge"]
    partners: tuple[tuple[str, ...], ...]
    """For each edge those with which it is redundant: both out cost what neither alone does."""
    n: int

    @property
    def verdicts(self) -> tuple[str, ...]:
        """For each edge: `needed`, `redundant`, `hurts`, `little effect`, or `not told from 0`."""
        rows = zip(self.cost.tolist(), self.low.tolist(), self.high.tolist(), self.partners, strict=True)
        return tuple("redundant" if partners else _verdict(*ends) for *ends, partners in rows)

    def rows(self) -> list[dict[str, object]]:
        """One row an edge."""
        columns = zip(
            self.edges,
            self.cost.tolist(),
            self.low.tolist(),
            self.high.tolist(),
            self.verdicts,
            self.partners,
            strict=True,
        )
        return [
            {
                "edge": edge,
                "cost": cost,
                "low": low,
                "high": high,
                "verdict": verdict,
                "redundant_with": ", ".join(partners),
            }
            for edge, cost, low, high, verdict, partners in columns
        ]

    def tables(self) -> Sequence[Table]:
        """The costs as bars; none for an empty circuit."""
        if not self.edges:
            return []
        return [
            Table(
                name="circuit_minimality",
                frame=pd.DataFrame(self.rows()),
                kind="bar",
                axes={"x": "edge", "y": "cost", "low": "low", "high": "high"},
                unit="share of the headroom",
                caption=(
                    f"What the circuit loses without each of its edges; n = {self.n} examples, 95 % paired bootstrap "
                    f"intervals. Below {TOLERANCE:.0%} an edge has little effect alone, above it is needed where the "
                    "interval excludes 0; where two that have little effect alone cost something together, with an "
                    "interval that excludes 0, they are redundant. Redundancy of three or more is not looked for."
                ),
            )
        ]


def minimality(plan: Experiment, keep: Bool[Tensor, " edge"], *, seed: int = 0) -> Minimality:
    """Take each edge out of a circuit, and those that cost nothing two by two."""
    edges = keep.nonzero()[:, 0]
    tries = keep.repeat(len(edges) + 1, 1)
    tries[torch.arange(len(edges)), edges] = False
    values = circuit_values(plan, tries)
    lost = (values[-1] - values[:-1]).T
    low, high = ratio_bootstrap(lost, plan.full - plan.empty, seed=seed)
    cost = lost.mean(0) / plan.headroom
    return Minimality(
        edges=tuple(plan.graph.names(keep)),
        cost=cost,
        low=low,
        high=high,
        partners=_partners(plan, keep, edges, values[-1], lost, seed),
        n=len(plan.batch),
    )


def _verdict(cost: float, low: float, high: float) -> str:
    if abs(cost) <= TOLERANCE:
        return "little effect"
    if low <= 0 <= high:
        return "not told from 0"
    return "needed" if cost > 0 else "hurts"


def _partners(
    plan: Experiment,
    keep: Bool[Tensor, " edge"],
    edges: Int[Tensor, " kept"],
    whole: Float[Tensor, " batch"],
    lost: Float[Tensor, "batch kept"],
    seed: int,
) -> tuple[tuple[str, ...], ...]:
    """For each edge those that stand in for it."""
    found: list[list[str]] = [[] for _ in edges]
    cost = lost.mean(0) / plan.headroom
    cheap = cost.abs().argsort(stable=True)
    cheap = cheap[cost.abs()[cheap] <= TOLERANCE][:MOST_PAIRED].sort().values
    first, second = torch.combinations(cheap).T if len(cheap) > 1 else (cheap[:0], cheap[:0])
    tries = keep.repeat(len(first), 1)
    places = torch.arange(len(first))
    tries[places, edges[first]] = False
    tries[places, edges[second]] = False
    beyond = (whole - circuit_values(plan, tries)).T - lost[:, first] - lost[:, second]
    low, _ = ratio_bootstrap(beyond, plan.full - plan.empty, seed=seed)
    redundant = (beyond.mean(0) / plan.headroom > TOLERANCE) & (low > 0)
    for one, other in zip(first[redundant].tolist(), second[redundant].tolist(), strict=True):
        found[one].append(plan.graph.edges[int(edges[other])].name)
        found[other].append(plan.graph.edges[int(edges[one])].name)
    return tuple(tuple(names) for names in found)
