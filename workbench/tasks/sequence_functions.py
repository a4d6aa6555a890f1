"""What Transformer Programs are asked for: functions from a sequence of letters to a word at each of them.

Source: Friedman, Wettig and Chen (2023), appendix B: the RASP tasks of Weiss et al. (2021), Dyck languages and
in-context induction. All work on many sequences at once; letters are numbers, and what stands behind a sequence's
length is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.random import Generator

from workbench.runtime import WorkbenchError

Letters = Int64[np.ndarray, "sequence place"]
Lengths = Int64[np.ndarray, " sequence"]
UNREAD = -1
"""The answer at letters that are not asked about."""
DIGITS = "0123456789"
BRACKETS = "(){}[]<>"


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFunction:
    """A function of sequences, and how its inputs are drawn."""

    alphabet: Callable[[int], Sequence[str]]
    """The letters, of which there are that many."""
    outputs: Callable[[int, int], Sequence[str]]
    """Words of the answers, by number of letters and longest sequence."""
    answer: Callable[[Letters, Lengths, int], Letters]
    """Which output each letter has, by sequences, lengths and number of letters."""
    draw: Callable[[Generator, int, int, int], tuple[Letters, Lengths]]
    """Sequences and lengths, by how many, number of letters and longest sequence."""
    ends: bool = False
    """Whether a token says where the sequence ends."""
    causal: bool = False
    """Whether an answer depends on what stands before it alone."""
    free: bool = True
    """Whether every sequence of letters, of every length, is an input."""


def numerals(letters: int) -> Sequence[str]:
    """0, 1, 2 and so on."""
    return tuple(str(each) for each in range(letters))


def brackets(letters: int) -> Sequence[str]:
    """Pairs of brackets, each kind's opening one first."""
    if letters % 2 or not 2 <= letters <= len(BRACKETS):
        raise WorkbenchError(f"Brackets come in pairs: letters must be 2, 4, 6 or 8, got {letters}.")
    return tuple(BRACKETS[:letters])


def names_and_digits(letters: int) -> Sequence[str]:
    """Half of them letters a, b, ..., the other half digits."""
    half = letters // 2
    if letters % 2 or not 1 <= half <= len(DIGITS):
        raise WorkbenchError(f"Induction needs as many letters as digits: letters must be even, got {letters}.")
    return (*(chr(ord("a") + each) for each in range(half)), *DIGITS[:half])


def reverse(letters: Letters, length: Lengths, _n: int) -> Letters:
    """The sequence from its end."""
    place = length[:, None] - 1 - np.arange(letters.shape[1])
    return np.take_along_axis(letters, place.clip(0), 1)


def sort(letters: Letters, length: Lengths, n: int) -> Letters:
    """The sequence in the order of its letters' names, so that 10 stands before 2."""
    by_name = np.argsort(np.array(numerals(n)))
    rank = np.argsort(by_name)
    beyond = np.arange(letters.shape[1]) >= length[:, None]
    ranks = np.sort(np.where(beyond, n, rank[letters]), axis=1)
    return by_name[ranks.clip(max=n - 1)]


def hist(letters: Letters, length: Lengths, n: int) -> Letters:
    """How often each letter stands in the sequence; output 0 is once."""
    return np.take_along_axis(_counts(letters, length, n), letters, 1) - 1


def double_hist(letters: Letters, length: Lengths, n: int) -> Letters:
    """How many different letters stand in the sequence as often as this one; output 0 is one."""
    counts = _counts(letters, length, n)
    own = np.take_along_axis(counts, letters, 1)
    return (counts[:, None, :] == own[:, :, None]).sum(2) - 1


def most_freq(letters: Letters, length: Lengths, n: int) -> Letters:
    """The different letters, the most frequent first and of equals the earlier one; then output n."""
    width = letters.shape[1]
    counts = _counts(letters, length, n)
    place = np.where(np.arange(width) < length[:, None], np.arange(width), width)
    first = np.full((len(letters), n), width)
    np.minimum.at(first, (np.arange(len(letters))[:, None], letters), place)
    order = np.argsort(-counts * (width + 1) + first, axis=1)
    answer = np.full(letters.shape, n)
    shown = min(n, width)
    present = np.arange(shown) < (counts > 0).sum(1)[:, None]
    answer[:, :shown] = np.where(present, order[:, :shown], n)
    return answer


def dyck(letters: Letters, length: Lengths, n: int) -> Letters:
    """Whether the brackets so far are the beginning of a balanced string (0), balanced (1), or neither (2)."""
    rows = np.arange(len(letters))
    stack = np.full((len(letters), letters.shape[1] + 1), UNREAD)
    depth = np.zeros(len(letters), dtype=np.int64)
    failed = np.zeros(len(letters), dtype=bool)
    answer = np.empty_like(letters)
    for place in range(letters.shape[1]):
        kind, closes = letters[:, place] // 2, letters[:, place] % 2 == 1
        failed |= closes & ((depth == 0) | (stack[rows, (depth - 1).clip(0)] != kind))
        stack[rows[~closes], depth[~closes]] = kind[~closes]
        depth = np.where(closes, (depth - 1).clip(0), depth + 1)
        answer[:, place] = np.where(failed, 2, np.where(depth == 0, 1, 0))
    return answer


def induction(letters: Letters, length: Lengths, n: int) -> Letters:
    """At each letter the digit that followed it before, or output n/2 where it is new; digits are not asked about."""
    half = n // 2
    answer = np.full(letters.shape, UNREAD)
    known = np.full((len(letters), n), half)
    rows = np.arange(len(letters))
    for place in range(letters.shape[1]):
        now = letters[:, place]
        named = now < half
        answer[named, place] = known[rows, now][named]
        if place:
            before = letters[:, place - 1]
            pair = ~named & (before < half)
            known[rows[pair], before[pair]] = now[pair] - half
    return answer


def strings(rng: Generator, count: int, letters: int, longest: int) -> tuple[Letters, Lengths]:
    """Any letters, all lengths from 1 equally often."""
    return rng.integers(letters, size=(count, longest)), rng.integers(1, longest + 1, size=count)


def bracket_strings(rng: Generator, count: int, letters: int, longest: int) -> tuple[Letters, Lengths]:
    """Half of them any brackets; the others begin with a balanced string.

    That is made in up to 8 steps, each of which wraps what is there or appends a pair.
    """
    drawn = rng.integers(letters, size=(count, longest))
    for row in np.flatnonzero(rng.random(count) < 0.5):
        text: list[int] = []
        for kind, wraps in zip(
            rng.integers(letters // 2, size=(steps := rng.integers(1, 9))), rng.random(steps) < 0.5, strict=True
        ):
            text = [2 * kind, *text, 2 * kind + 1] if wraps else [*text, 2 * kind, 2 * kind + 1]
        text = text[:longest]
        drawn[row, : len(text)] = text
    return drawn, np.full(count, longest)


def pairs_of_names(rng: Generator, count: int, letters: int, longest: int) -> tuple[Letters, Lengths]:
    """Letters, each followed by its digit, which each sequence chooses for itself.

    Half of them begin with any digit, so that all may have an odd length.
    """
    half, n_pairs = letters // 2, longest // 2
    digit_of = rng.integers(half, size=(count, half))
    names = rng.integers(half, size=(count, n_pairs + 1))
    digits = half + np.take_along_axis(digit_of, names, 1)
    woven = np.stack([names, digits], 2).reshape(count, -1)
    starts = rng.random(count) < 0.5
    shifted = np.concatenate([half + rng.integers(half, size=(count, 1)), woven], 1)
    return np.where(starts[:, None], shifted[:, :longest], woven[:, :longest]), np.full(count, longest)


def _counts(letters: Letters, length: Lengths, n: int) -> Int64[np.ndarray, "sequence letter"]:
    present = np.arange(letters.shape[1]) < length[:, None]
    return ((letters[:, :, None] == np.arange(n)) & present[:, :, None]).sum(1)


def _letters_out(letters: int, _longest: int) -> Sequence[str]:
    return numerals(letters)


def _counts_out(_letters: int, longest: int) -> Sequence[str]:
    return tuple(str(each) for each in range(1, longest + 1))


FUNCTIONS: dict[str, SequenceFunction] = {
    "reverse": SequenceFunction(alphabet=numerals, outputs=_letters_out, answer=reverse, draw=strings, ends=True),
    "sort": SequenceFunction(alphabet=numerals, outputs=_letters_out, answer=sort, draw=strings, ends=True),
    "hist": SequenceFunction(alphabet=numerals, outputs=_counts_out, answer=hist, draw=strings),
    "double_hist": SequenceFunction(
        alphabet=numerals,
        outputs=lambda letters, longest: _counts_out(letters, min(letters, longest)),
        answer=double_hist,
        draw=strings,
    ),
    "most_freq": SequenceFunction(
        alphabet=numerals,
        outputs=lambda letters, longest: (*numerals(letters), "<s>"),
        answer=most_freq,
        draw=strings,
    ),
    "dyck": SequenceFunction(
        alphabet=brackets,
        outputs=lambda letters, longest: ("P", "T", "F"),
        answer=dyck,
        draw=bracket_strings,
        causal=True,
        free=False,
    ),
    "induction": SequenceFunction(
        alphabet=names_and_digits,
        outputs=lambda letters, longest: (*DIGITS[: letters // 2], "<unk>"),
        answer=induction,
        draw=pairs_of_names,
        causal=True,
        free=False,
    ),
}
