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


def test_each_writer_knows_where_it_reads() -> None:
    graph = circuit_graph(transformer(2, 2), split_inputs=True)
    read = {
        node.name: [graph.ports[port].name for port in ports]
        for node, ports in zip(graph.writers, graph.ports_of, strict=True)
    }
    assert read["embed"] == read["pos"] == []
    assert read["a0.h1"] == ["a0.h1<q>", "a0.h1<k>", "a0.h1<v>"]
    assert read["m1"] == ["m1"]


def test_a_node_hears_keys_of_all_columns_and_the_rest_of_its_own() -> None:
    graph = circuit_graph(transformer(1, 1), columns=("a", "b", "="))

    def heard(port: str, column: int) -> list[str]:
        place = [port.name for port in graph.ports].index(port)
        return [graph.edges[edge].name for edge in graph.heard(place, column)]

    assert heard("a0.h0<k>", 1) == ["input@a->a0.h0<k>@a", "input@b->a0.h0<k>@b", "input@=->a0.h0<k>@="]
    assert heard("a0.h0<q>", 1) == ["input@b->a0.h0<q>@b"]
    assert heard("m0", 2) == ["input@=->m0@=", "a0.h0@=->m0@="]
    assert heard("logits", 0) == ["input@a->logits@a", "a0.h0@a->logits@a", "m0@a->logits@a"]


def test_what_reaches_the_logits_needs_no_input() -> None:
    graph = circuit_graph(transformer(1, 2))
    kept = graph.mask(["input->a0.h0<v>", "a0.h0->m0", "a0.h1->logits", "input->a0.h1<q>", "input->m0"])
    assert graph.names(graph.reaching(kept)) == ["input->a0.h1<q>", "a0.h1->logits"]
    silent = graph.mask(["a0.h0->m0", "m0->logits"])
    assert torch.equal(graph.reaching(silent), silent)
    assert not graph.connected(silent).any()
    assert not graph.pruned(silent, "resample").any()
    for ablation in ("zero", "mean"):
        assert torch.equal(graph.pruned(silent, ablation), silent)


def test_a_query_is_heard_in_its_own_column_alone() -> None:
    graph = circuit_graph(transformer(1, 1), columns=("a", "b", "="))
    kept = graph.mask(["input@a->a0.h0<k>@a", "a0.h0@=->logits@=", "input@b->a0.h0<q>@b", "input@=->a0.h0<q>@="])
    assert graph.names(graph.reaching(kept)) == ["input@=->a0.h0<q>@=", "input@a->a0.h0<k>@a", "a0.h0@=->logits@="]


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
