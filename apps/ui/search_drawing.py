"""A search graph and the attention operations that search it, as drawings.

The graph stands in layers from its sources on the left, each vertex with the set that its rows hold so far. The places
stand a row of the prompt in a line, from layer to layer, and the operations lead from the row that is copied from to
the row that copies.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence

import networkx as nx

from apps.ui.circuit_drawing import FAINT, Dash, Dot, Drawing, Line
from apps.ui.search_questions import name_of, row_label
from circuits.attention_ops import Operation
from circuits.reachable_sets import Merge
from circuits.search_prompts import SearchPrompt

Sets = Mapping[int, frozenset[int]]
"""The vertices that each vertex' rows hold."""
CAUSES: Mapping[str, tuple[str, str]] = {
    "forward": ("#D55E00", "by position: the next row"),
    "backward": ("#D55E00", "by position: the row before"),
    "token": ("#0072B2", "by the same vertex"),
    "start and goal": ("#009E73", "what start and goal both have"),
    "goal": ("#009E73", "what the goal has"),
}
"""Colours of Okabe and Ito, and words, of the kinds of cause."""
TALL = 1.35
"""Rows of a vertex: its box has two lines."""
EDGE, OPERATION = 1.5, 3.0
"""Widths of lines."""


def sets_after(merge: Merge, prompt: SearchPrompt, layer: int) -> Sets:
    """What the rows of each vertex hold together before layer `layer`: what flowed into the answer up to there."""
    found: dict[int, frozenset[int]] = {vertex: frozenset({vertex}) for vertex in prompt.graph.vertices}
    for places in merge.held[: layer + 1]:
        for row, held in places.items():
            vertex = prompt.vertex(row)
            if vertex is not None and row != len(prompt) - 1:
                found[vertex] |= _vertices(prompt, held)
    return found


def answer_set(merge: Merge, prompt: SearchPrompt, layer: int) -> frozenset[int]:
    """The vertices that the last row holds before layer `layer`."""
    return _vertices(prompt, merge.held[layer].get(len(prompt) - 1, frozenset()))


def draw_graph(prompt: SearchPrompt, sets: Sets, *, chosen: int | None, answer: str) -> Drawing:
    """The graph, each vertex with its set.

    Args:
        prompt: with the graph.
        sets: of its vertices.
        chosen: a vertex; what is not in its set fades.
        answer: what the model answers; the edge from the start to it is marked.
    """
    places, n_stages, n_rows = layered(sorted(prompt.graph.edges))
    shown = prompt.graph.vertices if chosen is None else sets[chosen]
    dots = [
        Dot(
            name=str(vertex),
            label=f"{vertex}{_role(prompt, vertex)}\n{listed(sets[vertex])}",
            at=(stage, TALL * row),
            lit=vertex in shown,
            chosen=vertex == chosen,
        )
        for vertex, (stage, row) in places.items()
    ]
    lines = [
        _edge(
            source,
            target,
            marked=(source, str(target)) == (prompt.start, answer),
            faint=not {source, target} <= set(shown),
        )
        for source, target in sorted(prompt.graph.edges)
    ]
    stages = tuple(f"depth {stage}" for stage in range(n_stages))
    return Drawing(stages=stages, rows=TALL * n_rows, dots=tuple(dots), lines=tuple(lines), named=True, arrows=True)


def draw_operations(
    prompt: SearchPrompt,
    operations: Sequence[Operation],
    merge: Merge,
    *,
    layers: int,
    chosen: str | None,
    removed: Collection[str],
) -> Drawing:
    """Rows of the prompt from layer to layer, and the operations up to a layer.

    Args:
        prompt: the traced one.
        operations: those to show, with their causes.
        merge: which of them merged sets that flow into the answer.
        layers: how many have run.
        chosen: the name of one; the others fade.
        removed: names of those that are undone.
    """
    n_layers = len(merge.held) - 1
    ends = {row for each in operations for row in (each.dest, each.src)} | {len(prompt) - 1}
    line_of = {row: float(line) for line, row in enumerate(sorted(ends))}
    dots = [
        Dot(
            name=f"{layer}.{row}",
            label=_place_label(prompt, merge, layer, row),
            at=(float(layer), line),
            lit=row in merge.held[layer] and layer <= layers,
            chosen=False,
        )
        for layer in range(n_layers + 1)
        for row, line in line_of.items()
    ]
    merged = {(each.layer, each.dest, each.src) for each in merge.operations}
    stays = [
        Line(
            name=f"stream {layer}.{row}",
            source=f"{layer}.{row}",
            target=f"{layer + 1}.{row}",
            slot="",
            colour=FAINT,
            width=1.0,
            dash="solid",
            bend=0.0,
            opacity=0.4,
            tip="residual stream",
        )
        for layer in range(n_layers)
        for row in line_of
    ]
    moves = [
        _move(each, prompt, merged=(each.layer, each.dest, each.src) in merged, chosen=chosen, removed=removed)
        for each in operations
    ]
    stages = ("embedded", *(f"after layer {layer}" for layer in range(n_layers)))
    return Drawing(
        stages=stages, rows=float(len(line_of)), dots=tuple(dots), lines=(*stays, *moves), named=True, arrows=False
    )


def layered(edges: Sequence[tuple[int, int]]) -> tuple[dict[int, tuple[float, float]], int, float]:
    """A stage and a row for every vertex of a graph without cycles, and how many there are of both.

    A vertex stands right of all that lead to it; within a stage, vertices are ordered by the middle of their parents'
    rows, which keeps most edges from crossing (Sugiyama et al. 1981).
    """
    graph = nx.DiGraph(edges)
    stages = list(nx.topological_generations(graph))
    n_rows = max(map(len, stages))
    row: dict[int, float] = {}
    for stage in stages:
        above = {vertex: [row[parent] for parent in graph.predecessors(vertex)] for vertex in sorted(stage)}
        ordered = sorted(above, key=lambda vertex, above=above: sum(above[vertex]) / max(1, len(above[vertex])))
        row |= {vertex: (n_rows - len(stage)) / 2 + place for place, vertex in enumerate(ordered)}
    places = {vertex: (float(depth), row[vertex]) for depth, stage in enumerate(stages) for vertex in stage}
    return places, len(stages), float(n_rows)


def listed(vertices: Collection[int]) -> str:
    """A set as it is written on a drawing: in parentheses, since braces mean something to ECharts."""
    return f"({' '.join(map(str, sorted(vertices)))})"


def _vertices(prompt: SearchPrompt, rows: Collection[int]) -> frozenset[int]:
    return frozenset(vertex for row in rows if (vertex := prompt.vertex(row)) is not None)


def _role(prompt: SearchPrompt, vertex: int) -> str:
    return {prompt.start: " start", prompt.goal: " goal"}.get(vertex, "")


def _edge(source: int, target: int, *, marked: bool, faint: bool) -> Line:
    said = " (the model's choice)" if marked else ""
    return Line(
        name=f"{source}>{target}",
        source=str(source),
        target=str(target),
        slot="",
        colour="#b35806" if marked else "#57606a",
        width=2 * EDGE if marked else EDGE,
        dash="solid",
        bend=0.08,
        opacity=0.25 if faint and not marked else 1.0,
        tip=f"{source} → {target}{said}",
    )


def _place_label(prompt: SearchPrompt, merge: Merge, layer: int, row: int) -> str:
    """In the first column the row's name, later what it holds."""
    if layer == 0:
        return row_label(prompt, row)
    held = merge.held[layer].get(row)
    return "·" if held is None else listed(_vertices(prompt, held))


def _move(
    operation: Operation, prompt: SearchPrompt, *, merged: bool, chosen: str | None, removed: Collection[str]
) -> Line:
    name = name_of(operation, prompt)
    colour, _ = CAUSES[operation.causes[0].kind] if operation.causes else (FAINT, "")
    dash: Dash = "dotted" if name in removed else "solid" if merged else "dashed"
    said = ", ".join(map(str, operation.causes)) or "no cause found"
    return Line(
        name=name,
        source=f"{operation.layer}.{operation.src}",
        target=f"{operation.layer + 1}.{operation.dest}",
        slot="",
        colour=colour,
        width=OPERATION + (2 if name == chosen else 0),
        dash=dash,
        bend=0.0,
        opacity=1.0 if chosen in (None, name) else 0.25,
        tip=f"{html.escape(name)}<br>{html.escape(said)}",
    )
