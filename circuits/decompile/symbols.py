"""Values that depend on letters not known yet: a formula for each that may be, exactly one of which holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import z3

Formula = z3.BoolRef | bool
Value = dict[int, Formula]


def all_of(*parts: Formula) -> Formula:
    """Whether all hold; decided at once where that is known."""
    if any(part is False for part in parts):
        return False
    left = [part for part in parts if part is not True]
    return cast(Formula, z3.And(*left)) if len(left) > 1 else left[0] if left else True


def any_of(*parts: Formula) -> Formula:
    """Whether one holds; decided at once where that is known."""
    if any(part is True for part in parts):
        return True
    left = [part for part in parts if part is not False]
    return cast(Formula, z3.Or(*left)) if len(left) > 1 else left[0] if left else False


def negated(part: Formula) -> Formula:
    """Whether it does not hold."""
    return not part if isinstance(part, bool) else cast(Formula, z3.Not(part))


def one_of(value: Value, images: Sequence[int]) -> Value:
    """What each value is sent to."""
    found: dict[int, list[Formula]] = {}
    for one, held in value.items():
        found.setdefault(int(images[one]), []).append(held)
    return {one: any_of(*parts) for one, parts in found.items()}


def summed(terms: Sequence[tuple[Formula, Value]]) -> Value:
    """The sum of those values whose formula holds."""
    total: Value = {0: True}
    for held, value in terms:
        found: dict[int, list[Formula]] = {}
        for so_far, reached in total.items():
            found.setdefault(so_far, []).append(all_of(reached, negated(held)))
            for one, also in value.items():
                found.setdefault(so_far + one, []).append(all_of(reached, held, also))
        total = {one: formula for one, parts in found.items() if (formula := any_of(*parts)) is not False}
    return total


def same(first: Value, second: Value) -> Formula:
    """Whether both are equal."""
    return any_of(*(all_of(held, second[one]) for one, held in first.items() if one in second))
