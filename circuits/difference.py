"""What changed from one circuit to another of the same graph: between two checkpoints, or between two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.consensus import edge_rows
from workbench.intervals import paired_bootstrap
from workbench.store import Provenance
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CircuitDifference:
    """What changed from one circuit of a graph to another: between two checkpoints, or two methods."""

    labels: tuple[str, str]
    before: Circuit
    after: Circuit
    change: Float[Tensor, " edge"] | None
    """Score after minus score before; None unless both are scored by one method."""
    interval: tuple[Float[Tensor, " edge"], Float[Tensor, " edge"]] | None
    """95 % paired bootstrap interval of the change, where both have scores for the same number of examples."""
    provenance: Provenance

    @property
    def gained(self) -> list[str]:
        """Edges of the second circuit alone."""
        return self.after.graph.names(self.after.keep & ~self.before.keep)

    @property
    def lost(self) -> list[str]:
        """Edges of the first circuit alone."""
        return self.after.graph.names(self.before.keep & ~self.after.keep)

    @property
    def kept(self) -> list[str]:
        """Edges of both."""
        return self.after.graph.names(self.before.keep & self.after.keep)

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge, in the graph's order."""
        status = {(False, False): "in neither", (False, True): "gained", (True, False): "lost", (True, True): "kept"}
        pairs = zip(self.before.keep.tolist(), self.after.keep.tolist(), strict=True)
        frame = edge_rows(self.after.graph).assign(status=[status[pair] for pair in pairs])
        if self.change is not None:
            frame["change"] = self.change.tolist()
        if self.interval is not None:
            frame["low"], frame["high"] = (end.tolist() for end in self.interval)
        return frame

    def tables(self) -> Sequence[Table]:
        """The edges of either circuit, the largest change first; a plain table where nothing tells the change."""
        frame = self.frame.query("status != 'in neither'")
        terms, (first, second) = self.after.terms, self.labels
        caption = (
            f"Circuit of {second} against that of {first}: {len(self.gained)} edges gained, {len(self.lost)} lost, "
            f"{len(self.kept)} kept; {self.after.method}, {terms.metric} under {terms.ablation} ablation, "
            f"n = {terms.n} examples"
        )
        if self.change is None or self.after.scores is None:
            rows = frame.reset_index(drop=True)
            return [Table(name="circuit_difference", frame=rows, kind="table", axes={}, unit="", caption=f"{caption}.")]
        ends = {} if self.interval is None else {"low": "low", "high": "high"}
        return [
            Table(
                name="circuit_difference",
                frame=frame.sort_values("change", key=lambda column: -column.abs(), kind="stable").reset_index(
                    drop=True
                ),
                kind="bar",
                axes={"x": "edge", "y": "change", "series": "status", **ends},
                unit=self.after.scores.scale,
                caption=caption + (", 95 % paired bootstrap intervals." if ends else "."),
            )
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "before": self.labels[0],
            "after": self.labels[1],
            "gained": self.gained,
            "lost": self.lost,
            "kept": self.kept,
            "edges": self.frame.query("status != 'in neither'").to_dict("records"),
            "ablation": self.after.terms.ablation,
            "metric": self.after.terms.metric,
            "n": self.after.terms.n,
        }


def difference(before: Circuit, after: Circuit, *, labels: tuple[str, str] = ("before", "after")) -> CircuitDifference:
    """Edges that one circuit has and the other has not, and how far scores moved.

    The interval of a change takes examples in pairs by their place: give both circuits the same batch.

    Args:
        before: of the same graph, under the same metric and ablation.
        after: the other.
        labels: what captions call them.

    Raises:
        WorkbenchError: circuits of different graphs, metrics or ablations.
    """
    before.graph.check_same(after.graph)
    before.terms.check_comparable(after.terms)
    change, interval = None, None
    first, second = before.scores, after.scores
    if first is not None and second is not None and (first.method, first.scale) == (second.method, second.scale):
        change = second.score - first.score
        if first.examples is not None and second.examples is not None and len(first.examples) == len(second.examples):
            interval = paired_bootstrap(second.examples - first.examples)
    parents = dict.fromkeys([*before.provenance.parents, *after.provenance.parents])
    return CircuitDifference(
        labels=labels,
        before=before,
        after=after,
        change=change,
        interval=interval,
        provenance=replace(after.provenance, parents=tuple(parents)),
    )
