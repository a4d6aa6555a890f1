"""What every finder ranks edges by, and the time that it takes.

Effects on the metric are ranked by their size, whether an edge helps or hurts; below a millionth of the headroom they
are rounding and tie at 0. Gates, rounds and flows are ranked as they are. ACDC, which decides and does not score, gives
an edge the largest of ten thresholds at which it keeps it, and 0 if it keeps it at none. EAP takes its gradient at the
clean run; a metric that compares with that run is least there and has no gradient, so that EAP takes the ablated one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.acdc import acdc
from circuits.attribution import eap
from circuits.circuit import EdgeScores
from circuits.discovery import score_edges
from circuits.experiment import Experiment
from workbench.instrument.sites import Instrumented
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch

THRESHOLDS = tuple(10 ** (-4 + 0.4 * place) for place in range(10))
"""Of ACDC, as shares of the headroom: from 1e-4 to 0.4, each 2.5 times the one before."""
ROUNDING = 1e-6
"""Share of the headroom below which an effect is rounding."""
FORWARDS = 9
"""Forward passes of whose times the median is taken."""
OnProgress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranking:
    """What a finder made of an experiment."""

    score: Float[Tensor, " edge"] | None
    """Larger for edges that it would rather keep; None where it cannot run."""
    cpu_seconds: float | None = None
    """Process CPU time."""
    reference: str = ""
    """Run at which it looks: the clean one, the ablated one, what is left of it."""
    reason: str = ""
    """Why it cannot run; empty where it can."""


def rank_edges(
    plan: Experiment, finder: str, *, size: int, seed: int = 0, on_progress: OnProgress | None = None
) -> Ranking:
    """A finder's ranking of the edges, with the time that it took or the reason why there is none.

    Args:
        plan: the experiment.
        finder: one of `METHODS`.
        size: budget of a learned mask.
        seed: of what is drawn at random.
        on_progress: told the share of the work that is done, by finders that take long.
    """
    begun = time.process_time()
    try:
        if finder == "acdc":
            score, reference = acdc_ranking(plan, on_progress=on_progress), "circuits of the edges that are left"
        else:
            scores = _scores(plan, finder, size, seed, on_progress)
            score, reference = _strength(plan, scores), scores.reference
    except WorkbenchError as error:
        return Ranking(score=None, reason=str(error))
    return Ranking(score=score, cpu_seconds=time.process_time() - begun, reference=reference)


def acdc_ranking(plan: Experiment, *, on_progress: OnProgress | None = None) -> Float[Tensor, " edge"]:
    """The largest of the thresholds at which ACDC keeps each edge; 0 where it keeps it at none."""
    score = plan.full.new_zeros(len(plan.graph.edges))
    for done, share in enumerate(THRESHOLDS):
        threshold = share * abs(plan.headroom)
        kept = acdc(plan, threshold, on_progress=part_of(on_progress, done, len(THRESHOLDS))).keep
        score[kept] = threshold
    return score


def forward_seconds(model: Instrumented, batch: Batch) -> float:
    """CPU time of one hooked forward pass, the median of several."""
    found = []
    with torch.no_grad():
        model.forward(batch.tokens)
        for _ in range(FORWARDS):
            begun = time.process_time()
            model.forward(batch.tokens)
            found.append(time.process_time() - begun)
    return median(found)


def part_of(on_progress: OnProgress | None, done: int, total: int) -> OnProgress | None:
    """What one of several equal parts of a work tells its share to."""
    return None if on_progress is None else lambda share: on_progress((done + share) / total)


def _scores(plan: Experiment, finder: str, size: int, seed: int, on_progress: OnProgress | None) -> EdgeScores:
    if finder == "eap" and plan.metric.needs_reference:
        return eap(plan, reference="ablated")
    return score_edges(plan, finder, edges=size, seed=seed, on_progress=on_progress)


def _strength(plan: Experiment, scores: EdgeScores) -> Float[Tensor, " edge"]:
    strength = scores.strength(absolute=True)
    return strength.where(strength > ROUNDING * abs(plan.headroom), 0.0) if scores.is_effect else strength
