"""Path patching: what reaches a receiver straight from a sender (Wang et al. 2022; Goldowsky-Dill et al. 2023).

A path is the edge from a sender to a receiver, or a sender's edges to all chosen receivers together, which can matter
where none of them does alone. *Noising* lets the path carry the ablated value in the clean run; *denoising* lets it
carry the clean value in the corrupt run. The sender's other edges carry what they did, and what the receivers make of
the change flows on through the whole model: nothing is frozen and nothing linearised, so that every effect is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.experiment import Experiment, experiment
from circuits.graph import LOGITS, CircuitGraph
from circuits.memoised import circuit_values
from circuits.patching import FALSE_DISCOVERY_RATE, Direction
from workbench.instrument.sites import Instrumented
from workbench.intervals import discoveries, ratio_bootstrap, sign_flip_pvalue
from workbench.metrics import Metric
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError, nearest
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, check_choice

TOGETHER = "together"
"""Stands for all chosen receivers that a sender has an edge to."""
SHOWN = 12
"""Names that an error lists at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """What is patched at once: a sender's edge to a receiver, or its edges to several."""

    sender: str
    receiver: str
    """A port of the graph, or `together`."""
    edges: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.edges:
            raise WorkbenchError(
                f"The path {self.sender} -> {self.receiver} has no edge: patching it would change nothing."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PathMap:
    """Effect of patching each path, one at a time."""

    paths: tuple[Path, ...]
    directions: tuple[Direction, ...]
    effect: Float[Tensor, "direction path"]
    """Share of the difference between clean and corrupt: 0 = no effect, 1 = all of it."""
    low: Float[Tensor, "direction path"]
    high: Float[Tensor, "direction path"]
    patched: Float[Tensor, "direction path"]
    """Mean metric after the patch."""
    significant: Bool[Tensor, "direction path"]
    """Whether the mean change differs from 0, at a false-discovery rate of 5 % over the paths."""
    live: Bool[Tensor, " path"]
    """Whether the path carries anything else when it is patched; an effect of 0 says nothing where it does not."""
    n: int
    dropped: int
    """Pairs that were left out because their change does not change the answer."""
    ablation: Ablation
    metric: str
    unit: str
    higher: str
    """What a higher value of the metric means."""
    clean: float
    corrupt: float
    """Mean metric with every edge ablated: under resample ablation that of the counterfactual run."""
    provenance: Provenance

    @property
    def disagree(self) -> Bool[Tensor, " path"]:
        """Paths whose denoising and noising intervals do not overlap."""
        if len(self.directions) < 2:
            return torch.zeros(len(self.paths), dtype=torch.bool)
        return (self.low[0] > self.high[1]) | (self.low[1] > self.high[0])

    @property
    def frame(self) -> pd.DataFrame:
        """One row a path and direction."""
        return pd.DataFrame(list(self._rows()))

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "n": self.n,
            "dropped": self.dropped,
            "ablation": self.ablation,
            "metric": self.metric,
            "direction": list(self.directions),
            "higher": self.higher,
            "clean": self.clean,
            "corrupt": self.corrupt,
            "disagreements": int(self.disagree.sum()),
            "paths": list(self._rows()),
        }

    def tables(self) -> Sequence[Table]:
        """A heat map of senders by receivers, one a direction."""
        return [
            Table(
                name="path_patching",
                frame=self.frame,
                kind="heatmap",
                axes={
                    "x": "receiver",
                    "y": "sender",
                    "value": "effect",
                    "low": "low",
                    "high": "high",
                    "facet": "direction",
                },
                unit="share of clean − corrupt",
                caption=(
                    f"Effect of patching the path from each sender to each receiver on {self.metric}, as a share of "
                    f"the difference between clean ({self.clean:.3g}) and corrupt ({self.corrupt:.3g}); "
                    f"{self.ablation} ablation, n = {self.n} examples, 95 % paired bootstrap intervals. Denoise: the "
                    "clean value in the corrupt run; noise: the ablated one in the clean run; together: all receivers "
                    "at once."
                ),
            )
        ]

    def _rows(self) -> Iterator[dict[str, object]]:
        disagree = self.disagree
        for row, direction in enumerate(self.directions):
            for column, path in enumerate(self.paths):
                yield {
                    "sender": path.sender,
                    "receiver": path.receiver,
                    "edges": ", ".join(path.edges),
                    "direction": direction,
                    "effect": float(self.effect[row, column]),
                    "low": float(self.low[row, column]),
                    "high": float(self.high[row, column]),
                    "patched": float(self.patched[row, column]),
                    "significant": bool(self.significant[row, column]),
                    "live": bool(self.live[column]),
                    "disagree": bool(disagree[column]),
                }


def path_patch(
    model: Instrumented,
    batch: Batch,
    *,
    senders: str | Iterable[str] | None = None,
    receivers: str | Iterable[str] = LOGITS,
    ablation: Ablation = "resample",
    metric: str | Metric = "logit_difference",
    direction: Literal["denoise", "noise", "both"] = "both",
    graph: CircuitGraph | None = None,
    seed: int = 0,
) -> PathMap:
    """Patch the path from every sender to every receiver, one at a time, and to all receivers together.

    Args:
        model: one that runs in parts, or a GPT-2-shaped bridge.
        batch: examples, with counterfactuals where the ablation or the metric needs them.
        senders: writers of the graph, as names or comma-separated; `a0.*` stands for all heads of a layer. None is
            every writer that comes before a receiver.
        receivers: what reads: `logits`, `m1`, `a1.h0<q>`; `a1.*<q>` stands for the queries of all heads of a layer.
        ablation: what a patched path carries in the clean run.
        metric: a metric or its name; its direction is kept in the result.
        direction: denoise, noise, or both from one call. Only a counterfactual run can be denoised.
        graph: of this model; None is the component graph.
        seed: of the bootstrap and the permutation test.

    Raises:
        WorkbenchError: an unknown sender or receiver, a sender that does not come before a receiver, no path, no
            counterfactual run to denoise, or no headroom.
    """
    check_choice("direction", direction, ("denoise", "noise", "both"))
    directions: tuple[Direction, ...] = ("denoise", "noise") if direction == "both" else (direction,)
    plan = experiment(model, batch, graph=graph, ablation=ablation, metric=metric)
    paths = _paths(plan.graph, senders, receivers)
    masks = torch.stack([plan.graph.mask(path.edges) for path in paths])
    patched, changes = [], []
    for way in directions:
        base = plan if way == "noise" else _exchanged(plan)
        after = circuit_values(base, ~masks).double()
        patched.append(after.mean(1))
        # Both directions count what the path carried over, as a share of the same difference.
        changes.append((after - base.full.double()).T * (1 if way == "denoise" else -1))
    difference = (plan.full - plan.empty).double()
    low, high = zip(*(ratio_bootstrap(change, difference, seed=seed) for change in changes), strict=True)
    pvalues = torch.stack([sign_flip_pvalue(change, seed=seed) for change in changes])
    return PathMap(
        paths=paths,
        directions=directions,
        effect=torch.stack([change.mean(0) / difference.mean() for change in changes]),
        low=torch.stack(low),
        high=torch.stack(high),
        patched=torch.stack(patched),
        significant=torch.stack([discoveries(row, rate=FALSE_DISCOVERY_RATE) for row in pvalues]),
        live=(masks & plan.carrying).any(1),
        n=len(batch),
        dropped=batch.dropped,
        ablation=ablation,
        metric=plan.metric.name,
        unit=plan.metric.unit,
        higher=plan.metric.higher,
        clean=float(plan.full.mean()),
        corrupt=float(plan.empty.mean()),
        provenance=plan.provenance,
    )


def _exchanged(plan: Experiment) -> Experiment:
    """The experiment with its two runs in each other's place; answer and distractor remain those of the clean one."""
    if plan.ablation != "resample":
        raise WorkbenchError(
            f"Denoising puts clean values into the corrupt run, and {plan.ablation} ablation has no such run. "
            "Say direction='noise', or ablation='resample'."
        )
    corrupt, _ = plan.batch.pairs()
    batch = replace(plan.batch, tokens=corrupt, corrupt=plan.batch.tokens)
    return replace(plan, batch=batch, clean=plan.ablated, ablated=plan.clean, full=plan.empty, empty=plan.full)


def _paths(
    graph: CircuitGraph, senders: str | Iterable[str] | None, receivers: str | Iterable[str]
) -> tuple[Path, ...]:
    """Every path from a sender to a receiver, and to all of them together where there are several."""
    sending, receiving = _names("sender", "*" if senders is None else senders), _names("receiver", receivers)
    sources = _matching("sender", sending, list(dict.fromkeys(edge.source for edge in graph.edges)))
    targets = _matching("receiver", receiving, list(dict.fromkeys(edge.target for edge in graph.edges)))
    paths: list[Path] = []
    for source in sources:
        edges = {target: edge for target in targets if (edge := f"{source}->{target}") in graph.index}
        if source in sending and (missing := [name for name in targets if name in receiving and name not in edges]):
            raise _not_before(graph, source, missing[0])
        paths += [Path(sender=source, receiver=target, edges=(edge,)) for target, edge in edges.items()]
        if len(edges) > 1:
            paths.append(Path(sender=source, receiver=TOGETHER, edges=tuple(edges.values())))
    used = {end for path in paths for end in (path.sender, path.receiver)}
    idle = [name for name in (*sources, *targets) if name in (*sending, *receiving) and name not in used]
    if idle or not paths:
        raise WorkbenchError(
            f"Nothing to patch{f' at {idle[0]}' if idle else ''}: no sender of {', '.join(sending)} comes before a "
            f"receiver of {', '.join(receiving)} there. Name earlier senders or later receivers."
        )
    return tuple(paths)


def _names(role: str, wanted: str | Iterable[str]) -> list[str]:
    parts = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    names = [name.strip() for name in parts if name.strip()]
    if not names:
        raise WorkbenchError(f"Nothing to patch: no {role} was named. Name some, such as 'a0.h1' and 'a1.h0<q>'.")
    return names


def _matching(role: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that are wanted, in their own order."""
    for name in wanted:
        if not any(fnmatchcase(each, name) for each in known):
            raise WorkbenchError(f"Unknown {role} {name!r}: this graph has none. {nearest(name, known)}")
    return [each for each in known if any(fnmatchcase(each, name) for name in wanted)]


def _not_before(graph: CircuitGraph, source: str, target: str) -> WorkbenchError:
    read = [edge.source for edge in graph.edges if edge.target == target]
    shown = ", ".join(read[:SHOWN]) + (", …" if len(read) > SHOWN else "")
    return WorkbenchError(
        f"Sender {source} does not come before receiver {target}: this graph has no edge {source}->{target}. "
        f"{target} reads {shown}."
    )
