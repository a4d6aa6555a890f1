"""A prompt of graph search as its tracer reads it: the directed graph, and which row of the prompt holds what.

Rows are those of the prompt without its padding, which no other row reads; the last rows are those of the question.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.graph_prompts import EDGE_LENGTH, Layout, check_question
from workbench.tasks.graph_search import TAIL

START, GOAL, CURRENT = -4, -3, -1
"""Rows of the question, counted from the end."""


@dataclass(frozen=True, kw_only=True)
class Digraph:
    """A directed graph without cycles."""

    edges: frozenset[tuple[int, int]]

    @functools.cached_property
    def vertices(self) -> frozenset[int]:
        """Both ends of every edge."""
        return frozenset(vertex for edge in self.edges for vertex in edge)

    def children(self, vertex: int) -> frozenset[int]:
        """Ends of the edges that leave a vertex."""
        return frozenset(target for source, target in self.edges if source == vertex)

    def descendants(self, vertex: int) -> frozenset[int]:
        """What can be reached from a vertex over one edge or more."""
        return self._closure.get(vertex, frozenset())

    def reaches(self, source: int, target: int) -> bool:
        """Whether a path leads from one vertex to another, or they are the same."""
        return source == target or target in self.descendants(source)

    def useful(self, vertex: int, goal: int) -> frozenset[int]:
        """Children of a vertex from which the goal can be reached."""
        return frozenset(child for child in self.children(vertex) if self.reaches(child, goal))

    def within(self, vertices: Iterable[int]) -> Digraph:
        """The edges both of whose ends are among these vertices."""
        kept = frozenset(vertices)
        return Digraph(edges=frozenset(edge for edge in self.edges if kept.issuperset(edge)))

    def longest_path(self) -> int:
        """Edges of the longest path; 0 without any."""
        length: dict[int, int] = {}
        for vertex in sorted(self.vertices, key=lambda vertex: len(self.descendants(vertex))):
            length[vertex] = max((1 + length[child] for child in self.children(vertex)), default=0)
        return max(length.values(), default=0)

    def renamed(self, names: Mapping[int, int]) -> Digraph:
        """The same graph with other names for some of its vertices."""
        return Digraph(edges=frozenset((names.get(a, a), names.get(b, b)) for a, b in self.edges))

    @functools.cached_property
    def _closure(self) -> dict[int, frozenset[int]]:
        found = {vertex: self.children(vertex) for vertex in self.vertices}
        for _ in range(len(found)):
            wider = {vertex: near.union(*(found[child] for child in near)) for vertex, near in found.items()}
            if wider == found:
                break
            found = wider
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchPrompt:
    """One question about one graph."""

    padded: Int[Tensor, " pos"]
    """The prompt as the model reads it."""
    position: Int[Tensor, " row"]
    """Where each row stands in it."""
    layout: Layout
    graph: Digraph
    """By which a trace is judged; the prompt's own, unless a control puts another there."""

    @classmethod
    def read(cls, tokens: Int[Tensor, " pos"], layout: Layout) -> SearchPrompt:
        """The prompt in these tokens.

        Raises:
            WorkbenchError: another layout, a cycle, several parts, or a goal that cannot be reached.
        """
        position = (tokens != layout.pad).nonzero()[:, 0]
        rows = tokens[position].tolist()
        body, tail = rows[: -len(TAIL)], rows[-len(TAIL) :]
        triples = [body[first : first + EDGE_LENGTH] for first in range(0, len(body), EDGE_LENGTH)]
        names = [*(vertex for triple in triples for vertex in triple[1:]), *tail[1:3]]
        shaped = len(tokens) == layout.size and triples and len(body) % EDGE_LENGTH == 0
        shaped = shaped and all(triple[0] == layout.edge for triple in triples)
        shaped = shaped and [tail[0], *tail[3:]] == [layout.query, layout.path, tail[1]]
        if not shaped or not all(1 <= name <= layout.n_names for name in names):
            raise WorkbenchError(
                f"No prompt of graph search: tokens {tokens.tolist()}. Wanted {layout.size} of them: "
                f"`{layout.edge} source target` for each edge, then `{layout.query} start goal {layout.path} start`, "
                f"padded on the left with {layout.pad}; vertices are 1 to {layout.n_names}."
            )
        check_question(layout.read(tokens[None].numpy()))
        edges = frozenset((source, target) for _, source, target in triples)
        return cls(padded=tokens, position=position, layout=layout, graph=Digraph(edges=edges))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.position)

    @property
    def tokens(self) -> Int[Tensor, " row"]:
        """The prompt without its padding."""
        return self.padded[self.position]

    @property
    def start(self) -> int:
        """The vertex to search from."""
        return int(self.tokens[START])

    @property
    def goal(self) -> int:
        """The vertex to reach."""
        return int(self.tokens[GOAL])

    @property
    def answers(self) -> frozenset[int]:
        """Every right next vertex."""
        return self.graph.useful(self.start, self.goal)

    @property
    def unused(self) -> int | None:
        """A vertex that does not occur, to stand for any other; None where all occur."""
        free = set(range(1, self.layout.n_names + 1)) - set(self.tokens.tolist())
        return min(free, default=None)

    def vertex(self, row: int) -> int | None:
        """The vertex at a row; None where there is another token."""
        token = int(self.tokens[row])
        return token if 1 <= token <= self.layout.n_names else None

    def solved_by(self, rows: Iterable[int]) -> bool:
        """Whether the vertices at these rows hold a path from start to goal."""
        held = self.graph.within(vertex for row in rows if (vertex := self.vertex(row)) is not None)
        return held.reaches(self.start, self.goal)

    def depth(self, rows: Iterable[int]) -> int:
        """Edges of the longest path among the vertices at these rows."""
        return self.graph.within(vertex for row in rows if (vertex := self.vertex(row)) is not None).longest_path()

    def relabelled(self, seed: int | torch.Generator) -> SearchPrompt:
        """The same prompt judged by a wrong graph: all vertices but start and goal change places, none keeps its own.

        Raises:
            WorkbenchError: there are not two vertices to change.
        """
        others = sorted(self.graph.vertices - {self.start, self.goal})
        if len(others) < 2:
            raise WorkbenchError(f"A graph of {len(self.graph.vertices)} vertices has no two to change places.")
        order = torch.randperm(len(others), generator=generator(seed, "relabelled")).tolist()
        names = {others[a]: others[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}
        return replace(self, graph=self.graph.renamed(names))
