"""What a program does not need: variables that change no vote, and votes that hardly ever decide.

Two steps. What is left out first changes no answer on any input: parts whose variables nothing reads that is read in
the end. Then, within a budget of accuracy on given sequences, the votes of variables are replaced by their mean, the
least missed first, and what only fed them goes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int64

from circuits.decompile.ranges import Ranges
from workbench.models.discrete import CategoricalHead, CategoricalTable, DiscreteProgram, NumericalHead, NumericalMLP
from workbench.models.interpreter import run_program

Tokens = Int64[np.ndarray, "batch pos"]
Answers = Int64[np.ndarray, "batch pos"]
Read = Bool[np.ndarray, "batch pos"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """Variables that are still needed, by their places."""

    categorical: frozenset[int]
    numerical: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One variable's votes less."""

    variable: str
    accuracy: float
    """Share of the right answers on the sequences given, after it."""


def find_live(program: DiscreteProgram, ranges: Ranges) -> Live:
    """What the votes need: variables whose votes differ between values that occur, and all that these are made of."""
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
    for part in reversed(program.parts):
        match part.does:
            case NumericalHead() as head if part.writes in numerical:
                categorical |= {head.query, head.key}
                numerical.add(head.value)
            case CategoricalHead() as head if part.writes in categorical:
                categorical |= {head.query, head.key, head.value}
            case CategoricalTable() as mlp if part.writes in categorical:
                categorical.update(mlp.reads)
            case NumericalMLP() as mlp if part.writes in categorical:
                numerical.update(mlp.reads)
            case _:
                pass
    return Live(categorical=frozenset(categorical), numerical=frozenset(numerical))


def prune_votes(
    program: DiscreteProgram, tokens: Tokens, answers: Answers, read: Read, *, budget: float
) -> tuple[DiscreteProgram, Sequence[Step]]:
    """The program without the votes that are not missed, and what each step cost.

    Args:
        program: what is pruned.
        tokens: sequences that accuracy is measured on.
        answers: their right answers.
        read: where they are.
        budget: most accuracy that may be lost in all; 0 leaves every answer on these sequences as it is or better.
    """
    categorical, numerical = (found[read] for found in run_program(program, tokens))
    wanted = answers[read]
    votes = _votes(program, categorical, numerical)
    allowed = np.where(program.allowed, 0.0, -np.inf)
    # The constant 1 gives every class its bias, and stays.
    total = sum(votes.values()) + program.W_numerical[0] + allowed
    lowest = (total.argmax(1) == wanted).mean() - budget
    steps: list[Step] = []
    while votes:
        trials = {
            name: float(((total - each + each.mean(0)).argmax(1) == wanted).mean()) for name, each in votes.items()
        }
        name = max(trials, key=lambda each: trials[each])
        if trials[name] < lowest - 1e-12:
            break
        gone = votes.pop(name)
        total = total - gone + gone.mean(0)
        program = _without(program, name, gone.mean(0))
        steps.append(Step(variable=f"{name[0]} {name[1]}", accuracy=trials[name]))
    return program, steps


def _votes(
    program: DiscreteProgram,
    categorical: Int64[np.ndarray, "read variable"],
    numerical: Int64[np.ndarray, "read number"],
) -> dict[tuple[str, int], Float64[np.ndarray, "read output"]]:
    found: dict[tuple[str, int], Float64[np.ndarray, "read output"]] = {}
    for place in range(categorical.shape[1]):
        found["categorical", place] = program.W_categorical[place][categorical[:, place]]
    for place in range(1, numerical.shape[1]):
        found["numerical", place] = numerical[:, place, None] * program.W_numerical[place]
    return found


def _without(program: DiscreteProgram, name: tuple[str, int], mean: Float64[np.ndarray, " output"]) -> DiscreteProgram:
    kind, place = name
    W_categorical, W_numerical = program.W_categorical.copy(), program.W_numerical.copy()
    if kind == "categorical":
        W_categorical[place] = 0
    else:
        W_numerical[place] = 0
    W_numerical[0] += mean
    return replace(program, W_categorical=W_categorical, W_numerical=W_numerical)
