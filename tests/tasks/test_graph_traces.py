from dataclasses import replace

import pytest
import torch
from search_by_hand import parse_edges, reachable

from workbench.runtime import WorkbenchError
from workbench.tasks import graph_traces
from workbench.tasks.base import Streamed, Task
from workbench.tasks.graph_traces import DepthFirst, SelectionInference

DEPTH = DepthFirst(size=44, test_size=40)
STEPS = SelectionInference(size=62, test_size=40)
TASKS = pytest.mark.parametrize("task", [DEPTH, STEPS], ids=lambda task: task.name)


def next_visits(children, goal, trace):
    """The distance back to the vertex that goes on, and where it may go."""
    for back, vertex in enumerate(reversed(trace)):
        if following := children.get(vertex, set()) - set(trace):
            return back, {goal} if goal in following else following
    raise AssertionError("nothing is left to visit")


def steps_of(children, start, path, mark):
    """Vertices that can be selected, the selected one or None, and what it leads to."""
    *shown, last = path
    visited = {start, *(vertex for vertex in path if vertex != mark)}
    frontier = {vertex for vertex in visited if children.get(vertex, set()) - visited}
    selected = None if last == mark else last
    return frontier, selected, children.get(selected, set()) - visited


@TASKS
def test_tasks_that_stream(task):
    assert isinstance(task, Task)
    assert isinstance(task, Streamed)
    assert len(task.position_labels) == task.size
    assert torch.equal(task.stream(20, seed=1).tokens, task.stream(20, seed=1).tokens)


@TASKS
def test_prompts_are_graphs_without_cycles_and_with_a_path(task):
    for row in task.stream(200, seed=0).tokens.tolist():
        children, n_edges = parse_edges(row[: task.layout.end], edge=task.layout.edge)
        query, start, goal, mark = row[task.layout.end :][:4]
        assert (query, mark) == (task.layout.query, task.layout.path)
        assert n_edges == sum(map(len, children.values())) <= task.layout.n_edges
        assert goal in reachable(children, start)
        assert not any(vertex in reachable(children, vertex) for vertex in children)


def test_a_trace_is_that_of_a_depth_first_search():
    levels = set()
    for level in DEPTH.levels:
        batch = DEPTH.examples(f"test_{level}")
        for row, right in zip(batch.tokens.tolist(), batch.right, strict=True):
            children, _ = parse_edges(row[: DEPTH.layout.end], edge=DEPTH.layout.edge)
            _, start, goal, _, *shown = row[DEPTH.layout.end :]
            trace = [vertex for vertex in shown if vertex != DEPTH.layout.path]
            # Marks stand on the left alone.
            assert shown[-len(trace) :] == trace
            assert trace[0] == start
            assert goal not in trace
            for n in range(1, len(trace)):
                assert trace[n] in next_visits(children, goal, trace[:n])[1]
            back, wanted = next_visits(children, goal, trace)
            assert back == level
            assert set(right.nonzero()[:, 0].tolist()) == wanted
            levels.add(back)
    assert levels == {0, 1, 2, 3}


def test_steps_are_those_of_a_search():
    kinds = set()
    for level in STEPS.levels:
        batch = STEPS.examples(f"test_{level}")
        for row, right in zip(batch.tokens.tolist(), batch.right, strict=True):
            children, _ = parse_edges(row[: STEPS.layout.end], edge=STEPS.layout.edge)
            _, start, goal, _, *path = row[STEPS.layout.end :]
            mark = STEPS.layout.path
            frontier, selected, following = steps_of(children, start, path, mark)
            assert set(right.nonzero()[:, 0].tolist()) == (frontier if selected is None else following)
            assert goal not in path
            triples = path[:-1] if selected is None else path[:-2]
            seen = {start}
            for at in range(len(triples) % 3, len(triples), 3):
                before, parent, child = triples[at : at + 3]
                assert before == mark
                if parent == mark:
                    continue
                assert parent in seen
                assert child in children[parent]
                seen.add(child)
            if selected is not None:
                assert path[-2] == mark
                assert selected in frontier
                assert len(frontier) + len(following) - 1 == level
            kinds.add(selected is None)
    assert kinds == {True, False}


@TASKS
def test_no_graph_is_in_training_and_in_a_test(task):
    def questions(batch):
        return {
            (
                frozenset((a, b) for a, targets in parse_edges(row[: task.layout.end], edge=task.layout.edge)[0].items()
                          for b in targets),
                *row[task.layout.end + 1 : task.layout.end + 3],
            )
            for row in batch.tokens.tolist()
        }  # fmt: skip

    assert not questions(task.stream(1000, seed=0)) & questions(task.examples("test"))


@TASKS
def test_a_prompt_is_read_back(task):
    batch = task.stream(50, seed=0)
    for row, right in zip(batch.tokens, batch.right, strict=True):
        again = task.prompt(task.decode(row.tolist()))
        assert torch.equal(again.tokens[0], row)
        assert torch.equal(again.right[0], right)


@TASKS
def test_a_counterfactual_exchanges_two_names_in_the_edges(task):
    pairs = task.contrast(task.stream(100, seed=0), seed=0)
    # A selection's answers, and a goal, stand in the tail and cannot be exchanged.
    assert len(pairs) > (30 if task is DEPTH else 15)
    end = task.layout.end
    assert torch.equal(pairs.tokens[:, end:], pairs.corrupt[:, end:])
    for row, changed, answer, other in zip(
        pairs.tokens[:, :end].tolist(), pairs.corrupt[:, :end].tolist(), pairs.targets[:, -1].tolist(),
        pairs.distractor[:, -1].tolist(), strict=True,
    ):  # fmt: skip
        exchange = {answer: other, other: answer}
        assert changed == [exchange.get(token, token) for token in row]
    moved = task._right(task.layout.read(pairs.corrupt.numpy()), task.layout.read_tail(pairs.corrupt.numpy()))
    assert (moved >> pairs.distractor[:, -1].numpy() & 1 == 1).all()
    assert (moved >> pairs.targets[:, -1].numpy() & 1 == 0).all()


def test_the_check_of_traces_can_fail(monkeypatch):
    # Mutant: a search that goes on from the first vertex that it can, not the last.
    plain = graph_traces._next_visits

    def breadth_first(graphs, trace):
        back, following = plain(graphs, trace[:, ::-1])
        return trace.shape[1] - 1 - back, following

    monkeypatch.setattr(graph_traces, "_next_visits", breadth_first)
    monkeypatch.setattr(DepthFirst, "seed", 5, raising=False)
    with pytest.raises(AssertionError):
        test_a_trace_is_that_of_a_depth_first_search()


def test_prompts_by_hand():
    batch = DEPTH.prompt("1>2 1>3 2>4 3>5 Q 1 5 P 1 2 4")
    assert DEPTH.vocab[batch.targets[0, -1]] == "3"
    assert DEPTH.vocab[DEPTH.prompt("1>2 1>3 Q 1 3").targets[0, -1]] == "3"
    selecting = STEPS.prompt("1>2 1>3 2>4 3>5 Q 1 5 P 1 2 P")
    assert [STEPS.vocab[token] for token in selecting.right[0].nonzero()[:, 0].tolist()] == ["1", "2"]
    inferring = STEPS.prompt("1>2 1>3 2>4 3>5 Q 1 5 P 1 2 P 2")
    assert inferring.right[0].nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (DEPTH, "1>2 2>3 Q 1 3 P 2 1", "The path must begin at the start 1"),
        (DEPTH, "1>2 2>3 Q 1 3 P 1 2 3", "After this path there is nothing to answer. Shorten it"),
        (DEPTH, "1>2 2>3 Q 1 3 P " + "1 " * 11, "The path has 11 tokens; this prompt has room for 10"),
    ],
)
def test_bad_paths_are_refused(task, text, message):
    with pytest.raises(WorkbenchError, match=message):
        task.prompt(text)


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (DEPTH, {"size": 20}, "size 20 are too short for a search: give at least 28 positions"),
        (DEPTH, {"backtrack": 8}, "Backtracking by 8 does not fit 10 edges: choose 0 to 7"),
        (STEPS, {"breadth": 6}, "Breadth 6 does not fit 10 edges: choose 1 to 5"),
        (STEPS, {"size": 30}, "give at least 38 positions"),
    ],
)
def test_bad_fields_are_refused(task, fields, message):
    with pytest.raises(WorkbenchError, match=message):
        replace(task, **fields)
