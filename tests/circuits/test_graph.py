"""The graph against counts worked by hand, and its splits."""

from __future__ import annotations

import pytest
import torch

from circuits.graph import CircuitGraph, circuit_graph, graph_from_json
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator


def transformer(n_layers: int, n_heads: int, **fields: object) -> Transformer:
    config: dict[str, object] = {
        "n_layers": n_layers,
        "d_model": 8,
        "n_heads": n_heads,
        "d_head": 4,
        "d_mlp": 6,
        "n_ctx": 3,
        "d_vocab": 5,
        "d_vocab_out": 5,
        **fields,
    }
    return Transformer(ModelConfig(**config), generator=generator(0, "graph"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("layers", "heads", "edges"), [(1, 4, 23), (2, 4, 110), (4, 4, 479), (6, 1, 163), (2, 8, 310)])
def test_edges_are_as_many_as_the_formula_says(layers: int, heads: int, edges: int) -> None:
    assert len(circuit_graph(transformer(layers, heads)).edges) == edges


def test_one_layer_by_hand() -> None:
    graph = circuit_graph(transformer(1, 1))
    assert [edge.name for edge in graph.edges] == [
        "input->a0.h0<q>",
        "input->a0.h0<k>",
        "input->a0.h0<v>",
        "input->m0",
        "a0.h0->m0",
        "input->logits",
        "a0.h0->logits",
        "m0->logits",
    ]


def test_a_shared_block_has_nodes_for_each_step() -> None:
    graph = circuit_graph(transformer(1, 1, schedule=(0, 0)))
    assert "a0.h0->a1.h0<q>" in graph.index
    assert graph.key != circuit_graph(transformer(2, 1)).key


def test_splits_add_nodes() -> None:
    model = transformer(1, 1)
    split = circuit_graph(model, split_inputs=True, columns=("a", "a", "b"), clusters={0: [[0, 2, 4], [1, 3, 5]]})
    assert {"embed@a->a0.h0<k>@a", "pos@b->m0.c1@b", "m0.c0@b->logits@b"} <= set(split.index)
    assert graph_from_json(split.to_json()).key == split.key


def test_what_dangles_is_not_connected() -> None:
    graph = circuit_graph(transformer(1, 2))
    kept = graph.mask(["input->a0.h0<v>", "a0.h0->m0", "a0.h1->logits", "input->a0.h1<q>"])
    assert graph.names(graph.connected(kept)) == ["input->a0.h1<q>", "a0.h1->logits"]


def test_keys_of_one_column_reach_heads_of_another() -> None:
    graph = circuit_graph(transformer(1, 1), columns=("a", "b", "="))
    kept = graph.mask(["input@a->a0.h0<k>@a", "a0.h0@=->logits@=", "input@b->a0.h0<q>@b"])
    assert graph.names(graph.connected(kept)) == ["input@a->a0.h0<k>@a", "a0.h0@=->logits@="]


def test_errors_say_what_is_wrong() -> None:
    graph = circuit_graph(transformer(1, 1))
    with pytest.raises(WorkbenchError, match="'m9->logits' is not in this graph of 8 edges"):
        graph.mask(["m9->logits"])
    with pytest.raises(WorkbenchError, match="another model's graph"):
        graph.check_same(circuit_graph(transformer(2, 1)))
    with pytest.raises(WorkbenchError, match="each of its MLP's 6 neurons once"):
        circuit_graph(transformer(1, 1), clusters={0: [[0, 1]]})
    with pytest.raises(WorkbenchError, match="not a graph"):
        graph_from_json({"n_heads": 1})
    with pytest.raises(WorkbenchError, match="every column a position"):
        CircuitGraph(n_heads=1, n_steps=1, d_model=4, inputs=("input",), clusters=((),), columns=("a",), column_of=(1,))
    assert torch.equal(graph.mask(graph.names(torch.ones(8, dtype=torch.bool))), torch.ones(8, dtype=torch.bool))
