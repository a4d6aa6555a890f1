"""A program's classifier: fewer voters, and whole numbers for votes.

The variables of a program do not change here, only what they add to the logits. A variable whose votes are not missed
is left out (`prune_votes`), the least missed first; and votes are rounded on the coarsest scale that changes no more
answers than is allowed (`round_votes`), so that their sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int64

from circuits.decompile.ranges import Ranges
from circuits.decompile.simplify import Live
from workbench.models.discrete import DiscreteProgram
from workbench.models.interpreter import run_program

LARGEST = tuple(2**power for power in range(1, 21))
"""Sizes of the largest vote that are tried, the coarsest first."""
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ballots:
    """What votes where: the variables at every position that is read, and the answers there; equal ones once."""

    categorical: Int64[np.ndarray, "position variable"]
    numerical: Int64[np.ndarray, "position number"]
    answers: Int64[np.ndarray, " position"]
    count: Int64[np.ndarray, " position"]
    """How often each occurs."""

    def accuracy(self, logits: Float64[np.ndarray, "position output"]) -> float:
        """Share of the positions where the answer has the most votes, the first of equals."""
        return float(((logits.argmax(1) == self.answers) * self.count).sum() / self.count.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One variable's votes less."""

    variable: str
    accuracy: float
    """Share of the right answers on the sequences given, after it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tally:
    """What the classifier adds up, by the classes that may be the output: whole numbers where all votes are."""

    bias: np.ndarray
    """At every position, what variables with one value vote included."""
    categorical: Mapping[int, Mapping[int, np.ndarray]]
    """Votes by value that occurs, by place of the variable."""
    numerical: Mapping[int, np.ndarray]
    """Votes of one, by place of the variable."""


def tally(program: DiscreteProgram, ranges: Ranges, live: Live) -> Tally:
    """The votes that change an output."""
    allowed = np.flatnonzero(program.allowed)
    arrays = (program.W_categorical[:, :, allowed], program.W_numerical[:, allowed])
    if all((array % 1 == 0).all() for array in arrays):
        arrays = tuple(array.astype(np.int64) for array in arrays)
    W_categorical, W_numerical = arrays
    bias, categorical = W_numerical[0], {}
    for place, values in enumerate(ranges.values):
        rows = {value: W_categorical[place, value] for value in sorted(values)}
        if place not in live.categorical or not np.ptp(list(rows.values()), axis=0).any():
            bias = bias + next(iter(rows.values()))
        else:
            categorical[place] = rows
    numerical = {}
    for place, (low, high) in list(enumerate(ranges.numbers))[1:]:
        if low == high:
            bias = bias + low * W_numerical[place]
        elif place in live.numerical and W_numerical[place].any():
            numerical[place] = W_numerical[place]
    return Tally(bias=bias, categorical=categorical, numerical=numerical)


def ballots(
    program: DiscreteProgram,
    tokens: Int64[np.ndarray, "batch pos"],
    answers: Int64[np.ndarray, "batch pos"],
    read: Bool[np.ndarray, "batch pos"],
) -> Ballots:
    """The ballots of a program on sequences."""
    categorical, numerical = (found[read] for found in run_program(program, tokens))
    rows = np.concatenate([categorical, numerical, answers[read][:, None]], 1)
    rows, count = np.unique(rows, axis=0, return_counts=True)
    width = categorical.shape[1]
    return Ballots(categorical=rows[:, :width], numerical=rows[:, width:-1], answers=rows[:, -1], count=count)


def logits_of(program: DiscreteProgram, cast: Ballots) -> Float64[np.ndarray, "position output"]:
    """The sum of all votes; minus infinity where a class may not be the output."""
    total = cast.numerical @ program.W_numerical
    for place in range(cast.categorical.shape[1]):
        total = total + program.W_categorical[place][cast.categorical[:, place]]
    return np.where(np.array(program.allowed), total, -np.inf)


def prune_votes(program: DiscreteProgram, cast: Ballots, *, lowest: float) -> tuple[DiscreteProgram, list[Step]]:
    """The program without the votes that are not missed, and what each step cost.

    A variable's votes are replaced by their mean.

    Args:
        program: what is pruned.
        cast: where accuracy is measured.
        lowest: accuracy that is to be left.
    """
    steps: list[Step] = []
    # The constant 1 gives every class its bias, and stays.
    votes = {key: _votes(program, key, cast) for key in _keys(program) if _voters(program, key).any()}
    means = {key: np.average(each, axis=0, weights=cast.count) for key, each in votes.items()}
    total = logits_of(program, cast)
    while votes:
        trials = {key: cast.accuracy(total - each + means[key]) for key, each in votes.items()}
        key = max(trials, key=lambda each: trials[each])
        if trials[key] < lowest:
            break
        total = total - votes.pop(key) + means[key]
        program = _without(program, key, means[key])
        steps.append(Step(variable=f"{key[0]} {key[1]}", accuracy=trials[key]))
    return program, steps


def round_votes(program: DiscreteProgram, accept: Callable[[DiscreteProgram], bool]) -> DiscreteProgram | None:
    """The program with whole numbers for votes, on the coarsest scale at which it is accepted; None if it never is."""
    size = max(np.abs(program.W_categorical).max(), np.abs(program.W_numerical).max())
    for largest in LARGEST if size else ():
        scale = largest / size
        W_categorical, W_numerical = np.rint(scale * program.W_categorical), np.rint(scale * program.W_numerical)
        rounded = replace(program, W_categorical=W_categorical, W_numerical=W_numerical)
        if accept(rounded):
            return rounded
    return None


def _keys(program: DiscreteProgram) -> Sequence[Key]:
    categorical = [("categorical", place) for place in range(len(program.W_categorical))]
    return [*categorical, *(("numerical", place) for place in range(1, len(program.W_numerical)))]


def _voters(program: DiscreteProgram, key: Key) -> np.ndarray:
    weights = program.W_categorical if key[0] == "categorical" else program.W_numerical
    return weights[key[1]][..., list(program.allowed)]


def _votes(program: DiscreteProgram, key: Key, cast: Ballots) -> Float64[np.ndarray, "position output"]:
    kind, place = key
    if kind == "categorical":
        return program.W_categorical[place][cast.categorical[:, place]]
    return cast.numerical[:, [place]] * program.W_numerical[place]


def _without(program: DiscreteProgram, key: Key, mean: Float64[np.ndarray, " output"]) -> DiscreteProgram:
    """The program whose variable votes for nothing, and every class for what it got from it on average."""
    kind, place = key
    W_categorical, W_numerical = program.W_categorical.copy(), program.W_numerical.copy()
    if kind == "categorical":
        W_categorical[place] = 0
    else:
        W_numerical[place] = 0
    W_numerical[0] += mean
    return replace(program, W_categorical=W_categorical, W_numerical=W_numerical)
