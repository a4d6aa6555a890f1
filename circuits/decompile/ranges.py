"""Which values each variable of a program can have: computed from what it reads, never assumed.

The sets are sound: a value that occurs on any input is in them. They may hold values that never occur, since what a
part reads is taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from workbench.models.discrete import CategoricalHead, CategoricalTable, DiscreteProgram, NumericalHead, NumericalMLP

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
    for part in program.parts:
        match part.does:
            case CategoricalHead() as head:
                # Position 0 is copied where nothing matches: its value is one of the variable's too.
                values.append(values[head.value])
                kinds.append(kinds[head.value])
            case NumericalHead() as head:
                numbers.append((0, n * numbers[head.value][1]))
            case CategoricalTable() as mlp:
                pairs = product(*(values[read] for read in mlp.reads))
                values.append(frozenset(int(mlp.table[pair]) for pair in pairs))
                kinds.append("code")
            case NumericalMLP() as mlp:
                pairs = cells(mlp, numbers)
                every = frozenset(range(len(mlp.b_out)))
                values.append(every if pairs is None else frozenset(mlp(np.array(pairs)).tolist()))
                kinds.append("code")
    return Ranges(values=tuple(values), kinds=tuple(kinds), numbers=tuple(numbers))


def cells(mlp: NumericalMLP, numbers: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """All pairs of numbers that an MLP may read; None where they are too many."""
    (first_low, first_high), (second_low, second_high) = (numbers[read] for read in mlp.reads)
    if mlp.reads[0] == mlp.reads[1]:
        return [(value, value) for value in range(first_low, first_high + 1)]
    count = (first_high - first_low + 1) * (second_high - second_low + 1)
    if count > MOST_CELLS:
        return None
    return list(product(range(first_low, first_high + 1), range(second_low, second_high + 1)))
