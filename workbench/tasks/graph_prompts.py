"""How a search graph is written as a prompt, and read back (Saparov et al. 2025, section 3).

    PAD … PAD E source target E source target … Q start goal P start

The edges come in a random order, padding stands on the left, so that the tail after them has fixed positions; the
answer is read at the last one. Vertices go by random names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from workbench.runtime import WorkbenchError
from workbench.tasks.graphs import Graphs, bit, collect, descendants, members

EDGE_LENGTH = 3
QUERY, PATH = -1, -2
"""The marks of a tail, among vertices that are numbered from 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Written:
    """Graphs as prompts."""

    tokens: Int64[np.ndarray, "batch pos"]
    code: Int64[np.ndarray, " batch"]
    """A number for each graph with its names, start and goal, whatever the order of its edges."""
    name: Int64[np.ndarray, "batch vertex"]
    """Token of each vertex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Tokens and positions of prompts of one length."""

    size: int
    """Positions of a prompt."""
    n_edges: int
    """Most edges that a prompt holds, and most vertices that a graph has."""
    spare: int
    """Names beyond those that the largest graph needs."""
    tail: tuple[str, ...]
    """What stands at the positions after the edges; `Q start goal P` comes first."""

    @property
    def n_names(self) -> int:
        """Vertices are tokens 1 to this; 0 is no token."""
        return self.n_edges + self.spare

    @property
    def path(self) -> int:
        """Token before the path so far."""
        return self.n_names + 1

    @property
    def edge(self) -> int:
        """Token before each edge."""
        return self.n_names + 2

    @property
    def pad(self) -> int:
        """Token that fills the left."""
        return self.n_names + 3

    @property
    def query(self) -> int:
        """Token before start and goal."""
        return self.n_names + 4

    @property
    def vocab(self) -> Sequence[str]:
        """What each token is to a person."""
        return ("<none>", *map(str, range(1, self.n_names + 1)), "P", "E", "<pad>", "Q")

    @property
    def position_labels(self) -> Sequence[str]:
        """Edges by number from the left, then the tail."""
        edges = [label for n in range(1, self.n_edges + 1) for label in (f"E{n}", f"source {n}", f"target {n}")]
        return (*(f"pad {n}" for n in range(1, self.end - len(edges) + 1)), *edges, *self.tail)

    @property
    def end(self) -> int:
        """Position where the edges end and the tail begins."""
        return self.size - len(self.tail)

    def write(
        self, graphs: Graphs, tail: Int64[np.ndarray, "batch tail"], rng: np.random.Generator, *, seed: int
    ) -> Written:
        """The graphs as prompts: names and order of edges drawn at random.

        Args:
            graphs: of at most `n_edges` edges and vertices each.
            tail: vertices and marks.
            rng: draws names and order.
            seed: of the codes.
        """
        width = graphs.children.shape[1]
        name = 1 + rng.random((len(graphs), self.n_names), np.float32).argsort(1)[:, :width]
        graph, source, target = graphs.edges()
        source, target = name[graph, source], name[graph, target]
        rows = np.arange(len(graphs))
        start, goal = name[rows, graphs.start], name[rows, graphs.goal]
        order = (graph + rng.random(len(graph))).argsort()
        n_edges = graphs.n_edges
        ends = n_edges.cumsum()
        # The graphs' edges stay together, so that only the order within each is new.
        slot = self.end - EDGE_LENGTH * (ends[graph] - np.arange(len(graph)))
        tokens = np.full((len(graphs), self.size), self.pad, np.int64)
        tokens[graph, slot] = self.edge
        tokens[graph, slot + 1] = source[order]
        tokens[graph, slot + 2] = target[order]
        marks = np.where(tail == QUERY, self.query, self.path)
        tokens[:, self.end :] = np.where(tail < 0, marks, np.take_along_axis(name, np.maximum(tail, 0), 1))
        code = np.bitwise_xor.reduceat(_keys(self.n_names, seed)[source, target], ends - n_edges)
        code ^= _keys(self.n_names, seed)[0, start] ^ _keys(self.n_names, seed)[goal, 0]
        return Written(tokens=tokens, code=code, name=name)

    def read(self, tokens: Int64[np.ndarray, "batch pos"]) -> Graphs:
        """The graphs in prompts; vertices are tokens."""
        children = np.zeros((len(tokens), self.n_names + 1), np.int64)
        rows = np.arange(len(tokens))
        for n in range(1, self.n_edges + 1):
            slot = self.end - EDGE_LENGTH * n
            source, target = tokens[:, slot + 1], tokens[:, slot + 2]
            is_edge = tokens[:, slot] == self.edge
            children[rows, np.where(is_edge, source, 0)] |= np.where(is_edge, bit(target), 0)
        return Graphs(children=children, start=tokens[:, self.end + 1], goal=tokens[:, self.end + 2])

    def read_tail(self, tokens: Int64[np.ndarray, "batch pos"]) -> Int64[np.ndarray, "batch tail"]:
        """What follows the edges, as `write` takes it; vertices are tokens."""
        tail = tokens[:, self.end :]
        return np.where(tail == self.query, QUERY, np.where(tail == self.path, PATH, tail))

    def write_one(self, edges: Sequence[tuple[int, int]], tail: Sequence[int]) -> Int64[np.ndarray, " pos"]:
        """The prompt of one graph whose vertices are tokens, its edges in the order given.

        Raises:
            WorkbenchError: too many edges, one twice, or a vertex that is no token.
        """
        if not 1 <= len(edges) <= self.n_edges:
            raise WorkbenchError(f"This graph has {len(edges)} edges; the model reads 1 to {self.n_edges}.")
        for vertex in (*(vertex for edge in edges for vertex in edge), *(each for each in tail if each >= 0)):
            if not 1 <= vertex <= self.n_names:
                raise WorkbenchError(f"Vertex {vertex} is not in the vocabulary: vertices go from 1 to {self.n_names}.")
        if twice := [edge for edge, n in Counter(edges).items() if n > 1]:
            raise WorkbenchError(f"Edge {twice[0][0]}>{twice[0][1]} is given twice. Leave one of them out.")
        body = [token for source, target in edges for token in (self.edge, source, target)]
        marks = {QUERY: self.query, PATH: self.path}
        padding = [self.pad] * (self.end - len(body))
        return np.array([*padding, *body, *(marks.get(each, each) for each in tail)], np.int64)


def check_question(graphs: Graphs) -> None:
    """Refuse a graph, the first of a batch, that has no answer or that no distribution would draw.

    Raises:
        WorkbenchError: it has a cycle or several parts, or its goal cannot be reached.
    """
    children, start, goal = graphs.children[0], int(graphs.start[0]), int(graphs.goal[0])
    below = descendants(graphs.children)[0]
    place = np.arange(len(children))
    if cyclic := np.flatnonzero(below >> place & 1).tolist():
        raise WorkbenchError(
            f"This graph has a cycle through {_listed(cyclic)}; graphs here have none. Leave out an edge."
        )
    both_ways = children | collect(members(children, len(children)).T)
    together = descendants(both_ways[None])[0, start] | 1 << start
    used = int(np.bitwise_or.reduce(both_ways)) | 1 << start | 1 << goal
    if apart := np.flatnonzero((used & ~together) >> place & 1).tolist():
        raise WorkbenchError(
            f"This graph is in several parts: nothing connects {_listed(apart)} with the start {start}. Add an edge."
        )
    if start == goal:
        raise WorkbenchError(f"Start and goal are both {start}. Choose two vertices.")
    if not below[start] >> goal & 1:
        raise WorkbenchError(f"Goal {goal} cannot be reached from start {start}. Add an edge or choose another goal.")


def _listed(vertices: Sequence[int]) -> str:
    return ", ".join(map(str, vertices))


@lru_cache(maxsize=8)
def _keys(n_names: int, seed: int) -> Int64[np.ndarray, "source target"]:
    """A random number for each edge, as for each piece on each square of a board (Zobrist 1970)."""
    return np.random.default_rng(seed).integers(0, 2**63 - 1, (n_names + 1, n_names + 1), np.int64)
