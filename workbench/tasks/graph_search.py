"""Search in a directed graph: which child of the start leads to the goal (Saparov et al. 2025)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int64

from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch, check_choice
from workbench.tasks.graph_distributions import DISTRIBUTIONS, Distribution, largest_lookahead
from workbench.tasks.graph_prompts import EDGE_LENGTH, PATH, QUERY, Layout
from workbench.tasks.graph_task import Candidates, GraphTask
from workbench.tasks.graphs import Graphs, Sets, bit, choose_member, descendants, distances, members

Mode = Literal["strict", "legacy"]
TAIL = ("Q", "start", "goal", "P", "current")
SMALLEST = 20
"""Positions of the shortest prompts: five edges, the fewest at which a lookahead of 2 fits."""


def search_layout(size: int, spare: int) -> Layout:
    """Prompts of as many edges as fit beside the tail."""
    return Layout(size=size, n_edges=(size - len(TAIL)) // EDGE_LENGTH, spare=spare, tail=TAIL)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSearch(GraphTask):
    """Prompts of one length over graphs of one distribution; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "graph_search"
    contrasts = ("goal", "name")

    size: int = 26
    """Positions of a prompt: n positions hold (n - 5) // 3 edges."""
    distribution: Distribution = "balanced"
    """Where training graphs come from; the tests by lookahead are balanced always."""
    lookahead: int | None = None
    """Largest lookahead in training; None is the largest that fits."""
    mode: Mode = "strict"
    """Whether a balanced graph's lookahead is the one that was drawn for it (strict), or may drift from it by what its
    distracting vertices do, as it did in the published runs (legacy)."""

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_choice("mode", self.mode, get_args(Mode))
        self._check_sizes(least=SMALLEST)
        most = self.levels[-1]
        if self.lookahead is not None and not 0 <= self.lookahead <= most:
            raise WorkbenchError(
                f"Lookahead {self.lookahead} does not fit prompts of size {self.size}: two branches of that length "
                f"must. Choose 0 to {most}, or a size of {EDGE_LENGTH * (2 * self.lookahead + 1) + len(TAIL)}."
            )

    @property
    def layout(self) -> Layout:
        """Edges, then start and goal, then the start once more as the vertex to go on from."""
        return search_layout(self.size, self.spare)

    @property
    def levels(self) -> range:
        """All lookaheads that fit the prompts."""
        return range(largest_lookahead(self.layout.n_edges) + 1)

    @property
    def hardest(self) -> int:
        """The largest lookahead of training."""
        return self.levels[-1] if self.lookahead is None else self.lookahead

    @property
    def splits(self) -> tuple[str, ...]:
        """What training sees; all lookaheads together and each alone; the other two distributions.

        Graphs of the tests have one right answer. Those by lookahead are balanced; in `test_naive` and `test_star` the
        start has several children, and the goal is none of them.
        """
        return (*self.measured, "test_naive", "test_star")

    def _propose(self, rng: np.random.Generator, levels: Int64[np.ndarray, " batch"], kind: str) -> Candidates:
        distribution: Distribution = self.distribution if kind == "train" else "balanced"
        if kind in ("naive", "star"):
            distribution = kind
        graphs = DISTRIBUTIONS[distribution](rng, levels, self.layout.n_edges)
        useful = graphs.useful()
        fits = (graphs.n_edges <= self.layout.n_edges) & (useful != 0)
        if kind != "train":
            fits &= np.bitwise_count(useful) == 1
        if kind in ("naive", "star"):
            fits &= (graphs.first != useful) & (graphs.first & bit(graphs.goal) == 0)
        rows = np.flatnonzero(fits)
        found = graphs.select(rows).lookahead()
        exact = distribution == "balanced" and (kind != "train" or self.mode == "strict")
        rows = rows[found == levels[rows] if exact else found <= levels.max(initial=0)]
        graphs = graphs.select(rows)
        marks = np.full_like(graphs.start, QUERY), np.full_like(graphs.start, PATH)
        tail = np.stack([marks[0], graphs.start, graphs.goal, marks[1], graphs.start], 1)
        return Candidates(rows=rows, graphs=graphs, tail=tail, right=useful[rows])

    def _right(self, graphs: Graphs, tail: Int64[np.ndarray, "batch tail"]) -> Sets:
        return graphs.useful()

    def _change(
        self, batch: Batch, kind: str, rng: np.random.Generator
    ) -> tuple[Int64[np.ndarray, "batch pos"], Int64[np.ndarray, " batch"], Bool[np.ndarray, " batch"]]:
        """`goal`: the goal moved to a vertex that only other children lead to, as far from the start if any is.

        Nothing else in the prompt changes.
        """
        if kind == "name":
            # A class with slots is made anew by `dataclass`, which a bare super() does not know.
            return GraphTask._change(self, batch, kind, rng)
        graphs, tokens = self.graphs(batch), batch.tokens.numpy().copy()
        width, rows = graphs.children.shape[1], np.arange(len(batch))
        useful, below = graphs.useful(), descendants(graphs.children) | bit(np.arange(width))
        old, new = (
            np.bitwise_or.reduce(np.where(members(children, width), below, 0), axis=1)
            for children in (useful, graphs.first & ~useful)
        )
        depth = distances(graphs.children, graphs.start)
        off = np.abs(depth - depth[rows, graphs.goal][:, None])
        goal = np.where(members(new & ~old, width), rng.random(off.shape) - off, -np.inf).argmax(1)
        tokens[:, self.layout.end + 2] = goal
        moved = Graphs(children=graphs.children, start=graphs.start, goal=goal)
        return tokens, choose_member(moved.useful(), width, rng), (new & ~old) != 0
