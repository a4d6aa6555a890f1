"""What several scores of the same edges agree on: of several methods on one model, or of several seeds of one recipe.

Circuits of the same size are compared as sets (Jaccard index, beside what chance gives), rankings as a whole
(Spearman's correlation), and every edge by how many circuits have it. Numbers by different metrics or under different
ablations are never compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.circuit import Circuit, EdgeScores, Terms
from circuits.discovery import top_n
from circuits.graph import CircuitGraph
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Agreement:
    """What several scores of one graph's edges have in common: of methods on one model, or of seeds of one recipe."""

    labels: tuple[str, ...]
    graph: CircuitGraph
    terms: Terms
    """Of the first; ablation and metric are those of all."""
    n: tuple[int, ...]
    """Examples of each."""
    edges: int
    """Edges that each circuit was asked to keep."""
    keep: Bool[Tensor, "result edge"]
    """The circuits: each one's largest scores, less what dangles."""
    jaccard: Float[Tensor, "result other"]
    """Edges that two circuits share, of those that either has; 1 where both are empty."""
    chance: Float[Tensor, "result other"]
    """The Jaccard index to expect of two random sets of live edges of these sizes."""
    correlation: Float[Tensor, "result other"]
    """Spearman's, of the importances of edges that are live in both; NaN where all edges of one are tied."""
    live_edges: int
    """Edges that are live in any."""
    provenance: Provenance

    @property
    def votes(self) -> Int[Tensor, " edge"]:
        """How many circuits have each edge."""
        return self.keep.sum(0)

    @property
    def shared(self) -> list[str]:
        """Edges that all circuits have."""
        return self.graph.names(self.keep.all(0))

    def circuit(self, votes: int | None = None) -> Circuit:
        """The edges that so many circuits have, all of them unless told, less what then dangles.

        Raises:
            WorkbenchError: fewer than one vote, or more than there are circuits.
        """
        wanted = len(self.labels) if votes is None else votes
        if not 1 <= wanted <= len(self.labels):
            raise WorkbenchError(
                f"Asked for {wanted} votes of {len(self.labels)} circuits; ask for at least 1 of them."
            )
        return Circuit(
            graph=self.graph,
            keep=self.graph.pruned(self.votes >= wanted, self.terms.ablation),
            terms=self.terms,
            method="consensus",
            rule=f"edges of at least {wanted} of {len(self.labels)} circuits of {self.edges}: {', '.join(self.labels)}",
            provenance=self.provenance,
        )

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge, in the graph's order: how many circuits have it, and which."""
        found_by = [", ".join(itertools.compress(self.labels, row)) for row in self.keep.T.tolist()]
        return edge_rows(self.graph).assign(votes=self.votes.tolist(), found_by=found_by)

    @property
    def pairs(self) -> pd.DataFrame:
        """One row an ordered pair of results."""
        places = list(itertools.product(range(len(self.labels)), repeat=2))
        return pd.DataFrame(
            {
                "result": [self.labels[row] for row, _ in places],
                "other": [self.labels[column] for _, column in places],
                "jaccard": self.jaccard.flatten().tolist(),
                "chance": self.chance.flatten().tolist(),
                "correlation": self.correlation.flatten().tolist(),
            }
        )

    def tables(self) -> Sequence[Table]:
        """Both matrices, and the edges by votes."""
        voted = self.frame.query("votes > 0").sort_values("votes", ascending=False, kind="stable")
        under = (
            f"{self.terms.metric} under {self.terms.ablation} ablation, n = {_numbers(self.n)} examples, "
            f"{self.live_edges} live edges"
        )
        alike = float(self.chance[~torch.eye(len(self.labels), dtype=torch.bool)].mean())
        return [
            self._matrix(
                "jaccard",
                "Jaccard index",
                f"Edges that two circuits of {self.edges} edges share, of those that either has; {under}. "
                f"Random sets of live edges as large share {alike:.3f} on average.",
            ),
            self._matrix(
                "correlation",
                "Spearman's rank correlation",
                f"Rank correlation of the importances of edges that are live in both; {under}.",
            ),
            Table(
                name="agreement_votes",
                frame=voted.reset_index(drop=True),
                kind="bar",
                axes={"x": "edge", "y": "votes"},
                unit="circuits",
                caption=f"How many of {len(self.labels)} circuits of {self.edges} edges have each edge; {under}.",
            ),
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        rows = self.pairs.astype(object).where(self.pairs.notna(), None).to_dict("records")
        return {
            "labels": list(self.labels),
            "requested": self.edges,
            "sizes": self.keep.sum(1).tolist(),
            "pairs": [row for row in rows if row["result"] != row["other"]],
            "shared": self.shared,
            "votes": {
                edge: votes for edge, votes in zip(self.frame["edge"], self.votes.tolist(), strict=True) if votes
            },
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
            "n": list(self.n),
            "live_edges": self.live_edges,
            "all_edges": len(self.graph.edges),
        }

    def _matrix(self, value: str, unit: str, caption: str) -> Table:
        return Table(
            name=f"agreement_{value}",
            frame=self.pairs,
            kind="heatmap",
            axes={"x": "result", "y": "other", "value": value},
            unit=unit,
            caption=caption,
        )


def agreement(
    scores: Sequence[EdgeScores], *, edges: int, labels: Sequence[str] | None = None, absolute: bool = True
) -> Agreement:
    """Compare the rankings of several methods on one model, or of one method on several seeds of one recipe.

    Args:
        scores: of equal graphs, by one metric under one ablation.
        edges: how many each circuit keeps at most.
        labels: a name for each; its method unless given.
        absolute: whether an edge that hurts counts as much as one that helps, for scores in the metric's unit.

    Raises:
        WorkbenchError: fewer than two scores, other graphs, metrics or ablations, or labels that do not tell apart.
    """
    if len(scores) < 2:
        raise WorkbenchError(f"Agreement is between at least 2 scores, got {len(scores)}.")
    first = scores[0]
    for other in scores[1:]:
        first.graph.check_same(other.graph)
        first.terms.check_comparable(other.terms)
    names = _labels(scores, labels)
    keep = torch.stack([top_n(each, edges, absolute=absolute).keep for each in scores])
    live = torch.stack([each.live for each in scores])
    sizes = keep.sum(1).tolist()
    chance = torch.eye(len(scores), dtype=torch.float64)
    correlation = torch.eye(len(scores), dtype=torch.float64)
    for row, column in itertools.combinations(range(len(scores)), 2):
        n_live = int((live[row] | live[column]).sum())
        chance[row, column] = chance[column, row] = _chance(n_live, sizes[row], sizes[column])
        both = live[row] & live[column]
        weights = [scores[place].strength(absolute=absolute)[both] for place in (row, column)]
        correlation[row, column] = correlation[column, row] = _spearman(*weights)
    parents = dict.fromkeys(itertools.chain.from_iterable(each.provenance.parents for each in scores))
    seeds = {each.provenance.seed for each in scores}
    return Agreement(
        labels=names,
        graph=first.graph,
        terms=first.terms,
        n=tuple(each.terms.n for each in scores),
        edges=edges,
        keep=keep,
        jaccard=torch.stack([jaccard(keep, each) for each in keep]),
        chance=chance,
        correlation=correlation,
        live_edges=int(live.any(0).sum()),
        provenance=replace(
            first.provenance, seed=first.provenance.seed if len(seeds) == 1 else None, parents=tuple(parents)
        ),
    )


def jaccard(keep: Bool[Tensor, "circuit edge"], circuit: Bool[Tensor, " edge"]) -> Float[Tensor, " circuit"]:
    """Edges that each circuit shares with one, of those that either has; 1 where both are empty."""
    shared, either = (keep & circuit).sum(1), (keep | circuit).sum(1)
    return torch.where(either == 0, 1.0, shared.double() / either.clamp(min=1))


def edge_rows(graph: CircuitGraph) -> pd.DataFrame:
    """The edges of a graph, one a row: names that tables of edges begin with."""
    return pd.DataFrame(
        {
            "edge": [edge.name for edge in graph.edges],
            "from": [edge.source for edge in graph.edges],
            "to": [edge.target for edge in graph.edges],
        }
    )


def _chance(live: int, one: int, other: int) -> float:
    """Mean Jaccard index of two random sets of live edges: what they share is hypergeometric."""
    from scipy.stats import hypergeom

    if not one and not other:
        return 1.0
    shared = torch.arange(min(one, other) + 1)
    chances = torch.from_numpy(hypergeom.pmf(shared.numpy(), live, one, other))
    return float((chances * shared / (one + other - shared)).sum())


def _spearman(one: Float[Tensor, " live"], other: Float[Tensor, " live"]) -> float:
    from scipy.stats import spearmanr

    if len(one.unique()) < 2 or len(other.unique()) < 2:
        return math.nan
    return float(spearmanr(one.numpy(), other.numpy()).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _labels(scores: Sequence[EdgeScores], labels: Sequence[str] | None) -> tuple[str, ...]:
    """A name for each: its method, numbered where methods repeat."""
    methods = [each.method for each in scores]
    if labels is None:
        repeated = len(set(methods)) < len(methods)
        return tuple(f"{method} {place}" if repeated else method for place, method in enumerate(methods, start=1))
    if len(labels) != len(scores) or len(set(labels)) != len(labels):
        raise WorkbenchError(
            f"{len(scores)} scores need as many different labels, got {len(labels)}: {', '.join(labels)}."
        )
    return tuple(labels)


def _numbers(n: tuple[int, ...]) -> str:
    """One number where all are the same."""
    return ", ".join(map(str, dict.fromkeys(n)))
