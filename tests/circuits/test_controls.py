"""Random connected circuits: connected, live, of the size asked for, and drawn from a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.controls import controls_of_size, random_circuits
from circuits.experiment import experiment
from circuits.graph import CircuitGraph, circuit_graph
from tests.circuits.test_graph import transformer
from tests.circuits.test_memoised import KINDS, planned
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError, generator

GRAPHS = {kind: planned(kind).graph for kind in KINDS}


@given(
    kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10**6), share=st.floats(0.3, 1), size=st.floats(0.15, 1)
)
@settings(max_examples=60)
def test_circuits_are_connected_live_and_of_one_size(kind: str, seed: int, share: float, size: float) -> None:
    graph = GRAPHS[kind]
    live = torch.rand(len(graph.edges), generator=generator(seed, "live")) < share
    live[direct_edge(graph)] = True
    usable = int(graph.connected(live).sum())
    edges = max(1, round(size * usable))
    drawn = controls_of_size(graph, live, edges=edges, n=3, seed=seed)
    # Among few live edges some sizes have no circuit; one edge and all of them always do.
    assert drawn.sum(1).tolist() in ([edges] * 3, [])
    assert len(drawn) == 3 or edges not in (1, usable)
    for keep in drawn:
        assert not bool((keep & ~live).any())
        assert torch.equal(graph.connected(keep), keep)
    assert torch.equal(controls_of_size(graph, live, edges=edges, n=3, seed=seed), drawn)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_size_is_found_where_every_edge_is_live(kind: str) -> None:
    graph = GRAPHS[kind]
    live = torch.ones(len(graph.edges), dtype=torch.bool)
    for edges in range(1, len(live) + 1, 4):
        assert random_circuits(graph, live, edges=edges, n=2).sum(1).tolist() == [edges] * 2


def direct_edge(graph: CircuitGraph) -> int:
    """An input's edge to the logits: a circuit by itself."""
    return next(edge for name, edge in graph.index.items() if name.startswith(graph.inputs[0]) and "->logits" in name)


def test_all_live_edges_are_one_circuit_and_seeds_differ() -> None:
    plan = planned("plain")
    assert bool(random_circuits(plan.graph, plan.live, edges=46, n=1).all())
    one, other = (random_circuits(plan.graph, plan.live, edges=12, n=20, seed=seed) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert len(one.unique(dim=0)) > 10
    # No live edge is out of reach.
    assert bool(random_circuits(plan.graph, plan.live, edges=12, n=200).any(0).all())


def test_none_are_none() -> None:
    plan = planned("plain")
    assert random_circuits(plan.graph, plan.live, edges=5, n=0).shape == (0, 46)


def test_sizes_without_a_circuit_are_refused() -> None:
    graph = circuit_graph(transformer(1, 1))
    chain = graph.mask(["input->m0", "m0->logits", "a0.h0->logits"])
    with pytest.raises(WorkbenchError, match="circuit of 1 edges was found among 2 live ones"):
        random_circuits(graph, chain, edges=1, n=1)
    assert graph.names(random_circuits(graph, chain, edges=2, n=1)[0]) == ["input->m0", "m0->logits"]
    with pytest.raises(WorkbenchError, match="circuit of 3 edges was found among 2 live ones"):
        random_circuits(graph, chain, edges=3, n=1)
    with pytest.raises(WorkbenchError, match="among 0 live ones"):
        random_circuits(graph, torch.zeros(8, dtype=torch.bool), edges=1, n=1)


def test_whole_paths_are_drawn_where_single_edges_would_dangle() -> None:
    known = PLANTED["induction"]()
    plan = experiment(known.model, known.pairs(8, 0), graph=circuit_graph(known.model, split_inputs=True))
    for keep in random_circuits(plan.graph, plan.live, edges=4, n=20):
        names = plan.graph.names(keep)
        assert any(name.endswith("->logits") for name in names)
        assert any(name.startswith("embed->") for name in names)
