"""A discrete program as a Python module: typed, alone in its file, with every variable under a name.

The module imports nothing beyond typing, opens nothing, and answers like the program. Where it can, it says what is
looked for in closed form (`query - 1`); else it lists values, by what they lead to.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from circuits.decompile.ranges import Ranges, cells
from circuits.decompile.simplify import Live
from workbench.models.discrete import CategoricalHead, CategoricalTable, DiscreteProgram, NumericalHead, NumericalMLP

WIDTH = 118
MODULE = '''"""{title}

Written by the Interp Workbench from a discretised Transformer Program (Friedman et al. 2023).
"""

from __future__ import annotations

import sys
from collections.abc import {abstract}
{types}
__all__ = ["run"]

ALPHABET = {alphabet}
LONGEST = {longest}
CLASSES = {classes}


def run(letters: Sequence[str]) -> list[str]:
    """The program's word at each letter.

    Raises:
        ValueError: no letter, too many, or one that is not in the alphabet.
    """
    if not 1 <= len(letters) <= LONGEST:
        raise ValueError(f"Give 1 to {{LONGEST}} letters, got {{len(letters)}}.")
    for letter in letters:
        if letter not in ALPHABET:
            raise ValueError(f"Letter {{letter!r}} is not in the alphabet: {{' '.join(ALPHABET)}}.")
{body}
    words = []
    for place in range(1, 1 + len(letters)):
        votes = [
{votes}
        ]
        totals = [sum(each) for each in zip(*votes)]
        words.append(CLASSES[totals.index(max(totals))])
    return words


{parts}


if __name__ == "__main__":
    print(" ".join(run(sys.argv[1:])))
'''
TYPES = """from typing import TypeVar

Q = TypeVar("Q")
K = TypeVar("K")
V = TypeVar("V")
"""
COPY = '''def copy_nearest(
    queries: Sequence[Q], keys: Sequence[K], values: Sequence[V], wanted: Callable[[Q], K | None]
) -> list[V]:
    """For each position the value at the nearest key that it wants; of two the earlier, of all its own the last."""
    copied = []
    for place, query in enumerate(queries):
        key = wanted(query)
        matches = [at for at in {sees} if key is not None and keys[at] == key]
        others = [at for at in matches if at != place] or matches
        copied.append(values[min(others, key=lambda at: (abs(at - place), at), default=0)])
    return copied'''
ADD = '''def add_up(
    queries: Sequence[Q], keys: Sequence[K], numbers: Sequence[int], wanted: Callable[[Q], K | None]
) -> list[int]:
    """For each position the sum of the numbers at all keys that it wants."""
    sums = []
    for place, query in enumerate(queries):
        key = wanted(query)
        sums.append(sum(numbers[at] for at in {sees} if key is not None and keys[at] == key))
    return sums'''


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """What stands around a program: whom it is for, and which tokens frame the letters."""

    title: str
    letters: int
    """The first tokens are letters."""
    begin: int
    end: int | None
    longest: int


class Names:
    """What each variable is called, and how its values are written."""

    def __init__(self, program: DiscreteProgram, ranges: Ranges) -> None:
        columns = program.embedding.shape[1]
        own = np.arange(min(program.shape.cardinality, len(program.embedding)))
        # Words beyond the cardinality are words of answers alone.
        self.plain = columns == 1 and bool((program.embedding[: len(own), 0] == own).all())
        self.categorical = ["tokens"] if self.plain else [f"code_{column}" for column in range(columns)]
        self.categorical.append("positions")
        self.numerical = ["ones"]
        for part in program.parts:
            (self.numerical if isinstance(part.does, NumericalHead) else self.categorical).append(part.name)
        self.words = [kind.startswith("token") and self.plain for kind in ranges.kinds]
        self.vocab = program.vocab

    def value(self, variable: int, value: int) -> str:
        """A value, as it is written."""
        return repr(self.vocab[value]) if self.words[variable] else str(value)

    def type_of(self, variable: int) -> str:
        """The Python type of its values."""
        return "str" if self.words[variable] else "int"


def emit_python(program: DiscreteProgram, ranges: Ranges, live: Live, interface: Interface) -> str:
    """The module's text."""
    names = Names(program, ranges)
    body, parts = [], []
    if not names.plain:
        codes = {program.vocab[token]: program.embedding[token].tolist() for token in _framed(interface)}
        parts.append("CODES = " + _wrapped(repr(codes)))
        columns = range(program.embedding.shape[1])
        body += [f"{names.categorical[at]} = [CODES[token][{at}] for token in tokens]" for at in columns]
    for line, part in _parts(program, ranges, live, names):
        body.append(line)
        parts.append(part)
    votes, tables = _votes(program, ranges, live, names)
    parts += tables
    # Only what is used is written.
    used = "\n".join([*body, *votes])
    sees = "range(place + 1)" if program.shape.causal else "range(len(keys))"
    helpers = [text.format(sees=sees) for name, text in (("copy_nearest", COPY), ("add_up", ADD)) if name in used]
    end = "" if interface.end is None else f", {program.vocab[interface.end]!r}"
    length = f"len(letters) + {2 if end else 1}"
    variables = {
        "tokens": f"[{program.vocab[interface.begin]!r}, *letters{end}]",
        "positions": f"list(range({length}))",
        "ones": f"[1] * ({length})",
    }
    body = [*(f"{name} = {value}" for name, value in variables.items() if name in used), *body]
    classes = [word for word, allowed in zip(program.classes, program.allowed, strict=True) if allowed]
    return MODULE.format(
        title=interface.title,
        abstract="Callable, Sequence" if helpers else "Sequence",
        types=TYPES if helpers else "",
        alphabet=_wrapped(repr(tuple(program.vocab[: interface.letters]))),
        longest=interface.longest,
        classes=_wrapped(repr(tuple(classes))),
        body=textwrap.indent("\n".join(body), "    "),
        votes=textwrap.indent(",\n".join(votes) + ",", " " * 12),
        parts="\n\n\n".join([*parts, *helpers]),
    )


def _framed(interface: Interface) -> list[int]:
    ends = [] if interface.end is None else [interface.end]
    return [*range(interface.letters), interface.begin, *ends]


def _parts(program: DiscreteProgram, ranges: Ranges, live: Live, names: Names) -> list[tuple[str, str]]:
    """A line of the body and a function for each part that lives, in the order in which they run."""
    found = []
    for part in program.parts:
        numerical = isinstance(part.does, NumericalHead)
        if part.writes not in (live.numerical if numerical else live.categorical):
            continue
        match part.does:
            case CategoricalHead() as head:
                found.append(_head("copy_nearest", part.name, names.categorical[head.value], head, ranges, names))
            case NumericalHead() as head:
                found.append(_head("add_up", part.name, names.numerical[head.value], head, ranges, names))
            case CategoricalTable() as mlp:
                found.append(_table(part.name, mlp, ranges, names))
            case NumericalMLP() as mlp:
                found.append(_counts(part.name, mlp, ranges, names))
    return found


def _head(
    function: str, name: str, values: str, head: CategoricalHead | NumericalHead, ranges: Ranges, names: Names
) -> tuple[str, str]:
    query, key = names.categorical[head.query], names.categorical[head.key]
    line = f"{name} = {function}({query}, {key}, {values}, wanted_by_{name})"
    head_line = f"def wanted_by_{name}(query: {names.type_of(head.query)}) -> {names.type_of(head.key)} | None:"
    return line, f"{head_line}\n{_indented(_predicate(head, ranges, names))}"


def _predicate(head: CategoricalHead | NumericalHead, ranges: Ranges, names: Names) -> str:
    """The body of the function from a query to the key that it wants: in closed form, or by cases."""
    keys = ranges.values[head.key]
    wanted = {
        query: int(head.predicate[query])
        for query in sorted(ranges.values[head.query])
        if int(head.predicate[query]) in keys
    }
    if not wanted:
        return "return None"
    # What is wanted but does not occur matches nothing, whether it is listed or follows from a form.
    asked = {query: int(head.predicate[query]) for query in sorted(ranges.values[head.query])}
    cases = {names.value(head.query, query): names.value(head.key, key) for query, key in wanted.items()}
    shortest = _cases("query", cases, "None")
    for form, text in _forms(asked, set(wanted.values()), head, names):
        other = {
            query: key for query, key in asked.items() if form(query) != key and (form(query) in keys or key in keys)
        }
        exceptions = {
            names.value(head.query, query): names.value(head.key, key) if key in keys else "None"
            for query, key in other.items()
        }
        shortest = min(shortest, _cases("query", exceptions, text), key=lambda body: body.count("\n"))
    return shortest


def _forms(
    asked: Mapping[int, int], found: set[int], head: CategoricalHead | NumericalHead, names: Names
) -> list[tuple[Callable[[int], int], str]]:
    """Functions that may be what a predicate does, simplest first, and how they are written."""
    forms: list[tuple[Callable[[int], int], str]] = [
        ((lambda query, key=key: key), names.value(head.key, key)) for key in sorted(found)
    ]
    worded = names.words[head.query], names.words[head.key]
    if worded[0] == worded[1]:
        forms.insert(0, (lambda query: query, "query"))
    if not any(worded):
        for shift in sorted({key - query for query, key in asked.items()} - {0}, key=abs):
            text = f"query {'+' if shift > 0 else '-'} {abs(shift)}"
            forms.append((lambda query, shift=shift: query + shift, text))
        for mirror in sorted({key + query for query, key in asked.items()}):
            forms.append((lambda query, mirror=mirror: mirror - query, f"{mirror} - query"))
    return forms


def _table(name: str, mlp: CategoricalTable, ranges: Ranges, names: Names) -> tuple[str, str]:
    first, second = mlp.reads
    pairs = list(product(sorted(ranges.values[first]), sorted(ranges.values[second])))
    if first == second:
        pairs = [(one, two) for one, two in pairs if one == two]
        values: Mapping[str, int] = {names.value(first, one): int(mlp.table[one, two]) for one, two in pairs}
        return _function(name, [names.categorical[first]], [names.type_of(first)], _by_default("first", values))
    cases = {f"({names.value(first, one)}, {names.value(second, two)})": int(mlp.table[one, two]) for one, two in pairs}
    arguments = [names.categorical[first], names.categorical[second]]
    return _function(
        name, arguments, [names.type_of(first), names.type_of(second)], _by_default("(first, second)", cases)
    )


def _counts(name: str, mlp: NumericalMLP, ranges: Ranges, names: Names) -> tuple[str, str]:
    first, second = mlp.reads
    pairs = cells(mlp, ranges.numbers)
    if pairs is None:
        return _function(name, [names.numerical[first], names.numerical[second]], ["int", "int"], _arithmetic(mlp))
    codes = mlp(np.array(pairs)).tolist()
    if first == second:
        values = {str(one): code for (one, _), code in zip(pairs, codes, strict=True)}
        return _function(name, [names.numerical[first]], ["int"], _by_default("first", values))
    cases = {str(pair): code for pair, code in zip(pairs, codes, strict=True)}
    arguments = [names.numerical[first], names.numerical[second]]
    return _function(name, arguments, ["int", "int"], _by_default("(first, second)", cases))


def _function(name: str, arguments: Sequence[str], types: Sequence[str], body: str) -> tuple[str, str]:
    parameters = ["first", "second"][: len(arguments)]
    signature = ", ".join(f"{each}: {kind}" for each, kind in zip(parameters, types, strict=True))
    line = f"{name} = [{name}_of({', '.join(parameters)}) for {', '.join(parameters)} in zip({', '.join(arguments)})]"
    if len(arguments) == 1:
        line = f"{name} = [{name}_of(first) for first in {arguments[0]}]"
    return line, f"def {name}_of({signature}) -> int:\n{_indented(body)}"


def _arithmetic(mlp: NumericalMLP) -> str:
    """A function of too many numbers to list, as the sums that it is."""
    weights = {"w_in": mlp.W_in.T, "b_in": mlp.b_in, "w_out": mlp.W_out.T, "b_out": mlp.b_out}
    lines = [f"{name} = {_wrapped(repr(_as_tuples(value)))}" for name, value in weights.items()]
    return "\n".join(
        [
            *lines,
            "hidden = [max(0.0, a * first + b * second + c) for (a, b), c in zip(w_in, b_in)]",
            "outputs = [sum(w * h for w, h in zip(row, hidden)) + b for row, b in zip(w_out, b_out)]",
            "return outputs.index(max(outputs))",
        ]
    )


def _as_tuples(array: np.ndarray) -> object:
    return tuple(_as_tuples(row) for row in array) if array.ndim > 1 else tuple(array.tolist())


def _by_default(subject: str, values: Mapping[str, int]) -> str:
    """Cases, with the most common result for all that is not listed."""
    results = list(values.values())
    default = max(sorted(set(results)), key=results.count)
    return _cases(subject, {key: str(value) for key, value in values.items() if value != default}, str(default))


def _cases(subject: str, results: Mapping[str, str], default: str) -> str:
    """`if` for each result, with all that leads to it."""
    lines = []
    for result in dict.fromkeys(results.values()):
        keys = [key for key, value in results.items() if value == result]
        test = f"== {keys[0]}" if len(keys) == 1 else "in {" + ", ".join(keys) + "}"
        lines.append(_wrapped(f"if {subject} {test}:"))
        lines.append(f"    return {result}")
    return "\n".join([*lines, f"return {default}"])


def _votes(program: DiscreteProgram, ranges: Ranges, live: Live, names: Names) -> tuple[list[str], list[str]]:
    """What is summed at each position, and the tables that it is looked up in."""
    allowed = np.flatnonzero(program.allowed)
    terms, tables = [], []
    bias = program.W_numerical[0][allowed]
    for place, values in enumerate(ranges.values):
        rows = {value: program.W_categorical[place][value][allowed] for value in sorted(values)}
        stacked = np.stack(list(rows.values()))
        if place not in live.categorical or not np.ptp(stacked, axis=0).any():
            bias = bias + stacked[0]
            continue
        name = f"VOTES_OF_{names.categorical[place].upper()}"
        lines = [f"    {names.value(place, value)}: {_as_tuples(row)!r}," for value, row in rows.items()]
        tables.append("\n".join([f"{name} = {{", *(_wrapped(line) for line in lines), "}"]))
        terms.append(f"{name}[{names.categorical[place]}[place]]")
    for place in range(1, len(ranges.numbers)):
        row = program.W_numerical[place][allowed]
        if place in live.numerical and row.any():
            name = f"VOTES_OF_{names.numerical[place].upper()}"
            tables.append(_wrapped(f"{name} = {_as_tuples(row)!r}"))
            terms.append(f"[{names.numerical[place]}[place] * vote for vote in {name}]")
    tables.append(_wrapped(f"BIAS = {_as_tuples(bias)!r}"))
    return [*terms, "BIAS"], tables


def _wrapped(text: str) -> str:
    """Broken after commas where it is too long for a line."""
    if len(text) <= WIDTH:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    return "\n".join(
        textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
                      initial_indent=indent[4:])
    )  # fmt: skip


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ")
