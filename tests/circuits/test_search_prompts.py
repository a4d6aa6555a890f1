"""Prompts and graphs of the tracer, against networkx."""

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_models import prompt_of

from circuits.search_prompts import Digraph, SearchPrompt
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import search_layout

LAYOUT = search_layout(26, 1)

acyclic = st.sets(st.tuples(st.integers(1, 8), st.integers(1, 8)).filter(lambda edge: edge[0] < edge[1]), min_size=1)


@given(acyclic)
def test_graphs_are_those_of_networkx(edges):
    mine, theirs = Digraph(edges=frozenset(edges)), nx.DiGraph(sorted(edges))
    assert mine.vertices == set(theirs)
    assert mine.longest_path() == nx.dag_longest_path_length(theirs)
    for vertex in theirs:
        assert mine.descendants(vertex) == nx.descendants(theirs, vertex)
        assert mine.children(vertex) == set(theirs.successors(vertex))
        for goal in set(theirs) - {vertex}:
            wanted = {child for child in theirs.successors(vertex) if nx.has_path(theirs, child, goal)}
            assert mine.useful(vertex, goal) == wanted
    part = mine.within({1, 2, 3})
    assert part.edges == set(theirs.subgraph([1, 2, 3]).edges)


def test_rows_of_a_prompt():
    prompt = prompt_of([(3, 1), (1, 2), (3, 5)], 3, 2, LAYOUT)
    assert len(prompt) == 14
    assert prompt.position.tolist() == list(range(12, 26))
    assert (prompt.start, prompt.goal, prompt.unused) == (3, 2, 4)
    assert prompt.answers == {1}
    assert [prompt.vertex(row) for row in range(6)] == [None, 3, 1, None, 1, 2]
    # Rows 1 and 2 hold 3→1, row 5 holds 2: a path only with the vertex between them.
    assert prompt.solved_by([1, 2, 5])
    assert not prompt.solved_by([1, 5])
    assert prompt.depth([1, 2, 5]) == 2
    assert prompt.depth([0, 9]) == 0


def test_a_wrong_graph_moves_all_but_start_and_goal():
    prompt = prompt_of([(3, 1), (1, 2), (3, 5), (5, 6)], 3, 2, LAYOUT)
    for seed in range(5):
        wrong = prompt.relabelled(seed)
        assert nx.is_isomorphic(nx.DiGraph(sorted(wrong.graph.edges)), nx.DiGraph(sorted(prompt.graph.edges)))
        assert (wrong.start, wrong.goal) == (3, 2)
        assert wrong.answers in ({5}, {6})
        assert torch.equal(wrong.padded, prompt.padded)
    with pytest.raises(WorkbenchError, match="A graph of 2 vertices has no two to change places"):
        prompt_of([(1, 2)], 1, 2, LAYOUT).relabelled(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({-2: 3}, "No prompt of graph search"),
        ({-1: 1}, "No prompt of graph search"),
        ({-8: 9}, "vertices are 1 to 8"),
        ({-6: 0}, "No prompt of graph search"),
        ({-7: 2, -6: 3}, "cycle through 1, 2, 3"),
        ({-4: 2, -1: 2, -3: 3}, "Goal 3 cannot be reached from start 2"),
        ({-7: 6, -6: 7}, "several parts: nothing connects 6, 7"),
    ],
)
def test_prompts_that_cannot_be_traced(change, message):
    tokens = prompt_of([(3, 1), (1, 2), (3, 5)], 3, 2, LAYOUT).padded.clone()
    for place, token in change.items():
        tokens[place] = token
    with pytest.raises(WorkbenchError, match=message):
        SearchPrompt.read(tokens, LAYOUT)


def test_a_prompt_of_another_length():
    tokens = prompt_of([(3, 1), (1, 2), (3, 5)], 3, 2, LAYOUT).padded
    with pytest.raises(WorkbenchError, match="Wanted 26 of them"):
        SearchPrompt.read(tokens[1:], LAYOUT)
