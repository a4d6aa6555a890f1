"""Greedy elimination against the loop that takes out one edge at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits.elimination import greedy_elimination
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from tests.circuits.test_memoised import one_by_one, planned
from workbench.models.known import Ablation
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError


def one_at_a_time(plan: Experiment) -> Tensor:
    """The round in which each edge goes: the one whose loss leaves the metric nearest to the whole model's."""
    keep, rounds, round_ = plan.live.clone(), torch.zeros(len(plan.graph.edges)), 0
    while keep.any():
        best: tuple[float, int] | None = None
        for edge in keep.nonzero()[:, 0].tolist():
            without = keep.clone()
            without[edge] = False
            distance = float((one_by_one(plan, without[None])[0] - plan.full).abs().mean())
            if best is None or distance < best[0] - 1e-12:
                best = distance, edge
        assert best is not None
        before, round_ = keep.clone(), round_ + 1
        keep[best[1]] = False
        keep = plan.graph.pruned(keep, plan.ablation)
        rounds[before & ~keep] = round_
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ablation"), [("attention only", "resample"), ("attention only", "zero")])
def test_rounds_are_those_of_one_edge_at_a_time(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    found = greedy_elimination(plan, share=0.0)
    assert torch.equal(found.score, one_at_a_time(plan))
    assert found.rule == "backward elimination, one by one"
    assert found.scale == "round in which it goes"


def test_a_round_takes_a_share_and_what_dangles_then() -> None:
    plan = planned("plain", "zero")
    found = greedy_elimination(plan, share=0.5)
    left = plan.live.clone()
    for round_ in range(1, int(found.score.max()) + 1):
        gone = left & (found.score == round_)
        assert int(gone.sum()) >= max(1, int(left.sum()) // 2)
        left &= ~gone
        # What is left never dangles.
        assert torch.equal(plan.graph.pruned(left, plan.ablation), left)
    assert not left.any()
    assert found.rule == "backward elimination, 50% of the edges a round"


def test_the_last_to_go_are_the_circuit() -> None:
    known = PLANTED["and_gate"]()
    plan = experiment(known.model, known.pairs(8, 0), graph=circuit_graph(known.model, split_inputs=True))
    told: list[float] = []
    found = greedy_elimination(plan, on_progress=told.append)
    truth = plan.graph.mask(known.structural) & plan.live
    assert float(found.score[truth].min()) > float(found.score[~truth].max())
    assert float(found.score[~plan.live].abs().sum()) == 0
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(WorkbenchError, match="a share from 0 to below 1"):
        greedy_elimination(planned("plain"), share=share)
