"""The model that is wired to search: right on the task's own tests, and by the parts that its docstring names."""

import pytest
import torch

from workbench.models.planted_search import path_doubling
from workbench.tasks.graph_search import GraphSearch


def accuracy(model, batch):
    with torch.no_grad():
        answers = model(batch.tokens)[batch.read].argmax(1)
    return float((answers == batch.targets[batch.read]).double().mean())


@pytest.mark.parametrize(("size", "spare"), [(26, 1), (27, 0), (32, 1)])
def test_every_answer_of_paths_of_three_edges_is_right(size, spare):
    task = GraphSearch(size=size, spare=spare, test_size=200)
    model = path_doubling(task.layout)
    for lookahead in range(4):
        assert accuracy(model, task.examples(f"test_{lookahead}")) == 1


def test_longer_paths_are_beyond_it():
    task = GraphSearch(size=32, test_size=200)
    assert accuracy(path_doubling(task.layout), task.examples("test_4")) < 0.8


@pytest.mark.parametrize(("layer", "at_three"), [(0, 0.7), (1, 0.7), (2, 0.1)])
def test_every_layer_is_needed(layer, at_three):
    """Without what one layer writes, which of two branches leads to the goal is a guess, or nothing is said at all."""
    task = GraphSearch(size=26, test_size=200)
    model = path_doubling(task.layout)
    model.weights[layer].attn.W_O.data.zero_()
    assert accuracy(model, task.examples("test_3")) < at_three


def test_rows_attend_where_they_should():
    task = GraphSearch(size=26, test_size=1)
    batch = task.ask([(1, 2), (2, 3), (1, 4)], 1, 3)
    found = {}
    with torch.no_grad():
        model = path_doubling(task.layout)
        model(batch.tokens, {site: lambda x, s=site: found.setdefault(str(s), x) for site in model.sites})
    bind, double, read = (found[f"L{layer}.pattern"][0, 0].argmax(1).tolist() for layer in range(3))
    # Ends of the edges at positions 13 14, 16 17, 19 20; the goal at 23, the sink at 24.
    assert [bind[row] for row in (13, 14, 16, 17, 19, 20, 25)] == [14, 13, 17, 16, 20, 19, 23]
    assert [double[row] for row in (13, 16, 19, 25)] == [16, 24, 24, 17]
    assert read[25] == 13
