"""A function of one or two values as rules in order, of which the first that holds decides.

A rule asks each argument whether it is in a set, and so covers a rectangle of the function's cells. Rules are found one
after the other, the one first that covers most cells which no rule has covered yet; it may cover others of the same
result, and cells that never occur or were decided before. That is the cover of two-level logic minimisation (espresso)
for values instead of bits; it is exact on all cells and need not be the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MOST_SETS = 256
"""Sets of columns that are tried for each result at each step."""
Cell = tuple[int, int]
Masks = dict[int, int]
"""Bits of columns by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """The result wherever each argument is one of a set."""

    inside: tuple[frozenset[int], frozenset[int]]
    """Rows and columns that it may cover."""
    needed: tuple[frozenset[int], frozenset[int]]
    """Those of them with a cell that no rule before it decides; it has to cover these."""
    result: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """An argument as a text names it."""

    name: str
    domain: frozenset[int]
    """Values that occur."""
    write: Callable[[int], str]
    ordered: bool
    """Whether its values are numbers, which may be compared."""


def decision_list(results: Mapping[Cell, str], default: str) -> list[Rule]:
    """Rules for all cells whose result is not the default.

    Args:
        results: by cell; what is not listed never occurs. A function of one value has one column.
        default: the result where no rule holds.
    """
    columns = sorted({column for _, column in results})
    bit = {column: 1 << at for at, column in enumerate(columns)}
    rows = sorted({row for row, _ in results})
    # What a rectangle may not touch: cells that are not decided yet, by result.
    left: dict[str, Masks] = {}
    for (row, column), result in results.items():
        masks = left.setdefault(result, dict.fromkeys(rows, 0))
        masks[row] |= bit[column]
    found = []
    while open_results := [result for result, masks in left.items() if result != default and any(masks.values())]:
        candidates = [_largest(left, result, rows, (1 << len(columns)) - 1) for result in open_results]
        _, mask, chosen, result = max(candidates, key=lambda each: each[0])
        open_columns = {row: left[result][row] & mask for row in chosen if left[result][row] & mask}
        found.append(
            Rule(
                inside=(frozenset(chosen), frozenset(column for column in columns if mask & bit[column])),
                needed=(
                    frozenset(open_columns),
                    frozenset(
                        column for column in columns if any(bit[column] & each for each in open_columns.values())
                    ),
                ),
                result=result,
            )
        )
        for row in chosen:
            left[result][row] &= ~mask
    return found


def write_rules(rules: Sequence[Rule], default: str, arguments: Sequence[Argument], width: int) -> list[str]:
    """The rules as the body of a function, each test within the width.

    Args:
        rules: in order.
        default: what is returned where none holds.
        arguments: one or two.
        width: columns of a line, the body's indent left out.
    """
    lines = []
    for rule in rules:
        for test in _tests(rule, arguments, width):
            lines += [f"if {test}:", f"    return {rule.result}"]
    return [*lines, f"return {default}"]


def condition(argument: Argument, inside: frozenset[int], needed: frozenset[int]) -> str:
    """The shortest test that holds for all that is needed and nothing outside; empty where all of the domain is in."""
    return min((_membership(argument, each) for each in (inside, needed)), key=len)


def _largest(
    left: Mapping[str, Masks], result: str, rows: Sequence[int], everything: int
) -> tuple[tuple[int, int], int, list[int], str]:
    """The rectangle that decides most: its size and how few sides it has, columns, rows and result."""
    forbidden = dict.fromkeys(rows, 0)
    for other, masks in left.items():
        if other != result:
            for row in rows:
                forbidden[row] |= masks[row]
    free = {row: everything & ~forbidden[row] for row in rows}
    own = left[result]
    best: tuple[tuple[int, int], int, list[int], str] | None = None
    for mask in _column_sets([free[row] for row in rows if own[row]]):
        chosen = [row for row in rows if not mask & ~free[row]]
        gain = sum((own[row] & mask).bit_count() for row in chosen)
        # Of equals the one that asks for less: all rows, or all columns.
        simple = (len(chosen) == len(rows)) + (mask == everything)
        if best is None or (gain, simple) > best[0]:
            best = ((gain, simple), mask, chosen, result)
    assert best is not None
    return best


def _column_sets(masks: Sequence[int]) -> list[int]:
    """Intersections of the masks, none of them empty: a largest rectangle spans one of these."""
    found = dict.fromkeys(mask for mask in masks if mask)
    for mask in list(found):
        for other in list(found):
            if mask & other and len(found) < MOST_SETS:
                found[mask & other] = None
    return list(found)


def _tests(rule: Rule, arguments: Sequence[Argument], width: int) -> list[str]:
    """The rule's test, or several where one would be too long for a line."""
    asked = [
        condition(argument, inside, needed)
        for argument, inside, needed in zip(arguments, rule.inside, rule.needed, strict=False)
    ]
    test = " and ".join(filter(None, asked))
    longest = max(range(len(asked)), key=lambda at: len(asked[at]))
    values = sorted(rule.needed[longest])
    if len(f"if {test}:") <= width or len(values) < 2:
        return [test]
    tests = []
    for half in (values[: len(values) // 2], values[len(values) // 2 :]):
        needed = list(rule.needed)
        needed[longest] = frozenset(half)
        part = Rule(inside=(needed[0], needed[1]), needed=(needed[0], needed[1]), result=rule.result)
        tests += _tests(part, arguments, width)
    return tests


def _membership(argument: Argument, inside: frozenset[int]) -> str:
    name, domain = argument.name, sorted(argument.domain)
    kept = [value for value in domain if value in inside]
    others = [value for value in domain if value not in inside]
    if not others:
        return ""
    tests = [_member(name, "==", "in", kept, argument.write), _member(name, "!=", "not in", others, argument.write)]
    if argument.ordered and kept == domain[domain.index(kept[0]) :][: len(kept)]:
        low, high = argument.write(kept[0]), argument.write(kept[-1])
        if kept[0] == domain[0]:
            tests.append(f"{name} <= {high}")
        elif kept[-1] == domain[-1]:
            tests.append(f"{name} >= {low}")
        elif len(kept) > 1:
            tests.append(f"{low} <= {name} <= {high}")
    return min(tests, key=len)


def _member(name: str, single: str, several: str, values: Sequence[int], write: Callable[[int], str]) -> str:
    if len(values) == 1:
        return f"{name} {single} {write(values[0])}"
    return f"{name} {several} {{{', '.join(map(write, values))}}}"
