"""What is said of a graph's edges: a score for each, and a circuit of those that are kept.

A score is the mean metric of the clean run minus that with the edge ablated, measured or estimated: positive where
ablating the edge lowers the metric. Both results carry their terms (ablation, metric, number of examples), and numbers
under different terms are refused wherever two of them meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import CircuitGraph
from workbench.intervals import paired_bootstrap
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Under what a number about edges holds."""

    ablation: Ablation
    """What an edge carries that is not kept."""
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    n: int
    """Examples."""

    def check_comparable(self, other: Terms) -> None:
        """Raise a WorkbenchError unless the other number is about the same metric under the same ablation."""
        mine, theirs = (self.ablation, self.metric), (other.ablation, other.metric)
        if mine != theirs:
            raise WorkbenchError(
                f"These results do not compare: one is {mine[1]} under {mine[0]} ablation, the other {theirs[1]} "
                f"under {theirs[0]} ablation. Compute both under the same."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EdgeScores:
    """A score for each edge of a graph."""

    graph: CircuitGraph
    terms: Terms
    method: str
    score: Float[Tensor, " edge"]
    """Mean metric of the clean run minus that with the edge ablated, or an estimate of it. Learned masks, ACDC and
    information flow have scores of their own, whose order alone counts (`scale`)."""
    examples: Float[Tensor, "batch edge"] | None = None
    """The same for each example, where the method gives it."""
    live: Bool[Tensor, " edge"]
    """Edges that lie in a circuit of carrying edges: with all others ablated every answer is the model's."""
    scale: str
    """Unit of the score."""
    reference: str
    """Run at which it is taken: the clean one, the ablated one, or the path between."""
    rule: str
    """How: patched one by one, gradient, integration rule, optimisation."""
    seconds: float
    """Wall time."""
    provenance: Provenance

    def __post_init__(self) -> None:
        n_edges = len(self.graph.edges)
        if self.score.shape != (n_edges,):
            raise WorkbenchError(f"Scores of shape {list(self.score.shape)} came for a graph of {n_edges} edges.")
        if not bool(self.score.isfinite().all()):
            lost = self.graph.names(~self.score.isfinite())
            raise WorkbenchError(
                f"{len(lost)} scores of method {self.method!r} are not finite, such as that of {lost[0]}. "
                "Look at the model's logits, or choose another metric."
            )

    @property
    def is_effect(self) -> bool:
        """Whether scores are effects on the metric; else their order alone counts."""
        return self.scale == self.terms.unit

    @property
    def importance(self) -> Float[Tensor, " edge"]:
        """The score with its sign turned so that positive edges help: ablating them makes the metric worse."""
        helps = self.terms.better == "higher" or not self.is_effect
        return self.score if helps else -self.score

    def ranking(self, *, absolute: bool) -> Int[Tensor, " edge"]:
        """Edges from the most important to the least, ties in the graph's order.

        Args:
            absolute: whether an edge that hurts counts as much as one that helps.
        """
        return self.strength(absolute=absolute).argsort(descending=True, stable=True)

    def strength(self, *, absolute: bool) -> Float[Tensor, " edge"]:
        """What edges are ranked by.

        Scores that are no effects keep their sign even then: the log alpha of a closed gate is negative and large.
        """
        return self.importance.abs() if absolute and self.is_effect else self.importance

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge, in the graph's order; an interval where examples are kept."""
        frame = pd.DataFrame(
            {
                "edge": [edge.name for edge in self.graph.edges],
                "from": [edge.source for edge in self.graph.edges],
                "to": [edge.target for edge in self.graph.edges],
                "score": self.score.tolist(),
                "live": self.live.tolist(),
            }
        )
        if self.examples is not None:
            low, high = paired_bootstrap(self.examples)
            frame["low"], frame["high"] = low.tolist(), high.tolist()
        return frame

    def tables(self) -> Sequence[Table]:
        """The scores, the largest first."""
        frame = self.frame.iloc[self.ranking(absolute=True).tolist()].reset_index(drop=True)
        ends = {"low": "low", "high": "high"} if "low" in frame else {}
        interval = ", 95 % paired bootstrap intervals" if ends else ""
        return [
            Table(
                name=f"edge_scores_{self.method.replace('-', '_')}",
                frame=frame,
                kind="bar",
                axes={"x": "edge", "y": "score", **ends},
                unit=self.scale,
                caption=(
                    f"Score of every edge by {self.method} ({self.rule}; taken at {self.reference}): "
                    f"{self.terms.metric} lost by {self.terms.ablation} ablation of the edge. "
                    f"n = {self.terms.n} examples{interval}."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "edges": [
                {"from": edge.source, "to": edge.target, "score": score}
                for edge, score in zip(self.graph.edges, self.score.tolist(), strict=True)
            ],
            "method": self.method,
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
            "scale": self.scale,
            "reference": self.reference,
            "rule": self.rule,
            "n": self.terms.n,
            "live_edges": int(self.live.sum()),
            "all_edges": len(self.graph.edges),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Circuit:
    """Edges of a graph that are kept; all others are ablated."""

    graph: CircuitGraph
    keep: Bool[Tensor, " edge"]
    terms: Terms
    method: str
    rule: str
    """How the edges were chosen: the size or the threshold, and whether by signed or absolute score."""
    requested: int | None = None
    """Edges that were asked for; fewer are kept where some of them dangle."""
    absolute: bool | None = None
    """Whether edges that hurt counted as much as edges that help; None where no scores were ranked."""
    scores: EdgeScores | None = None
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.keep.shape != (len(self.graph.edges),):
            raise WorkbenchError(
                f"A mask of shape {list(self.keep.shape)} came for a graph of {len(self.graph.edges)} edges."
            )

    @property
    def size(self) -> int:
        """How many edges are kept."""
        return int(self.keep.sum())

    @property
    def edges(self) -> list[str]:
        """Names of the edges that are kept, in the graph's order."""
        return self.graph.names(self.keep)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a kept edge, with its score where there is one."""
        chosen = [self.graph.edges[place] for place in self.keep.nonzero()[:, 0].tolist()]
        frame = pd.DataFrame(
            {
                "edge": [edge.name for edge in chosen],
                "from": [edge.source for edge in chosen],
                "to": [edge.target for edge in chosen],
            }
        )
        if self.scores is not None:
            frame["score"] = self.scores.score[self.keep].tolist()
        return frame

    def tables(self) -> Sequence[Table]:
        """The kept edges."""
        caption = (
            f"Circuit of {self.size} of {len(self.graph.edges)} edges found by {self.method} ({self.rule}), "
            f"{self.terms.ablation} ablation, {self.terms.metric}, n = {self.terms.n} examples."
        )
        return [
            Table(name="circuit_edges", frame=self.frame, kind="table", axes={}, unit=self.terms.unit, caption=caption)
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        scores = None if self.scores is None else self.scores.score.tolist()
        return {
            "edges": [
                {"from": edge.source, "to": edge.target, **({} if scores is None else {"score": scores[place]})}
                for place, edge in enumerate(self.graph.edges)
                if self.keep[place]
            ],
            "requested": self.requested,
            "size": self.size,
            "all_edges": len(self.graph.edges),
            "method": self.method,
            "rule": self.rule,
            "absolute": self.absolute,
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
        }
