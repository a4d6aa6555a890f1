"""Two circuits laid over each other: what both have, and what one has alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd

from circuits.circuit import Circuit
from workbench.tables import Table

Status = Literal["hit", "miss", "false alarm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Which edges are in a circuit and in another one."""

    status: Mapping[str, Status]
    """For each edge that is in any of the two."""

    def count(self, status: Status) -> int:
        """How many edges stand so."""
        return sum(each == status for each in self.status.values())

    @property
    def precision(self) -> float | None:
        """Share of this circuit's edges that are in the other; None if it has none."""
        return _share(self.count("hit"), self.count("false alarm"))

    @property
    def recall(self) -> float | None:
        """Share of the other circuit's edges that are in this one; None if that has none."""
        return _share(self.count("hit"), self.count("miss"))


def compare(mine: Circuit, other: Circuit) -> Comparison:
    """What a circuit has in common with another: hits, what it misses, and what the other does not know.

    Raises:
        WorkbenchError: they are of different graphs, or under another ablation or metric.
    """
    mine.graph.check_same(other.graph)
    mine.terms.check_comparable(other.terms)
    here, there = set(mine.edges), set(other.edges)
    names = [edge.name for edge in mine.graph.edges if edge.name in here | there]
    return Comparison(
        status={name: "hit" if name in here & there else "miss" if name in there else "false alarm" for name in names}
    )


def difference(circuit: Circuit, other: Circuit, compared: Comparison, name: str) -> Table:
    """A row for every edge of one of two circuits."""
    rows = {"edge": list(compared.status), "status": list(compared.status.values())}
    for title, each in (("score", circuit), ("score of the other", other)):
        if each.scores is not None:
            rows[title] = [float(each.scores.score[each.graph.index[edge]]) for edge in compared.status]
    caption = f"Circuit of {circuit.size} edges against {name} of {other.size}: {counts(compared)}."
    return Table(name="circuit_overlay", frame=pd.DataFrame(rows), kind="table", axes={}, unit="", caption=caption)


def counts(compared: Comparison) -> str:
    """How the two compare, in words."""
    told = ", ".join(f"{status} {compared.count(status)}" for status in get_args(Status))
    shares = {"precision": compared.precision, "recall": compared.recall}
    rates = ", ".join(f"{name} {'–' if value is None else format(value, '.3f')}" for name, value in shares.items())
    return f"{told}; {rates}"


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
