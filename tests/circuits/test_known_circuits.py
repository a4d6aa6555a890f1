"""The edge engine on models whose circuit is known, and on another library's models."""

from __future__ import annotations

import pytest
import torch

from circuits.components import edge_readable
from circuits.experiment import experiment
from circuits.graph import circuit_graph
from circuits.memoised import circuit_values
from workbench.instrument.adapters import BridgeModel, ModelShape, nnsight_model
from workbench.models.bridges import to_bridge
from workbench.models.config import ModelConfig
from workbench.models.planted import PLANTED
from workbench.models.tracr import load_tracr
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_edges_alone_answer_like_the_model(name: str) -> None:
    known = PLANTED[name]()
    graph = circuit_graph(known.model, split_inputs=True)
    for ablation in known.ablations:
        plan = experiment(known.model, known.pairs(64, 0), graph=graph, ablation=ablation, metric="disagreement")  # pyright: ignore[reportArgumentType]
        kept = graph.mask(known.structural | known.constants)
        whole, lacking = circuit_values(plan, torch.stack([kept, torch.zeros_like(kept)]))
        assert float(whole.max()) == 0
        assert float(lacking.mean()) > 0


@pytest.mark.parametrize(("name", "causal"), [("hist", 6), ("frac_prevs", 5), ("reverse", 11)])
def test_edges_whose_single_ablation_changes_a_compiled_program(name: str, causal: int) -> None:
    known = load_tracr(name)
    graph = circuit_graph(known.model, split_inputs=True)
    plan = experiment(known.model, known.pairs(64, 0), graph=graph, ablation="zero", metric="squared_error")
    effects = circuit_values(plan, ~torch.eye(len(graph.edges), dtype=torch.bool)).amax(1)
    found = set(graph.names(effects > 1e-3))
    assert len(found) == causal
    assert found <= known.structural | known.constants


def gpt2_bridge() -> BridgeModel:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=6, vocab_size=11, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval()
    return BridgeModel(build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=config))


def native_bridge() -> BridgeModel:
    config = ModelConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, n_ctx=6, d_vocab=11, d_vocab_out=11, normalization="LN"
    )
    return BridgeModel(to_bridge(Transformer(config, generator=generator(0, "native")))[0])


@pytest.mark.parametrize("make", [gpt2_bridge, native_bridge])
def test_a_bridge_runs_in_parts_with_its_own_logits(make: object) -> None:
    assert callable(make)
    bridge = make()
    tokens = torch.randint(0, 11, (3, 6), generator=generator(1, "tokens"))
    parts = edge_readable(bridge)
    torch.testing.assert_close(parts.forward(tokens), bridge.forward(tokens), rtol=1e-5, atol=1e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_folded_bridge_and_a_model_without_parts_are_refused() -> None:
    folded = gpt2_bridge()
    folded.bridge.enable_compatibility_mode()
    with pytest.raises(WorkbenchError, match="compatibility mode"):
        edge_readable(folded)
    embedding = torch.nn.Sequential(torch.nn.Embedding(5, 5))
    shape = ModelShape(n_steps=1, n_heads=1, d_mlp=0, n_ctx=4, causal=True, d_vocab=5)
    with pytest.raises(WorkbenchError, match="has no edges to intervene on"):
        edge_readable(nnsight_model(embedding, {"embed": "0"}, config=shape))
