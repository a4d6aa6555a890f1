"""The circuits of all checkpoints: their numbers and their edges' scores over steps, and when each edge was there.

An edge is *born* at the first checkpoint whose circuit has it and has *vanished* at the one after the last. Between two
checkpoints nobody looked; and where a circuit is given a number of edges, one that comes takes the place of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import Circuit, Terms
from circuits.difference import CircuitDifference, difference
from circuits.graph import CircuitGraph
from workbench.intervals import Estimate
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moment:
    """The circuit of one checkpoint, and how good it is."""

    step: int
    circuit: Circuit
    """Empty where the checkpoint has no headroom."""
    reason: str | None = None
    """Why there is no circuit; None where there is one."""
    headroom: float | None = None
    """Mean metric of the whole model minus that with every edge ablated; None where the two are the same."""
    headroom_interval: tuple[float, float] | None = None
    """95 % paired bootstrap interval. Where it holds 0, there is no circuit."""
    model_accuracy: float | None = None
    accuracy: Estimate | None = None
    """Share of answers that the circuit gets right, over the whole vocabulary."""
    faithfulness: Estimate | None = None
    """Share of the headroom with all other edges ablated."""
    random_95: float | None = None
    """95th percentile of the faithfulness of random connected circuits of the same size; None where none were drawn."""

    def row(self) -> dict[str, object]:
        """The numbers, None where there are none."""
        low, high = self.headroom_interval or (None, None)
        return {
            "step": self.step,
            "size": self.circuit.size,
            "headroom": self.headroom,
            "headroom_low": low,
            "headroom_high": high,
            **_ends("faithfulness", self.faithfulness),
            "random_95": self.random_95,
            **_ends("accuracy", self.accuracy),
            "model_accuracy": self.model_accuracy,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifetime:
    """When one edge was in the circuit."""

    edge: str
    steps: tuple[int, ...]
    """Checkpoints whose circuit has it."""
    vanished: int | None
    """First checkpoint after the last of them; None where there is none."""
    spells: int
    """Unbroken rows of checkpoints that have it: 2 where it was lost once and came back."""

    @property
    def born(self) -> int:
        """First checkpoint whose circuit has it."""
        return self.steps[0]

    @property
    def last(self) -> int:
        """Last checkpoint whose circuit has it."""
        return self.steps[-1]

    def row(self) -> dict[str, object]:
        """The steps that matter, and how many checkpoints have the edge."""
        return {
            "edge": self.edge,
            "born": self.born,
            "last": self.last,
            "vanished": self.vanished,
            "checkpoints": len(self.steps),
            "spells": self.spells,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class CircuitHistory:
    """A circuit at every checkpoint, on the same examples."""

    moments: tuple[Moment, ...]
    """In the order of steps."""
    graph: CircuitGraph
    terms: Terms
    method: str
    controls: int
    """Random circuits that each checkpoint's circuit was compared with."""
    seconds: float
    provenance: Provenance

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints."""
        return tuple(moment.step for moment in self.moments)

    @cached_property
    def keep(self) -> Bool[Tensor, "step edge"]:
        """Which edges each circuit has."""
        return torch.stack([moment.circuit.keep for moment in self.moments])

    @cached_property
    def score(self) -> Float[Tensor, "step edge"]:
        """Every edge's score at each checkpoint; NaN where nothing could be scored."""
        nothing = torch.full((len(self.graph.edges),), torch.nan, dtype=torch.float64)
        found = [moment.circuit.scores for moment in self.moments]
        return torch.stack([nothing if scores is None else scores.score.double() for scores in found])

    @cached_property
    def lifetimes(self) -> tuple[Lifetime, ...]:
        """Every edge that some circuit has, the first to be born first."""
        found = [self._lifetime(edge) for edge in self.keep.any(0).nonzero()[:, 0].tolist()]
        return tuple(sorted(found, key=lambda lifetime: lifetime.born))

    def at(self, step: int) -> Moment:
        """What was found at a checkpoint.

        Raises:
            WorkbenchError: there is no checkpoint at that step.
        """
        for moment in self.moments:
            if moment.step == step:
                return moment
        near = min(self.steps, key=lambda known: abs(known - step))
        raise WorkbenchError(
            f"No checkpoint at step {step} was looked at; the nearest is {near}. There are {len(self.steps)}, from "
            f"{self.steps[0]} to {self.steps[-1]}."
        )

    def difference(self, before: int, after: int) -> CircuitDifference:
        """What changed between two checkpoints.

        Raises:
            WorkbenchError: there is no checkpoint at one of the steps.
        """
        circuits = [self.at(step).circuit for step in (before, after)]
        return difference(circuits[0], circuits[1], labels=(f"step {before}", f"step {after}"))

    @property
    def frame(self) -> pd.DataFrame:
        """One row a checkpoint."""
        return pd.DataFrame([moment.row() for moment in self.moments])

    def tables(self) -> Sequence[Table]:
        """Faithfulness and headroom over steps, scores by step and edge, when each edge was there."""
        terms = self.terms
        without = [str(moment.step) for moment in self.moments if moment.reason]
        lacking = f" No headroom, and so no circuit, at step {', '.join(without)}." if without else ""
        rules = [f" ({moment.circuit.rule})" for moment in self.moments if not moment.reason]
        under = (
            f"{self.method}{rules[-1] if rules else ''}, {terms.metric} under {terms.ablation} ablation, "
            f"n = {terms.n} examples"
        )
        between = f"{under}, 95 % paired bootstrap intervals.{lacking}"
        found = [
            self._curves(
                f"Faithfulness and accuracy of the circuit through training; {between} Random: 95th percentile of "
                f"{self.controls} random connected circuits of the same size."
            ),
            Table(
                name="history_headroom",
                frame=self.frame.dropna(subset=["headroom"]).reset_index(drop=True),
                kind="curve",
                axes={"x": "step", "y": "headroom", "low": "headroom_low", "high": "headroom_high"},
                unit=terms.unit,
                caption=f"Mean metric of the whole model minus that with every edge ablated; {between}",
            ),
            *self._heatmaps(f"{under}.{lacking}"),
            Table(
                name="history_edges",
                frame=pd.DataFrame([lifetime.row() for lifetime in self.lifetimes], dtype=object),
                kind="table",
                axes={},
                unit="",
                caption=(
                    f"Checkpoints at which each edge is first and last in the circuit, and at which it has vanished; "
                    f"{under}.{lacking}"
                ),
            ),
        ]
        return [table for table in found if len(table.frame)]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        edges = [moment.circuit.edges for moment in self.moments]
        return {
            "checkpoints": [
                {**moment.row(), "edges": names} for moment, names in zip(self.moments, edges, strict=True)
            ],
            "lifetimes": [{**lifetime.row(), "steps": list(lifetime.steps)} for lifetime in self.lifetimes],
            "method": self.method,
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
            "n": self.terms.n,
            "all_edges": len(self.graph.edges),
            "seconds": self.seconds,
        }

    def _lifetime(self, edge: int) -> Lifetime:
        there = self.keep[:, edge].tolist()
        last = max(place for place, present in enumerate(there) if present)
        spells = sum(present and not (place and there[place - 1]) for place, present in enumerate(there))
        return Lifetime(
            edge=self.graph.edges[edge].name,
            steps=tuple(step for step, present in zip(self.steps, there, strict=True) if present),
            vanished=self.steps[last + 1] if last + 1 < len(self.steps) else None,
            spells=spells,
        )

    def _heatmaps(self, under: str) -> Iterator[Table]:
        """Scores of all edges that some circuit has, the largest at the end first; and as shares of the headroom."""
        ever = self.keep.any(0)
        scored = [moment.circuit.scores for moment in self.moments if moment.circuit.scores is not None]
        order = [edge for edge in scored[-1].ranking(absolute=True).tolist() if ever[edge]] if scored else []
        frame = pd.DataFrame(
            [
                {
                    "checkpoint": str(moment.step),
                    "edge": self.graph.edges[edge].name,
                    "score": float(self.score[place, edge]),
                    "in_circuit": bool(self.keep[place, edge]),
                    "share": float(self.score[place, edge]) / moment.headroom
                    if moment.headroom is not None and moment.reason is None
                    else None,
                }
                for edge in order
                for place, moment in enumerate(self.moments)
            ],
            columns=["checkpoint", "edge", "score", "in_circuit", "share"],
        )
        scale = scored[-1].scale if scored else self.terms.unit
        yield Table(
            name="history_scores",
            frame=frame,
            kind="heatmap",
            axes={"x": "checkpoint", "y": "edge", "value": "score"},
            unit=scale,
            caption=f"Scores through training of the edges that are in some checkpoint's circuit; {under}",
        )
        if scale == self.terms.unit:
            yield Table(
                name="history_shares",
                frame=frame,
                kind="heatmap",
                axes={"x": "checkpoint", "y": "edge", "value": "share"},
                unit="share of the headroom",
                caption=f"Scores through training as shares of each checkpoint's headroom; {under}",
            )

    def _curves(self, caption: str) -> Table:
        """Faithfulness with its control, and accuracies, of the checkpoints that have a circuit."""
        series = {
            "circuit": ("faithfulness", "faithfulness_low", "faithfulness_high"),
            "random, 95th percentile": ("random_95",) * 3,
            "accuracy of the circuit": ("accuracy", "accuracy_low", "accuracy_high"),
            "accuracy of the model": ("model_accuracy",) * 3,
        }
        columns = ["value", "low", "high"]
        own = self.frame.query("reason.isna()").reset_index(drop=True)
        parts = [
            pd.DataFrame(
                {
                    "step": own["step"],
                    "series": name,
                    **{column: own[key] for column, key in zip(columns, keys, strict=True)},
                }
            )
            for name, keys in series.items()
        ]
        return Table(
            name="history_faithfulness",
            frame=pd.concat(parts, ignore_index=True).dropna(subset=["value"]).reset_index(drop=True),
            kind="curve",
            axes={"x": "step", "y": "value", "series": "series", "low": "low", "high": "high"},
            unit="share of the headroom; accuracy as a fraction",
            caption=caption,
        )


def _ends(name: str, share: Estimate | None) -> dict[str, float | None]:
    """A share and its interval as columns."""
    values = (None,) * 3 if share is None else (share.mean, share.low, share.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
