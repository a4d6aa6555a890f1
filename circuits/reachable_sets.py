"""The sets that attention operations merge, forward through the graph of places that lead to the answer.

A place is a row before a layer, or after the last. Each row begins with itself as its set; the residual stream carries
a set on, an operation copies one to another row (Saparov et al. 2025, appendix). The last row begins with nothing that
counts: its first copy must have a cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from circuits.attention_causes import Cause
from circuits.attention_ops import Operation
from circuits.search_prompts import GOAL, START, SearchPrompt

Rows = frozenset[int]
Hypothesis = Literal["paths", "one hop"]
"""Whole sets are merged; or, the rival, only what is one edge away from what a row holds."""
Edge = Operation | None
"""An operation, or the residual stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """The sets that an input's operations merge, under one rule."""

    held: tuple[Mapping[int, Rows], ...]
    """Before each layer and after the last: the rows whose sets flow into the answer, and these sets."""
    operations: tuple[Operation, ...]
    """Those whose merge was accepted and flows into the answer, each with the cause that let it in, if one did."""
    explained: bool
    """The last row ends up with a path from start to goal."""
    maximal: int
    """Places between the layers, without start and goal, into which a path as long as their own was merged."""
    short: int
    """Such places into which none was, while all that flows into them is maximal."""


def rows_of_graph(operations: Sequence[Operation], *, n_layers: int, last: int) -> tuple[Rows, ...]:
    """Before each layer and after the last, the rows from which residual stream and operations lead to the answer."""
    rows = [frozenset({last})]
    for layer in reversed(range(n_layers)):
        sources = {each.src for each in operations if each.layer == layer and each.dest in rows[0]}
        rows.insert(0, rows[0] | sources)
    return tuple(rows)


def merge_paths(
    prompt: SearchPrompt,
    operations: Sequence[Operation],
    rows: Sequence[Rows],
    *,
    strict: bool,
    hypothesis: Hypothesis = "paths",
) -> Merge:
    """Merge sets forward through the graph of operations.

    Args:
        prompt: with the graph that says what reaches what.
        operations: with their causes.
        rows: `rows_of_graph` of them.
        strict: every operation needs a cause. Else, as published, only the first edge that arrives at a place does, in
            the order of the rows that they come from, the residual stream's own row among them.
        hypothesis: what is merged.
    """
    last = len(prompt) - 1
    held: list[dict[int, Rows]] = [{row: frozenset({row}) for row in rows[0] if row != last}]
    arrived: list[dict[int, list[Edge]]] = []
    for layer, after in enumerate(rows[1:]):
        places = _Places(prompt=prompt, before=held[-1], strict=strict, hypothesis=hypothesis)
        incoming = {row: [each for each in operations if (each.layer, each.dest) == (layer, row)] for row in after}
        found = {row: places.arrive(row, edges) for row, edges in incoming.items()}
        held.append({row: gathered for row, (gathered, accepted) in found.items() if accepted})
        arrived.append({row: accepted for row, (_, accepted) in found.items() if accepted})
    flowing = _flowing(held, arrived, last)
    kept = tuple({row: held[layer][row] for row in sorted(rows)} for layer, rows in enumerate(flowing))
    merged = [each for layer, edges in enumerate(arrived) for row in flowing[layer + 1] for each in edges[row] if each]
    maximal, short = _count_maximal(prompt, kept, arrived)
    return Merge(
        held=kept,
        operations=tuple(sorted(merged, key=lambda each: (each.layer, each.dest, each.src))),
        explained=last in held[-1] and prompt.solved_by(held[-1][last]),
        maximal=maximal,
        short=short,
    )


def accepting_cause(operation: Operation, source: Rows, own: Rows, prompt: SearchPrompt) -> Cause | None:
    """The first cause that lets an operation merge one set into another; None where it has none.

    Args:
        operation: with its causes.
        source: the set at the row that is copied from.
        own: the set at the row that copies.
        prompt: whose graph says which of the two vertices reaches the other.
    """
    at, to = prompt.vertex(operation.src), prompt.vertex(operation.dest)
    ahead, behind = _leads(prompt, to, at), _leads(prompt, at, to)
    tokens = prompt.tokens
    last, goal, start = len(prompt) - 1, len(prompt) + GOAL, len(prompt) + START
    for cause in operation.causes:
        row = cause.key
        accepted = {
            "forward": ahead and row in source and row - 1 in own,
            "backward": behind and row in source and row + 1 in own,
            "token": cause.kind == "token" and any(int(tokens[each]) == row for each in source),
            "start and goal": operation.dest == last and {start, goal} <= source,
            "goal": goal in source,
        }
        if accepted[cause.kind]:
            return cause
    return None


def _leads(prompt: SearchPrompt, source: int | None, target: int | None) -> bool:
    """Whether one vertex reaches another one; what is no vertex reaches nothing."""
    if source is None or target is None or source == target:
        return False
    return prompt.graph.reaches(source, target)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """What arrives at the places after one layer."""

    prompt: SearchPrompt
    before: Mapping[int, Rows]
    strict: bool
    hypothesis: Hypothesis

    def arrive(self, row: int, operations: Sequence[Operation]) -> tuple[Rows, list[Edge]]:
        """The set at a row and the edges that were accepted; without any of these, the place counts for nothing."""
        own = frozenset({row})
        if self.strict:
            own |= self.before.get(row, own)
        accepted: list[Edge] = []
        gathered = own
        for edge in self._ordered(row, operations):
            source = self.before[row if edge is None else edge.src]
            cause = None if edge is None else accepting_cause(edge, source, own, self.prompt)
            if edge is None or cause is not None or (accepted and not self.strict):
                accepted.append(edge and replace(edge, causes=() if cause is None else (cause,)))
                gathered |= source if edge is None else self._carried(source, own, cause)
        return gathered, accepted

    def _ordered(self, row: int, operations: Sequence[Operation]) -> list[Edge]:
        """Those that come from places that count: by row, or the residual stream first where order shall not matter."""
        edges: list[Edge] = [each for each in operations if each.src in self.before]
        if row in self.before:
            edges.append(None)
        return sorted(edges, key=lambda edge: (self.strict and edge is not None, row if edge is None else edge.src))

    def _carried(self, source: Rows, own: Rows, cause: Cause | None) -> Rows:
        """What an operation copies: of the rival only what is one edge away, but the answer is read off whole."""
        if self.hypothesis == "paths" or (cause is not None and cause.kind in ("start and goal", "goal")):
            return source
        vertices = {self.prompt.vertex(row) for row in own}
        near = {end for edge in self.prompt.graph.edges for end in edge if not vertices.isdisjoint(edge)}
        return frozenset(row for row in source if self.prompt.vertex(row) in near | vertices)


def _flowing(
    held: Sequence[Mapping[int, Rows]], arrived: Sequence[Mapping[int, Sequence[Edge]]], last: int
) -> list[set[int]]:
    """Rows at each depth whose sets flow into the last row's at the end, along what was accepted."""
    flowing = [{last} & set(held[-1])]
    for edges in reversed(arrived):
        flowing.insert(0, {row if edge is None else edge.src for row in flowing[0] for edge in edges[row]})
    return flowing


def _count_maximal(
    prompt: SearchPrompt, held: Sequence[Mapping[int, Rows]], arrived: Sequence[Mapping[int, Sequence[Edge]]]
) -> tuple[int, int]:
    """How many places merged a path as long as their own, and how many did not though all before them had."""
    maximal = short = 0
    failed: set[int] = set()
    ends = {prompt.start, prompt.goal}
    for layer in range(1, len(held) - 1):
        inherited, failed = failed, set()
        for row, gathered in held[layer].items():
            edges = arrived[layer - 1][row]
            if None not in edges or ends & {prompt.vertex(each) for each in gathered}:
                continue
            longest = prompt.depth(held[layer - 1][row])
            doubled = any(edge and prompt.depth(held[layer - 1][edge.src]) >= longest for edge in edges)
            late = any((row if edge is None else edge.src) in inherited for edge in edges)
            if not doubled or late:
                failed.add(row)
            maximal += doubled and not late
            short += not doubled and not late
    return maximal, short
