"""Which values each variable of a program can have: computed from what it reads, never assumed.

By the program's text the sets are sound: a value that occurs on any input is in them; they may hold values that never
occur, since what a part reads is taken as independent. From all inputs, where these are listed, they are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Int64

from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
    Part,
)
from workbench.models.interpreter import run_program

MOST_CELLS = 4096
"""Pairs of numbers up to which a numerical MLP is looked at one by one."""
WIDE = 1 << 32
"""More than any variable holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """What can occur, by variable in the order of `workbench.models.discrete`."""

    values: tuple[frozenset[int], ...]
    """Of each categorical variable."""
    kinds: tuple[str, ...]
    """What each categorical variable's values are: `token 0`, `token 1` and so on, `position`, or `code`."""
    numbers: tuple[tuple[int, int], ...]
    """Least and largest value of each numerical variable."""
    pairs: Mapping[str, frozenset[tuple[int, int]] | None]
    """What each MLP may read, by its part's name; None where that is more than is listed."""


def find_ranges(program: DiscreteProgram, inputs: Iterable[int]) -> Ranges:
    """What can occur where prompts hold the tokens `inputs`."""
    tokens = sorted(set(inputs) - {program.pad_token})
    n = program.shape.n_ctx
    values = [frozenset(program.embedding[tokens, column].tolist()) for column in range(program.embedding.shape[1])]
    values.append(frozenset(range(n)))
    numbers = [(1, 1)]
    pairs: dict[str, frozenset[tuple[int, int]] | None] = {}
    for part in program.parts:
        match part.does:
            case CategoricalHead() as head:
                # Position 0 is copied where nothing matches: its value is one of the variable's too.
                values.append(values[head.value])
            case NumericalHead() as head:
                numbers.append((0, n * numbers[head.value][1]))
            case CategoricalTable() as mlp:
                found = _read_together(part, [sorted(values[read]) for read in mlp.reads])
                values.append(frozenset(int(mlp.table[pair]) for pair in found))
                pairs[part.name] = found
            case NumericalFunction() as mlp:
                spans = [range(numbers[read][0], numbers[read][1] + 1) for read in mlp.reads]
                few = len(spans[0]) * len(spans[1]) <= MOST_CELLS or mlp.reads[0] == mlp.reads[1]
                pairs[part.name] = _read_together(part, spans) if few else None
                values.append(_codes(mlp, pairs[part.name]))
    return Ranges(values=tuple(values), kinds=_kinds(program), numbers=tuple(numbers), pairs=pairs)


def observed_ranges(program: DiscreteProgram, prompts: Iterable[Int64[np.ndarray, "_ pos"]]) -> Ranges:
    """What occurs on prompts, exactly.

    Args:
        program: whose variables.
        prompts: all there are, in parts that fit into memory; padding is left out.
    """
    values: dict[int, set[int]] = {}
    numbers: dict[int, set[int]] = {}
    pairs: dict[str, set[tuple[int, int]]] = {}
    for tokens in prompts:
        categorical, numerical = (found[tokens != program.pad_token] for found in run_program(program, tokens))
        for place, column in enumerate(categorical.T):
            values.setdefault(place, set()).update(np.unique(column).tolist())
        for place, column in enumerate(numerical.T):
            numbers.setdefault(place, set()).update((int(column.min()), int(column.max())))
        for part in program.parts:
            if isinstance(part.does, CategoricalTable | NumericalFunction):
                read = categorical if isinstance(part.does, CategoricalTable) else numerical
                first, second = (read[:, at] for at in part.does.reads)
                # Two columns as one number: ten times faster than by rows.
                both = np.unique(first * WIDE + second)
                found = np.stack([both // WIDE, both % WIDE], 1).tolist()
                pairs.setdefault(part.name, set()).update((one, two) for one, two in found)
    return Ranges(
        values=tuple(frozenset(values[place]) for place in sorted(values)),
        kinds=_kinds(program),
        numbers=tuple((min(numbers[place]), max(numbers[place])) for place in sorted(numbers)),
        pairs={name: frozenset(found) if len(found) <= MOST_CELLS else None for name, found in pairs.items()},
    )


def _kinds(program: DiscreteProgram) -> tuple[str, ...]:
    kinds = [*(f"token {column}" for column in range(program.embedding.shape[1])), "position"]
    for part in program.parts:
        if isinstance(part.does, CategoricalHead):
            kinds.append(kinds[part.does.value])
        elif not isinstance(part.does, NumericalHead):
            kinds.append("code")
    return tuple(kinds)


def _read_together(part: Part, values: Sequence[Sequence[int]]) -> frozenset[tuple[int, int]]:
    assert isinstance(part.does, CategoricalTable | NumericalFunction)
    first, second = part.does.reads
    if first == second:
        return frozenset((value, value) for value in values[0])
    return frozenset(product(values[0], values[1]))


def _codes(mlp: NumericalFunction, pairs: frozenset[tuple[int, int]] | None) -> frozenset[int]:
    return mlp.values if pairs is None else frozenset(mlp(np.array(sorted(pairs))).tolist())
