"""Whole names found in text: precision, recall and F1 of tags `B-KIND`, `I-KIND` and `O` (Tjong Kim Sang 2002).

A name counts as found if its first word, its last word and its kind are all right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.intervals import Estimate, ratio_bootstrap

OUTSIDE = "O"
Span = tuple[int, int, str]
"""First place, the place after the last, kind."""


def spans(tags: Sequence[str]) -> set[Span]:
    """The names that tags mark; an `I-KIND` that goes on with nothing of its kind begins a name."""
    found, start, before = set(), 0, OUTSIDE
    for place, tag in enumerate([*tags, OUTSIDE]):
        side, _, kind = tag.partition("-")
        goes_on = side == "I" and before == kind
        if before != OUTSIDE and not goes_on:
            found.add((start, place, before))
        if not goes_on:
            start, before = place, kind or OUTSIDE
    return found


def entity_scores(
    said: Int[Tensor, "text pos"], targets: Int[Tensor, "text pos"], read: Bool[Tensor, "text pos"], tags: Sequence[str]
) -> dict[str, Estimate | None]:
    """Precision, recall and F1 over all names, each with its bootstrap interval over texts; None where there are none.

    Args:
        said: tags by number.
        targets: the right ones.
        read: where words are.
        tags: names of the numbers.
    """
    rows = []
    for row, words in enumerate(read):
        found, right = (spans([tags[int(tag)] for tag in each[row][words]]) for each in (said, targets))
        rows.append((len(found & right), len(found), len(right)))
    hits, found, right = torch.tensor(rows, dtype=torch.float64).unbind(1)
    ratios = {"precision": (hits, found), "recall": (hits, right), "f1": (2 * hits, found + right)}
    return {name: _ratio(*parts) for name, parts in ratios.items()}


def _ratio(above: Tensor, below: Tensor) -> Estimate | None:
    if not below.sum():
        return None
    low, high = ratio_bootstrap(above, below)
    return Estimate(mean=float(above.sum() / below.sum()), low=float(low), high=float(high))
