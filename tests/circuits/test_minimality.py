"""Which edges of a circuit are needed: gates, where the answer is known, and costs against single runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from circuits import minimality as module
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.minimality import Minimality, minimality
from tests.circuits.test_acdc import clusters_writing
from tests.circuits.test_faithfulness import told_apart
from tests.circuits.test_memoised import one_by_one, planned
from workbench.models.planted import PLANTED


def gate(name: str) -> tuple[Experiment, Tensor]:
    """A gate's experiment, and the edges of its circuit that differ between the runs."""
    known = PLANTED[name]()
    plan = experiment(known.model, known.pairs(8, 0), graph=circuit_graph(known.model, split_inputs=True))
    return plan, plan.graph.mask(known.structural) & plan.live


def test_the_inputs_of_an_or_gate_are_redundant_with_each_other() -> None:
    plan, keep = gate("or_gate")
    found = minimality(plan, keep)
    rows = {row["edge"]: row for row in found.rows()}
    assert found.n == 8
    assert rows["m0->logits"]["verdict"] == "needed"
    assert rows["m0->logits"]["cost"] == pytest.approx(1, abs=1e-5)
    assert rows["m0->logits"]["redundant_with"] == ""
    first, second = ("embed->a0.h0<v>", "a0.h0->m0"), ("embed->a0.h2<v>", "a0.h2->m0")
    for branch, other in ((first, second), (second, first)):
        for edge in branch:
            assert rows[edge]["verdict"] == "redundant"
            assert rows[edge]["redundant_with"] == ", ".join(other)
            assert rows[edge]["cost"] == pytest.approx(0, abs=1e-5)


def test_the_inputs_of_an_and_gate_are_needed() -> None:
    plan, keep = gate("and_gate")
    found = minimality(plan, keep)
    assert set(found.verdicts) == {"needed"}
    torch.testing.assert_close(found.cost, torch.ones(int(keep.sum())), rtol=0, atol=1e-4)


def test_an_edge_that_does_nothing_has_no_effect_and_no_partner() -> None:
    plan, keep = gate("or_gate")
    junk = plan.graph.index["a0.h1->m0"]
    keep[junk] = True
    rows = {row["edge"]: row for row in minimality(plan, keep).rows()}
    assert rows["a0.h1->m0"]["verdict"] == "little effect"
    assert rows["a0.h1->m0"]["redundant_with"] == ""
    assert "a0.h1->m0" not in str(rows["a0.h0->m0"]["redundant_with"])


def test_small_costs_that_add_up_are_not_redundancy() -> None:
    plan = clusters_writing(97.0, 1.5, 1.5)
    found = minimality(plan, torch.ones(len(plan.graph.edges), dtype=torch.bool))
    rows = {row["edge"]: row for row in found.rows()}
    assert rows["m0.c0->logits"]["verdict"] == "needed"
    for edge in ("m0.c1->logits", "m0.c2->logits"):
        assert rows[edge]["cost"] == pytest.approx(0.015)
        assert rows[edge]["verdict"] == "little effect"


@pytest.mark.parametrize("metric", ["logit_difference", "kl"])
def test_costs_are_those_of_single_runs(metric: str) -> None:
    plan = told_apart("attention only", metric=metric)
    keep = torch.ones(len(plan.graph.edges), dtype=torch.bool)
    keep[[2, 5, 11]] = False
    found = minimality(plan, keep, seed=3)
    whole = one_by_one(plan, keep[None])[0]
    verdicts = []
    for place, edge in enumerate(keep.nonzero()[:, 0].tolist()):
        without = keep.clone()
        without[edge] = False
        cost = float((whole - one_by_one(plan, without[None])[0]).mean()) / plan.headroom
        assert float(found.cost[place]) == pytest.approx(cost, abs=1e-10)
        assert float(found.low[place]) - 1e-9 <= cost <= float(found.high[place]) + 1e-9
        told = not float(found.low[place]) <= 0 <= float(found.high[place])
        large = ("needed" if cost > 0 else "hurts") if told else "not told from 0"
        verdicts.append(large if abs(cost) > 0.02 else "cheap")
    assert {"needed", "not told from 0"} <= set(verdicts)
    for said, wanted in zip(found.verdicts, verdicts, strict=True):
        assert said == wanted or (wanted == "cheap" and said in ("little effect", "redundant"))
    assert found.edges == tuple(plan.graph.names(keep))
    assert torch.equal(minimality(plan, keep, seed=3).low, found.low)
    assert not torch.equal(minimality(plan, keep, seed=4).low, found.low)


def by_hand(seldom: Tensor, monkeypatch: pytest.MonkeyPatch) -> Minimality:
    """The first edge is worth 1 in every example, the second this much, as is either of two; the last one costs 0.1."""
    plan = planned("plain")
    keep = torch.arange(len(plan.graph.edges)) < 5

    def values(plan: Experiment, circuits: Tensor) -> Tensor:
        first, second, third, fourth, fifth = circuits[:, :5].T.double()[..., None]
        return first + seldom * second + seldom * torch.maximum(third, fourth) - 0.1 * fifth

    monkeypatch.setattr(module, "circuit_values", values)
    rows = torch.zeros(len(seldom), dtype=torch.long)
    runs = {"clean": plan.clean[rows], "ablated": plan.ablated[rows], "full": 1 + 2 * seldom, "empty": 0 * seldom}
    return minimality(replace(plan, batch=plan.batch.select(rows), **runs), keep)


def test_what_one_example_says_alone_is_not_told_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    always = by_hand(torch.full((24,), 0.5, dtype=torch.float64), monkeypatch)
    torch.testing.assert_close(always.cost, torch.tensor([0.5, 0.25, 0, 0, -0.05], dtype=torch.float64))
    assert always.verdicts == ("needed", "needed", "redundant", "redundant", "hurts")
    once = torch.zeros(24, dtype=torch.float64)
    once[7] = 12
    found = by_hand(once, monkeypatch)
    torch.testing.assert_close(found.cost, always.cost)
    assert found.verdicts == ("needed", "not told from 0", "little effect", "little effect", "hurts")


def test_so_many_pairs_are_tried_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, keep = gate("or_gate")
    monkeypatch.setattr(module, "MOST_PAIRED", 1)
    assert set(minimality(plan, keep).verdicts) == {"little effect", "needed"}


def test_an_empty_circuit_has_nothing_to_take_out() -> None:
    plan = planned("plain")
    found = minimality(plan, torch.zeros(len(plan.graph.edges), dtype=torch.bool))
    assert found.edges == found.verdicts == ()
    assert found.rows() == found.tables() == []


def test_the_table_says_what_it_shows() -> None:
    plan, keep = gate("or_gate")
    table = minimality(plan, keep).tables()[0]
    assert list(table.frame.columns) == ["edge", "cost", "low", "high", "verdict", "redundant_with"]
    assert "n = 8 examples" in table.caption
