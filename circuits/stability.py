"""What of a circuit chance explains: would other examples give the same edges, and is an edge's effect more than noise?

Scores are means over examples, and a circuit is a cut through their ranking. `stability` draws the examples again and
again and cuts anew (Méloux et al. 2025 found EAP-IG's circuits to vary much under this); `significant_edges` keeps the
edges whose mean effect is not 0, at a false-discovery rate over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import Circuit, EdgeScores
from circuits.consensus import edge_rows, jaccard
from circuits.discovery import top_n
from workbench.intervals import RESAMPLES as LEAST_FLIPS
from workbench.intervals import discoveries, sign_flip_pvalue
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table

RESAMPLES = 200
"""Times that the examples are drawn anew."""
MOST_FLIPS = 20_000
"""Sign assignments that a p-value is taken over, at most: at a rate of 5 %, enough for one of 1000 edges alone."""
ROUNDING = 1e-6
"""Share of the largest effect up to which one is rounding."""
ELEMENTS = 2**24
"""Numbers that the sign assignments of some edges may hold."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stability:
    """How much of a circuit would be found again on other examples of the same kind."""

    circuit: Circuit
    """On all examples."""
    edges: int
    """Edges that each circuit was asked to keep."""
    frequency: Float[Tensor, " edge"]
    """Share of the resamples whose circuit has each edge."""
    jaccard: Float[Tensor, " resample"]
    """Edges that each resample's circuit shares with the circuit, of those that either has."""
    seed: int

    @property
    def provenance(self) -> Provenance:
        """Where the scores come from."""
        return self.circuit.provenance

    @property
    def mean_jaccard(self) -> float:
        """How alike the resamples' circuits are to the circuit, on average."""
        return float(self.jaccard.mean())

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge, in the graph's order."""
        return edge_rows(self.circuit.graph).assign(
            frequency=self.frequency.tolist(), in_circuit=self.circuit.keep.tolist()
        )

    def tables(self) -> Sequence[Table]:
        """The edges that some resample found, most frequent first."""
        frame = self.frame.query("frequency > 0")
        terms = self.circuit.terms
        return [
            Table(
                name=f"stability_{self.circuit.method.replace('-', '_')}",
                frame=frame.sort_values("frequency", ascending=False, kind="stable").reset_index(drop=True),
                kind="bar",
                axes={"x": "edge", "y": "frequency"},
                unit="share of resamples",
                caption=(
                    f"How often each edge is in the circuit of {self.edges} edges by {self.circuit.method}, over "
                    f"{len(self.jaccard)} resamples of n = {terms.n} examples; {terms.metric} under {terms.ablation} "
                    f"ablation. Mean Jaccard index with the circuit of all examples: {self.mean_jaccard:.3f}."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        found = self.frame.query("frequency > 0")
        return {
            **self.circuit.summary(),
            "frequency": dict(zip(found["edge"], found["frequency"], strict=True)),
            "mean_jaccard": self.mean_jaccard,
            "least_jaccard": float(self.jaccard.min()),
            "resamples": len(self.jaccard),
            "seed": self.seed,
            "n": self.circuit.terms.n,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Significance:
    """Which edges' mean effects chance does not explain."""

    scores: EdgeScores
    pvalue: Float[Tensor, " edge"]
    """That the mean effect is 0, by flipping signs of examples; 1 for edges that are not tested."""
    tested: Bool[Tensor, " edge"]
    """Edges with an effect in some example, whether or not they are live."""
    found: Bool[Tensor, " edge"]
    rate: float
    """Share of false ones to expect among what was found, at most."""
    flips: int
    """Sign assignments drawn."""
    seed: int

    @property
    def provenance(self) -> Provenance:
        """Where the scores come from."""
        return self.scores.provenance

    @property
    def edges(self) -> list[str]:
        """Names of what was found, in the graph's order."""
        return self.scores.graph.names(self.found)

    @property
    def fewest(self) -> int:
        """How many edges must have the least p-value there is for any to be found; 1 where one alone can be."""
        least = _least_pvalue(self.scores.terms.n, self.flips)
        return max(1, math.ceil(int(self.tested.sum()) * least / self.rate))

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge, in the graph's order, with the effect's interval."""
        return self.scores.frame.assign(pvalue=self.pvalue.tolist(), significant=self.found.tolist())

    def tables(self) -> Sequence[Table]:
        """What was found, the largest effect first."""
        frame = self.frame.iloc[self.scores.ranking(absolute=True).tolist()]
        terms = self.scores.terms
        return [
            Table(
                name=f"significant_edges_{self.scores.method.replace('-', '_')}",
                frame=frame.query("significant").reset_index(drop=True),
                kind="bar",
                axes={"x": "edge", "y": "score", "low": "low", "high": "high"},
                unit=self.scores.scale,
                caption=(
                    f"The {len(self.edges)} of {int(self.tested.sum())} edges with an effect whose mean effect by "
                    f"{self.scores.method} is not 0 at a false-discovery rate of {self.rate:g}; {terms.metric} lost "
                    f"under {terms.ablation} ablation. Two-sided sign-flip test with {self.flips} assignments, "
                    f"Benjamini-Hochberg, by which at least {self.fewest} must stand out for any to be found; "
                    f"n = {terms.n} examples, 95 % paired bootstrap intervals."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        terms = self.scores.terms
        columns = ["from", "to", "score", "low", "high", "pvalue"]
        rows = pd.DataFrame(self.frame.query("significant"), columns=columns)
        return {
            "edges": rows.to_dict("records"),
            "rate": self.rate,
            "tested": int(self.tested.sum()),
            "flips": self.flips,
            "fewest": self.fewest,
            "seed": self.seed,
            "method": self.scores.method,
            "ablation": terms.ablation,
            "metric": terms.metric,
            "n": terms.n,
            "all_edges": len(self.scores.graph.edges),
        }


def stability(
    scores: EdgeScores, *, edges: int, resamples: int = RESAMPLES, seed: int = 0, absolute: bool = True
) -> Stability:
    """Draw the examples again with replacement, and see which edges are still among the best.

    Args:
        scores: of a method that scores example by example.
        edges: how many each circuit keeps at most.
        resamples: how often.
        seed: of the draws.
        absolute: whether an edge that hurts counts as much as one that helps, for scores in the metric's unit.

    Raises:
        WorkbenchError: there are no scores by example or only one example, or fewer than one resample.
    """
    examples = _by_example(scores)
    n = len(examples)
    if n < 2 or resamples < 1:
        raise WorkbenchError(
            f"Stability needs at least 2 examples and 1 resample; got {n} and {resamples}. Score more examples."
        )
    circuit = top_n(scores, edges, absolute=absolute)
    draws = torch.randint(n, (resamples, n), generator=generator(seed, "stability"))
    again = [replace(scores, score=examples[draw].mean(0), examples=None) for draw in draws]
    keep = torch.stack([top_n(each, edges, absolute=absolute).keep for each in again])
    return Stability(
        circuit=circuit,
        edges=edges,
        frequency=keep.double().mean(0),
        jaccard=jaccard(keep, circuit.keep),
        seed=seed,
    )


def significant_edges(scores: EdgeScores, *, rate: float = 0.05, seed: int = 0) -> Significance:
    """Find the edges whose mean effect is not 0, at a false-discovery rate over all edges with an effect.

    An edge is tested if it has an effect in some example, which edges that are not live can have. The test only flips
    signs, so that choosing by the size of effects does not look at its outcome. It takes an edge that does nothing on
    average to have effects spread alike on both sides of 0, and the rate takes edges to be independent or to move
    together (Benjamini & Yekutieli 2001). Of effects that were estimated from gradients it says that the estimate is
    not 0.

    P-values are as coarse as examples and sign assignments are few, of which there are 20,000 at most. Where so many
    edges are tested that the least p-value is too large for one alone, several must reach it together for any to be
    found (`fewest`).

    Args:
        scores: of a method that scores example by example, in the unit of the metric.
        rate: share of false ones to expect among what is found, at most.
        seed: of the signs.

    Raises:
        WorkbenchError: no scores by example, scores that are no effects on the metric, a rate outside (0, 1), or so
            few examples or so low a rate that nothing could be found.
    """
    examples = _by_example(scores)
    n = len(examples)
    if not scores.is_effect:
        raise WorkbenchError(
            f"Scores of method {scores.method!r} are in {scores.scale}, not in {scores.terms.unit}: they are no "
            "effects that could be 0 by chance. Use 'exact', 'eap' or 'eap-ig'."
        )
    if not 0 < rate < 1:
        raise WorkbenchError(f"A false-discovery rate lies between 0 and 1, got {rate:g}.")
    if 2.0 ** (1 - n) > rate:
        raise WorkbenchError(
            f"With {n} examples no p-value is below {2.0 ** (1 - n):g}, so that nothing could be found at rate "
            f"{rate:g}. Score at least {1 + math.ceil(-math.log2(rate))} examples."
        )
    largest = examples.abs().amax(0)
    tested = largest > ROUNDING * largest.max()
    places = tested.nonzero()[:, 0]
    # As far as that is possible, enough assignments that one edge alone can pass.
    flips = min(MOST_FLIPS, max(LEAST_FLIPS, math.ceil(len(places) / rate)))
    if _least_pvalue(n, flips) > rate:
        raise WorkbenchError(
            f"With {flips} sign assignments no p-value is below {_least_pvalue(n, flips):.2g}, so that nothing could "
            f"be found at rate {rate:g}. Choose a higher rate."
        )
    pvalue = torch.ones(len(scores.score), dtype=torch.float64)
    for some in places.split(max(1, ELEMENTS // flips)) if len(places) else ():
        pvalue[some] = sign_flip_pvalue(examples[:, some].double(), seed=seed, resamples=flips)
    found = torch.zeros_like(tested)
    found[places] = discoveries(pvalue[places], rate=rate)
    return Significance(scores=scores, pvalue=pvalue, tested=tested, found=found, rate=rate, flips=flips, seed=seed)


def _least_pvalue(n: int, flips: int) -> float:
    """The least that the test can give: of all 2^n assignments two are as far from 0 as the observed one."""
    return max(2.0 ** (1 - n), 1 / (flips + 1))


def _by_example(scores: EdgeScores) -> Float[Tensor, "batch edge"]:
    if scores.examples is None:
        raise WorkbenchError(
            f"Method {scores.method!r} gives no score for each example, so that its examples cannot be drawn anew. "
            "Use 'exact', 'eap' or 'eap-ig'."
        )
    return scores.examples
