"""What a program does not need: variables that change no vote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuits.decompile.ranges import Ranges
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
    Part,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """Variables that are still needed, by their places."""

    categorical: frozenset[int]
    numerical: frozenset[int]

    def parts(self, program: DiscreteProgram) -> list[Part]:
        """The parts that write one of them, in the order in which they run."""
        return [
            part
            for part in program.parts
            if part.writes in (self.numerical if isinstance(part.does, NumericalHead) else self.categorical)
        ]


def find_voters(program: DiscreteProgram, ranges: Ranges) -> Live:
    """Variables whose votes differ between values that occur."""
    allowed = np.flatnonzero(program.allowed)
    categorical = {
        place
        for place, values in enumerate(ranges.values)
        if np.ptp(program.W_categorical[place][sorted(values)][:, allowed], axis=0).any()
    }
    numerical = {
        place
        for place, (low, high) in enumerate(ranges.numbers)
        if low < high and np.ptp(program.W_numerical[place][allowed]) > 0
    }
    return Live(categorical=frozenset(categorical), numerical=frozenset(numerical))


def find_live(program: DiscreteProgram, ranges: Ranges) -> Live:
    """What the votes need: the voters, and all that these are made of."""
    voters = find_voters(program, ranges)
    categorical, numerical = set(voters.categorical), set(voters.numerical)
    for part in reversed(program.parts):
        match part.does:
            case NumericalHead() as head if part.writes in numerical:
                categorical |= {head.query, head.key}
                numerical.add(head.value)
            case CategoricalHead() as head if part.writes in categorical:
                categorical |= {head.query, head.key, head.value}
            case CategoricalTable() as mlp if part.writes in categorical:
                categorical.update(mlp.reads)
            case NumericalFunction() as mlp if part.writes in categorical:
                numerical.update(mlp.reads)
            case _:
                pass
    return Live(categorical=frozenset(categorical), numerical=frozenset(numerical))
