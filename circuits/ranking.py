"""How well a ranking of edges tells those of a circuit from the others, and what a ranking at random would reach.

Ties never depend on the order of the edges: a pair that ties counts half in the area under the ROC curve, edges that
tie enter the precision-recall curve together, and where a circuit of some size ends among ties, its precision is what
breaking them at random gives on average.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.runtime import generator

RANKINGS = 1000
"""Random rankings that a band is taken from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How well a ranking found a circuit."""

    auroc: float
    """Share of pairs of a true and a false edge in which the true one ranks higher; 0.5 is chance."""
    auprc: float
    """Average precision; the density is chance."""
    precision: float
    """Share of true edges among as many of the first ones as there are true edges."""
    recall: float
    """Share of the true edges that are among these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """A measure over random rankings."""

    mean: float
    low: float
    """2.5th percentile."""
    high: float
    """97.5th percentile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """What random rankings reach, each measure among the edges that it is taken among."""

    auroc: Band
    """Of all edges in random order."""
    auprc: Band
    precision: Band
    """Of the candidates in random order: telling them from the others is no merit of a ranking."""
    recall: Band


def judge(
    score: Float[Tensor, " edge"], truth: Bool[Tensor, " edge"], candidates: Bool[Tensor, " edge"]
) -> Quality | None:
    """The quality of a ranking; None where all edges are true or none is.

    Args:
        score: the larger, the sooner the edge is taken.
        truth: edges of the circuit.
        candidates: edges that may be taken into a circuit of the true size. Where they are fewer, it is smaller.
    """
    if truth.all() or not truth.any():
        return None
    from sklearn.metrics import average_precision_score, roc_auc_score

    wanted = int(truth.sum())
    taken = min(wanted, int(candidates.sum()))
    hits = _expected_hits(score[candidates], truth[candidates], taken)
    return Quality(
        auroc=float(roc_auc_score(truth.numpy(), score.numpy())),
        auprc=float(average_precision_score(truth.numpy(), score.numpy())),
        precision=hits / taken if taken else 0.0,
        recall=hits / wanted,
    )


def chance(
    truth: Bool[Tensor, " edge"], candidates: Bool[Tensor, " edge"], *, rankings: int = RANKINGS, seed: int = 0
) -> Chance | None:
    """What `judge` finds of rankings at random; None where all edges are true or none is."""
    counts = len(truth), int(truth.sum()), int(candidates.sum()), int((truth & candidates).sum())
    return _chance(*counts, rankings=rankings, seed=seed)


@functools.cache
def _chance(edges: int, true: int, candidates: int, true_candidates: int, *, rankings: int, seed: int) -> Chance | None:
    if not 0 < true < edges:
        return None
    ranks = _ranks_of_true(edges, true, rankings=rankings, seed=seed)
    ahead = torch.arange(1, true + 1, dtype=torch.double)
    overtaken = (ranks - ahead).sum(1) / (true * (edges - true))
    taken = min(true, candidates)
    hits = (_ranks_of_true(candidates, true_candidates, rankings=rankings, seed=seed) <= taken).double().sum(1)
    return Chance(
        auroc=_band(1 - overtaken),
        auprc=_band((ahead / ranks).mean(1)),
        precision=_band(hits / max(taken, 1)),
        recall=_band(hits / true),
    )


def _ranks_of_true(edges: int, true: int, *, rankings: int, seed: int) -> Float[Tensor, "ranking true"]:
    """Where the true ones of some edges stand in random rankings, in order: the first places of a permutation."""
    draw = generator(seed, "random rankings", edges, true)
    return torch.rand(rankings, edges, generator=draw).argsort(1)[:, :true].sort(1).values.double() + 1


def _expected_hits(score: Float[Tensor, " candidate"], truth: Bool[Tensor, " candidate"], taken: int) -> float:
    """True edges among the first ones, on average over the orders of those that tie with the last of them."""
    if not taken:
        return 0.0
    last = score.sort(descending=True).values[taken - 1]
    sure, tied = score > last, score == last
    return float(truth[sure].sum() + (taken - sure.sum()) * truth[tied].double().mean())


def _band(values: Float[Tensor, " ranking"]) -> Band:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Band(mean=float(values.mean()), low=low, high=high)
