"""Many circuits in one pass against each of them run in parts, and against the hooked forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from circuits import memoised
from circuits.components import inputs_of, run_parts, weighted
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from workbench.models.config import ModelConfig
from workbench.models.known import ABLATIONS, Ablation
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch

KINDS: Mapping[str, tuple[dict[str, object], dict[str, object]]] = {
    "plain": ({}, {}),
    "no norm": ({"normalization": None}, {}),
    "split inputs": ({}, {"split_inputs": True}),
    "columns": ({}, {"columns": ("a", "b", "b", "=")}),
    "clusters": ({}, {"clusters": {1: [[0, 3, 5], [1, 2, 4, 6, 7]]}}),
    "attention only": ({"d_mlp": 0}, {}),
    "bidirectional": ({"causal": False}, {}),
    "shared": ({"n_layers": 1, "schedule": (0, 0)}, {}),
    "padded": ({"pad_token": 6}, {}),
}


def planned(kind: str, ablation: Ablation = "resample", metric: str = "logit_difference") -> Experiment:
    fields, splits = KINDS[kind]
    config: dict[str, object] = {
        "n_layers": 2,
        "d_model": 8,
        "n_heads": 2,
        "d_head": 4,
        "d_mlp": 8,
        "n_ctx": 4,
        "d_vocab": 7,
        "d_vocab_out": 7,
        "normalization": "LN",
        "activation": "gelu",
        "biases": ("attn", "mlp", "unembed"),
        **fields,
    }
    model = Transformer(ModelConfig(**config), generator=generator(0, kind)).double()  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if ".b_" in name:
            torch.nn.init.normal_(parameter, generator=generator(1, name))
    draw = generator(2, kind)
    tokens, corrupt = torch.randint(0, 6, (2, 5, 4), generator=draw)
    read = torch.zeros(5, 4, dtype=torch.bool)
    read[:, 3] = True
    read[1, 1] = True
    if kind == "padded":
        tokens[0, 2:], corrupt[0, 2:], read[0] = 6, 6, torch.tensor([False, True, False, False])
    targets, distractor = torch.randint(0, 6, (2, 5, 4), generator=draw)
    batch = Batch(tokens=tokens, targets=targets, read=read, corrupt=corrupt, distractor=distractor)
    graph = circuit_graph(model, **splits)  # pyright: ignore[reportArgumentType]
    return experiment(model, batch, graph=graph, ablation=ablation, metric=metric)


def one_by_one(plan: Experiment, keep: Tensor) -> Tensor:
    """The reference: each circuit in a pass of its own."""
    found = []
    with torch.no_grad():
        inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens)
        for mask in keep:
            mix = weighted(plan.graph, mask[None].to(inputs), plan.ablated)
            stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, mix)[1]
            found.append(plan.measure(plan.model.finish(stream[plan.batch.read], {})))
    return torch.stack(found)


def masks(plan: Experiment) -> Tensor:
    n = len(plan.graph.edges)
    random = torch.rand(12, n, generator=generator(3, "masks")) < 0.6
    return torch.cat(
        [~torch.eye(n, dtype=torch.bool), random, torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n).bool()]
    )


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_together_is_one_by_one(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    keep = masks(plan)
    torch.testing.assert_close(circuit_values(plan, keep), one_by_one(plan, keep), rtol=1e-10, atol=1e-10)


def test_passes_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("plain")
    keep = masks(plan)
    whole = circuit_values(plan, keep)
    monkeypatch.setattr(memoised, "ELEMENTS", 3 * plan.clean.numel())
    torch.testing.assert_close(circuit_values(plan, keep), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_all_edges_are_the_model_and_none_the_counterfactual(kind: str) -> None:
    plan = planned(kind)
    n = len(plan.graph.edges)
    every, none = circuit_values(plan, torch.stack([torch.ones(n).bool(), torch.zeros(n).bool()]))
    assert plan.batch.corrupt is not None
    hooked = [plan.model.forward(tokens)[plan.batch.read] for tokens in (plan.batch.tokens, plan.batch.corrupt)]
    torch.testing.assert_close(every, plan.measure(hooked[0]).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(none, plan.measure(hooked[1]).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(none, plan.empty, rtol=1e-10, atol=1e-10)


def test_edges_that_carry_nothing_else_change_nothing_and_a_missing_change_is_seen() -> None:
    plan = planned("columns")
    keep = ~torch.eye(len(plan.graph.edges), dtype=torch.bool)
    moved = (circuit_values(plan, keep) - plan.full).abs().amax(1)
    assert 0 < int(plan.carrying.sum()) < len(plan.graph.edges)
    assert float(moved[~plan.carrying].max()) < 1e-10
    assert float(moved[plan.carrying].max()) > 1e-3


def test_a_small_difference_is_carried_and_rounding_is_not() -> None:
    plan = planned("columns")
    assert bool(plan.carrying.any())
    for share, carried in ((1e-4, plan.carrying), (1e-9, plan.carrying & False)):
        nearer = replace(plan, ablated=plan.clean + share * (plan.ablated - plan.clean))
        assert torch.equal(nearer.carrying, carried)


def test_what_cannot_be_measured_is_refused() -> None:
    plan = planned("plain")
    with pytest.raises(WorkbenchError, match="graph of 46 edges"):
        circuit_values(plan, torch.ones(1, 3, dtype=torch.bool))
    same = Batch(
        tokens=plan.batch.tokens,
        targets=plan.batch.targets,
        read=plan.batch.read,
        corrupt=plan.batch.tokens,
        distractor=plan.batch.distractor,
    )
    with pytest.raises(WorkbenchError, match="No headroom"):
        experiment(plan.model, same)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        experiment(
            plan.model,
            plan.batch,
            graph=planned("attention only").graph.__class__(
                n_heads=1, n_steps=1, d_model=8, inputs=("input",), clusters=((),)
            ),
        )


@pytest.mark.parametrize("metric", ["kl", "squared_error", "disagreement"])
def test_metrics_against_the_clean_run_are_zero_there(metric: str) -> None:
    plan = planned("plain", metric=metric)
    assert float(plan.full.abs().max()) < 1e-12
    assert float(plan.empty.mean()) > 0
