"""A Transformer Program after discretisation: which variables each part reads, and what it makes of them.

Source: Friedman, Wettig and Chen, "Learning Transformer Programs" (2023), section 3. A value without tensors or noise:
the model that trains makes one of itself, and what decompiles, proves or emits it reads nothing else.

Variables of a position, in the order in which they are appended:

* categorical, each a number below `ProgramShape.cardinality`: one per embedding column, the position, then by layer its
  categorical heads, its categorical MLPs and its numerical MLPs;
* numerical, each an integer: the constant 1, then by layer its numerical heads.

A part reads variables of earlier layers alone, save the MLPs, which read their own layer's heads as well.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramShape:
    """Sizes of a program."""

    cardinality: int
    """Values of a categorical variable."""
    n_ctx: int
    """Longest sequence, special tokens included."""
    causal: bool
    """Whether heads see no later position."""
    pooled: bool = False
    """Whether the votes of a sequence's positions are averaged; the result stands at each of them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CategoricalHead:
    """Copies a variable from the nearest position whose key matches; from position 0 where none does.

    A key matches if it equals `predicate[query]`. The nearest match is taken: at equal distance the earlier one, and
    the query's own position only if no other matches.
    """

    query: int
    key: int
    value: int
    """Categorical variables that it reads."""
    predicate: Int64[np.ndarray, " query"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NumericalHead:
    """Sums a numerical variable over all positions whose key matches, its own and position 0 among them."""

    query: int
    key: int
    value: int
    """Query and key are categorical variables, the value is a numerical one."""
    predicate: Int64[np.ndarray, " query"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CategoricalTable:
    """A categorical variable from two of them."""

    reads: tuple[int, int]
    table: Int64[np.ndarray, "first second"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NumericalFunction(ABC):
    """A categorical variable from two numerical ones."""

    reads: tuple[int, int]

    @abstractmethod
    def __call__(self, numbers: Int64[np.ndarray, "*batch 2"]) -> Int64[np.ndarray, " *batch"]:
        """The value at each pair."""

    @property
    @abstractmethod
    def values(self) -> frozenset[int]:
        """All that it may say."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NumericalMLP(NumericalFunction):
    """By one hidden layer with ReLU, in float64."""

    W_in: Float64[np.ndarray, "2 hidden"]
    b_in: Float64[np.ndarray, " hidden"]
    W_out: Float64[np.ndarray, "hidden value"]
    b_out: Float64[np.ndarray, " value"]

    def __call__(self, numbers: Int64[np.ndarray, "*batch 2"]) -> Int64[np.ndarray, " *batch"]:
        """The first of the largest outputs."""
        hidden = np.maximum(numbers.astype(np.float64) @ self.W_in + self.b_in, 0)
        return (hidden @ self.W_out + self.b_out).argmax(-1)

    @property
    def values(self) -> frozenset[int]:
        """As many as there are outputs."""
        return frozenset(range(len(self.b_out)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A comparison in a tree: which of the two numbers, and what follows where it is at most so much, and above it."""

    reads: int
    """0 or 1."""
    at_most: int
    below: Split | int
    above: Split | int
    """A value, or the next comparison."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NumericalTree(NumericalFunction):
    """By comparisons: a short stand-in for a `NumericalMLP`."""

    root: Split | int

    def __call__(self, numbers: Int64[np.ndarray, "*batch 2"]) -> Int64[np.ndarray, " *batch"]:
        """The value at each pair's leaf."""

        def decide(node: Split | int) -> np.ndarray:
            if isinstance(node, int):
                return np.full(numbers.shape[:-1], node)
            return np.where(numbers[..., node.reads] <= node.at_most, decide(node.below), decide(node.above))

        return decide(self.root)

    @property
    def values(self) -> frozenset[int]:
        """Those at its leaves."""

        def leaves(node: Split | int) -> frozenset[int]:
            return frozenset({node}) if isinstance(node, int) else leaves(node.below) | leaves(node.above)

        return leaves(self.root)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """Heads read what stands before the layer; the MLPs read the heads' outputs as well, not each other's."""

    categorical_heads: tuple[CategoricalHead, ...]
    numerical_heads: tuple[NumericalHead, ...]
    categorical_mlps: tuple[CategoricalTable, ...]
    numerical_mlps: tuple[NumericalMLP | NumericalTree, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """A head or an MLP in its place."""

    name: str
    """Of the variable that it writes: what it does, its layer, and its number among those that do so there."""
    does: CategoricalHead | NumericalHead | CategoricalTable | NumericalMLP | NumericalTree
    writes: int
    """Place of that variable, among the numerical ones for a numerical head, else among the categorical ones."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DiscreteProgram:
    """From tokens to a class at every position."""

    shape: ProgramShape
    vocab: tuple[str, ...]
    """Tokens by id."""
    classes: tuple[str, ...]
    """Outputs by id."""
    pad_token: int
    """Padding on the right; no head sees it."""
    embedding: Int64[np.ndarray, "token column"]
    """Categorical variables of each token."""
    layers: tuple[Layer, ...]
    W_categorical: Float64[np.ndarray, "variable value output"]
    """What each value of each categorical variable adds to the logits."""
    W_numerical: Float64[np.ndarray, "number output"]
    """What one of each numerical variable adds to the logits."""
    allowed: tuple[bool, ...]
    """Whether a class may be the output; the largest allowed logit wins, the first of equals."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All heads and MLPs, in an order in which each finds what it reads."""
        found = []
        categorical, numerical = itertools.count(self.embedding.shape[1] + 1), itertools.count(1)
        for index, layer in enumerate(self.layers):
            for name, group, places in (
                ("copy", layer.categorical_heads, categorical),
                ("sum", layer.numerical_heads, numerical),
                ("table", layer.categorical_mlps, categorical),
                ("counts", layer.numerical_mlps, categorical),
            ):
                found += [
                    Part(name=f"{name}_{index}_{at}", does=each, writes=next(places)) for at, each in enumerate(group)
                ]
        return tuple(found)
