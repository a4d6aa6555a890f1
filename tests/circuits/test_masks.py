"""Learned masks: what they find on planted models, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from circuits import masks
from circuits.components import Mix, weighted
from circuits.discovery import top_n
from circuits.experiment import Experiment, experiment
from circuits.graph import CircuitGraph, circuit_graph
from circuits.masks import learned_mask
from tests.circuits.test_memoised import planned
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError


def planted(name: str, n: int) -> tuple[Experiment, torch.Tensor]:
    """An experiment, and the edges of the planted circuit that differ between its runs."""
    known = PLANTED[name]()
    plan = experiment(known.model, known.pairs(n, 0), graph=circuit_graph(known.model, split_inputs=True))
    return plan, plan.graph.mask(known.structural) & plan.live


@pytest.mark.parametrize("name", ["copy", "induction", "and_gate"])
def test_at_the_true_size_the_planted_edges_are_found(name: str) -> None:
    plan, truth = planted(name, 8)
    size = int(truth.sum())
    assert torch.equal(top_n(learned_mask(plan, size, steps=80), size).keep, truth)


def test_of_an_or_gate_a_whole_branch_is_found() -> None:
    plan, truth = planted("or_gate", 8)
    size = int(truth.sum())
    circuit = top_n(learned_mask(plan, size, steps=80), size)
    assert {"a0.h0->m0", "a0.h2->m0"} & set(circuit.edges)
    assert "m0->logits" in circuit.edges


def test_gates_hold_the_budget() -> None:
    plan, _ = planted("and_gate", 8)
    scores = learned_mask(plan, 8, steps=150)
    # Probability that a gate is not closed (Louizos et al. 2018, eq. 12): P(noise > what stretching cuts off).
    open_ = (scores.score[plan.live] - 2 / 3 * math.log(0.1 / 1.1)).sigmoid()
    assert float(open_.sum()) == pytest.approx(8, abs=2.5)
    assert float(scores.score[~plan.live].max()) < float(scores.score[plan.live].min())


def test_the_budget_tightens_over_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multipliers' gradients are the share of live gates beyond what is allowed at each step, and its square."""
    plan, _ = planted("and_gate", 8)
    steps, edges, live, seen = 20, 8, int(plan.live.sum()), []

    class Spied(torch.optim.Adam):
        def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            gates, multipliers = (group["params"][0] for group in self.param_groups)
            seen.append((gates.detach().clone(), multipliers.grad.clone()))
            super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Spied)
    learned_mask(plan, edges, steps=steps)
    assert len(seen) == steps
    for step, (gates, gradient) in enumerate(seen):
        open_ = float((gates - 2 / 3 * math.log(0.1 / 1.1)).sigmoid().sum())
        allowed = live - (live - edges) * min(1.0, (step + 1) / 10)
        excess = (open_ - allowed) / live
        assert gradient.tolist() == pytest.approx([excess, excess**2], abs=1e-5)


def test_gates_are_hard_concrete(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, drawn = planned("columns"), []

    def spied(graph: CircuitGraph, keep: torch.Tensor, ablated: torch.Tensor) -> Mix:
        drawn.append(keep.detach()[:, plan.live])
        return weighted(graph, keep, ablated)

    monkeypatch.setattr(masks, "weighted", spied)
    for seed in range(10):
        learned_mask(plan, 20, steps=1, seed=seed)
    gates = torch.cat(drawn)
    assert float(gates.min()) == 0
    assert float(gates.max()) == 1
    # At the first log alpha of 2 (Louizos et al. 2018, §2.2); stretching from -0.1 to 1.1 makes both ends likely.
    cut = 2 / 3 * math.log(0.1 / 1.1)
    assert float((gates > 0).double().mean()) == pytest.approx(1 / (1 + math.exp(-2 + cut)), abs=0.01)
    assert float((gates < 1).double().mean()) == pytest.approx(1 / (1 + math.exp(2 + cut)), abs=0.03)
    assert not torch.equal(gates[0], gates[1])


def test_seeds_reproduce() -> None:
    plan = planned("attention only")
    one, again, other = (learned_mask(plan, 6, steps=10, seed=seed).score for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert learned_mask(plan, 6, steps=3, seed=4).rule == "hard-concrete gates, 3 steps of Adam, budget 6, seed 4"


def test_a_closed_gate_is_not_important() -> None:
    plan = planned("attention only")
    scores = learned_mask(plan, 6, steps=60)
    assert float(scores.score.min()) < -float(scores.score.max())
    for absolute in (True, False):
        assert scores.ranking(absolute=absolute)[0] == scores.score.argmax()


def test_examples_that_do_not_fit_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, told = planned("padded"), []
    monkeypatch.setattr(masks, "ELEMENTS", 1)
    scores = learned_mask(plan, 5, steps=5, on_progress=told.append)
    assert bool(scores.score.isfinite().all())
    assert told == [pytest.approx(step / 5) for step in range(1, 6)]


def test_a_metric_without_a_gradient_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="'accuracy' has no gradient, so that no mask can be learned"):
        learned_mask(planned("plain").measured_by("accuracy"), 5)


def test_a_metric_that_compares_with_the_clean_run_can_be_learned_from() -> None:
    plan = planned("attention only", metric="kl")
    scores = learned_mask(plan, 20, steps=20)
    assert 0 < top_n(scores, 20).size <= 20
    assert scores.score[plan.live].unique().numel() > 20
