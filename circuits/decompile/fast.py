"""A discrete program as a Python module that runs many sequences at once, with NumPy.

It has the letters, the words and the command line of the readable module; inside, values are the program's own numbers,
a head is a comparison of whole arrays, and a table is indexed.
"""

from __future__ import annotations

import textwrap

import numpy as np

from circuits.decompile.layout import WIDTH, indented, literal, quoted
from circuits.decompile.python import Interface, Names
from circuits.decompile.ranges import MOST_CELLS, Ranges
from circuits.decompile.simplify import Live
from circuits.decompile.votes import tally
from workbench.models.discrete import (
    CategoricalHead,
    CategoricalTable,
    DiscreteProgram,
    NumericalFunction,
    NumericalHead,
    NumericalMLP,
    NumericalTree,
    Part,
    Split,
)

MODULE = '''"""{title}

Written by the Interp Workbench from a discretised Transformer Program (Friedman et al. 2023), to run many sequences at
once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

__all__ = ["run", "run_all"]

{alphabet}
LONGEST = {longest}
{classes}
AT_ONCE = 1024
{begin}
{end}
PAD = {pad}
PLACES = np.arange(LONGEST + 1 + len(END))
DISTANCE = abs(PLACES[:, None] - PLACES)
# The own place is the last that is copied from; of two the earlier is the first smallest.
NEAR = np.where(DISTANCE == 0, len(PLACES), DISTANCE)
FAR = len(PLACES) + 1
{arrays}


def run(letters: Sequence[str]) -> list[str]:
    """The program's word at each letter.

    Raises:
        ValueError: no letter, too many, or one that is not in the alphabet.
    """
    return run_all([letters])[0]


def run_all(sequences: Sequence[Sequence[str]]) -> list[list[str]]:
    """The program's word at each letter of each sequence.

    Raises:
        ValueError: as `run` does.
    """
    parts = range(0, len(sequences), AT_ONCE)
    return [words for at in parts for words in _run(sequences[at : at + AT_ONCE])]


def _run(sequences: Sequence[Sequence[str]]) -> list[list[str]]:
    for letters in sequences:
        if not 1 <= len(letters) <= LONGEST:
            raise ValueError(f"Give 1 to {{LONGEST}} letters, got {{len(letters)}}.")
        for letter in letters:
            if letter not in ALPHABET:
                known = " ".join(ALPHABET)
                raise ValueError(f"Letter {{letter!r}} is not in the alphabet: {{known}}.")
    width = max(map(len, sequences))
    ids = np.array(
        [
            BEGIN + [ALPHABET[letter] for letter in letters] + END + [PAD] * (width - len(letters))
            for letters in sequences
        ]
    )
    real = ids != PAD
    ones = real.astype(int)
    positions = np.broadcast_to(PLACES[: ids.shape[1]], ids.shape)
{body}
    said = totals.argmax(2)
    return [
        [CLASSES[word] for word in row[1 : 1 + len(letters)]]
        for row, letters in zip(said.tolist(), sequences)
    ]


def _matches(queries: np.ndarray, keys: np.ndarray, wanted: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Which places each place looks for: padding neither looks nor is found."""
    asked, found = np.where(real, wanted[queries], -1), np.where(real, keys, -2)
    return {match}


def _copied(values: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """The value at the nearest match, or at place 0."""
    length = values.shape[1]
    nearest = np.where(matches, NEAR[:length, :length], FAR).argmin(2)
    return np.take_along_axis(values, nearest, 1)


def _summed(numbers: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """The sum of the numbers at all matches."""
    return np.einsum("bqk,bk->bq", matches, numbers)


if __name__ == "__main__":
    try:
        print(" ".join(run(sys.argv[1:])))
    except ValueError as error:
        sys.exit(str(error))
'''
MATCH = "asked[:, :, None] == found[:, None, :]"
CAUSAL = f"np.tril({MATCH})"


def emit_fast(program: DiscreteProgram, ranges: Ranges, live: Live, interface: Interface) -> str:
    """The module's text."""
    names = Names(program, ranges)
    arrays = [_array("EMBEDDING", program.embedding)]
    lines = [
        f"{name} = EMBEDDING[ids, {at}]" for at, name in enumerate(names.categorical[: program.embedding.shape[1]])
    ]
    for part in live.parts(program):
        line, needed = _part(part, names)
        lines.append(line)
        arrays += needed
    summed = tally(program, ranges, live)
    lines.append("totals = BIAS + np.zeros((*ids.shape, 1), dtype=BIAS.dtype)")
    arrays.append(_array("BIAS", summed.bias))
    for place, rows in summed.categorical.items():
        name = names.categorical[place]
        # What never occurs has no votes.
        votes = np.zeros((program.shape.cardinality, len(summed.bias)), dtype=summed.bias.dtype)
        votes[list(rows)] = list(rows.values())
        arrays.append(_array(f"VOTES_OF_{name.upper()}", votes))
        lines.append(f"totals += VOTES_OF_{name.upper()}[{name}]")
    for place, row in summed.numerical.items():
        name = names.numerical[place]
        arrays.append(_array(f"VOTES_OF_{name.upper()}", row))
        lines.append(f"totals += {name}[:, :, None] * VOTES_OF_{name.upper()}")
    letters = {quoted(word): str(token) for token, word in enumerate(program.vocab[: interface.letters])}
    classes = [quoted(word) for word, allowed in zip(program.classes, program.allowed, strict=True) if allowed]
    return MODULE.format(
        title=interface.title,
        alphabet=literal("ALPHABET = ", [f"{word}: {token}" for word, token in letters.items()], "{}"),
        longest=interface.longest,
        classes=literal("CLASSES = ", classes, "()"),
        begin=f"BEGIN = [{interface.begin}]",
        end=f"END = {[] if interface.end is None else [interface.end]}",
        pad=program.pad_token,
        arrays="\n".join(arrays),
        body=indented("\n".join(lines)),
        match=CAUSAL if program.shape.causal else MATCH,
    )


def _part(part: Part, names: Names) -> tuple[str, list[str]]:
    """The line that computes a part's variable, and the arrays that it needs."""
    name, capitals = part.name, part.name.upper()
    match part.does:
        case CategoricalHead() | NumericalHead() as head:
            copies = isinstance(head, CategoricalHead)
            values = names.categorical[head.value] if copies else names.numerical[head.value]
            queries, keys = names.categorical[head.query], names.categorical[head.key]
            matches = f"_matches({queries}, {keys}, WANTED_BY_{capitals}, real)"
            line = f"{name} = {'_copied' if copies else '_summed'}({values}, {matches})"
            return line, [_array(f"WANTED_BY_{capitals}", head.predicate)]
        case CategoricalTable() as mlp:
            return f"{name} = {capitals}[{_both(names.categorical, mlp.reads)}]", [_array(capitals, mlp.table)]
        case NumericalFunction() as mlp:
            read = _both(names.numerical, mlp.reads)
            sizes = [names.ranges.numbers[place][1] + 1 for place in mlp.reads]
            if sizes[0] * sizes[1] <= MOST_CELLS:
                table = mlp(np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1))
                return f"{name} = {capitals}[{read}]", [_array(capitals, table)]
            if isinstance(mlp, NumericalTree):
                one, two = (names.numerical[place] for place in mlp.reads)
                return f"{name} = {_choice(mlp.root, (one, two))}", []
            assert isinstance(mlp, NumericalMLP)
            weights = {"W_IN": mlp.W_in, "B_IN": mlp.b_in, "W_OUT": mlp.W_out, "B_OUT": mlp.b_out}
            hidden = f"np.maximum(np.stack([{read}], 2) @ {capitals}_W_IN + {capitals}_B_IN, 0)"
            line = f"{name} = ({hidden} @ {capitals}_W_OUT + {capitals}_B_OUT).argmax(2)"
            return line, [_array(f"{capitals}_{each}", array) for each, array in weights.items()]


def _both(names: list[str], reads: tuple[int, int]) -> str:
    return ", ".join(names[place] for place in reads)


def _choice(node: Split | int, names: tuple[str, str]) -> str:
    """A tree as an expression."""
    if isinstance(node, int):
        return f"np.full(ids.shape, {node})"
    test = f"{names[node.reads]} <= {node.at_most}"
    return f"np.where({test}, {_choice(node.below, names)}, {_choice(node.above, names)})"


def _array(name: str, array: np.ndarray) -> str:
    """An array under its name, in lines that fit."""
    text = textwrap.fill(str(array.tolist()), WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    line = f"{name} = np.array({text})"
    return line if "\n" not in text and len(line) <= WIDTH else f"{name} = np.array(\n{indented(text)}\n)"
