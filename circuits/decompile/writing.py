"""What a head looks for and what a table says, in the form that takes fewest lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from circuits.decompile.layout import WIDTH, indented, literal, mapping
from circuits.decompile.rules import Argument, Cell, decision_list, write_rules

INDENT = 4
AROUND = 3
"""Lines of a function that its body does not have: its first one, and two empty ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A piece of a module: an expression or a line, and what it needs above it."""

    line: str
    table: str = ""
    function: str = ""

    @property
    def lines(self) -> int:
        """What it adds to a module, of which `line` is one."""
        table = self.table.count("\n") + 1 if self.table else 0
        return table + (self.function.count("\n") + AROUND if self.function else 0)


def write_predicate(name: str, wanted: Mapping[int, int], query: Argument, key: Argument) -> Written:
    """From a query to the key that it wants, as a function without a name where it is short.

    Args:
        name: the head's.
        wanted: the key by query.
        query: the argument; what it may be is all that is asked.
        key: what keys may be; what is wanted but never occurs matches nothing.
    """
    signature = f"def wanted_by_{name}(query: {_type(query)}) -> {_type(key)} | None:"
    texts = {value: key.write(found) if found in key.domain else "None" for value, found in wanted.items()}
    options = [_mapped(f"WANTED_BY_{name.upper()}", texts, query)]
    for text, agrees in closed_forms(wanted, query, key):
        if len(agrees) == len(wanted):
            options.append(Written(line=f"lambda query: {text}"))
        elif agrees:
            cells = {(value, 0): text if value in agrees else texts[value] for value in wanted}
            body = write_rules(decision_list(cells, text), text, [query], WIDTH - INDENT)
            function = "\n".join([signature, *map(indented, body)])
            options.append(Written(line=f"wanted_by_{name}", function=function))
    return min(options, key=lambda option: option.lines)


def closed_forms(wanted: Mapping[int, int], query: Argument, key: Argument) -> list[tuple[str, frozenset[int]]]:
    """Functions of `query` as they are written, simplest first, each with the queries at which it is the predicate."""
    return [
        (
            text,
            frozenset(
                value
                for value, found in wanted.items()
                if form(value) == found or (form(value) not in key.domain and found not in key.domain)
            ),
        )
        for form, text in _forms(wanted, query, key)
    ]


def write_lookup(name: str, cells: Mapping[Cell, int], arguments: Sequence[Argument]) -> Written:
    """A table of one or two values as an expression of its arguments.

    Args:
        name: of the part.
        cells: result by what is read; of one value with 0 as the second.
        arguments: as many.
    """
    results = sorted(set(cells.values()))
    names = [argument.name for argument in arguments]
    if len(results) == 1:
        return Written(line=str(results[0]))
    options = []
    for default in results:
        rules = decision_list({cell: str(value) for cell, value in cells.items()}, str(default))
        body = write_rules(rules, str(default), arguments, WIDTH - INDENT)
        signature = ", ".join(f"{argument.name}: {_type(argument)}" for argument in arguments)
        function = "\n".join([f"def {name}_of({signature}) -> int:", *map(indented, body)])
        options.append(Written(line=f"{name}_of({', '.join(names)})", function=function))
    if len(arguments) == 1:
        texts = {one: str(value) for (one, _), value in cells.items()}
        table = mapping(f"{name.upper()} = ", {arguments[0].write(one): text for one, text in texts.items()})
        options.append(Written(line=f"{name.upper()}[{names[0]}]", table=table))
    else:
        options += [
            Written(line=f"{name.upper()}[{names[0]}][{names[1]}]", table=mapping(f"{name.upper()} = ", rows))
            for rows in _rows(cells, arguments)
        ]
    return min(options, key=lambda option: option.lines)


def _rows(cells: Mapping[Cell, int], arguments: Sequence[Argument]) -> list[dict[str, str]]:
    """A table's rows by the first argument: as dictionaries, and where the second is a number as tuples too."""
    first, second = arguments
    by_row: dict[int, dict[int, int]] = {}
    for (one, two), value in cells.items():
        by_row.setdefault(one, {})[two] = value
    dictionaries, tuples = {}, {}
    for one, row in by_row.items():
        key = first.write(one)
        room = INDENT + len(key) + len(": ,")
        dictionaries[key] = mapping("", {second.write(two): str(value) for two, value in row.items()}, indent=room)
        # What never occurs has any value: that of a neighbour.
        dense = [str(row.get(two, next(iter(row.values())))) for two in range(max(second.domain) + 1)]
        tuples[key] = literal("", dense, "()", indent=room)
    return [dictionaries, tuples] if second.ordered else [dictionaries]


def _mapped(name: str, texts: Mapping[int, str], query: Argument) -> Written:
    """The key by query as a table, as short as there is one."""
    listed = {query.write(value): text for value, text in texts.items() if text != "None"}
    by_key = Written(line=f"{name}.get", table=mapping(f"{name} = ", listed))
    if query.ordered and list(texts) == list(range(len(texts))):
        in_order = Written(line=f"lambda query: {name}[query]", table=literal(f"{name} = ", list(texts.values()), "()"))
        return min(by_key, in_order, key=lambda option: option.lines)
    return by_key


def _forms(wanted: Mapping[int, int], query: Argument, key: Argument) -> list[tuple[Callable[[int], int | None], str]]:
    """Functions that a predicate may be but for some queries, simplest first, and how they are written."""
    forms: list[tuple[Callable[[int], int | None], str]] = [(lambda query: None, "None")]
    forms += [
        ((lambda query, found=found: found), key.write(found)) for found in sorted({*wanted.values()} & key.domain)
    ]
    if query.ordered == key.ordered:
        forms.insert(0, (lambda query: query, "query"))
    if query.ordered and key.ordered:
        for shift in sorted({found - value for value, found in wanted.items()} - {0}, key=abs):
            text = f"query {'+' if shift > 0 else '-'} {abs(shift)}"
            forms.append((lambda query, shift=shift: query + shift, text))
        for mirror in sorted({found + value for value, found in wanted.items()}):
            forms.append((lambda query, mirror=mirror: mirror - query, f"{mirror} - query"))
    return forms


def _type(argument: Argument) -> str:
    return "int" if argument.ordered else "str"
