"""Distributions of search graphs: balanced, naive and star (Saparov et al. 2025; Bachmann & Nagarajan 2024).

Each function draws one candidate for each lookahead that is asked for; what does not keep to it, has too many edges or
no path to the goal is for the caller to reject. Vertices are numbered in the order in which they are made: whoever
shows a graph to a model renames them at random first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int64

from workbench.tasks.graphs import Graphs, bit

Distribution = Literal["balanced", "naive", "star"]
Counts = Int64[np.ndarray, " batch"]
MOST_PER_SIDE = 3
"""Most children, and most parents, that a distracting vertex is given when it is added."""
MOST_SPARE = 5
"""Most vertices beyond those that the branches need."""


class Draw(Protocol):
    """One candidate graph for each lookahead."""

    def __call__(self, rng: np.random.Generator, lookahead: Counts, n_vertices: int) -> Graphs:
        """Graphs of at most `n_vertices` vertices; the lookahead asked for may or may not be theirs."""
        ...


def largest_lookahead(n_vertices: int) -> int:
    """Two branches of this length and their start just fit."""
    return (n_vertices - 1) // 2


def balanced(rng: np.random.Generator, lookahead: Counts, n_vertices: int) -> Graphs:
    """Branches from the start that are all about as long, so that neither degree nor early ends betray the right one.

    The branch of the goal has the lookahead's length, the others that or one more; a chain of ancestors leads to the
    start; a few distracting vertices are tied to all of it at random, those of high degree preferred.
    """
    n_paths = _between(
        rng, np.where(lookahead == 0, 1, 2), (n_vertices - 1) // np.maximum(lookahead, 1), zero=lookahead
    )
    correct = np.maximum(lookahead, 1)
    least = 1 + correct + (n_paths - 1) * lookahead
    size = np.minimum(1 + n_paths * lookahead + rng.integers(0, MOST_SPARE + 1, len(lookahead)), n_vertices)
    size = np.maximum(size, np.maximum(least, 2))
    lengths = _branch_lengths(rng, correct, lookahead, n_paths, size - least)
    used = 1 + lengths.sum(1)
    prefix = rng.integers(0, size - used + 1)
    growing = Growing.chains(lengths, n_vertices)
    growing.prepend(used, prefix)
    for extra in range(MOST_SPARE):
        vertex = used + prefix + extra
        rows = np.flatnonzero(vertex < size)
        if len(rows):
            growing.attach(rng, rows, vertex[rows])
    return Graphs(children=growing.children, start=np.zeros_like(correct), goal=correct)


def naive(rng: np.random.Generator, lookahead: Counts, n_vertices: int) -> Graphs:
    """Every vertex but the first has one to three earlier ones as parents; start and goal are any two, not the last.

    The lookahead asked for is not looked at: it is what it happens to be, mostly small.
    """
    n, size = len(lookahead), rng.integers(3, n_vertices, len(lookahead))
    earlier = np.arange(n_vertices)
    n_parents = np.where(rng.random((n, n_vertices)) < 0.5, 1, rng.integers(1, 4, (n, n_vertices)))
    n_parents = np.minimum(n_parents, earlier) * (earlier < size[:, None])
    parents = _distinct_triples(rng, n, n_vertices)
    children = np.zeros((n, n_vertices), np.int64)
    rows = np.arange(n)
    for vertex in range(1, n_vertices):
        for nth, parent in enumerate(parents):
            children[rows, parent[:, vertex]] |= np.where(nth < n_parents[:, vertex], 1 << vertex, 0)
    start = rng.integers(0, size - 1)
    # A number below size - 2, moved past the start.
    goal = rng.integers(0, size - 2)
    return Graphs(children=children, start=start, goal=goal + (goal >= start))


def star(rng: np.random.Generator, lookahead: Counts, n_vertices: int) -> Graphs:
    """Chains of one length from a hub, the goal at the end of one: every length and number that fits, equally likely.

    The lookahead asked for is not looked at: it is the chains' length, or 0 where there is only one.
    """
    longest = largest_lookahead(n_vertices)
    table = np.array(
        [(length, n) for length in range(1, longest + 1) for n in range(1, (n_vertices - 1) // length + 1)]
    )
    length, n_chains = table[rng.integers(0, len(table), len(lookahead))].T
    lengths = np.where(np.arange(n_chains.max()) < n_chains[:, None], length[:, None], 0)
    growing = Growing.chains(lengths, n_vertices)
    return Graphs(children=growing.children, start=np.zeros_like(length), goal=length.copy())


DISTRIBUTIONS: Mapping[Distribution, Draw] = {"balanced": balanced, "naive": naive, "star": star}


@dataclass(kw_only=True, slots=True)
class Growing:
    """Graphs that are being built: chains from vertex 0, then a chain into it, then single vertices.

    Descendants and degrees are kept up to date, since what is added next depends on them.
    """

    children: Int64[np.ndarray, "batch vertex"]
    below: Int64[np.ndarray, "batch vertex"]
    """Descendants of each vertex."""
    n_in: Int64[np.ndarray, "batch vertex"]
    n_out: Int64[np.ndarray, "batch vertex"]

    @classmethod
    def chains(cls, lengths: Int64[np.ndarray, "batch chain"], n_vertices: int) -> Growing:
        """Chains of these lengths, one after another in the numbering; none where the length is 0."""
        place = np.arange(n_vertices)
        ends = lengths.cumsum(1)
        used = 1 + ends[:, -1]
        heads = np.where(lengths > 0, bit(1 + ends - lengths), 0).sum(1)
        # Vertices whose parent is the one numbered before them.
        inner = (bit(used) - 2) & ~heads
        children = np.left_shift(2, place) & inner[:, None]
        children[:, 0] = heads
        # The run of inner vertices right after a vertex is the rest of its chain; x ^ (x + 1) finds where it ends.
        after = inner[:, None] >> (place + 1)
        below = ((after ^ (after + 1)) >> 1) << (place + 1)
        below[:, 0] = bit(used) - 2
        below[place >= used[:, None]] = 0
        n_in = ((place > 0) & (place < used[:, None])).astype(np.int64)
        return cls(children=children, below=below, n_in=n_in, n_out=np.bitwise_count(children).astype(np.int64))

    def prepend(self, used: Counts, length: Counts) -> None:
        """A chain of so many new vertices into vertex 0, numbered from the one that points at it."""
        place = np.arange(self.children.shape[1])
        new = (place >= used[:, None]) & (place < (used + length)[:, None])
        into = np.where(place == used[:, None], 1, bit(np.maximum(place - 1, 0)))
        self.children[new] = into[new]
        # All that was there before can be reached, whatever its number.
        self.below[new] = np.broadcast_to(bit(place) - 1, new.shape)[new]
        self.n_out[new] = 1
        self.n_in += (place >= used[:, None]) & (place < (used + length - 1)[:, None])
        self.n_in[:, 0] += length > 0

    def attach(self, rng: np.random.Generator, rows: np.ndarray, vertex: Counts) -> None:
        """A new vertex in some rows, with up to three children and parents, more likely those of high degree.

        A parent is never a descendant, so that no cycle closes.
        """
        each = np.arange(len(rows))
        n_children = rng.integers(0, MOST_PER_SIDE + 1, len(rows))
        n_parents = rng.integers((n_children == 0).astype(np.int64), MOST_PER_SIDE + 1)
        present = np.arange(self.children.shape[1]) < vertex[:, None]
        below, own = self.below[rows], bit(vertex)
        chosen, targets = _weighted_choice(rng, self.n_in[rows], present, n_children)
        under = targets | np.bitwise_or.reduce(np.where(chosen >= 0, below[each[:, None], chosen], 0), axis=1)
        place = np.arange(below.shape[1])
        allowed = present & (under[:, None] >> place & 1 == 0)
        parents, sources = _weighted_choice(rng, self.n_out[rows], allowed, n_parents)
        self.children[rows, vertex] = targets
        self.n_out[rows, vertex] = np.bitwise_count(targets)
        self.n_in[rows, vertex] = np.bitwise_count(sources)
        above = (below & sources[:, None] != 0) | (sources[:, None] >> place & 1 == 1)
        below |= np.where(above, (under | own)[:, None], 0)
        below[each, vertex] = under
        self.below[rows] = below
        for nth in range(MOST_PER_SIDE):
            child, parent = chosen[:, nth], parents[:, nth]
            self.n_in[rows[child >= 0], child[child >= 0]] += 1
            self.n_out[rows[parent >= 0], parent[parent >= 0]] += 1
            self.children[rows[parent >= 0], parent[parent >= 0]] |= own[parent >= 0]


def _between(rng: np.random.Generator, low: Counts, high: Counts, *, zero: Counts) -> Counts:
    """How many branches: from `low` to `high`, but at most two where the lookahead is 0."""
    return rng.integers(low, np.where(zero == 0, 2, high) + 1)


def _branch_lengths(
    rng: np.random.Generator, correct: Counts, lookahead: Counts, n_paths: Counts, room: Counts
) -> Int64[np.ndarray, "batch chain"]:
    """The right branch's length, then the others': the lookahead or, as long as there is room, one more at random."""
    nth = np.arange(n_paths.max(initial=1))
    longer = (rng.random((len(n_paths), len(nth))) < 0.5) & (nth > 0) & (nth < n_paths[:, None])
    longer &= longer.cumsum(1) <= room[:, None]
    lengths = np.where(nth < n_paths[:, None], lookahead[:, None], 0) + longer
    lengths[:, 0] = correct
    return lengths


def _weighted_choice(
    rng: np.random.Generator,
    degree: Int64[np.ndarray, "row vertex"],
    allowed: Bool[np.ndarray, "row vertex"],
    n: Counts,
) -> tuple[Int64[np.ndarray, "row nth"], Int64[np.ndarray, " row"]]:
    """Up to `n` of the allowed vertices without replacement, with probability as 0.5 + degree; -1 where there is none.

    The order of exponential waiting times at these rates is that of draws without replacement.
    """
    waiting = rng.standard_exponential(degree.shape, np.float32) / (degree.astype(np.float32) + np.float32(0.5))
    waiting[~allowed] = np.inf
    each, chosen = np.arange(len(n)), np.full((len(n), MOST_PER_SIDE), -1)
    for nth in range(MOST_PER_SIDE):
        soonest = waiting.argmin(1)
        chosen[:, nth] = np.where((nth < n) & (waiting[each, soonest] < np.inf), soonest, -1)
        waiting[each, soonest] = np.inf
    picked = np.where(chosen >= 0, bit(np.maximum(chosen, 0)), 0)
    return chosen, np.bitwise_or.reduce(picked, axis=1)


def _distinct_triples(rng: np.random.Generator, n: int, n_vertices: int) -> list[Int64[np.ndarray, "batch vertex"]]:
    """Three distinct earlier vertices of each vertex, at random; not distinct where there are too few."""
    earlier = np.arange(n_vertices)
    first, second, third = (
        (rng.random((n, n_vertices)) * np.maximum(earlier - taken, 1)).astype(np.int64) for taken in range(3)
    )
    second += second >= first
    low, high = np.minimum(first, second), np.maximum(first, second)
    third += third >= low
    third += third >= high
    return [np.minimum(parent, np.maximum(earlier - 1, 0)) for parent in (first, second, third)]
