"""Paths against parts mixed by hand, another library's path patching, and circuits that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor

from circuits.components import inputs_of, run_parts
from circuits.experiment import experiment
from circuits.graph import CircuitGraph, circuit_graph
from circuits.paths import TOGETHER, Path, path_patch
from workbench.instrument.adapters import BridgeModel
from workbench.instrument.sites import Slot
from workbench.models.config import ModelConfig
from workbench.models.known import ABLATIONS, Ablation
from workbench.models.planted import PLANTED
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch

KINDS: Mapping[str, tuple[dict[str, object], dict[str, object], str, str]] = {
    "plain": ({}, {}, "input,a0.*,m0", "a1.*<?>,m1,logits"),
    "no norm": ({"normalization": None}, {}, "a0.h1", "a1.h0<k>,a2.*<v>,m2"),
    "split inputs": ({}, {"split_inputs": True}, "embed,pos", "a0.h0<q>,a1.h1<v>,m0"),
    "columns": ({}, {"columns": ("a", "b", "b", "=")}, "a0.h0@*,m0@b", "a1.h0<v>@*,m1@b"),
    "clusters": ({}, {"clusters": {1: [[0, 3, 5], [1, 2, 4, 6, 7]]}}, "m0,m1.c0,m1.c1", "m2,logits"),
    "shared": ({"n_layers": 1, "schedule": (0, 0, 0)}, {}, "a0.h0,a1.h1", "a2.*<q>,logits"),
    "padded": ({"pad_token": 6}, {}, "a0.*", "a1.h0<k>,a2.h1<v>"),
}
"""Configuration, splits of the graph, senders, receivers."""


def planned(kind: str = "plain") -> tuple[Transformer, Batch, CircuitGraph]:
    fields, splits, _, _ = KINDS[kind]
    config: dict[str, object] = {
        "n_layers": 3,
        "d_model": 8,
        "n_heads": 2,
        "d_head": 4,
        "d_mlp": 8,
        "n_ctx": 4,
        "d_vocab": 7,
        "d_vocab_out": 7,
        "normalization": "LN",
        "biases": ("attn", "mlp", "unembed"),
        **fields,
    }
    model = Transformer(ModelConfig(**config), generator=generator(0, kind)).double()  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator(1, name))
    tokens, corrupt, targets = torch.randint(0, 6, (3, 5, 4), generator=generator(2, kind))
    distractor = (targets + 3) % 6
    read = torch.zeros(5, 4, dtype=torch.bool)
    read[:, 3] = True
    if kind == "padded":
        tokens[0, 2:], corrupt[0, 2:], read[0] = 6, 6, torch.tensor([False, True, False, False])
    batch = Batch(tokens=tokens, targets=targets, read=read, corrupt=corrupt, distractor=distractor)
    return model, batch, circuit_graph(model, **splits)  # pyright: ignore[reportArgumentType]


def by_hand(model: Transformer, batch: Batch, graph: CircuitGraph, path: Path, way: str, ablation: Ablation) -> Tensor:
    """The reference: one pass in parts, in which only what the path's receivers read of the sender is exchanged."""
    plan = experiment(model, batch, graph=graph, ablation=ablation)
    other = plan.ablated if way == "noise" else plan.clean
    tokens = batch.tokens if way == "noise" else batch.corrupt
    assert tokens is not None
    columns = torch.tensor(graph.column_of or (0,) * 4)

    def mix(ports: slice, outputs: Tensor) -> Tensor:
        read = []
        for reader in graph.ports[ports]:
            x = outputs.sum(2).clone()
            for writer, node in enumerate(graph.writers[: outputs.shape[2]]):
                for column in range(graph.n_columns):
                    end = f"@{graph.columns[column]}" if graph.columns else ""
                    if f"{node.name}{end}->{reader.name}{end}" in path.edges:
                        change = other[:, :, writer] - outputs[:, :, writer]
                        x[:, columns == column] += change[:, columns == column]
            read.append(x)
        return torch.stack(read, 2)

    with torch.no_grad():
        stream = run_parts(model, graph, tokens, inputs_of(model, graph, tokens), mix)[1]
        return plan.measure(model.finish(stream[batch.read], {}))


@pytest.mark.parametrize("kind", KINDS)
def test_paths_are_those_mixed_by_hand(kind: str) -> None:
    model, batch, graph = planned(kind)
    _, _, senders, receivers = KINDS[kind]
    found = path_patch(model, batch, graph=graph, senders=senders, receivers=receivers)
    assert found.directions == ("denoise", "noise")
    assert any(path.receiver == TOGETHER for path in found.paths)
    wanted = torch.stack(
        [
            torch.stack([by_hand(model, batch, graph, path, way, "resample").mean() for path in found.paths])
            for way in found.directions
        ]
    )
    torch.testing.assert_close(found.patched, wanted, rtol=1e-9, atol=1e-9)
    restored = (wanted[0] - found.corrupt) / (found.clean - found.corrupt)
    broken = (found.clean - wanted[1]) / (found.clean - found.corrupt)
    torch.testing.assert_close(found.effect, torch.stack([restored, broken]), rtol=1e-9, atol=1e-9)
    assert float(found.effect.abs().max()) > 1e-3


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_can_be_carried(ablation: Ablation) -> None:
    model, batch, graph = planned()
    found = path_patch(model, batch, senders="a0.h1,m0", receivers="a1.h0<v>", ablation=ablation, direction="noise")
    wanted = [by_hand(model, batch, graph, path, "noise", ablation).mean() for path in found.paths]
    torch.testing.assert_close(found.patched[0], torch.stack(wanted), rtol=1e-9, atol=1e-9)
    assert found.ablation == ablation
    assert not found.disagree.any()


def test_denoising_is_noising_the_exchanged_pairs() -> None:
    model, batch, _ = planned()
    assert batch.corrupt is not None
    assert batch.distractor is not None
    exchanged = replace(
        batch, tokens=batch.corrupt, corrupt=batch.tokens, targets=batch.distractor, distractor=batch.targets
    )
    denoised = path_patch(model, batch, receivers="a1.h0<q>,m1", direction="denoise")
    noised = path_patch(model, exchanged, receivers="a1.h0<q>,m1", direction="noise")
    torch.testing.assert_close(denoised.effect, noised.effect, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoised.low, noised.low, rtol=1e-9, atol=1e-9)


def test_all_edges_of_the_input_are_the_whole_way_and_one_path_is_not_another() -> None:
    model, batch, graph = planned()
    found = path_patch(model, batch, receivers="*")
    places = {(path.sender, path.receiver): place for place, path in enumerate(found.paths)}
    # All that the only input writes: the other run, whole.
    assert found.effect[:, places["input", TOGETHER]].tolist() == pytest.approx([1, 1])
    mutant = Path(sender="a0.h0", receiver="m1", edges=("a0.h0->a1.h0<q>",))
    noised = by_hand(model, batch, graph, mutant, "noise", "resample").mean()
    assert float((noised - found.patched[1, places["a0.h0", "m1"]]).abs()) > 1e-3


def gpt2_bridge() -> BridgeModel:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=3, n_head=2, n_embd=8, n_positions=6, vocab_size=11, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval()
        for parameter in module.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter)
    return BridgeModel(build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=config))


@pytest.mark.parametrize("slot", ["q", "k", "v"])
def test_paths_between_heads_are_transformer_lens_own(slot: Slot) -> None:
    from transformer_lens import patching

    model = gpt2_bridge()
    tokens, corrupt = torch.randint(0, 11, (2, 4, 6), generator=generator(0, "prompts"))
    answers = torch.randint(0, 11, (2, 4, 6), generator=generator(1, "answers"))
    read = torch.zeros(4, 6, dtype=torch.bool)
    read[:, 5] = True
    batch = Batch(tokens=tokens, targets=answers[0], read=read, corrupt=corrupt, distractor=answers[1])
    rows = torch.arange(4)

    def logit_difference(logits: Tensor) -> Tensor:
        return (logits[rows, 5, answers[0, :, 5]] - logits[rows, 5, answers[1, :, 5]]).mean()

    with torch.no_grad():
        caches = [model.bridge.run_with_cache(prompts)[1] for prompts in (tokens, corrupt)]
        ends = {"denoise": (corrupt, caches[0], caches[1]), "noise": (tokens, caches[1], caches[0])}
        found = path_patch(model, batch, senders="a?.h?", receivers=f"a?.h?<{slot}>")
        moved = 0.0
        for row, way in enumerate(found.directions):
            base, source, target = ends[way]
            theirs = patching.get_act_patch_direct_path_all_sources(
                model.bridge, base, source, target, logit_difference, component=slot, verbose=False
            )
            unpatched = float(logit_difference(model.forward(base)))
            ours = dict(zip(((path.sender, path.receiver) for path in found.paths), found.patched[row], strict=True))
            for (layer, head), (later, reader) in ((a, b) for a in HEADS for b in HEADS if a[0] < b[0]):
                patched = float(ours[f"a{layer}.h{head}", f"a{later}.h{reader}<{slot}>"])
                assert patched == pytest.approx(float(theirs[layer, head, later, reader]), abs=1e-4)
                moved = max(moved, abs(patched - unpatched))
    # There was something to agree on.
    assert moved > 1e-2


HEADS = [(layer, head) for layer in range(3) for head in range(2)]


@pytest.mark.parametrize(("name", "alone"), [("or_gate", (1, 0)), ("and_gate", (0, 1))])
def test_one_bit_of_a_gate_and_both_together(name: str, alone: tuple[int, int]) -> None:
    known = PLANTED[name]()
    graph = circuit_graph(known.model, split_inputs=True)
    found = path_patch(known.model, known.pairs(16, 0), graph=graph, senders="embed", receivers="a0.*<v>")
    assert [path.receiver for path in found.paths] == ["a0.h0<v>", "a0.h1<v>", "a0.h2<v>", TOGETHER]
    for row, effect in enumerate(alone):
        assert found.effect[row].tolist() == pytest.approx([effect, 0, effect, 1], abs=1e-5)
        assert found.significant[row].tolist() == [bool(effect), False, bool(effect), True]
    assert found.disagree.tolist() == [True, False, True, False]
    assert found.summary()["disagreements"] == 2


def test_induction_goes_through_the_key_alone() -> None:
    known = PLANTED["induction"]()
    graph = circuit_graph(known.model, split_inputs=True)
    pairs = known.pairs(32, 0)
    found = path_patch(known.model, pairs, graph=graph, senders="a0.*", receivers="a1.*<?>,logits", direction="noise")
    moved = {
        (path.sender, path.receiver): float(effect)
        for path, effect in zip(found.paths, found.effect[0], strict=True)
        if abs(effect) > 1e-4
    }
    assert set(moved) == {("a0.h2", "a1.h0<k>"), ("a0.h2", TOGETHER)}
    assert moved["a0.h2", "a1.h0<k>"] == moved["a0.h2", TOGETHER]
    # An empty head carries nothing, and the result says so.
    assert not any(live for path, live in zip(found.paths, found.live, strict=True) if path.sender == "a0.h1")


def test_what_is_shown() -> None:
    model, batch, graph = planned()
    found = path_patch(model, replace(batch, dropped=3))
    assert [path.sender for path in found.paths] == [node.name for node in graph.writers]
    assert {path.receiver for path in found.paths} == {"logits"}
    assert ((found.low <= found.effect) & (found.effect <= found.high)).all()
    [table] = found.tables()
    assert len(table.frame) == 20
    assert "resample ablation, n = 5 examples" in table.caption
    summary = found.summary()
    assert summary["ablation"] == "resample"
    assert summary["dropped"] == 3
    assert isinstance(summary["paths"], list)
    assert summary["paths"][1]["edges"] == "a0.h0->logits"
    assert found.provenance == model.provenance
    again = path_patch(model, batch, seed=1)
    assert torch.equal(again.effect, found.effect)
    assert not torch.equal(again.low, found.low)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"senders": "a0.h7"}, "Unknown sender 'a0.h7'.*Did you mean 'a0.h"),
        ({"senders": "a0.h0<q>"}, "Unknown sender 'a0.h0<q>'.*Did you mean 'a0.h0'"),
        ({"receivers": "a1.h0"}, "Unknown receiver 'a1.h0'.*Did you mean 'a1.h0<"),
        ({"receivers": "a7.*<q>"}, "Unknown receiver 'a7"),
        (
            {"senders": "a1.h0", "receivers": "a1.h1<q>"},
            "a1.h0 does not come before receiver a1.h1<q>.*reads input, a0",
        ),
        ({"senders": "a0.h0,m1", "receivers": "m1,logits"}, "m1 does not come before receiver m1"),
        ({"senders": "m2", "receivers": "a1.*<q>"}, "Nothing to patch at m2: no sender of m2 comes before"),
        ({"senders": "a1.*,a0.*", "receivers": "a0.h0<q>,logits"}, "Nothing to patch at a0.h0<q>"),
        ({"senders": "a2.*", "receivers": "a1.*<q>"}, "Nothing to patch: no sender of a2"),
        ({"senders": " , "}, "Nothing to patch: no sender was named"),
        ({"receivers": []}, "Nothing to patch: no receiver was named"),
        ({"ablation": "mean"}, "mean ablation has no such run. Say direction='noise'"),
    ],
)
def test_what_cannot_be_patched_is_refused(chosen: dict[str, object], message: str) -> None:
    model, batch, _ = planned()
    with pytest.raises(WorkbenchError, match=message):
        path_patch(model, batch, **chosen)  # pyright: ignore[reportArgumentType]


def test_a_path_without_edges_is_an_error() -> None:
    with pytest.raises(WorkbenchError, match="path a0.h0 -> m1 has no edge: patching it would change nothing"):
        Path(sender="a0.h0", receiver="m1", edges=())


def test_a_direction_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # As outside the tests, where no shape or type is checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, batch, _ = planned()
    with pytest.raises(WorkbenchError, match="Unknown direction 'noising'. Did you mean 'noise'"):
        path_patch(model, batch, direction="noising")  # pyright: ignore[reportArgumentType]
