"""Functions of two numbers that are too many to list, as the smallest trees of comparisons that keep the answers.

A numerical MLP says something of every pair of numbers, and only some of these occur. A tree that is grown on the pairs
of a sample, weighed by how often each occurs (CART, Breiman et al. 1984), is a few lines, and says something of all
others too: the program with the tree in place of the MLP is a program like any other, and is run, emitted and proved
as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64
from sklearn.tree import DecisionTreeClassifier

from workbench.models.discrete import DiscreteProgram, NumericalMLP, NumericalTree, Split
from workbench.models.interpreter import run_program


def plant_trees(
    program: DiscreteProgram,
    tokens: Int64[np.ndarray, "batch pos"],
    mlps: Sequence[NumericalMLP],
    accept: Callable[[DiscreteProgram], bool],
) -> DiscreteProgram:
    """The program with trees in place of numerical MLPs, each of twice as many leaves until it is accepted.

    Args:
        program: what is shortened.
        tokens: the sample, by which trees grow; on it a tree of enough leaves says what its MLP says.
        mlps: those of its MLPs that are replaced, in the order in which they are computed.
        accept: whether a program keeps enough of the answers.
    """
    real = tokens != program.pad_token
    for mlp in mlps:
        # Trees before this one may have changed what it reads.
        _, numerical = run_program(program, tokens)
        pairs, count = np.unique(numerical[real][:, list(mlp.reads)], axis=0, return_counts=True)
        codes = mlp(pairs)
        n_leaves = 2
        while True:
            grown = DecisionTreeClassifier(max_leaf_nodes=n_leaves, random_state=0).fit(pairs, codes, count)
            planted = _replaced(program, mlp, NumericalTree(reads=mlp.reads, root=_node(grown)))
            # With leaves to spare the tree says what the MLP says.
            if grown.get_n_leaves() < n_leaves or accept(planted):
                break
            n_leaves *= 2
        program = planted
    return program


def _node(grown: DecisionTreeClassifier, at: int = 0) -> Split | int:
    """The tree from a node on; thresholds lie between whole numbers."""
    tree = grown.tree_
    if tree.children_left[at] == tree.children_right[at]:
        return int(grown.classes_[tree.value[at, 0].argmax()])
    return Split(
        reads=int(tree.feature[at]),
        at_most=int(tree.threshold[at]),
        below=_node(grown, int(tree.children_left[at])),
        above=_node(grown, int(tree.children_right[at])),
    )


def _replaced(program: DiscreteProgram, mlp: NumericalMLP, tree: NumericalTree) -> DiscreteProgram:
    layers = [
        replace(layer, numerical_mlps=tuple(tree if each is mlp else each for each in layer.numerical_mlps))
        for layer in program.layers
    ]
    return replace(program, layers=tuple(layers))
