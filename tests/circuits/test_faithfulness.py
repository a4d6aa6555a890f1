"""What a circuit is judged by: the run itself by a second path, and each refutation on a circuit that fails it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import evaluate, extract
from circuits.circuit import Circuit
from circuits.components import constant_before
from circuits.discovery import find
from circuits.exchange import load_circuit
from circuits.experiment import Experiment, experiment
from circuits.faithfulness import completeness, judge
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from tests.circuits.test_memoised import KINDS, one_by_one, planned
from workbench.instrument.passes import run
from workbench.instrument.sites import Site
from workbench.instrument.trace import FromTrace, Patch, Zero
from workbench.metrics import Metric
from workbench.models.known import ABLATIONS, Ablation
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError, generator
from workbench.tables import Table

CLI_KEYS = {
    "edges",
    "requested",
    "size",
    "live_edges",
    "all_edges",
    "method",
    "ablation",
    "metric",
    "faithfulness",
    "faithfulness_interval",
    "random_95",
    "accuracy",
    "completeness",
    "n",
    "seconds",
}

PLANS = {(kind, ablation): planned(kind, ablation) for kind in KINDS for ablation in ABLATIONS}


def gate(name: str, ablation: Ablation = "resample") -> tuple[Experiment, Tensor]:
    known = PLANTED[name]()
    graph = circuit_graph(known.model, split_inputs=True)
    plan = experiment(known.model, known.pairs(8, 0), graph=graph, ablation=ablation)
    return plan, graph.mask(known.structural | known.constants) & plan.live


def told_apart(kind: str, ablation: Ablation = "resample", metric: str = "logit_difference") -> Experiment:
    """A random model's experiment, its answers chosen so that every example prefers them in the clean run."""
    plan = planned(kind, ablation)
    constant = constant_before(plan.model, plan.graph, plan.graph.n_steps)
    empty = plan.model.finish((plan.ablated.sum(2) + constant)[plan.batch.read], {})
    answers, distractors = torch.zeros((2, *plan.batch.tokens.shape), dtype=torch.long)
    answers[plan.batch.read] = (plan.reference - empty).argmax(1)
    distractors[plan.batch.read] = (plan.reference - empty).argmin(1)
    batch = replace(plan.batch, targets=answers, distractor=distractors)
    return experiment(plan.model, batch, graph=plan.graph, ablation=ablation, metric=metric)


def kept(plan: Experiment, keep: Tensor) -> Circuit:
    """Any edges as a circuit."""
    circuit = find(plan, "exact", edges=1)
    return replace(circuit, keep=keep, method="by hand", rule="by hand", requested=None, absolute=None, scores=None)


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("kind", ["plain", "bidirectional", "shared", "padded"])
def test_a_circuit_without_what_a_head_writes_is_the_model_with_the_head_patched(kind: str, ablation: Ablation) -> None:
    plan = told_apart(kind, ablation)
    for step, head in ((0, 1), (1, 0)):
        names = [name for name in plan.graph.index if not name.startswith(f"a{step}.h{head}->")]
        found = judge(plan, kept(plan, plan.graph.mask(names)), controls=0)
        site = Site.parse(f"L{step}.z.h{head}")
        assert plan.batch.corrupt is not None
        other = run(plan.model, plan.batch.corrupt, record=[site])
        patch = Patch(site=site, source=FromTrace(other) if ablation == "resample" else Zero())
        logits = run(plan.model, plan.batch.tokens, patches=[patch]).logits[plan.batch.read]
        lost = plan.measure(logits)
        wanted = (lost.mean() - plan.empty.mean()) / (plan.full.mean() - plan.empty.mean())
        assert found.faithfulness.mean == pytest.approx(float(wanted), abs=1e-10)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    ablation=st.sampled_from(ABLATIONS),
    seed=st.integers(0, 10**6),
    share=st.floats(0.1, 0.9),
)
@settings(max_examples=40)
def test_what_is_pruned_makes_no_difference(kind: str, ablation: Ablation, seed: int, share: float) -> None:
    plan = PLANS[kind, ablation]
    keep = torch.rand(len(plan.graph.edges), generator=generator(seed, "pruned")) < share
    pruned = plan.graph.pruned(keep, ablation)
    assert not bool((pruned & ~keep).any())
    both = circuit_values(plan, torch.stack([keep, pruned]))
    torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-9)


def test_every_number_against_the_loop() -> None:
    plan = told_apart("plain", metric="loss")
    circuit = find(plan, "exact", edges=12)
    found = judge(plan, circuit, controls=7, seed=2)
    values = one_by_one(plan, torch.stack([circuit.keep, ~circuit.keep]))
    headroom = float(plan.full.mean() - plan.empty.mean())
    assert headroom == pytest.approx(plan.headroom)
    assert found.faithfulness.mean == pytest.approx(float((values[0] - plan.empty).mean()) / headroom)
    assert found.necessity.mean == pytest.approx(float((plan.full - values[1]).mean()) / headroom)
    assert found.whole == pytest.approx(float(plan.full.mean()))
    assert found.empty == pytest.approx(float(plan.empty.mean()))
    accuracy = plan.measured_by("accuracy")
    right = one_by_one(accuracy, circuit.keep[None])[0]
    assert found.accuracy.mean == pytest.approx(float(right.mean()))
    assert found.model_accuracy == pytest.approx(float(accuracy.full.mean()))
    for share in (found.faithfulness, found.necessity, found.accuracy):
        assert share.low - 1e-9 <= share.mean <= share.high + 1e-9
    assert len(found.controls) == 7
    assert found.random_95 == pytest.approx(float(found.controls.quantile(0.95)))
    assert found.live_edges == int(plan.live.sum())
    assert found.n == 5
    again, other = (judge(plan, circuit, controls=7, seed=seed) for seed in (2, 3))
    assert torch.equal(again.controls, found.controls)
    assert not torch.equal(other.controls, found.controls)


def test_the_whole_model_is_faithful_complete_and_right() -> None:
    plan, _ = gate("and_gate")
    found = judge(plan, kept(plan, torch.ones(len(plan.graph.edges), dtype=torch.bool)), controls=2)
    assert found.faithfulness.mean == pytest.approx(1)
    assert found.necessity.mean == pytest.approx(1)
    assert found.accuracy.mean == found.model_accuracy == 1
    assert found.completeness == pytest.approx(0, abs=1e-6)


def test_a_missing_backup_is_found() -> None:
    """One branch of an OR gate answers like the model; without this branch, the model still does."""
    plan, whole = gate("or_gate")
    branch = plan.graph.mask(["embed->a0.h0<v>", "a0.h0->m0", "m0->logits"])
    found = judge(plan, kept(plan, branch), controls=0)
    assert found.faithfulness.mean == pytest.approx(1, abs=1e-4)
    assert found.completeness == pytest.approx(1, abs=1e-4)
    assert found.worst_subset
    assert {"embed->a0.h0<v>", "a0.h0->m0"} & set(found.worst_subset)
    assert "m0->logits" not in found.worst_subset
    without = plan.graph.mask(found.worst_subset)
    apart = circuit_values(plan, torch.stack([branch & ~without, ~without])).mean(1)
    assert float((apart[0] - apart[1]).abs()) / plan.headroom == pytest.approx(found.completeness, abs=1e-5)
    assert found.necessity.mean == pytest.approx(1, abs=1e-4)
    assert completeness(plan, whole)[0] == pytest.approx(0, abs=1e-3)


def test_greedy_parts_go_where_random_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, whole = gate("or_gate")
    keep = whole.clone()
    keep[plan.graph.index["embed->a0.h2<v>"]] = False
    monkeypatch.setattr("circuits.faithfulness.SUBSETS", 0)
    greedy = completeness(plan, keep)
    assert greedy[0] == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr("circuits.faithfulness.GREEDY_STEPS", 0)
    # With nothing taken out of either, circuit and model agree.
    assert completeness(plan, keep) == (pytest.approx(0, abs=1e-4), ())
    monkeypatch.setattr("circuits.faithfulness.SUBSETS", 20)
    assert completeness(plan, keep)[0] == pytest.approx(1, abs=1e-4)


def test_parts_grow_by_the_edge_that_drives_the_two_apart_most(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = told_apart("attention only")
    keep = torch.rand(len(plan.graph.edges), generator=generator(4, "greedy")) < 0.4
    monkeypatch.setattr("circuits.faithfulness.SUBSETS", 0)
    monkeypatch.setattr("circuits.faithfulness.GREEDY_STEPS", 4)

    def gap(part: Tensor) -> float:
        apart = one_by_one(plan, torch.stack([keep & ~part, ~part])).mean(1)
        return abs(float(apart[0] - apart[1])) / plan.headroom

    part = torch.zeros_like(keep)
    tried = [(gap(part), plan.graph.names(part))]
    for _ in range(4):
        grown = []
        for edge in (keep & ~part).nonzero()[:, 0].tolist():
            more = part.clone()
            more[edge] = True
            grown.append((gap(more), more))
        part = max(grown, key=lambda pair: pair[0])[1]
        tried.append((gap(part), plan.graph.names(part)))
    wanted, names = max(tried)
    found = completeness(plan, keep)
    assert found == (pytest.approx(wanted), tuple(names))
    assert len(names) > 1


def test_an_empty_circuit_is_judged_like_any_other() -> None:
    plan, _ = gate("or_gate")
    # By single patches, no input of an OR gate matters: what is found dangles.
    circuit = find(plan, "exact", edges=1)
    assert circuit.size == 0
    found = judge(plan, circuit)
    assert found.faithfulness.mean == pytest.approx(0, abs=1e-9)
    assert (found.completeness, found.worst_subset) == (0.0, ())
    assert found.random_95 is None
    assert found.minimality.edges == ()
    assert "random 95 % none" in str(found)
    assert found.summary()["random_95"] is None
    assert all(isinstance(table, Table) for table in found.tables())


def test_a_size_without_a_random_circuit_is_judged_without_controls() -> None:
    """Under zero ablation one edge can be a circuit; the only path from an input to the logits has two."""
    plan, _ = gate("or_gate", "zero")
    live = plan.graph.mask(["embed->a0.h0<v>", "a0.h0->logits", "a0.h1->logits"])
    plan.__dict__["live"] = live
    found = judge(plan, kept(plan, plan.graph.mask(["a0.h0->logits"])), controls=5)
    assert found.random_95 is None


def test_the_summary_is_what_the_command_line_promises() -> None:
    known = PLANTED["copy"]()
    graph = circuit_graph(known.model, split_inputs=True)
    circuit = extract(known.model, known.pairs(8, 0), method="eap-ig", edges=2, graph=graph)
    told: list[float] = []
    found = evaluate(known.model, circuit, known.pairs(16, 1), controls=3, on_progress=told.append)
    summary = found.summary()
    assert set(summary) >= CLI_KEYS
    assert [set(edge) for edge in summary["edges"]] == [{"from", "to", "score"}] * 2  # pyright: ignore
    assert (summary["requested"], summary["size"], summary["all_edges"]) == (2, 2, 23)
    assert (summary["n"], summary["controls"], summary["method"]) == (16, 3, "eap-ig")
    low, high = summary["faithfulness_interval"]  # pyright: ignore[reportGeneralTypeIssues]
    assert low <= summary["faithfulness"] <= high  # pyright: ignore[reportOperatorIssue]
    assert told == sorted(told)
    assert told[-1] == 1
    assert found.curve is not None
    assert {"cpr", "cmd", "curve"} <= set(summary)
    assert [table.name for table in found.tables()] == [
        "circuit_evaluation",
        "circuit_edges",
        "circuit_minimality",
        "circuit_curve",
    ]
    assert str(found).startswith(f"2 of 23 edges ({found.live_edges} live): faithfulness 1.000")


def test_the_file_holds_the_circuit(tmp_path: object) -> None:
    plan = told_apart("attention only")
    circuit = find(plan, "eap", edges=8)
    (tmp_path / "circuit.json").write_bytes(judge(plan, circuit, controls=0).files()["circuit.json"])  # pyright: ignore
    loaded = load_circuit(tmp_path / "circuit.json")  # pyright: ignore[reportOperatorIssue]
    assert torch.equal(loaded.keep, circuit.keep)


def test_acdc_has_no_ranking_and_so_no_curve() -> None:
    plan = told_apart("attention only")
    found = judge(plan, find(plan, "acdc", edges=8), controls=0)
    assert found.curve is None
    assert "curve" not in found.summary()


def test_a_headroom_that_may_be_none_is_refused() -> None:
    plan = planned("attention only")
    assert bool((plan.full > plan.empty).any())
    assert bool((plan.full < plan.empty).any())
    with pytest.raises(WorkbenchError, match=r"Headroom is not told from 0: .* n = 5"):
        judge(plan, find(plan, "eap", edges=8))


def test_what_does_not_fit_together_is_refused() -> None:
    plan = told_apart("attention only")
    circuit = find(plan, "eap", edges=8)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        judge(planned("plain"), circuit)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        evaluate(planned("plain").model, circuit, plan.batch)
    with pytest.raises(WorkbenchError, match="under resample ablation"):
        judge(planned("attention only", "zero"), circuit)
    with pytest.raises(WorkbenchError, match="loss"):
        judge(plan.measured_by("loss"), circuit)
    own = Metric(name="own", unit="logits", higher="more", values=plan.metric.values)
    with pytest.raises(WorkbenchError, match="found under 'logit_difference', not 'own'"):
        evaluate(plan.model, circuit, plan.batch, metric=own)


def test_a_metric_of_ones_own_is_brought_again() -> None:
    plan = told_apart("attention only")
    own = Metric(name="own", unit="logits", higher="more", values=plan.metric.values)
    circuit = extract(plan.model, plan.batch, method="eap", edges=8, metric=own)
    found = evaluate(plan.model, circuit, plan.batch, metric=own, controls=0)
    reference = judge(plan, find(plan, "eap", edges=8), controls=0)
    assert found.faithfulness == reference.faithfulness
    with pytest.raises(WorkbenchError, match="Unknown metric 'own'"):
        evaluate(plan.model, circuit, plan.batch)
