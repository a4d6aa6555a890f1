"""A program against its task on every sequence of a length at once, by a solver instead of one after the other.

Every variable at every position is a formula for each value that it may have, made of the letters alone; a head's
nearest match is a chain of cases, a sum is added up position by position, and the votes are compared as weighted sums
of formulas. Z3 (de Moura and Bjørner 2008) then looks for letters at which the program's word is not the task's. If
there are none the program is proved for that length; if there are, they are a counterexample. Lengths are taken in
order, so it is a shortest one where all lengths before it are proved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product, takewhile
from math import lcm
from typing import Literal, cast

import numpy as np
import pandas as pd
import z3

from circuits.decompile.specifications import SPECIFICATIONS
from circuits.decompile.symbols import Formula, Value, all_of, any_of, negated, one_of, summed
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
)
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.sequences import BEGIN, END, Sequences

Verdict = Literal["proved", "refuted", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """What is known of all sequences of one length."""

    length: int
    verdict: Verdict
    counterexample: str
    """Letters at which the program is wrong; empty where there are none or none was found."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """A program against its task, by length."""

    lengths: tuple[Length, ...]
    provenance: Provenance

    @property
    def proved_to(self) -> int:
        """The length to which all are proved; 0 if not even one letter is."""
        proved = [each.length for each in takewhile(lambda each: each.verdict == "proved", self.lengths)]
        return proved[-1] if proved else 0

    def tables(self) -> Sequence[Table]:
        """A row a length."""
        rows = [[each.length, each.verdict, each.counterexample, each.seconds] for each in self.lengths]
        frame = pd.DataFrame(rows, columns=pd.Index(["length", "verdict", "counterexample", "seconds"]))
        caption = "All sequences of a length against the task's definition, by the solver Z3."
        return [Table(name="program_proof", frame=frame, kind="table", axes={}, unit="", caption=caption)]


def prove(
    program: DiscreteProgram,
    task: Sequences,
    *,
    longest: int | None = None,
    timeout: float = 60.0,
    provenance: Provenance,
    on_progress: Callable[[float, str], None] | None = None,
) -> Proof:
    """The program's word at every letter against the task's, for each length in turn until one is refuted.

    Args:
        program: what is proved.
        task: what it ought to do, on every sequence of letters, whether it is ever drawn or not.
        longest: letters to which it is proved; as many as a prompt holds by default.
        timeout: seconds for each length, after which it is unknown.
        provenance: of the program.
        on_progress: called with the share that is done, and what was decided last.

    Raises:
        WorkbenchError: a length that no prompt has.
    """
    longest = task.longest if longest is None else longest
    if not 1 <= longest <= task.longest:
        raise WorkbenchError(f"A prompt holds 1 to {task.longest} letters, got a longest of {longest}.")
    found: list[Length] = []
    for length in range(1, longest + 1):
        found.append(_decide(program, task, length, timeout))
        if on_progress is not None:
            on_progress(length / longest, f"length {length}: {found[-1].verdict}")
        if found[-1].verdict == "refuted":
            break
    return Proof(lengths=tuple(found), provenance=provenance)


def _decide(program: DiscreteProgram, task: Sequences, length: int, timeout: float) -> Length:
    started = time.perf_counter()
    letters, distinct = _letters(length, task.letters)
    begin: Value = {task.inputs.index(BEGIN): True}
    end: list[Value] = [{task.inputs.index(END): True}] if END in task.inputs else []
    wins = _wins(program, [begin, *letters, *end])
    wanted = SPECIFICATIONS[task.function](letters, task.letters)
    wrong = [
        all_of(asked, negated(wins(1 + place, task.outputs[output])))
        for place, answer in enumerate(wanted)
        for output, asked in answer.items()
    ]
    solver = z3.Solver()
    solver.set("timeout", int(1000 * timeout))
    solver.add(*distinct, any_of(*wrong))
    answer = solver.check()
    verdict: Verdict = "proved" if answer == z3.unsat else "refuted" if answer == z3.sat else "unknown"
    text = _read(solver.model(), letters, task) if answer == z3.sat else ""
    return Length(length=length, verdict=verdict, counterexample=text, seconds=time.perf_counter() - started)


def _letters(length: int, n: int) -> tuple[list[Value], list[Formula]]:
    """A letter at each place, and that there is exactly one."""
    letters: list[Value] = [
        {letter: z3.Bool(f"letter_{place}_{letter}") for letter in range(n)} for place in range(length)
    ]
    return letters, [z3.PbEq([(formula, 1) for formula in each.values()], 1) for each in letters]


def _read(model: z3.ModelRef, letters: Sequence[Value], task: Sequences) -> str:
    chosen = [next(one for one, formula in each.items() if z3.is_true(model.eval(formula))) for each in letters]
    return task.decode(chosen)


def _wins(program: DiscreteProgram, tokens: Sequence[Value]) -> Callable[[int, int], Formula]:
    """A formula for a class to be the output at a position, by both."""
    categorical, numerical = _variables(program, tokens)
    allowed = [at for at, each in enumerate(program.allowed) if each]
    W_categorical, W_numerical = _whole(program)

    def wins(position: int, output: int) -> Formula:
        beaten = []
        for other in allowed:
            if other == output:
                continue
            # The first of equals is the output: a later class may have as many votes.
            at_least = 1 if other < output else 0
            terms: list[tuple[Formula, int]] = [(True, W_numerical[0][output] - W_numerical[0][other])]
            for weights, variable in zip(W_categorical, categorical, strict=True):
                terms += [
                    (held, weights[one][output] - weights[one][other]) for one, held in variable[position].items()
                ]
            for weights, variable in zip(W_numerical[1:], numerical[1:], strict=True):
                terms += [(held, one * (weights[output] - weights[other])) for one, held in variable[position].items()]
            beaten.append(_at_least(terms, at_least))
        return all_of(*beaten)

    return wins


def _at_least(terms: Sequence[tuple[Formula, int]], least: int) -> Formula:
    """Whether the weights of what holds add up to at least so much."""
    least -= sum(weight for held, weight in terms if held is True)
    open_terms = [(held, weight) for held, weight in terms if not isinstance(held, bool) and weight]
    if not open_terms:
        return least <= 0
    total = cast(z3.ArithRef, z3.Sum([z3.If(held, z3.IntVal(weight), z3.IntVal(0)) for held, weight in open_terms]))
    return cast(Formula, total >= least)


def _variables(program: DiscreteProgram, tokens: Sequence[Value]) -> tuple[list[list[Value]], list[list[Value]]]:
    """The categorical and the numerical variables at every position."""
    columns = range(program.embedding.shape[1])
    categorical = [[one_of(token, program.embedding[:, column].tolist()) for token in tokens] for column in columns]
    categorical.append([{place: True} for place in range(len(tokens))])
    numerical: list[list[Value]] = [[{1: True} for _ in tokens]]
    for part in program.parts:
        match part.does:
            case CategoricalHead() as head:
                categorical.append(_copied(program, head, categorical))
            case NumericalHead() as head:
                values = numerical[head.value]
                numerical.append(
                    [
                        summed([(_matches(head, categorical, place, at), values[at]) for at in seen])
                        for place, seen in enumerate(_seen(program, len(tokens)))
                    ]
                )
            case CategoricalTable() as mlp:
                categorical.append(_looked_up(mlp.table.__getitem__, *(categorical[read] for read in mlp.reads)))
            case NumericalFunction() as mlp:
                categorical.append(_looked_up(_code(mlp), *(numerical[read] for read in mlp.reads)))
    return categorical, numerical


def _seen(program: DiscreteProgram, length: int) -> list[range]:
    return [range(place + 1 if program.shape.causal else length) for place in range(length)]


def _matches(
    head: CategoricalHead | NumericalHead, categorical: Sequence[Sequence[Value]], place: int, at: int
) -> Formula:
    key = categorical[head.key][at]
    pairs = ((held, int(head.predicate[one])) for one, held in categorical[head.query][place].items())
    return any_of(*(all_of(held, key.get(wanted, False)) for held, wanted in pairs))


def _copied(program: DiscreteProgram, head: CategoricalHead, categorical: Sequence[Sequence[Value]]) -> list[Value]:
    """The nearest match first, of two the earlier, its own place last; position 0 where there is none."""
    values = categorical[head.value]
    copied = []
    for place, seen in enumerate(_seen(program, len(values))):
        order = sorted(seen, key=lambda at, place=place: (at == place, abs(at - place), at))
        matches = [_matches(head, categorical, place, at) for at in order]
        none_before: Formula = True
        found: dict[int, list[Formula]] = {}
        for at, match in [*zip(order, matches, strict=True), (0, True)]:
            chosen = all_of(none_before, match)
            for one, held in values[at].items():
                found.setdefault(one, []).append(all_of(chosen, held))
            none_before = all_of(none_before, negated(match))
        copied.append({one: formula for one, parts in found.items() if (formula := any_of(*parts)) is not False})
    return copied


def _code(mlp: NumericalFunction) -> Callable[[tuple[int, int]], int]:
    return lambda pair: int(mlp(np.array([pair]))[0])


def _looked_up(table: Callable[[tuple[int, int]], int], first: list[Value], second: list[Value]) -> list[Value]:
    """What a table of two variables says at each position."""
    same = first is second
    found: list[Value] = []
    for one_here, two_here in zip(first, second, strict=True):
        parts: dict[int, list[Formula]] = {}
        for (one, held), (two, also) in product(one_here.items(), two_here.items()):
            if not same or one == two:
                parts.setdefault(int(table((one, two))), []).append(all_of(held, also))
        found.append({code: any_of(*each) for code, each in parts.items()})
    return found


def _whole(program: DiscreteProgram) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The votes as whole numbers in the same proportions: floats are fractions, and these have a common denominator."""
    fractions = [Fraction(float(each)) for array in (program.W_categorical, program.W_numerical) for each in array.flat]
    scale = lcm(*(each.denominator for each in fractions))

    def whole(array: np.ndarray) -> list:
        return [whole(row) if row.ndim else int(Fraction(float(row)) * scale) for row in array]

    return whole(program.W_categorical), whole(program.W_numerical)
