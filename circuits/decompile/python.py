"""A discrete program as a Python module: typed, alone in its file, with every variable under a name.

The module imports nothing beyond typing, opens nothing, and answers like the program. What a head looks for, and what a
table says, is written in the form that takes fewest lines: closed (`query - 1`), as rules in order, or as a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.decompile.layout import call, indented, literal, mapping, quoted
from circuits.decompile.ranges import Ranges
from circuits.decompile.rules import Argument
from circuits.decompile.simplify import Live
from circuits.decompile.votes import tally
from circuits.decompile.writing import Written, write_lookup, write_predicate
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
    NumericalMLP,
    NumericalTree,
    Split,
)

MODULE = '''"""{title}

Written by the Interp Workbench from a discretised Transformer Program (Friedman et al. 2023).
"""

from __future__ import annotations

import sys
from collections.abc import {abstract}
{types}
__all__ = ["run"]

{alphabet}
LONGEST = {longest}
{classes}
{bias}
{tables}

def run(letters: Sequence[str]) -> list[str]:
    """The program's word at each letter.

    Raises:
        ValueError: no letter, too many, or one that is not in the alphabet.
    """
    if not 1 <= len(letters) <= LONGEST:
        raise ValueError(f"Give 1 to {{LONGEST}} letters, got {{len(letters)}}.")
    for letter in letters:
        if letter not in ALPHABET:
            known = " ".join(ALPHABET)
            raise ValueError(f"Letter {{letter!r}} is not in the alphabet: {{known}}.")
{body}
    words = []
    for place in range(1, 1 + len(letters)):
        rows = [BIAS, *(each[place] for each in votes)]
        totals = [sum(column) for column in zip(*rows)]
        words.append(CLASSES[totals.index(max(totals))])
    return words{parts}


if __name__ == "__main__":
    try:
        print(" ".join(run(sys.argv[1:])))
    except ValueError as error:
        sys.exit(str(error))
'''
COPY = '''def copy_nearest(
    queries: Sequence[Q],
    keys: Sequence[K],
    values: Sequence[V],
    wanted: Callable[[Q], K | None],
) -> list[V]:
    """The value at the nearest key wanted; of two the earlier, its own place last."""
    copied = []
    for place, query in enumerate(queries):
        key = wanted(query)
        found = [at for at, each in enumerate({keys}) if each == key]
        found.sort(key=lambda at: (at == place, abs(at - place), at))
        copied.append(values[found[0] if found else 0])
    return copied'''
ADD = '''def add_up(
    queries: Sequence[Q],
    keys: Sequence[K],
    numbers: Sequence[int],
    wanted: Callable[[Q], K | None],
) -> list[int]:
    """The sum of the numbers at all keys wanted."""
    sums = []
    for place, query in enumerate(queries):
        key = wanted(query)
        kept = [n for n, each in zip(numbers, {keys}) if each == key]
        sums.append(sum(kept))
    return sums'''
VOTE = '''{vote}
    """For each value its votes by class; none where none is listed."""
    return [[table[word].get(value, 0) for word in CLASSES] for value in values]'''
LOOK_UP = '''{look_up}
    """For each value its votes by class."""
    return [list(table[value]) for value in values]'''
WEIGH = '''def weigh(numbers: Sequence[int], votes: Sequence[{number}]) -> {rows}:
    """For each number the votes of one, as often."""
    return [[number * each for each in votes] for number in numbers]'''
HELPERS = {"copy_nearest": COPY, "add_up": ADD, "vote": VOTE, "look_up": LOOK_UP, "weigh": WEIGH}
ABSTRACT = ("Callable", "Mapping", "Sequence")
NOTHING = ("0", "0.0", "-0.0")
BODY = 4
"""Columns that the body of `run` stands to the right."""


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
        self.ranges = ranges

    def value(self, variable: int, value: int) -> str:
        """A value of a categorical variable, as it is written."""
        return quoted(self.vocab[value]) if self.words[variable] else str(value)

    def argument(self, name: str, variable: int) -> Argument:
        """An argument that a categorical variable is given to."""

        def write(value: int) -> str:
            return self.value(variable, value)

        words = self.words[variable]
        return Argument(name=name, domain=self.ranges.values[variable], write=write, ordered=not words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Votes:
    """The classifier: what is summed, the tables it is looked up in, and what every position gets."""

    terms: list[str]
    tables: list[str]
    bias: str
    number: str
    """Type of a vote."""


def emit_python(program: DiscreteProgram, ranges: Ranges, live: Live, interface: Interface) -> str:
    """The module's text."""
    names = Names(program, ranges)
    written = _parts(program, live, names)
    votes = _votes(program, live, names)
    framed = _framed(program, interface)
    codes = []
    lines = [each.line for each in written]
    if not names.plain:
        rows = {quoted(word): str(tuple(program.embedding[token].tolist())) for token, word in framed.items()}
        codes = [mapping("CODES = ", rows)]
        columns = range(program.embedding.shape[1])
        lines = [f"{names.categorical[at]} = [CODES[token][{at}] for token in tokens]" for at in columns] + lines
    lines.append(literal("votes = ", votes.terms, "[]", indent=BODY))
    used = "\n".join(lines)
    # Only what is used is written.
    lines = [f"{name} = {text}" for name, text in _inputs(framed, interface).items() if name in used] + lines
    helpers = _helpers([name for name in HELPERS if f"{name}(" in used], votes.number, causal=program.shape.causal)
    types = [name for name in "QKV" if f"[{name}]" in helpers]
    variables = [f'{name} = TypeVar("{name}")' for name in types]
    classes = [quoted(word) for word, allowed in zip(program.classes, program.allowed, strict=True) if allowed]
    tables = [*codes, *(each.table for each in written if each.table), *votes.tables]
    functions = [each.function for each in written if each.function]
    return MODULE.format(
        title=interface.title,
        abstract=", ".join(name for name in ABSTRACT if name == "Sequence" or f"{name}[" in helpers),
        types="\n".join(["from typing import TypeVar", "", *variables, ""] if types else []),
        alphabet=literal("ALPHABET = ", [quoted(word) for word in program.vocab[: interface.letters]], "()"),
        longest=interface.longest,
        classes=literal("CLASSES = ", classes, "()"),
        bias=votes.bias,
        tables="\n".join([*tables, ""]),
        body=indented("\n".join(lines)),
        parts="".join(f"\n\n\n{part}" for part in [*functions, helpers] if part),
    )


def _helpers(names: Sequence[str], number: str, *, causal: bool) -> str:
    """The functions of these names, for votes of this type."""
    rows, keys = f"list[list[{number}]]", "keys[: place + 1]" if causal else "keys"
    arguments = {"vote": f"Mapping[str, Mapping[V, {number}]]", "look_up": f"Mapping[V, Sequence[{number}]]"}
    signatures = {
        name: call(f"def {name}", ["values: Sequence[V]", f"table: {table}"], f" -> {rows}:")
        for name, table in arguments.items()
    }
    return "\n\n\n".join(HELPERS[name].format(keys=keys, number=number, rows=rows, **signatures) for name in names)


def _framed(program: DiscreteProgram, interface: Interface) -> dict[int, str]:
    """The words of prompts, by token."""
    ends = [] if interface.end is None else [interface.end]
    return {token: program.vocab[token] for token in [*range(interface.letters), interface.begin, *ends]}


def _inputs(framed: Mapping[int, str], interface: Interface) -> dict[str, str]:
    """The variables that no part writes."""
    end = "" if interface.end is None else f", {quoted(framed[interface.end])}"
    length = f"len(letters) + {2 if end else 1}"
    return {
        "tokens": f"[{quoted(framed[interface.begin])}, *letters{end}]",
        "positions": f"list(range({length}))",
        "ones": f"[1] * ({length})",
    }


def _parts(program: DiscreteProgram, live: Live, names: Names) -> list[Written]:
    """Each part that lives, in the order in which they run."""
    found = []
    for part in live.parts(program):
        match part.does:
            case CategoricalHead() as head:
                found.append(_head("copy_nearest", part.name, names.categorical[head.value], head, names))
            case NumericalHead() as head:
                found.append(_head("add_up", part.name, names.numerical[head.value], head, names))
            case CategoricalTable() as mlp:
                found.append(_table(part.name, mlp, names))
            case NumericalFunction() as mlp:
                found.append(_counts(part.name, mlp, names))
    return found


def _head(function: str, name: str, values: str, head: CategoricalHead | NumericalHead, names: Names) -> Written:
    query = names.argument("query", head.query)
    wanted = {value: int(head.predicate[value]) for value in sorted(query.domain)}
    predicate = write_predicate(name, wanted, query, names.argument("key", head.key))
    arguments = [names.categorical[head.query], names.categorical[head.key], values, predicate.line]
    line = call(f"{name} = {function}", arguments, indent=BODY)
    return Written(line=line, table=predicate.table, function=predicate.function)


def _table(name: str, mlp: CategoricalTable, names: Names) -> Written:
    pairs = names.ranges.pairs[name]
    assert pairs is not None
    cells = {pair: int(mlp.table[pair]) for pair in sorted(pairs)}
    arguments = [names.argument(each, read) for each, read in zip(("one", "two"), mlp.reads, strict=True)]
    return _lookup(name, cells, arguments, [names.categorical[read] for read in mlp.reads])


def _counts(name: str, mlp: NumericalFunction, names: Names) -> Written:
    found = names.ranges.pairs[name]
    reads = [names.numerical[read] for read in mlp.reads]
    if isinstance(mlp, NumericalTree):
        return _function(name, _branches(mlp.root), reads)
    if found is None:
        assert isinstance(mlp, NumericalMLP)
        return _arithmetic(name, mlp, reads)
    pairs = sorted(found)
    cells = dict(zip(pairs, mlp(np.array(pairs)).tolist(), strict=True))
    arguments = [
        Argument(name=each, domain=frozenset(pair[at] for pair in pairs), write=str, ordered=True)
        for at, each in enumerate(("one", "two"))
    ]
    return _lookup(name, cells, arguments, reads)


def _lookup(name: str, cells: Mapping[tuple[int, int], int], arguments: list[Argument], reads: list[str]) -> Written:
    """The variable that a table of one or two others writes."""
    if reads[0] == reads[1]:
        cells, arguments, reads = {(one, 0): value for (one, _), value in cells.items()}, arguments[:1], reads[:1]
    lookup = write_lookup(name, cells, arguments)
    names = ", ".join(argument.name for argument in arguments)
    source = reads[0] if len(reads) == 1 else f"zip({', '.join(reads)})"
    line = f"{name} = [{lookup.line} for {names} in {source}]"
    return Written(line=line, table=lookup.table, function=lookup.function)


def _arithmetic(name: str, mlp: NumericalMLP, reads: list[str]) -> Written:
    """A function of too many numbers to list, as the sums that it is."""
    weights = {"w_in": mlp.W_in.T, "b_in": mlp.b_in, "w_out": mlp.W_out.T, "b_out": mlp.b_out}
    lines = [
        *(_nested(f"{weight} = ", value) for weight, value in weights.items()),
        "hidden = [max(0.0, a * one + b * two + c) for (a, b), c in zip(w_in, b_in)]",
        "sums = [sum(w * h for w, h in zip(row, hidden)) for row in w_out]",
        "outputs = [total + b for total, b in zip(sums, b_out)]",
        "return outputs.index(max(outputs))",
    ]
    return _function(name, lines, reads)


def _branches(node: Split | int) -> list[str]:
    """A tree, what is at most the threshold first."""
    if isinstance(node, int):
        return [f"return {node}"]
    below = [indented(line) for line in _branches(node.below)]
    return [f"if {('one', 'two')[node.reads]} <= {node.at_most}:", *below, *_branches(node.above)]


def _function(name: str, body: Sequence[str], reads: Sequence[str]) -> Written:
    """The variable that a function of two numbers writes."""
    function = f"def {name}_of(one: int, two: int) -> int:\n{indented(chr(10).join(body))}"
    return Written(line=f"{name} = [{name}_of(one, two) for one, two in zip({', '.join(reads)})]", function=function)


def _nested(head: str, array: np.ndarray, depth: int = 1) -> str:
    if array.ndim == 1:
        items = [repr(value) for value in array.tolist()]
    else:
        items = [_nested("", row, depth + 1) for row in array]
    return literal(head, items, "()", indent=depth * BODY + (depth > 1) * len(","))


def _votes(program: DiscreteProgram, live: Live, names: Names) -> Votes:
    """What is summed at each position, and the tables that it is looked up in, by class and value."""
    words = [quoted(word) for word, allowed in zip(program.classes, program.allowed, strict=True) if allowed]
    summed = tally(program, names.ranges, live)
    terms, tables = [], []
    for place, rows in summed.categorical.items():
        name = f"VOTES_OF_{names.categorical[place].upper()}"
        keys = [names.value(place, value) for value in rows]
        votes = [list(map(repr, row.tolist())) for row in rows.values()]
        options = {"vote": _by_class(name, keys, votes, words), "look_up": _by_value(name, keys, votes)}
        chosen = min(options, key=lambda option: options[option].count("\n"))
        tables.append(options[chosen])
        terms.append(f"{chosen}({names.categorical[place]}, {name})")
    for place, row in summed.numerical.items():
        weights = literal("", list(map(repr, row.tolist())), "()")
        terms.append(call("weigh", [names.numerical[place], weights], indent=2 * BODY + len(",")))
    bias = literal("BIAS = ", list(map(repr, summed.bias.tolist())), "()")
    return Votes(terms=terms, tables=tables, bias=bias, number="int" if summed.bias.dtype.kind == "i" else "float")


def _by_class(name: str, keys: Sequence[str], votes: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """A table of votes that lists for each class the values that vote, with theirs."""
    rows = {}
    for at, word in enumerate(words):
        listed = {key: row[at] for key, row in zip(keys, votes, strict=True) if row[at] not in NOTHING}
        rows[word] = mapping("", listed, indent=BODY + len(f"{word}: ,"))
    return mapping(f"{name} = ", rows)


def _by_value(name: str, keys: Sequence[str], votes: Sequence[Sequence[str]]) -> str:
    """A table of votes that lists for each value its vote for every class."""
    rows = {key: literal("", row, "()", indent=BODY + len(f"{key}: ,")) for key, row in zip(keys, votes, strict=True)}
    return mapping(f"{name} = ", rows)
