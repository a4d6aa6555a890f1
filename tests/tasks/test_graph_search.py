from collections import Counter
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_by_hand import lookahead, parse, reachable, useful

from workbench.runtime import WorkbenchError
from workbench.tasks import graph_task
from workbench.tasks.base import Streamed, Task
from workbench.tasks.graph_search import GraphSearch

TASK = GraphSearch(size=26, test_size=100)
WIDE = GraphSearch(size=44, test_size=50)


def check_invariants(task, batch):
    """A1: acyclic, goal reachable, few enough edges, names in range, layout as documented, label among the right."""
    layout = task.layout
    last = layout.n_names
    assert batch.tokens.shape[1] == task.size
    for row, answer, right in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), batch.right, strict=True):
        children, start, goal, n_edges = parse(row, edge=layout.edge)
        used = {*children, *(vertex for targets in children.values() for vertex in targets)}
        assert used <= set(range(1, last + 1))
        assert {start, goal} <= used
        assert len(used) <= layout.n_edges
        assert sum(map(len, children.values())) == n_edges <= layout.n_edges
        assert row[: task.size - 5 - 3 * n_edges] == [layout.pad] * (task.size - 5 - 3 * n_edges)
        assert row[-5:] == [layout.query, start, goal, layout.path, start]
        assert not any(vertex in reachable(children, vertex) for vertex in children)
        assert set(right.nonzero()[:, 0].tolist()) == useful(children, start, goal)
        assert answer in useful(children, start, goal)


def lookaheads_by_hand(task, batch):
    return [
        lookahead(*parse(row, edge=task.layout.edge)[:3]) for row in batch.tokens.tolist()
    ]  # fmt: skip


def test_is_a_task_that_streams():
    assert isinstance(TASK, Task)
    assert isinstance(TASK, Streamed)


@pytest.mark.parametrize("distribution", ["balanced", "naive", "star"])
@pytest.mark.parametrize("task", [TASK, WIDE], ids=["26", "44"])
def test_invariants_of_training_and_tests(task, distribution):
    task = replace(task, distribution=distribution)
    batch = task.stream(200, seed=0)
    check_invariants(task, batch)
    # A2: the bit masks find what plain Python finds, after a walk through tokens.
    assert task.graphs(batch).lookahead().tolist() == lookaheads_by_hand(task, batch)
    for split in task.splits:
        check_invariants(task, task.examples(split))


@pytest.mark.slow
@pytest.mark.parametrize("size", [26, 32, 128])
def test_invariants_over_many_examples(size):
    task = GraphSearch(size=size)
    counts = Counter()
    for seed in range(10):
        batch = task.stream(10_000, seed=seed)
        check_invariants(task, batch)
        found = lookaheads_by_hand(task, batch)
        assert task.graphs(batch).lookahead().tolist() == found
        counts.update(found)
    shares = [counts[level] / 100_000 for level in task.levels]
    assert max(abs(share - 1 / len(shares)) for share in shares) < 0.01


@pytest.mark.parametrize("most", [None, 1])
def test_strict_lookaheads_are_uniform(most):
    task = replace(TASK, lookahead=most)
    counts = np.bincount(task.graphs(task.stream(20_000, seed=1)).lookahead(), minlength=1)
    assert len(counts) == (4 if most is None else 2)
    assert np.abs(counts / 20_000 - 1 / len(counts)).max() < 0.012


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_largest_of_several_draws_favours_large_lookaheads(draws):
    task = replace(TASK, level_draws=draws)
    counts = np.bincount(task.graphs(task.stream(20_000, seed=1)).lookahead(), minlength=4)
    below = (np.arange(5) / 4) ** draws
    np.testing.assert_allclose(counts / 20_000, np.diff(below), atol=0.012)
    assert torch.equal(task.examples("test_2").tokens, TASK.examples("test_2").tokens)


def test_legacy_lookaheads_drift():
    task = replace(TASK, mode="legacy", lookahead=2)
    counts = np.bincount(task.graphs(task.stream(20_000, seed=1)).lookahead())
    assert len(counts) == 3
    assert np.abs(counts / 20_000 - 1 / 3).max() > 0.02


def test_naive_lookaheads_become_rarer():
    # A3
    task = GraphSearch(size=62, distribution="naive")
    counts = np.bincount(task.graphs(task.stream(10_000, seed=0)).lookahead(), minlength=6)
    assert (np.diff(counts[1:]) <= 0).all()
    assert counts[5:].sum() < 100


def test_a_star_is_chains_of_one_length():
    # A4
    task = replace(TASK, distribution="star")
    graphs = task.graphs(task.stream(500, seed=0))
    n_chains = np.bitwise_count(graphs.first)
    assert (graphs.n_edges % n_chains == 0).all()
    assert graphs.lookahead().tolist() == np.where(n_chains > 1, graphs.n_edges // n_chains, 0).tolist()
    assert (np.bitwise_count(graphs.children).max(1) == n_chains).all()
    assert set(zip(n_chains.tolist(), (graphs.n_edges // n_chains).tolist(), strict=True)) == {
        *((n, 1) for n in range(1, 7)), *((n, 2) for n in range(1, 4)), (1, 3), (2, 3),
    }  # fmt: skip


def question_of(task, row):
    children, start, goal, _ = parse(row, edge=task.layout.edge)
    return frozenset((a, b) for a in children for b in children[a]), start, goal


def held_out(task):
    return {question_of(task, row) for split in task.splits[1:] for row in task.examples(split).tokens.tolist()}


def seen(task):
    return {question_of(task, row) for row in task.stream(5000, seed=0).tokens.tolist()}


def test_no_graph_is_in_training_and_in_a_test():
    # A6, whatever the order of the edges.
    assert not held_out(TASK) & seen(TASK)
    assert not held_out(TASK) & {question_of(TASK, row) for row in TASK.examples("train").tokens.tolist()}


def test_the_check_of_splits_can_fail(monkeypatch):
    given = seen(TASK)
    # Mutant: every graph is held out, and training was given some before.
    monkeypatch.setattr(graph_task, "HELD_OUT", 1)
    assert held_out(replace(TASK, seed=1)) & given


@pytest.mark.parametrize("level", range(4))
def test_a_split_for_each_lookahead(level):
    batch = TASK.examples(f"test_{level}")
    assert set(TASK.graphs(batch).lookahead().tolist()) == {level}
    assert batch.right.sum(1).eq(1).all()
    assert len(batch) == TASK.test_size


def test_other_tests_ask_for_a_search():
    for split in ("test_naive", "test_star"):
        graphs = TASK.graphs(TASK.examples(split))
        assert (np.bitwise_count(graphs.first) > 1).all()
        assert (graphs.first & np.left_shift(1, graphs.goal) == 0).all()


def test_the_same_seed_gives_the_same_examples():
    assert torch.equal(TASK.stream(50, seed=3).tokens, TASK.stream(50, seed=3).tokens)
    assert not torch.equal(TASK.stream(50, seed=3).tokens, TASK.stream(50, seed=4).tokens)
    other = replace(TASK, seed=1)
    assert not torch.equal(other.examples("test_2").tokens, TASK.examples("test_2").tokens)
    # Models that were trained on different distributions meet the same tests.
    star = replace(TASK, distribution="star", lookahead=2)
    assert torch.equal(star.examples("test_3").tokens, TASK.examples("test_3").tokens)


def test_several_right_children_are_the_label_in_turn():
    batch = replace(TASK, distribution="naive").stream(4000, seed=0)
    several = batch.right.sum(1) == 2
    assert several.sum() > 100
    lower = batch.right[several].int().argmax(1)
    assert 0.4 < float((batch.targets[several, -1] == lower).double().mean()) < 0.6


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_a_counterfactual_moves_the_goal_to_another_branch(seed):
    clean = TASK.stream(20, seed=seed)
    pairs = TASK.contrast(clean, seed=seed)
    assert len(pairs) + pairs.dropped == 20
    assert ((pairs.tokens != pairs.corrupt).sum(1) == 1).all()
    for row, changed, answer, other in zip(
        pairs.tokens.tolist(), pairs.corrupt.tolist(), pairs.targets[:, -1].tolist(),
        pairs.distractor[:, -1].tolist(), strict=True,
    ):  # fmt: skip
        before = useful(*parse(row, edge=TASK.layout.edge)[:3])
        after = useful(*parse(changed, edge=TASK.layout.edge)[:3])
        assert not before & after
        assert answer in before
        assert other in after


def test_the_goal_moves_to_a_vertex_as_far():
    batch = TASK.prompt("1>2 2>3 1>4 4>5 5>6 Q 1 3")
    assert TASK.decode(TASK.contrast(batch).corrupt[0].tolist()) == "1>2 2>3 1>4 4>5 5>6 Q 1 5"


def test_without_a_choice_there_is_no_counterfactual():
    assert TASK.contrast(TASK.prompt("1>2 2>3 Q 1 3")).dropped == 1
    with pytest.raises(WorkbenchError, match="only 0 have headroom"):
        TASK.sample(5, split="test_0")


def test_sampled_pairs_are_of_the_split():
    pairs = TASK.sample(20, split="test_2", seed=0)
    assert len(pairs) == 20
    known = set(map(tuple, TASK.examples("test_2").tokens.tolist()))
    assert set(map(tuple, pairs.tokens.tolist())) <= known


def test_a_prompt_by_hand():
    batch = TASK.prompt("3>1, 1>4; 3 > 2 Q 3 4")
    E, pad, query, path = 10, 11, 12, 9
    assert batch.tokens[0].tolist() == [pad] * 12 + [E, 3, 1, E, 1, 4, E, 3, 2, query, 3, 4, path, 3]
    assert batch.targets[0, -1] == 1
    assert TASK.decode(batch.tokens[0].tolist()) == "3>1 1>4 3>2 Q 3 4"
    assert [TASK.vocab[token] for token in (9, 10, 11, 12)] == ["P", "E", "<pad>", "Q"]
    assert len(TASK.position_labels) == len(batch.tokens[0])
    assert TASK.position_labels[-8:] == ("E7", "source 7", "target 7", "Q", "start", "goal", "P", "current")
    for latent, token in (("start", 3), ("goal", 4), ("next", 1)):
        assert batch.latents[latent].value.tolist() == [token]
    assert batch.latents["goal"].position == TASK.position_labels.index("goal")


BAD = {
    "1>2 2>3 3>1 Q 1 3": r"cycle through 1, 2, 3; graphs here have none\. Leave out an edge",
    "1>2 3>4 Q 1 2": r"several parts: nothing connects 3, 4 with the start 1\. Add an edge",
    "1>2 Q 1 5": r"several parts: nothing connects 5 with the start 1",
    "1>2 1>2 Q 1 2": r"Edge 1>2 is given twice",
    "1>2 1>3 Q 2 3": r"Goal 3 cannot be reached from start 2\. Add an edge or choose another goal",
    "1>2 1>9 Q 1 2": r"Vertex 9 is not in the vocabulary: vertices go from 1 to 8",
    "1>2 0>2 Q 1 2": r"Vertex 0 is not in the vocabulary",
    "1>2 2>3 3>4 4>5 5>6 6>7 7>8 1>8 Q 1 3": r"has 8 edges; the model reads 1 to 7",
    "1>2 Q 1 1": r"Start and goal are both 1\. Choose two vertices",
    "1>2 Q 1": r"Cannot read '1>2 Q 1' as a prompt\. Write edges, then Q, start and goal, like",
    "Q 1 2": r"Cannot read",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_graphs_are_refused(text):
    with pytest.raises(WorkbenchError, match=BAD[text]):
        TASK.prompt(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 19}, r"size 19 are too short for a search: give at least 20 positions"),
        ({"size": 188}, r"Size 188 with 1 spare names makes 62 vertex names; .* fewer than 62 in all"),
        ({"spare": -1}, r"0 or more spare ones"),
        ({"lookahead": 4}, r"Lookahead 4 does not fit prompts of size 26: .* Choose 0 to 3, or a size of 32"),
        ({"lookahead": -1}, r"Choose 0 to 3"),
        ({"test_size": 0}, r"test_size must be at least 1, got 0"),
        ({"level_draws": 0}, r"level_draws must be at least 1, got 0"),
        ({"distribution": "normal"}, r"Unknown distribution 'normal'"),
        ({"mode": "lax"}, r"Unknown mode 'lax'"),
    ],
)
def test_bad_fields_are_refused(fields, message, monkeypatch):
    # The tests' type checker would be first with the names; users run without it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(WorkbenchError, match=message):
        GraphSearch(**fields)


def test_a_spare_name_is_absent_from_every_prompt():
    longest = GraphSearch(size=26, test_size=50).examples("test_3").tokens
    assert all(len(set(range(1, 9)) - set(row)) >= 1 for row in longest.tolist())
    assert GraphSearch(spare=0).layout.n_names == 7


def test_a_counterfactual_may_exchange_two_names():
    pairs = TASK.contrast(TASK.examples("test_3"), "name", seed=0)
    assert len(pairs) > 50
    end = TASK.layout.end
    assert torch.equal(pairs.tokens[:, end:], pairs.corrupt[:, end:])
    for row, changed, answer, other in zip(
        pairs.tokens.tolist(), pairs.corrupt.tolist(), pairs.targets[:, -1].tolist(),
        pairs.distractor[:, -1].tolist(), strict=True,
    ):  # fmt: skip
        assert useful(*parse(row, edge=TASK.layout.edge)[:3]) == {answer}
        assert useful(*parse(changed, edge=TASK.layout.edge)[:3]) == {other}


def test_a_path_that_is_not_the_start_is_refused():
    with pytest.raises(WorkbenchError, match="The path must begin at the start 1"):
        TASK.prompt("1>2 2>3 Q 1 3 P 2")
