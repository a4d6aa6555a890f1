"""Which values each variable of a program can have: computed from what it reads, never assumed.

The sets are sound: a value that occurs on any input is in them. They may hold values that never occur, since what a
part reads is taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np

from workbench.models.discrete import CategoricalHead, DiscreteProgram, NumericalMLP

MOST_CELLS = 4096
"""Pairs of numbers up to which a numerical MLP is looked at one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """What can occur, by variable in the order of `workbench.models.discrete`."""

    values: tuple[frozenset[int], ...]
    """Of each categorical variable."""
    kinds: tuple[str, ...]
    """What each categorical variable's values are: `token 0`, `token 1` and so on, `position`, or `code`."""
    numbers: tuple[tuple[int, int], ...]
    """Least and largest value of each numerical variable."""


def find_ranges(program: DiscreteProgram, inputs: Iterable[int]) -> Ranges:
    """What can occur where prompts hold the tokens `inputs`."""
    tokens = sorted(set(inputs) - {program.pad_token})
    n = program.shape.n_ctx
    values = [frozenset(program.embedding[tokens, column].tolist()) for column in range(program.embedding.shape[1])]
    values.append(frozenset(range(n)))
    kinds = [*(f"token {column}" for column in range(program.embedding.shape[1])), "position"]
    numbers = [(1, 1)]
    for layer in program.layers:
        copied = [(_copied(head, values), kinds[head.value]) for head in layer.categorical_heads]
        summed = [(0, n * numbers[head.value][1]) for head in layer.numerical_heads]
        values += [found for found, _ in copied]
        kinds += [kind for _, kind in copied]
        numbers += summed
        codes = [
            frozenset(int(mlp.table[pair]) for pair in product(*(values[read] for read in mlp.reads)))
            for mlp in layer.categorical_mlps
        ]
        codes += [_coded(mlp, numbers) for mlp in layer.numerical_mlps]
        values += codes
        kinds += ["code"] * len(codes)
    return Ranges(values=tuple(values), kinds=tuple(kinds), numbers=tuple(numbers))


def cells(mlp: NumericalMLP, numbers: Iterable[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """All pairs of numbers that an MLP may read; None where they are too many."""
    known = list(numbers)
    (first_low, first_high), (second_low, second_high) = (known[read] for read in mlp.reads)
    if mlp.reads[0] == mlp.reads[1]:
        return [(value, value) for value in range(first_low, first_high + 1)]
    count = (first_high - first_low + 1) * (second_high - second_low + 1)
    if count > MOST_CELLS:
        return None
    return list(product(range(first_low, first_high + 1), range(second_low, second_high + 1)))


def _copied(head: CategoricalHead, values: list[frozenset[int]]) -> frozenset[int]:
    # Position 0 is copied where nothing matches, so that its value is among those of the variable too.
    return values[head.value]


def _coded(mlp: NumericalMLP, numbers: list[tuple[int, int]]) -> frozenset[int]:
    pairs = cells(mlp, numbers)
    if pairs is None:
        return frozenset(range(len(mlp.b_out)))
    return frozenset(mlp(np.array(pairs)).tolist())
