"""Trees in place of numerical MLPs: on the sample they say the same, and modules with them are short and checked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from program_models import model_of

from circuits.decompile.decompiled import decompile
from circuits.decompile.trees import plant_trees
from workbench.models.discrete import Layer, NumericalHead, NumericalMLP, NumericalTree, Split
from workbench.models.interpreter import program_logits, run_program
from workbench.tasks.sequences import Sequences


def counting(mlp, n_ctx=6):
    """A program of an MLP that reads the count of the own letter twice, its task, and prompts."""
    task = Sequences(letters=2, n_ctx=n_ctx, size=200)
    base = model_of(task, n_layers=1, categorical_heads=0, categorical_mlps=0).discrete_program(tuple(task.vocab))
    head = NumericalHead(query=0, key=0, value=0, predicate=np.arange(8))
    layer = Layer(categorical_heads=(), numerical_heads=(head,), categorical_mlps=(), numerical_mlps=(mlp,))
    return replace(base, layers=(layer,)), task.examples("train").tokens.numpy()


def mlp_of(b_in, W_out, b_out):
    """One hidden unit, of the first number."""
    W_in, W_out = np.array([[1.0], [0.0]]), np.array([W_out], dtype=float)
    return NumericalMLP(reads=(1, 1), W_in=W_in, b_in=np.array([b_in]), W_out=W_out, b_out=np.array(b_out, dtype=float))


def test_a_threshold_is_a_tree_of_one_comparison():
    mlp = mlp_of(-2.0, [0, 2], [0.5, 0])
    program, tokens = counting(mlp)
    planted = plant_trees(program, tokens, [mlp], lambda each: True)
    [tree] = planted.layers[0].numerical_mlps
    assert isinstance(tree, NumericalTree)
    assert (tree.root.at_most, tree.root.below, tree.root.above) == (2, 0, 1)
    assert tree.values == {0, 1}
    # Of numbers that never occur it says what the MLP says too.
    numbers = np.stack([np.arange(20)] * 2, -1)
    assert np.array_equal(tree(numbers), mlp(numbers))
    assert np.array_equal(program_logits(planted, tokens), program_logits(program, tokens))


def test_what_is_always_the_same_is_no_comparison():
    mlp = mlp_of(-100.0, [0, 2], [0.5, 0])
    program, tokens = counting(mlp)
    [tree] = plant_trees(program, tokens, [mlp], lambda each: False).layers[0].numerical_mlps
    assert (tree.root, tree.values) == (0, {0})
    assert tree(np.zeros((3, 4, 2), dtype=int)).tolist() == [[0] * 4] * 3


def test_trees_grow_until_they_are_accepted_or_say_the_same():
    """An MLP that says the count itself: 2 n x - n² is largest where n is x."""
    mlp = mlp_of(0.0, 2 * np.arange(8), -(np.arange(8) ** 2))
    program, tokens = counting(mlp, n_ctx=8)
    tried = []

    def accept(each):
        tried.append(leaves(each.layers[0].numerical_mlps[0].root))
        return len(tried) == 3

    planted = plant_trees(program, tokens, [mlp], accept)
    # Counts are 1 to 7: with eight leaves allowed there are seven, and nobody needs to be asked.
    assert tried == [2, 4]
    assert leaves(planted.layers[0].numerical_mlps[0].root) == 7
    real = tokens != program.pad_token
    for one, two in zip(run_program(planted, tokens), run_program(program, tokens), strict=True):
        assert np.array_equal(one[real], two[real])
    # The third that is asked about is accepted.
    assert leaves(plant_trees(program, tokens, [mlp], accept).layers[0].numerical_mlps[0].root) == 2


def leaves(node):
    return leaves(node.below) + leaves(node.above) if isinstance(node, Split) else 1


@pytest.mark.parametrize("function", ["dyck", "hist"])
def test_a_budget_makes_trees_of_what_cannot_be_listed(function, monkeypatch):
    """Sequences that are listed and sequences that are not; the modules were run, and would have been refused."""
    monkeypatch.setattr("circuits.decompile.ranges.MOST_CELLS", 3)
    task = Sequences(function=function, letters=2, n_ctx=8, size=200)
    model = model_of(task, seed=1, n_layers=2, categorical_heads=0, numerical_heads=2, categorical_mlps=0)
    for layer, reads in zip(model.layers, ((1, 2), (3, 4)), strict=True):
        for at, read in enumerate(reads):
            layer.number_tables.read.data[:, at] = 10 * torch.eye(layer.number_tables.read.shape[-1])[read]
    whole, short = (decompile(model, task, budget=budget) for budget in (0.0, 0.01))
    assert "w_out = (" in whole.text
    assert "w_out = (" not in short.text
    assert whole.agreement == 1
    assert short.lines < whole.lines
