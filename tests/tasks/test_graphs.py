import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_by_hand import distance, lookahead, reachable, useful

from workbench.tasks import graphs
from workbench.tasks.graphs import (
    Graphs,
    ancestors,
    bit,
    choose_member,
    collect,
    descendants,
    distances,
    members,
    numpy_generator,
    successors,
)


def masks(*graphs, width):
    return np.array([[sum(1 << child for child in graph.get(v, ())) for v in range(width)] for graph in graphs])


def question(children, start, goal, width=8):
    return Graphs(children=masks(children, width=width), start=np.array([start]), goal=np.array([goal]))


def as_set(mask):
    return set(np.flatnonzero(members(np.array([mask]), 62)[0]).tolist())


@st.composite
def dags(draw):
    """A graph whose edges go from lower to higher numbers, some chosen at random."""
    n = draw(st.integers(2, 9))
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
    children = {}
    for a, b in draw(st.sets(st.sampled_from(pairs), min_size=1)):
        children.setdefault(a, set()).add(b)
    return children, n


@given(dags(), st.data())
def test_reachability_is_that_of_a_search_on_sets(drawn, data):
    children, n = drawn
    graph = masks(children, width=n)
    below = descendants(graph)[0]
    for vertex in range(n):
        assert as_set(below[vertex]) == reachable(children, vertex)
    start, goal = data.draw(st.permutations(range(n)))[:2]
    asked = question(children, start, goal, width=n)
    assert as_set(ancestors(graph, np.array([goal]))[0]) == {
        v for v in range(n) if goal in reachable(children, v) | {v}
    }
    assert as_set(asked.useful()[0]) == useful(children, start, goal)
    assert distances(graph, np.array([start]))[0].tolist() == [distance(children, start, v) for v in range(n)]
    if useful(children, start, goal):
        assert asked.lookahead().tolist() == [lookahead(children, start, goal)]
    _, sources, targets = asked.edges()
    assert set(zip(sources.tolist(), targets.tolist(), strict=True)) == {(a, b) for a in children for b in children[a]}
    assert asked.n_edges.tolist() == [len(sources)]


CASES = {
    "an only child": ({0: {1}, 1: {2}}, 0, 2, 0),
    "two children, both right": ({0: {1, 2}, 1: {3}, 2: {3}}, 0, 3, 0),
    "the goal is a child": ({0: {1, 2}, 2: {3}, 3: {4}}, 0, 1, 1),
    "the wrong child is a leaf": ({0: {1, 2}, 1: {3}, 3: {4}}, 0, 4, 1),
    "two branches of three": ({0: {1, 4}, 1: {2}, 2: {3}, 4: {5}, 5: {6}}, 0, 3, 3),
    "a wrong branch of two": ({0: {1, 4}, 1: {2}, 2: {3}, 4: {5}}, 0, 3, 2),
    # The wrong branch goes on only to what the right one reaches as early.
    "a wrong branch that joins": ({0: {1, 4}, 1: {2, 6}, 2: {5}, 5: {3}, 4: {6}, 6: {7}}, 0, 3, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_lookahead_by_hand(case):
    children, start, goal, wanted = CASES[case]
    assert lookahead(children, start, goal) == wanted
    assert question(children, start, goal).lookahead().tolist() == [wanted]


def test_the_cases_see_a_search_that_stops_at_the_children(monkeypatch):
    monkeypatch.setattr(graphs, "successors", lambda children, of: np.zeros_like(of))
    children, start, goal, wanted = CASES["a wrong branch of two"]
    assert question(children, start, goal).lookahead().tolist() != [wanted]


@given(st.lists(st.sets(st.integers(0, 61)), min_size=1, max_size=5))
def test_sets_survive_being_taken_apart_and_put_together(sets):
    numbers = np.array([sum(1 << member for member in each) for each in sets])
    assert [as_set(number) for number in numbers] == sets
    assert collect(members(numbers, 62)).tolist() == numbers.tolist()


def test_successors_are_those_of_every_member():
    graph = masks({0: {1}, 2: {3, 4}, 4: {0}}, width=8)
    assert as_set(successors(graph, bit(np.array([0])) | bit(np.array([2])))[0]) == {1, 3, 4}


def test_members_are_chosen_evenly_and_never_others():
    sets = np.full(3000, 0b1011)
    chosen = choose_member(sets, 8, numpy_generator(0, "test"))
    assert np.bincount(chosen, minlength=4)[[0, 1, 3]].min() > 900
    assert set(chosen.tolist()) == {0, 1, 3}
    assert choose_member(np.array([0]), 8, numpy_generator(0, "test")).tolist() == [0]


def test_a_cycle_is_seen_in_the_descendants():
    assert as_set(descendants(masks({0: {1}, 1: {2}, 2: {1}}, width=8))[0, 1]) == {1, 2}
