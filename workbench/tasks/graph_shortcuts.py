"""What a graph gives away without a search: how far rules get that look at degrees, names or the order of edges alone.

A distribution of graphs that such a rule answers above chance can be learnt without learning to search. Chance is a
child of the start drawn at random; where a rule has ties, each of the children that tie is as likely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from workbench.intervals import mean_of
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.graph_prompts import EDGE_LENGTH
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.graphs import Graphs, members

Scores = Float64[np.ndarray, "batch vertex"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shortcuts:
    """How often each rule names a right child, beside chance."""

    frame: pd.DataFrame
    """A row for each rule: `accuracy`, `chance`, and `excess` of the one over the other with its ends `low`, `high`."""
    distribution: str
    least: int
    n: int
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        fields = {"distribution": self.distribution, "least_lookahead": self.least, "n": self.n}
        return {**fields, "rules": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """What each rule has beyond chance."""
        return [
            Table(
                name=f"shortcuts_{self.distribution}",
                frame=self.frame,
                kind="bar",
                axes={"x": "rule", "y": "excess", "low": "low", "high": "high"},
                unit="fraction",
                caption=(
                    f"Accuracy of rules that do not search, less that of a random child, on {self.n} "
                    f"{self.distribution} graphs of lookahead {self.least} or more, with 95 % bootstrap intervals."
                ),
            )
        ]


def measure_shortcuts(task: GraphSearch, *, n: int = 20_000, least: int = 2, seed: int = 0) -> Shortcuts:
    """How far each rule gets on training examples that need a search.

    Args:
        task: whose distribution is looked at.
        n: examples drawn.
        least: smallest lookahead that counts: at 1 the goal is often next to the start.
        seed: of the examples.

    Raises:
        WorkbenchError: no example has that lookahead.
    """
    drawn = task.stream(n, seed=seed)
    hard = np.flatnonzero(task.graphs(drawn).lookahead() >= least)
    if not len(hard):
        raise WorkbenchError(
            f"None of {n} {task.distribution} graphs has lookahead {least}. Draw more, or ask for less."
        )
    batch = drawn.select(torch.from_numpy(hard))
    graphs = task.graphs(batch)
    width = graphs.children.shape[1]
    child, useful = members(graphs.first, width), members(graphs.useful(), width)
    chance = useful.sum(1) / child.sum(1)
    rows = []
    for rule, score in RULES.items():
        values = np.where(child, score(task, batch, graphs), -np.inf)
        best = values == values.max(1, keepdims=True)
        right = (best & useful).sum(1) / best.sum(1)
        excess = mean_of(torch.from_numpy(right - chance), seed=seed)
        rows.append({
            "rule": rule, "accuracy": right.mean(), "chance": chance.mean(),
            "excess": excess.mean, "low": excess.low, "high": excess.high,
        })  # fmt: skip
    return Shortcuts(
        frame=pd.DataFrame(rows),
        distribution=task.distribution,
        least=least,
        n=len(batch),
        provenance=Provenance(code_version=code_version(), seed=seed),
    )


def _in_degree(task: GraphSearch, batch: Batch, graphs: Graphs) -> Scores:
    return members(graphs.children, graphs.children.shape[1]).sum(1).astype(float)


def _out_degree(task: GraphSearch, batch: Batch, graphs: Graphs) -> Scores:
    return np.bitwise_count(graphs.children).astype(float)


def _name(task: GraphSearch, batch: Batch, graphs: Graphs) -> Scores:
    return np.broadcast_to(np.arange(graphs.children.shape[1], dtype=float), graphs.children.shape)


def _place(task: GraphSearch, batch: Batch, graphs: Graphs) -> Scores:
    """Where the edge from the start to each vertex stands in the prompt."""
    tokens, found = batch.tokens.numpy(), np.zeros(graphs.children.shape)
    rows, end = np.arange(len(tokens)), task.layout.end
    for slot in range(end - EDGE_LENGTH * task.layout.n_edges, end, EDGE_LENGTH):
        own = tokens[:, slot + 1] == graphs.start
        found[rows[own], tokens[own, slot + 2]] = slot + 1
    return found


def _reversed(score: Callable[[GraphSearch, Batch, Graphs], Scores]) -> Callable[[GraphSearch, Batch, Graphs], Scores]:
    return lambda task, batch, graphs: -score(task, batch, graphs)


RULES: Mapping[str, Callable[[GraphSearch, Batch, Graphs], Scores]] = {
    "most parents": _in_degree,
    "fewest parents": _reversed(_in_degree),
    "most children": _out_degree,
    "fewest children": _reversed(_out_degree),
    "listed last": _place,
    "listed first": _reversed(_place),
    "highest name": _name,
    "lowest name": _reversed(_name),
}
"""What each rule takes the largest of, among the start's children."""
