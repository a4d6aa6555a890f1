"""The faithfulness curve against its points one by one, and its areas worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from circuits.attribution import exact_scores
from circuits.circuit import EdgeScores
from circuits.controls import random_circuits
from circuits.curve import MIB_SHARES, FaithfulnessCurve, faithfulness_curve, smallest_circuit
from circuits.discovery import top_n
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from tests.circuits.test_memoised import one_by_one, planned
from workbench.models.known import ABLATIONS, Ablation
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError


def copying(n: int = 8) -> tuple[Experiment, EdgeScores]:
    known = PLANTED["copy"]()
    plan = experiment(known.model, known.pairs(n, 0), graph=circuit_graph(known.model, split_inputs=True))
    return plan, exact_scores(plan)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("absolute", [True, False])
def test_points_are_circuits_run_by_themselves(ablation: Ablation, absolute: bool) -> None:
    plan = planned("split inputs", ablation)
    scores = exact_scores(plan)
    curve = faithfulness_curve(plan, scores, absolute=absolute)
    assert curve.requested[0] == 0
    assert curve.requested[-1] == len(plan.graph.edges)
    assert float(curve.faithfulness[0]) == pytest.approx(0, abs=1e-12)
    assert float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-12)
    value = (scores.score.abs() if absolute else scores.score) + 1e6 * scores.live
    order = sorted(range(len(value)), key=lambda edge: -float(value[edge]))
    keeps = []
    for size in curve.requested:
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[order[:size]] = True
        keeps.append(keep if size == len(order) else plan.graph.pruned(keep, ablation))
    assert torch.equal(curve.keep, torch.stack(keeps))
    values = one_by_one(plan, curve.keep)
    found = (values.mean(1) - plan.empty.mean()) / (plan.full.mean() - plan.empty.mean())
    torch.testing.assert_close(curve.faithfulness, found, rtol=1e-9, atol=1e-9)
    assert bool((curve.low <= curve.faithfulness + 1e-9).all())
    assert bool((curve.faithfulness <= curve.high + 1e-9).all())
    right = one_by_one(plan.measured_by("accuracy"), curve.keep).mean(1)
    torch.testing.assert_close(curve.accuracy, right, rtol=1e-9, atol=1e-9)
    assert bool(curve.random_95.isnan().all())


def test_areas_are_those_of_trapezoids() -> None:
    plan = planned("plain")
    curve = faithfulness_curve(plan, exact_scores(plan))
    at = dict(zip(curve.requested, curve.faithfulness.tolist(), strict=True))
    # Of 46 edges: none, none, none, none, 1, 2, 5, 9, 23, 46.
    heights = [at[size] for size in (0, 0, 0, 0, 1, 2, 5, 9, 23, 46)]
    cpr = cmd = 0.0
    for place in range(1, 10):
        width = MIB_SHARES[place] - MIB_SHARES[place - 1]
        cpr += width * (heights[place] + heights[place - 1]) / 2
        cmd += width * (abs(1 - heights[place]) + abs(1 - heights[place - 1])) / 2
    assert curve.cpr == pytest.approx(cpr, abs=1e-12)
    assert curve.cmd == pytest.approx(cmd, abs=1e-12)


def test_a_perfect_ranking_by_hand() -> None:
    # Copying takes 2 of 23 edges, and faithfulness jumps from 0 to 1 where both are in: at the share 0.1.
    plan, scores = copying()
    assert len(plan.graph.edges) == 23
    curve = faithfulness_curve(plan, scores)
    at = dict(zip(curve.requested, curve.faithfulness.tolist(), strict=True))
    assert [round(at[size]) for size in (0, 1, 2, 5, 12, 23)] == [0, 0, 1, 1, 1, 1]
    # round(0.05 * 23) is 1, round(0.1 * 23) is 2: half of the step from 0.05 to 0.1, and all from there to 1.
    assert curve.cpr == pytest.approx(0.05 / 2 + 0.9, abs=1e-4)
    assert curve.cmd == pytest.approx(0.049 + 0.05 / 2, abs=1e-4)
    assert curve.sizes[:3] == (0, 0, 2)


def test_a_band_of_random_circuits() -> None:
    plan = planned("attention only")
    curve = faithfulness_curve(plan, exact_scores(plan), controls=11, seed=5)
    drawn = [place for place, value in enumerate(curve.random_95.tolist()) if not math.isnan(value)]
    assert 2 <= len({curve.sizes[place] for place in drawn}) <= 8
    for place in drawn:
        circuits = random_circuits(plan.graph, plan.live, edges=curve.sizes[place], n=11, seed=5)
        restored = (circuit_values(plan, circuits) - plan.empty).mean(1) / plan.headroom
        assert float(curve.random_95[place]) == pytest.approx(float(restored.quantile(0.95)), abs=1e-5)
    table = curve.tables()[0]
    assert set(table.frame["series"]) == {"circuit", "accuracy", "random, 95th percentile"}
    assert "11 random connected circuits a size" in table.caption
    assert curve.summary()["curve"][0]["random_95"] is None  # pyright: ignore[reportIndexIssue]


def test_sizes_without_a_random_circuit_have_no_band() -> None:
    """Under zero ablation two edges into the logits are a circuit; here a path from an input takes three."""
    plan = planned("plain", "zero")
    path, ends = ["input->a0.h0<v>", "a0.h0->m1", "m1->logits"], ["a0.h1->logits", "m0->logits"]
    plan.__dict__["live"] = plan.graph.mask([*path, *ends])
    scores = exact_scores(plan)
    order = [plan.graph.index[name] for name in (*ends, *reversed(path))]
    score = torch.zeros(len(scores.score), dtype=torch.float64)
    score[order] = torch.arange(5.0, 0.0, -1.0, dtype=torch.float64)
    curve = faithfulness_curve(plan, replace(scores, score=score, examples=None), controls=3)
    by_size = dict(zip(curve.sizes, curve.random_95.isnan().tolist(), strict=True))
    assert [by_size[size] for size in range(6)] == [True, True, True, False, True, True]


def curve_of(faithfulness: list[float], accuracy: list[float]) -> FaithfulnessCurve:
    n = len(faithfulness)
    return FaithfulnessCurve(
        requested=tuple(range(n)),
        keep=torch.tril(torch.ones(n, n, dtype=torch.bool), -1),
        faithfulness=torch.tensor(faithfulness),
        low=torch.zeros(n),
        high=torch.ones(n),
        accuracy=torch.tensor(accuracy),
        random_95=torch.full((n,), torch.nan),
        cpr=0.0,
        cmd=0.0,
        n=1,
        controls=0,
        title="by hand",
    )


def test_the_smallest_circuit_of_a_ranking() -> None:
    plan, scores = copying()
    circuit = smallest_circuit(plan, scores)
    assert circuit.edges == ["embed->a0.h1<v>", "a0.h1->logits"]
    assert circuit.requested == 2
    assert circuit.rule.startswith("smallest with faithfulness 0.9, accuracy 0.9; the 2 largest")
    assert "accuracy 0.5;" in smallest_circuit(plan, scores, accuracy=0.5).rule


def test_the_smallest_circuit_is_asked_for_both() -> None:
    plan = planned("plain")
    # Answers that the random model gives are right by definition here.
    targets = plan.batch.targets.clone()
    targets[plan.batch.read] = plan.reference.argmax(1)
    plan = experiment(plan.model, replace(plan.batch, targets=targets), graph=plan.graph)
    scores = exact_scores(plan)
    circuit = smallest_circuit(plan, scores, faithfulness=0.8, accuracy=0.7)
    assert circuit.absolute is True
    smaller = [top_n(scores, size) for size in range(1, circuit.size)]
    restored = circuit_values(plan, torch.stack([each.keep for each in smaller])) - plan.empty
    right = circuit_values(plan.measured_by("accuracy"), torch.stack([each.keep for each in smaller]))
    assert not ((restored.mean(1) / plan.headroom >= 0.8) & (right.mean(1) >= 0.7)).any()
    values = circuit_values(plan, circuit.keep[None])
    assert float((values - plan.empty).mean()) / plan.headroom >= 0.8
    assert float(circuit_values(plan.measured_by("accuracy"), circuit.keep[None]).mean()) >= 0.7
    with pytest.raises(
        WorkbenchError, match=r"No circuit of up to 46 edges by exact reaches faithfulness 1000 and 0\.9"
    ):
        smallest_circuit(plan, scores, faithfulness=1000.0)
    with pytest.raises(WorkbenchError, match="best reach .* Ask for a size instead"):
        smallest_circuit(plan, scores, accuracy=1.5)


def test_scores_under_other_terms_are_refused() -> None:
    plan = planned("attention only")
    scores = exact_scores(plan)
    for other in (planned("attention only", "zero"), plan.measured_by("loss")):
        for judge in (faithfulness_curve, smallest_circuit):
            with pytest.raises(WorkbenchError, match="do not compare"):
                judge(other, scores)
    for judge in (faithfulness_curve, smallest_circuit):
        with pytest.raises(WorkbenchError, match="another model's graph"):
            judge(planned("plain"), scores)
