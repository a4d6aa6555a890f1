"""ACDC by speculation against the algorithm one edge at a time, and on compiled programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits import acdc as module
from circuits.acdc import acdc, acdc_of_size
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from tests.circuits.test_memoised import KINDS, one_by_one, planned
from workbench.models.config import ModelConfig
from workbench.models.known import Ablation
from workbench.models.tracr import load_tracr
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch

CASES: list[tuple[str, Ablation]] = [
    *((kind, "resample") for kind in KINDS),
    ("attention only", "zero"),
    ("attention only", "mean"),
]


def one_edge_at_a_time(plan: Experiment, threshold: float) -> tuple[Tensor, list[int]]:
    """The algorithm as it is written: each edge from the logits backwards, one forward pass each."""
    keep = torch.ones(len(plan.graph.edges), dtype=torch.bool)
    before, removed = float(plan.full.mean()), []
    for edge in reversed(range(len(keep))):
        keep[edge] = False
        after = float(one_by_one(plan, keep[None]).mean())
        worse = before - after if plan.metric.better == "higher" else after - before
        if worse < threshold:
            before = after
            removed.append(edge)
        else:
            keep[edge] = True
    return keep, removed


@pytest.mark.parametrize(("kind", "ablation"), CASES)
def test_speculation_keeps_what_the_algorithm_keeps_in_its_order(
    kind: str, ablation: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(kind, ablation)
    for share in (0.02, 0.3):
        threshold = share * abs(plan.headroom)
        keep, removed = one_edge_at_a_time(plan, threshold)
        for window in (1, 3, 16):
            monkeypatch.setattr(module, "WINDOW", window)
            found = acdc(plan, threshold)
            assert torch.equal(found.keep, keep)
            assert list(found.removed) == removed


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_where_lower_is_better_worse_is_higher(metric: str) -> None:
    plan = planned("attention only", metric=metric)
    threshold = 0.05 * abs(plan.headroom)
    keep, removed = one_edge_at_a_time(plan, threshold)
    found = acdc(plan, threshold)
    assert 0 < len(removed) < len(keep)
    assert torch.equal(found.keep, keep)
    assert list(found.removed) == removed


def test_what_each_edge_cost_is_kept() -> None:
    plan = planned("attention only")
    found = acdc(plan, 0.05 * abs(plan.headroom))
    keep, before = torch.ones_like(found.keep), float(plan.full.mean())
    for edge in reversed(range(len(keep))):
        keep[edge] = False
        after = float(circuit_values(plan, keep[None]).mean())
        assert float(found.lost[edge]) == pytest.approx(before - after, abs=1e-6)
        if found.keep[edge]:
            keep[edge] = True
        else:
            before = after
    assert torch.equal(keep, found.keep)


def test_right_guesses_cost_one_call_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = planned("plain"), []
    measure = circuit_values

    def counted(plan: Experiment, keep: Tensor) -> Tensor:
        calls.append(len(keep))
        return measure(plan, keep)

    monkeypatch.setattr(module, "circuit_values", counted)
    monkeypatch.setattr(module, "WINDOW", 64)
    everything_goes = acdc(plan, 1e9)
    assert not everything_goes.keep.any()
    # Once the logits read nothing, no other edge can matter.
    assert calls == [7]
    assert everything_goes.measured == 7
    calls.clear()
    assert acdc(plan, 0.05 * abs(plan.headroom)).measured == sum(calls)
    assert len(calls) < len(plan.graph.edges)


@pytest.mark.parametrize("kind", ["attention only", "no norm"])
def test_a_size_is_never_exceeded(kind: str) -> None:
    plan = planned(kind)
    for edges in (1, 9):
        found = acdc_of_size(plan, edges)
        assert int(found.keep.sum()) <= edges
        assert torch.equal(found.keep, acdc(plan, found.threshold).keep)


def clusters_writing(*amounts: float) -> Experiment:
    """An MLP whose clusters write these logits of the answer in the clean run, and nothing in the other."""
    n = len(amounts)
    config = ModelConfig(n_layers=1, d_model=2, n_heads=1, d_head=1, d_mlp=n, n_ctx=1, d_vocab=2, d_vocab_out=2)
    model = Transformer(config, generator=generator(0, "clusters"))
    state = model.state_dict()
    for tensor in state.values():
        tensor.zero_()
    state["embed.W_E"][0, 0] = 1
    state["weights.0.mlp.W_in"][0] = 1
    state["weights.0.mlp.W_out"][:, 1] = torch.tensor(amounts)
    state["unembed.W_U"][1, 1] = 1
    tokens = torch.tensor([[0]])
    one = torch.ones_like(tokens)
    batch = Batch(tokens=tokens, targets=one, read=one.bool(), corrupt=one, distractor=tokens)
    return experiment(model, batch, graph=circuit_graph(model, clusters={0: [[place] for place in range(n)]}))


def test_edges_that_work_against_each_other_do_not_exceed_a_size_either() -> None:
    # Without one of the tens the answer falls by ten times the headroom.
    plan = clusters_writing(10.0, 10.0, -19.0)
    assert plan.headroom == 1
    assert int(acdc_of_size(plan, 1).keep.sum()) <= 1


def test_a_looser_threshold_is_taken_where_it_gives_the_size() -> None:
    plan = planned("plain")
    wanted = acdc(plan, 0.05 * abs(plan.headroom))
    size = int(wanted.keep.sum())
    found = acdc_of_size(plan, size)
    assert 0 < size < len(plan.graph.edges)
    assert int(found.keep.sum()) == size


def test_progress_is_told_to_its_end() -> None:
    plan, told = planned("attention only"), []
    acdc(plan, 0.1 * abs(plan.headroom), on_progress=told.append)
    assert told == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    told.clear()
    acdc_of_size(plan, 5, on_progress=told.append)
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] <= 1


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(WorkbenchError, match="needs a threshold above 0 in the metric's unit"):
        acdc(planned("plain"), threshold)


@pytest.mark.parametrize("name", ["hist", "frac_prevs", "reverse"])
def test_acdc_finds_a_program(name: str) -> None:
    known = load_tracr(name)
    graph = circuit_graph(known.model, split_inputs=True)
    plan = experiment(known.model, known.pairs(32, 0), graph=graph, ablation="zero", metric="squared_error")
    found = set(graph.names(acdc(plan, 1e-3).keep))
    alone = circuit_values(plan, ~torch.eye(len(graph.edges), dtype=torch.bool)).mean(1)
    causal = set(graph.names(alone > 1e-3))
    assert causal <= found <= known.structural | known.constants
