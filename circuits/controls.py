"""Random connected circuits: what a circuit of some size is worth that nobody looked for.

Edges at random mostly dangle, and nearly any method beats them. So the control is built of whole paths from an input to
the logits, through edges that are live, until it has the size that is asked for.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.graph import CircuitGraph
from workbench.runtime import WorkbenchError, generator

Vertex = tuple[int, int]
"""A writer in a column."""
TRIES = 50
"""Paths that are drawn before the gaps are filled with single edges, and restarts before a size is given up."""


def random_circuits(
    graph: CircuitGraph, live: Bool[Tensor, " edge"], *, edges: int, n: int, seed: int = 0
) -> Bool[Tensor, "circuit edge"]:
    """Connected circuits of live edges, all of one size.

    Raises:
        WorkbenchError: no circuit of this size was found, as when more edges are asked for than are live.
    """
    drawing = _Drawing(graph, live, generator(seed, "random circuits", edges))
    return torch.stack([drawing.circuit(edges) for _ in range(n)]) if n else live.new_zeros(0, len(live))


def controls_of_size(
    graph: CircuitGraph, live: Bool[Tensor, " edge"], *, edges: int, n: int, seed: int = 0
) -> Bool[Tensor, "circuit edge"]:
    """As `random_circuits`, but none where no connected circuit has this size."""
    try:
        return random_circuits(graph, live, edges=edges, n=n, seed=seed)
    except WorkbenchError:
        return live.new_zeros(0, len(live))


def control_size(graph: CircuitGraph, live: Bool[Tensor, " edge"], circuit: Bool[Tensor, " edge"]) -> int:
    """How many edges a circuit's controls have: as many as it, or all connected live ones where these are fewer."""
    return min(int(circuit.sum()), int(graph.connected(live).sum()))


class _Drawing:
    """Draws paths through the live edges of a graph."""

    def __init__(self, graph: CircuitGraph, live: Bool[Tensor, " edge"], rng: torch.Generator) -> None:
        self.graph, self.rng = graph, rng
        reader: list[int | None] = [None] * len(graph.ports)
        for writer, ports in enumerate(graph.ports_of):
            for port in ports:
                reader[port] = writer
        self.reader = reader
        """For each port the place of its node among the writers; None for the logits."""
        self.live = graph.connected(live).nonzero()[:, 0].tolist()
        self.into: dict[Vertex, list[int]] = {}
        self.out_of: dict[Vertex, list[int]] = {}
        for edge in self.live:
            self.out_of.setdefault(self.source(edge), []).append(edge)
            for target in self.targets(edge):
                self.into.setdefault(target, []).append(edge)

    def source(self, edge: int) -> Vertex:
        """Who writes what the edge carries."""
        found = self.graph.edges[edge]
        return found.writer, found.column

    def targets(self, edge: int) -> list[Vertex]:
        """Who reads it; none for the logits. Keys and values of one column are read from every other."""
        found = self.graph.edges[edge]
        writer = self.reader[found.port]
        if writer is None:
            return []
        everywhere = self.graph.ports[found.port].slot in ("k", "v")
        return [(writer, column) for column in (range(self.graph.n_columns) if everywhere else [found.column])]

    def circuit(self, edges: int) -> Bool[Tensor, " edge"]:
        """One circuit."""
        for _ in range(TRIES if 1 <= edges <= len(self.live) else 0):
            kept = self._grown(edges)
            if len(kept) == edges:
                keep = torch.zeros(len(self.graph.edges), dtype=torch.bool)
                keep[torch.tensor(sorted(kept), dtype=torch.long)] = True
                return keep
        raise WorkbenchError(
            f"No random connected circuit of {edges} edges was found among {len(self.live)} live ones."
        )

    def _grown(self, edges: int) -> set[int]:
        kept: set[int] = set()
        misses = 0
        while len(kept) < edges and misses < TRIES:
            path = self._path(kept)
            if path and len(kept) + len(path) <= edges:
                kept |= path
            else:
                misses += 1
        closing = [edge for edge in self.live if edge not in kept and self._closes(edge, kept)]
        while len(kept) < edges and closing:
            kept.add(closing.pop(self._draw(len(closing))))
        return kept

    def _path(self, kept: set[int]) -> set[int]:
        """A random edge, back to an input and on to the logits, or to what is kept; nothing if it is kept already."""
        middle = self.live[self._draw(len(self.live))]
        if middle in kept:
            return set()
        path = {middle}
        at = self.source(middle)
        while not self._reached(at, kept):
            choices = self.into[at]
            edge = choices[self._draw(len(choices))]
            path.add(edge)
            at = self.source(edge)
        targets = self.targets(middle)
        while targets and not any(self._heard(target, kept) for target in targets):
            choices = [edge for target in targets for edge in self.out_of.get(target, [])]
            edge = choices[self._draw(len(choices))]
            path.add(edge)
            targets = self.targets(edge)
        return path

    def _closes(self, edge: int, kept: set[int]) -> bool:
        """Whether the edge joins two that are there."""
        targets = self.targets(edge)
        heard = not targets or any(self._heard(target, kept) for target in targets)
        return heard and self._reached(self.source(edge), kept)

    def _reached(self, vertex: Vertex, kept: set[int]) -> bool:
        return vertex[0] < len(self.graph.inputs) or any(edge in kept for edge in self.into[vertex])

    def _heard(self, vertex: Vertex, kept: set[int]) -> bool:
        return any(edge in kept for edge in self.out_of.get(vertex, []))

    def _draw(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.rng))
