"""Greedy elimination: take out, again and again, the edges without which the circuit stays closest to the model.

Every round measures each edge that is left, all of them in one call, and takes out those whose removal keeps the metric
nearest to the whole model's, example by example. The order in which edges go ranks them. No method here is dearer, and
none sees redundant edges better: of two that stand in for each other, one goes and the other then stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from circuits.attribution import terms_of
from circuits.circuit import EdgeScores
from circuits.experiment import Experiment
from circuits.memoised import circuit_values
from workbench.runtime import WorkbenchError

SHARE = 0.05
"""Of the edges that are left, taken out in a round; at least one."""


def greedy_elimination(
    plan: Experiment, *, share: float = SHARE, on_progress: Callable[[float], None] | None = None
) -> EdgeScores:
    """The round in which each edge goes; the last ones to go have the largest score, edges that are not live 0.

    Args:
        plan: the experiment.
        share: of the edges that are left, to take out in a round; 0 takes one at a time.
        on_progress: told the share of live edges that are gone.

    Raises:
        WorkbenchError: the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise WorkbenchError(f"A round takes out a share from 0 to below 1 of the edges, got {share}.")
    begun = time.perf_counter()
    keep, score, gone = plan.live.clone(), torch.zeros(len(plan.graph.edges)), 0
    n_live = int(keep.sum())
    while keep.any():
        left = keep.nonzero()[:, 0]
        tries = keep.repeat(len(left), 1)
        tries[torch.arange(len(left)), left] = False
        distance = (circuit_values(plan, tries) - plan.full).abs().mean(1)
        first = distance.argsort(stable=True)[: max(1, math.floor(share * len(left)))]
        without = keep.clone()
        without[left[first]] = False
        # What dangles then makes no difference: it goes in the same round.
        without = plan.graph.pruned(without, plan.ablation)
        gone += 1
        score[keep & ~without] = gone
        keep = without
        if on_progress:
            on_progress(1 - int(keep.sum()) / n_live)
    return EdgeScores(
        graph=plan.graph,
        terms=terms_of(plan),
        method="greedy",
        score=score,
        live=plan.live,
        scale="round in which it goes",
        reference="circuits of the edges that are left",
        rule=f"backward elimination, {share:.0%} of the edges a round" if share else "backward elimination, one by one",
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )
