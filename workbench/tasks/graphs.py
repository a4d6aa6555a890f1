"""Many small directed graphs at once, as bit masks: children, reachability, lookahead.

A graph has at most 62 vertices. The children of a vertex are one 64-bit number, with a bit for each vertex; so is any
set of vertices. A batch of graphs is an array of such numbers, and a step of a search is a few operations on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64

from workbench.runtime import generator

MOST_VERTICES = 62

Sets = Int64[np.ndarray, " batch"]
"""A set of vertices for each graph."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Graphs:
    """A question about each of many graphs: which child of `start` leads to `goal`?"""

    children: Int64[np.ndarray, "batch vertex"]
    """The set of each vertex' children."""
    start: Int64[np.ndarray, " batch"]
    goal: Int64[np.ndarray, " batch"]

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.children)

    def select(self, rows: np.ndarray) -> Graphs:
        """The graphs of these rows."""
        return Graphs(children=self.children[rows], start=self.start[rows], goal=self.goal[rows])

    @property
    def first(self) -> Sets:
        """Children of the start: what can be answered."""
        return self.children[np.arange(len(self)), self.start]

    @property
    def n_edges(self) -> Int64[np.ndarray, " batch"]:
        """Number of edges."""
        return np.bitwise_count(self.children).sum(1, dtype=np.int64)

    def edges(self) -> tuple[Int64[np.ndarray, " edge"], Int64[np.ndarray, " edge"], Int64[np.ndarray, " edge"]]:
        """Graph, source and target of every edge of all graphs, in this order."""
        width = self.children.shape[1]
        flat = np.flatnonzero(members(self.children, width))
        graph, pair = np.divmod(flat, width * width)
        source, target = np.divmod(pair, width)
        return graph, source, target

    def useful(self) -> Sets:
        """Children of the start from which the goal can be reached: the right answers."""
        return self.first & ancestors(self.children, self.goal)

    def lookahead(self) -> Int64[np.ndarray, " batch"]:
        """How far from the start one has to look to tell right children from wrong ones; valid where there is a path.

        The right and the wrong children are followed side by side, level by level, each vertex counted where it is
        reached first. The lookahead is the number of levels until the goal is seen or the wrong branches have ended
        (Saparov et al. 2025, section 3): 0 where no child is wrong, at most the distance to the goal.
        """
        found, rows = np.zeros(len(self), np.int64), np.arange(len(self))
        seen, right = self.first, self.useful()
        wrong, children, goal = seen & ~right, self.children, bit(self.goal)
        while len(rows):
            found[rows] += wrong != 0
            on = (wrong != 0) & (right & goal == 0)
            rows, children, goal = rows[on], children[on], goal[on]
            seen, right, wrong = seen[on], right[on], wrong[on]
            right = successors(children, right) & ~seen
            wrong = successors(children, wrong) & ~seen & ~right
            seen = seen | right | wrong
        return found


def bit(vertex: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
    """The set of one vertex."""
    return np.left_shift(np.int64(1), vertex)


def members(sets: Int64[np.ndarray, "*shape"], width: int) -> Bool[np.ndarray, "*shape vertex"]:
    """Which of the first `width` vertices are in each set."""
    octets = np.ascontiguousarray(sets)[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=width, bitorder="little").view(bool)


def collect(member: Bool[np.ndarray, "batch vertex"]) -> Sets:
    """The sets that have these members: the inverse of `members`."""
    octets = np.zeros((len(member), 8), np.uint8)
    packed = np.packbits(member, axis=1, bitorder="little")
    octets[:, : packed.shape[1]] = packed
    return octets.view(np.int64)[:, 0]


def successors(children: Int64[np.ndarray, "batch vertex"], of: Sets) -> Sets:
    """All children of a set's vertices."""
    return np.bitwise_or.reduce(np.where(members(of, children.shape[1]), children, 0), axis=1)


def ancestors(children: Int64[np.ndarray, "batch vertex"], of: Int64[np.ndarray, " batch"]) -> Sets:
    """All vertices from which a vertex can be reached, itself among them."""
    reaching, rows = bit(of), np.arange(len(of))
    while len(rows):
        before = reaching[rows]
        after = before | collect(children & before[:, None] != 0)
        grown = after != before
        reaching[rows] = after
        rows, children = rows[grown], children[grown]
    return reaching


def descendants(children: Int64[np.ndarray, "batch vertex"]) -> Int64[np.ndarray, "batch vertex"]:
    """All vertices that can be reached from each vertex, itself only where there is a cycle."""
    below = children
    for middle in range(children.shape[1]):
        # Warshall 1962: who reaches the middle reaches all that the middle reaches.
        through = below >> middle & 1 == 1
        below = below | np.where(through, below[:, middle : middle + 1], 0)
    return below


def distances(children: Int64[np.ndarray, "batch vertex"], start: Int64[np.ndarray, " batch"]) -> np.ndarray:
    """Edges on the shortest path from the start to each vertex; -1 where there is none. Shape [batch, vertex]."""
    width = children.shape[1]
    found = np.full(children.shape, -1, np.int64)
    seen = frontier = bit(start)
    step = 0
    while frontier.any():
        found[members(frontier, width)] = step
        frontier = successors(children, frontier) & ~seen
        seen, step = seen | frontier, step + 1
    return found


def choose_member(sets: Sets, width: int, rng: np.random.Generator) -> Int64[np.ndarray, " batch"]:
    """One vertex of each set, all equally likely; 0 of an empty set."""
    score = np.where(members(sets, width), rng.random((len(sets), width), np.float32), -1)
    return np.where(sets == 0, 0, score.argmax(1))


def numpy_generator(seed: int | torch.Generator, *names: str | int) -> np.random.Generator:
    """A numpy generator for one use of `seed`."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator(seed, *names))))
