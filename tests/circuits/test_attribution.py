"""Edge scores against single patches, against the gradient of a circuit's mask, and against another library."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from circuits import attribution
from circuits.attribution import eap, eap_ig, eap_ig_activations, exact_scores
from circuits.components import inputs_of, run_parts, weighted
from circuits.experiment import Experiment, experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from circuits.paths import path_patch
from circuits.truths import causal_edges
from tests.circuits.test_known_circuits import gpt2_bridge
from tests.circuits.test_memoised import KINDS, one_by_one, planned
from workbench.metrics import Metric
from workbench.models.config import ModelConfig
from workbench.models.known import Ablation
from workbench.models.planted import PLANTED
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch

CASES: list[tuple[str, Ablation]] = [
    *((kind, "resample") for kind in KINDS),
    ("plain", "zero"),
    ("clusters", "mean"),
    ("columns", "zero"),
    ("padded", "mean"),
]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def inputs_between(plan: Experiment, share: float) -> Tensor:
    """The graph's inputs, so far from the ablated run to the clean one."""
    n = len(plan.graph.inputs)
    return plan.ablated[:, :, :n] + share * (plan.clean - plan.ablated)[:, :, :n]


def by_mask(plan: Experiment, inputs: Tensor, writers: slice = slice(0, 0), held: Tensor | None = None) -> Tensor:
    """Gradient of each example's metric by how much every edge keeps of what its ablation changes.

    The model runs from the inputs given; what some writers write can be held at other values.
    """
    keep = plan.clean.new_ones(len(inputs), len(plan.graph.edges)).requires_grad_()

    def mix(ports: slice, outputs: Tensor) -> Tensor:
        known = outputs.shape[2]
        if held is not None and known >= writers.stop:
            outputs = torch.cat([outputs[:, :, : writers.start], held, outputs[:, :, writers.stop :]], 2)
        without = outputs.detach() - (plan.clean - plan.ablated)[:, :, :known]
        return weighted(plan.graph, keep, without)(ports, outputs)

    stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs.detach(), mix)[1]
    values = plan.measure(plan.model.finish(stream[plan.batch.read], {}))
    return torch.autograd.grad(values.sum(), keep)[0]


@pytest.mark.parametrize(("kind", "ablation"), CASES)
def test_exact_scores_are_single_patches(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    scores = exact_scores(plan)
    alone = one_by_one(plan, ~torch.eye(len(plan.graph.edges), dtype=torch.bool))
    assert scores.examples is not None
    close(scores.examples, plan.full[:, None] - alone.T)
    close(scores.score, scores.examples.mean(0))
    assert float(scores.score[~plan.live].abs().sum()) == 0
    assert (scores.method, scores.reference, scores.scale) == ("exact", "clean run", "logits")


def silent_mlp() -> Experiment:
    """An MLP that writes nothing in the clean run nor under zero ablation, but does when its input is taken away."""
    config = ModelConfig(
        n_layers=1, d_model=2, n_heads=1, d_head=1, d_mlp=1, n_ctx=1, d_vocab=2, d_vocab_out=2, biases=("mlp",)
    )
    model = Transformer(config, generator=generator(0, "silent"))
    state = model.state_dict()
    for tensor in state.values():
        tensor.zero_()
    state["embed.W_E"][:, 0] = 1
    state["weights.0.mlp.W_in"][0, 0] = -2
    state["weights.0.mlp.b_in"][0] = 1
    state["weights.0.mlp.W_out"][0, 1] = 5
    state["unembed.W_U"].copy_(torch.eye(2))
    tokens = torch.tensor([[0], [1]])
    batch = Batch(
        tokens=tokens,
        targets=torch.zeros_like(tokens),
        read=torch.ones_like(tokens, dtype=torch.bool),
        corrupt=1 - tokens,
        distractor=torch.ones_like(tokens),
    )
    return experiment(model, batch, ablation="zero")


def test_an_edge_into_a_silent_node_is_measured_too() -> None:
    plan = silent_mlp()
    scores = exact_scores(plan)
    # Without its input the MLP writes relu(1) * 5 where the distractor is read.
    assert float(scores.score[plan.graph.index["input->m0"]]) == 5
    assert float(scores.score[plan.graph.index["input->logits"]]) == 1
    assert float(scores.score.sum()) == 6


def test_an_edge_that_is_not_live_can_change_an_answer_alone() -> None:
    plan = silent_mlp()
    names = plan.graph.names
    assert names(plan.live) == ["input->logits"]
    assert "input->m0" in names(plan.carrying)
    assert names(causal_edges(plan)) == ["input->m0", "input->logits"]
    without = torch.stack([plan.live, ~plan.graph.mask(["input->m0"])])
    # With all edges ablated that are not live every answer is the model's, and with this one alone it is not.
    assert (circuit_values(plan, without) - plan.full).tolist() == [[0, 0], [-5, -5]]
    patched = path_patch(plan.model, plan.batch, receivers="m0,logits", ablation="zero", direction="noise")
    alive = [(path.sender, path.receiver) for path, live in zip(patched.paths, patched.live, strict=True) if live]
    assert alive == [("input", "m0"), ("input", "logits"), ("input", "together")]


@pytest.mark.parametrize(("kind", "ablation"), CASES)
def test_eap_is_the_gradient_of_the_mask(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    keep = plan.clean.new_ones(len(plan.batch), len(plan.graph.edges)).requires_grad_()
    inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens).detach()
    stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, weighted(plan.graph, keep, plan.ablated))[1]
    values = plan.measure(plan.model.finish(stream[plan.batch.read], {}))
    found = eap(plan)
    assert found.examples is not None
    assert found.reference == "clean run"
    close(found.examples, torch.autograd.grad(values.sum(), keep)[0])
    close(found.score, found.examples.mean(0))
    # The same code serves below as the reference at other points.
    close(by_mask(plan, inputs), found.examples)
    at_ablated = eap(plan, reference="ablated")
    assert at_ablated.examples is not None
    assert at_ablated.reference == "ablated run"
    close(at_ablated.examples, by_mask(plan, inputs_between(plan, 0)))


def test_eap_is_what_little_ablation_costs() -> None:
    plan = planned("plain")
    scores, inputs = eap(plan), inputs_of(plan.model, plan.graph, plan.batch.tokens)
    share = 1e-5
    with torch.no_grad():
        for edge in range(0, len(plan.graph.edges), 5):
            costs = []
            for ablated in (share, -share):
                keep = plan.clean.new_ones(1, len(plan.graph.edges))
                keep[0, edge] = 1 - ablated
                mix = weighted(plan.graph, keep, plan.ablated)
                stream = run_parts(plan.model, plan.graph, plan.batch.tokens, inputs, mix)[1]
                costs.append(plan.full.mean() - plan.measure(plan.model.finish(stream[plan.batch.read], {})).mean())
            torch.testing.assert_close((costs[0] - costs[1]) / (2 * share), scores.score[edge], rtol=1e-6, atol=1e-8)


def test_eap_at_the_other_run_swaps_the_two() -> None:
    plan = planned("plain")
    assert plan.batch.corrupt is not None
    swapped = replace(plan.batch, tokens=plan.batch.corrupt, corrupt=plan.batch.tokens)
    other = experiment(plan.model, swapped, graph=plan.graph)
    close(eap(plan, reference="ablated").score, -eap(other).score)


@pytest.mark.parametrize(("kind", "ablation"), CASES)
def test_points_of_a_path_are_the_loop_over_them(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    found = eap_ig(plan, points=4)
    assert found.examples is not None
    assert found.rule == "left Riemann sum of 4 points on the inputs"
    close(found.examples, torch.stack([by_mask(plan, inputs_between(plan, k / 4)) for k in range(4)]).mean(0))


@pytest.mark.parametrize(("kind", "ablation"), CASES)
def test_paths_of_activations_are_the_loop_over_layers_and_points(kind: str, ablation: Ablation) -> None:
    plan = planned(kind, ablation)
    found = eap_ig_activations(plan, points=3)
    assert found.examples is not None
    assert found.rule == "right Riemann sum of 3 points on each layer's output"
    inputs = inputs_of(plan.model, plan.graph, plan.batch.tokens)
    writer_of = torch.tensor([edge.writer for edge in plan.graph.edges])
    layers = [(node.part, node.step) for node in plan.graph.writers]
    wanted = torch.zeros_like(found.examples)
    for layer in dict.fromkeys(layers):
        first, n = layers.index(layer), layers.count(layer)
        writers = slice(first, first + n)
        leaving = (writer_of >= first) & (writer_of < first + n)
        for point in (1, 2, 3):
            difference = (plan.clean - plan.ablated)[:, :, writers]
            held = plan.ablated[:, :, writers] + point / 3 * difference
            wanted[:, leaving] += by_mask(plan, inputs, writers, held)[:, leaving] / 3
    close(found.examples, wanted)


@pytest.mark.parametrize("kind", ["plain", "columns", "padded", "attention only"])
def test_what_leaves_the_inputs_sums_to_the_headroom(kind: str) -> None:
    plan = planned(kind)
    leaving = torch.tensor([edge.writer < len(plan.graph.inputs) for edge in plan.graph.edges])
    sums = []
    for points in (64, 128):
        examples = eap_ig(plan, points=points).examples
        assert examples is not None
        sums.append(examples[:, leaving].sum(1))
    # The error of a left sum goes with one over its points: what is left after its first term is small.
    torch.testing.assert_close(2 * sums[1] - sums[0], plan.full - plan.empty, rtol=0, atol=2e-3)


def test_one_point_on_the_inputs_is_eap_at_the_ablated_run() -> None:
    plan = planned("plain")
    close(eap_ig(plan, points=1).score, eap(plan, reference="ablated").score)
    close(eap_ig_activations(plan, points=1).score, eap(plan).score)


@pytest.mark.parametrize("kind", ["padded", "columns", "clusters"])
def test_passes_of_any_size_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(kind)
    methods = (eap, eap_ig, eap_ig_activations)
    whole = [method(plan).examples for method in methods]
    per_row = attribution.POINTS * plan.batch.tokens.shape[1] * len(plan.graph.ports) * plan.graph.d_model
    for elements in (1, 2 * per_row):
        monkeypatch.setattr(attribution, "ELEMENTS", elements)
        for method, wanted in zip(methods, whole, strict=True):
            examples = method(plan).examples
            assert examples is not None
            assert wanted is not None
            torch.testing.assert_close(examples, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["kl", "squared_error"])
def test_a_metric_that_compares_with_the_clean_run_has_a_gradient_along_the_path(metric: str) -> None:
    plan = planned("plain", metric=metric)
    found = eap_ig(plan, points=3)
    assert found.examples is not None
    close(found.examples, torch.stack([by_mask(plan, inputs_between(plan, k / 3)) for k in range(3)]).mean(0))
    # Ablating what helps raises a distance: the score falls, the importance rises.
    assert torch.equal(found.importance, -found.score)
    with pytest.raises(WorkbenchError, match="gradient is zero for every edge"):
        eap(plan)
    assert float(eap(plan, reference="ablated").score.abs().max()) > 0


def test_gradients_do_not_see_what_is_saturated() -> None:
    known = PLANTED["or_gate"]()
    plan = experiment(known.model, known.pairs(8, 0), graph=circuit_graph(known.model, split_inputs=True))
    value = plan.graph.index["embed->a0.h0<v>"]
    assert float(eap(plan).score[value]) == 0
    assert float(eap(plan, reference="ablated").score[value]) > 10


def test_what_cannot_be_attributed_is_refused() -> None:
    plan = planned("plain")
    for method in (eap, eap_ig, eap_ig_activations):
        with pytest.raises(WorkbenchError, match="'accuracy' has no gradient"):
            method(plan.measured_by("accuracy"))
    for method in (eap_ig, eap_ig_activations):
        with pytest.raises(WorkbenchError, match="at least 1 point, got 0"):
            method(plan, points=0)


def test_scores_that_are_no_numbers_are_refused() -> None:
    plan = planned("plain")
    base = plan.metric.values

    def steep(logits: Tensor, batch: object, reference: Tensor | None) -> Tensor:
        values = base(logits, batch, reference)  # pyright: ignore[reportArgumentType]
        return values + (values - values.detach()).sqrt()

    metric = Metric(name="steep", unit="logits", higher="more", values=steep)
    with pytest.raises(WorkbenchError, match=r"46 scores of method 'eap' are not finite, such as that of input->a0"):
        eap(plan.measured_by(metric))
    with torch.no_grad():
        plan.model.unembed.W_U.fill_(math.nan)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(WorkbenchError, match="Metric .logit_difference. is not finite on the whole model"):
        experiment(plan.model, plan.batch)


def bridge_experiment() -> Experiment:
    tokens, corrupt = torch.randint(0, 11, (2, 3, 6), generator=generator(1, "bridge pairs"))
    read = torch.zeros(3, 6, dtype=torch.bool)
    read[:, -1] = True
    batch = Batch(
        tokens=tokens,
        targets=torch.full_like(tokens, 3),
        read=read,
        corrupt=corrupt,
        distractor=torch.full_like(tokens, 7),
    )
    return experiment(gpt2_bridge(), batch)


def their_metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 3] - logits[0, -1, 7]


def our_name(writer: object, reader: object) -> str:
    """The EAP format's name of another library's edge, whatever its position."""
    names = []
    for node in (writer, reader):
        layer, head = node.layer, node.head  # pyright: ignore[reportAttributeAccessIssue]
        kind: str = node.kind  # pyright: ignore[reportAttributeAccessIssue]
        if kind in ("embed", "logits"):
            names.append("input" if kind == "embed" else kind)
        elif kind.startswith("mlp"):
            names.append(f"m{layer}")
        else:
            slot = "" if kind == "attn_head_out" else f"<{kind[0]}>"
            names.append(f"a{layer}.h{head}{slot}")
    return "->".join(names)


@pytest.mark.slow
def test_eap_equals_transformer_lens() -> None:
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    plan = bridge_experiment()
    assert plan.batch.corrupt is not None
    theirs = attribution_patch(
        gpt2_bridge().bridge,
        plan.batch.tokens,
        plan.batch.corrupt,
        their_metric,
        config=EdgeAttributionConfig(granularity="edge"),
    ).edge_scores
    summed = dict.fromkeys(plan.graph.index, 0.0)
    for (writer, reader), score in theirs.items():
        summed[our_name(writer, reader)] += score
    assert len(summed) == len(plan.graph.edges)
    wanted = torch.tensor(list(summed.values()))
    ours = eap(plan, reference="ablated").score
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    # The gradient at the clean run is another number: the agreement above is no accident.
    assert float((eap(plan).score - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("n_kept", [0, 10, 25])
def test_faithfulness_equals_transformer_lens(n_kept: int) -> None:
    from transformer_lens.tools.analysis.attribution_patching import (
        _edge_hook_flags as edge_hooks,
    )
    from transformer_lens.tools.analysis.attribution_patching import (
        _edge_hook_names as edge_hook_names,
    )
    from transformer_lens.tools.analysis.attribution_patching import (
        cache_activation_and_gradient,
        enumerate_edges,
        faithfulness,
    )

    plan, bridge = bridge_experiment(), gpt2_bridge().bridge
    assert plan.batch.corrupt is not None
    keep = torch.zeros(len(plan.graph.edges), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=generator(2, "kept"))[:n_kept]] = True
    ours = (circuit_values(plan, keep[None])[0] - plan.empty) / (plan.full - plan.empty)
    with edge_hooks(bridge):
        cache = cache_activation_and_gradient(
            bridge, plan.batch.tokens[:1], their_metric, names_filter=edge_hook_names(2), compute_gradient=False
        )
        edges = enumerate_edges(bridge, cache)
    circuit = [edge for edge in edges if keep[plan.graph.index[our_name(*edge)]]]
    for row in range(3):
        pair = slice(row, row + 1)
        theirs = faithfulness(bridge, plan.batch.tokens[pair], plan.batch.corrupt[pair], their_metric, circuit)
        assert float(ours[row]) == pytest.approx(theirs.recovered, abs=1e-4, rel=1e-4)
        assert float(plan.full[row]) == pytest.approx(theirs.full_metric, abs=1e-5)
