"""Search spelt out step by step: depth-first, and by selection and inference (Saparov et al. 2025, section 6).

Both show a graph and what a search has visited so far, and ask for its next step; any step that such a search could
take is right. Graphs are those of the naive distribution, walked at random until the goal is reached; of each walk one
step of the difficulty wanted is kept. The published generators build such graphs on purpose; this one rejects others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from workbench.runtime import WorkbenchError
from workbench.tasks.graph_distributions import naive
from workbench.tasks.graph_prompts import PATH, QUERY, Layout
from workbench.tasks.graph_task import Candidates, GraphTask
from workbench.tasks.graphs import Graphs, Sets, bit, choose_member, collect

HEAD = ("Q", "start", "goal", "P")


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthFirst(GraphTask):
    """The next vertex of a depth-first search: a child of the last visited vertex that has unvisited ones.

    The goal is visited as soon as it is such a child. The level is how far back in the trace that vertex stands.
    """

    # Without annotations this is the class's, not a field.
    name = "depth_first_search"

    size: int = 48
    """Positions of a prompt: n positions hold (n - 4) // 4 edges, and as many visited vertices."""
    backtrack: int = 3
    """Largest distance in the trace, back from its end, to the vertex whose child comes next."""

    def __post_init__(self) -> None:
        self._check_sizes(least=28)
        if not 0 <= self.backtrack <= self.layout.n_edges - 3:
            raise WorkbenchError(
                f"Backtracking by {self.backtrack} does not fit {self.layout.n_edges} edges: "
                f"choose 0 to {self.layout.n_edges - 3}."
            )

    @property
    def layout(self) -> Layout:
        """Edges, start and goal, then the trace, `P` where there is none yet."""
        n_edges = (self.size - len(HEAD)) // 4
        return Layout(
            size=self.size,
            n_edges=n_edges,
            spare=self.spare,
            tail=(*HEAD, *(f"visit {n}" for n in range(1, n_edges + 1))),
        )

    @property
    def levels(self) -> range:
        """Distances of backtracking."""
        return range(self.backtrack + 1)

    @property
    def hardest(self) -> int:
        """The farthest."""
        return self.backtrack

    def _propose(self, rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], kind: str) -> Candidates:
        rows, graphs = _askable(rng, levels, self.layout.n_edges)
        trace = graphs.start[:, None]
        back, right = [], []
        for _ in range(self.layout.n_edges - 1):
            distance, following = _next_visits(graphs, trace)
            back.append(distance)
            right.append(following)
            visit = np.where(following == 0, PATH, choose_member(following, graphs.children.shape[1], rng))
            trace = np.concatenate([trace, visit[:, None]], 1)
        fits = (np.stack(right, 1) != 0) & (np.stack(back, 1) == levels[rows][:, None])
        step, kept = _one_of(fits, rng)
        rows, graphs, trace, step = rows[kept], graphs.select(kept), trace[kept], step[kept]
        shown = _flush_right(trace, step + 1, self.layout.n_edges)
        chosen = np.stack(right, 1)[kept, step]
        return Candidates(rows=rows, graphs=graphs, tail=np.concatenate([_head(graphs), shown], 1), right=chosen)

    def _right(self, graphs: Graphs, tail: Int64[np.ndarray, "batch tail"]) -> Sets:
        return _next_visits(graphs, tail[:, len(HEAD) :])[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionInference(GraphTask):
    """Either step of a search: select a visited vertex with an unvisited child, or infer such a child of the selected.

    Visited edges are shown as triples `P parent child`; after them stands `P` where a vertex is to be selected, or
    `P vertex` where one has been. The level is the number of vertices that could be selected, plus that of the selected
    one's unvisited children, less one.
    """

    # Without annotations this is the class's, not a field.
    name = "selection_inference"

    size: int = 80
    """Positions of a prompt: n positions hold (n - 2) // 6 edges, and about as many visited ones."""
    breadth: int = 3
    """Largest level."""

    def __post_init__(self) -> None:
        self._check_sizes(least=38)
        if not 1 <= self.breadth <= self.layout.n_edges // 2:
            raise WorkbenchError(
                f"Breadth {self.breadth} does not fit {self.layout.n_edges} edges: choose 1 to "
                f"{self.layout.n_edges // 2}."
            )

    @property
    def layout(self) -> Layout:
        """Edges, start and goal, then visited edges and the step, `P` where there is none yet."""
        n_edges = (self.size - 2) // 6
        labels = (f"path {n}" for n in range(1, 3 * n_edges - 1))
        return Layout(size=self.size, n_edges=n_edges, spare=self.spare, tail=(*HEAD, *labels))

    @property
    def levels(self) -> range:
        """From one choice at each step."""
        return range(1, self.breadth + 1)

    @property
    def hardest(self) -> int:
        """The broadest."""
        return self.breadth

    def _propose(self, rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], kind: str) -> Candidates:
        rows, graphs = _askable(rng, levels, self.layout.n_edges)
        width, each = graphs.children.shape[1], np.arange(len(rows))
        visited, path = bit(graphs.start), np.empty((len(rows), 0), np.int64)
        wanted = 1 + (rng.random(len(rows)) * levels[rows]).astype(np.int64)
        fits, currents, steps = [], [], []
        for _ in range(self.layout.n_edges - 2):
            frontier = _frontier(graphs, visited)
            current = choose_member(frontier, width, rng)
            open_children = graphs.children[each, current] & ~visited
            going_on = (frontier != 0) & (visited & bit(graphs.goal) == 0)
            pair = np.bitwise_count(frontier) == wanted, np.bitwise_count(open_children) == levels[rows] + 1 - wanted
            fits.append(going_on & pair[0] & pair[1])
            currents.append(current)
            steps.append((frontier, open_children))
            child = choose_member(open_children, width, rng)
            path = np.concatenate([path, np.stack([np.full_like(child, PATH), current, child], 1)], 1)
            visited = visited | np.where(going_on, bit(child), 0)
        step, kept = _one_of(np.stack(fits, 1), rng)
        selects = rng.random(len(kept)) < 0.5
        rows, graphs, step = rows[kept], graphs.select(kept), step[kept]
        current = np.stack(currents, 1)[kept, step]
        room = len(self.layout.tail) - len(HEAD)
        selecting = _flush_right(path[kept], 3 * step, room - 1)
        inferring = _flush_right(path[kept], 3 * step, room - 2)
        marks = np.full((len(kept), 1), PATH)
        shown = np.where(
            selects[:, None],
            np.concatenate([selecting, marks], 1),
            np.concatenate([inferring, marks, current[:, None]], 1),
        )
        frontier, open_children = (np.stack(sets, 1)[kept, step] for sets in zip(*steps, strict=True))
        return Candidates(
            rows=rows,
            graphs=graphs,
            tail=np.concatenate([_head(graphs), shown], 1),
            right=np.where(selects, frontier, open_children),
        )

    def _right(self, graphs: Graphs, tail: Int64[np.ndarray, "batch tail"]) -> Sets:
        path, last = tail[:, len(HEAD) :], tail[:, -1]
        visited = bit(graphs.start) | np.bitwise_or.reduce(np.where(path < 0, 0, bit(np.maximum(path, 0))), axis=1)
        current = np.maximum(last, 0)
        open_children = graphs.children[np.arange(len(graphs)), current] & ~visited
        return np.where(last < 0, _frontier(graphs, visited), open_children)


def _askable(rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], n_edges: int) -> tuple[np.ndarray, Graphs]:
    """Naive graphs with a path to the goal and few enough edges, and the rows that they are for."""
    graphs = naive(rng, levels, n_edges)
    rows = np.flatnonzero((graphs.n_edges <= n_edges) & (graphs.useful() != 0))
    return rows, graphs.select(rows)


def _next_visits(graphs: Graphs, trace: Int64[np.ndarray, "batch visit"]) -> tuple[Int64[np.ndarray, " batch"], Sets]:
    """Where, back from its end, a trace goes on, and the vertices that it may go on to: none after the goal."""
    shown, each = trace >= 0, np.arange(len(trace))
    vertex = np.maximum(trace, 0)
    visited = np.bitwise_or.reduce(np.where(shown, bit(vertex), 0), axis=1)
    unvisited = np.where(shown, graphs.children[each[:, None], vertex] & ~visited[:, None], 0)
    back = (unvisited[:, ::-1] != 0).argmax(1)
    following, goal = unvisited[each, trace.shape[1] - 1 - back], bit(graphs.goal)
    following = np.where(following & goal != 0, goal, following)
    return back, np.where(visited & goal != 0, 0, following)


def _frontier(graphs: Graphs, visited: Sets) -> Sets:
    """Visited vertices that have an unvisited child."""
    return visited & collect(graphs.children & ~visited[:, None] != 0)


def _one_of(
    allowed: Bool[np.ndarray, "batch step"], rng: np.random.Generator
) -> tuple[Int64[np.ndarray, " batch"], np.ndarray]:
    """An allowed step of each row at random, and the rows that have any."""
    return np.where(allowed, rng.random(allowed.shape), -1).argmax(1), np.flatnonzero(allowed.any(1))


def _flush_right(
    path: Int64[np.ndarray, "batch visit"], length: Int64[np.ndarray, " batch"], room: int
) -> Int64[np.ndarray, "batch room"]:
    """The first entries of each path, marks before them."""
    place = np.arange(room) - (room - length)[:, None]
    taken = np.take_along_axis(path, np.clip(place, 0, path.shape[1] - 1), 1)
    return np.where(place < 0, PATH, taken)


def _head(graphs: Graphs) -> Int64[np.ndarray, "batch four"]:
    marks = (np.full_like(graphs.start, mark) for mark in (QUERY, PATH))
    query, path = marks
    return np.stack([query, graphs.start, graphs.goal, path], 1)
