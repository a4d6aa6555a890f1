"""A circuit as a drawing: nodes from the inputs on the left to the logits on the right, edges by what they are worth.

Blue edges help and vermilion ones hurt, the wider the more; where two circuits are compared, colour and dash tell what
is in both and what is in one alone. A drawing is laid out once, and shown by ECharts, whose nodes and edges can be
clicked, or by plotly, whose page opens offline.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from apps.ui.charts import FONT_SIZE, INK, LETTER, Margins
from apps.ui.circuit_overlay import Comparison, Status
from circuits.circuit import Circuit
from circuits.drawing import HELPS, HURTS, PLAIN
from circuits.graph import CircuitGraph, Edge, Node
from workbench.figures import TEMPLATE

Dash = Literal["solid", "dashed", "dotted"]
Point = tuple[float, float]

STATUS_LOOKS: Mapping[Status, tuple[str, Dash]] = {
    "hit": ("#0072B2", "solid"),
    "miss": ("#D55E00", "dashed"),
    "false alarm": ("#CC79A7", "dotted"),
}
"""Colours of Okabe and Ito, each with a dash of its own, so that print in black and white tells them apart."""
PLOTLY_DASHES: Mapping[Dash, str] = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
FAINT = "#9aa5b1"
ALL_DRAWN = 160
"""Up to this many edges, those that are not kept are there too, faint; up to this many nodes, those without edges."""
NAMED_STAGES = 9
"""Up to this many stages, nodes are boxes with names; beyond, dots."""
SLOTS_SHOWN = 40
AROUND = Margins(left=12, top=14, right=12, bottom=34)
ROW, LOWEST, HIGHEST = 46, 260, 900
"""Pixels of a row of nodes, and the least and most of the drawing."""
BELOW = 16
"""Pixels of each further line of a label."""
BEND, SPREAD = 0.22, 0.16
"""How far an edge bends that passes over other nodes, and how far the three slots of a head lie apart."""
WIDEST = 6.0
SLOT_SIDES = {"q": -1, "k": 0, "v": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """A node as it is drawn."""

    name: str
    label: str
    """What is written on it."""
    at: Point
    """Stage, and row from the top."""
    lit: bool
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An edge as it is drawn."""

    name: str
    source: str
    target: str
    """The node that reads."""
    slot: str
    colour: str
    width: float
    dash: Dash
    bend: float
    opacity: float
    tip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Where everything stands."""

    stages: tuple[str, ...]
    rows: float
    dots: tuple[Dot, ...]
    lines: tuple[Line, ...]
    """The last lie on top."""
    named: bool
    """Whether nodes are boxes with their labels; else dots."""
    arrows: bool = False
    """Whether edges point at what they lead to."""

    @property
    def height(self) -> int:
        """In pixels."""
        return round(min(HIGHEST, max(LOWEST, ROW * self.rows))) + AROUND.top + AROUND.bottom


def draw(circuit: Circuit, *, chosen: str | None = None, compared: Comparison | None = None) -> Drawing:
    """Lay a circuit out.

    Args:
        circuit: its edges, and their scores where there are any.
        chosen: a node or an edge; what does not touch it fades.
        compared: with another circuit; then colours tell of that, and not of scores.
    """
    graph = circuit.graph
    places, stages, rows = _layout(graph)
    in_it = set(circuit.edges) | set(() if compared is None else compared.status)
    scored = None if circuit.scores is None else circuit.scores.importance.tolist()
    largest = max((abs(value) for value in scored or ()), default=0.0) or 1.0
    lines = []
    for index, edge in enumerate(graph.edges):
        shown = edge.name in in_it
        if not shown and edge.name != chosen and len(graph.edges) > ALL_DRAWN:
            continue
        value = None if scored is None else scored[index]
        status = None if compared is None else compared.status.get(edge.name)
        lines.append(_line(graph, edge, places, shown, value, largest, status, chosen))
    ends = {end for line in lines if line.name in in_it for end in (line.source, line.target)}
    crowded = len(places) > ALL_DRAWN
    dots = [
        Dot(name=name, label=name, at=at, lit=name in ends, chosen=name == chosen)
        for name, at in places.items()
        if not crowded or name in ends or name == chosen
    ]
    standing = {dot.name for dot in dots}
    drawn = [line for line in lines if {line.source, line.target} <= standing]
    drawn.sort(key=lambda line: (line.opacity, line.width))
    return Drawing(stages=stages, rows=rows, dots=tuple(dots), lines=tuple(drawn), named=len(stages) <= NAMED_STAGES)


def reader_of(graph: CircuitGraph, edge: Edge) -> str:
    """The node that reads an edge, without its slot."""
    slot = graph.ports[edge.port].slot
    return edge.target if slot is None else edge.target.replace(f"<{slot}>", "", 1)


def nodes_of(graph: CircuitGraph) -> dict[str, Node]:
    """All nodes by name, those of each column of positions apart; by column, then by depth."""
    found: dict[str, tuple[int, Node]] = {}
    for edge in graph.edges:
        found[edge.source] = (edge.column, graph.writers[edge.writer])
        found[reader_of(graph, edge)] = (edge.column, graph.ports[edge.port].node)
    order = {node.name: place for place, node in enumerate(graph.writers)}
    by_depth = sorted(found, key=lambda name: (found[name][0], order.get(found[name][1].name, len(order))))
    return {name: found[name][1] for name in by_depth}


def echarts(drawing: Drawing) -> dict[str, Any]:
    """The drawing for ECharts; nodes and edges have the drawing's order."""
    named = drawing.named
    labelled = named and sum(line.opacity == 1 for line in drawing.lines) <= SLOTS_SHOWN
    return {
        "animation": False,
        "grid": {
            "left": AROUND.left,
            "right": AROUND.right,
            "top": AROUND.top,
            "bottom": AROUND.bottom,
            "containLabel": False,
            "outerBoundsMode": "none",
        },
        "tooltip": {"trigger": "item", "confine": True, "transitionDuration": 0, "textStyle": {"color": INK}},
        "xAxis": {
            "type": "category",
            "data": list(drawing.stages),
            "axisTick": {"show": False},
            "axisLine": {"show": False},
            "axisLabel": {"color": INK, "fontSize": FONT_SIZE if named else 11, "interval": 0, "hideOverlap": True},
        },
        "yAxis": {"type": "value", "show": False, "inverse": True, "min": -0.5, "max": drawing.rows - 0.5},
        "series": [
            {
                "type": "graph",
                "coordinateSystem": "cartesian2d",
                "layout": "none",
                "data": [_echarts_dot(dot, named) for dot in drawing.dots],
                "links": [_echarts_line(line, labelled) for line in drawing.lines],
                "edgeSymbol": ["none", "arrow" if drawing.arrows else "none"],
                "selectedMode": "single",
                "emphasis": {"focus": "none", "lineStyle": {"width": WIDEST + 1}},
            }
        ],
    }


def plotly(drawing: Drawing, caption: str) -> go.Figure:
    """The drawing as a figure to keep."""
    at = {dot.name: dot.at for dot in drawing.dots}
    figure = go.Figure()
    for line in drawing.lines:
        path = _curve(at[line.source], at[line.target], line.bend)
        look = {"color": line.colour, "width": line.width, "dash": PLOTLY_DASHES[line.dash]}
        figure.add_trace(
            go.Scatter(
                x=[x for x, _ in path],
                y=[y for _, y in path],
                mode="lines",
                line=look,
                opacity=line.opacity,
                text=line.tip,
                hoverinfo="text",
            )
        )
    lit = [INK if dot.lit else FAINT for dot in drawing.dots]
    figure.add_trace(
        go.Scatter(
            x=[dot.at[0] for dot in drawing.dots],
            y=[dot.at[1] for dot in drawing.dots],
            text=[html.escape(dot.label).replace("\n", "<br>") for dot in drawing.dots],
            mode="markers+text",
            textposition="top center",
            marker={"color": lit, "size": 10},
            textfont={"color": lit},
            hoverinfo="text",
        )
    )
    figure.update_xaxes(tickvals=list(range(len(drawing.stages))), ticktext=drawing.stages, showgrid=False, title="")
    figure.update_yaxes(visible=False, autorange="reversed")
    return figure.update_layout(template=TEMPLATE, title_text=caption, showlegend=False, height=drawing.height + 120)


def legend(drawing: Drawing, compared: Comparison | None, names: Mapping[Status, str], scale: str) -> str:
    """What colours and dashes mean, as a line of HTML."""
    keys: list[tuple[str, Dash, str]]
    if compared is None:
        keys = [(HELPS, "solid", f"helps ({scale})"), (HURTS, "solid", "hurts")]
    else:
        keys = [(*look, f"{names[status]}: {compared.count(status)}") for status, look in STATUS_LOOKS.items()]
    if any(line.colour == FAINT for line in drawing.lines):
        keys.append((FAINT, "solid", "not kept"))
    return " ".join(legend_key(*key) for key in keys)


def _layout(graph: CircuitGraph) -> tuple[dict[str, Point], tuple[str, ...], float]:
    """Where each node stands, the names of the stages, and how many rows there are."""
    crowded = graph.n_steps * (2 if any(graph.clusters) else 1) + 2 > NAMED_STAGES
    words = {"head": "a" if crowded else "heads ", "mlp": "m" if crowded else "MLP "}
    stages = ["inputs"]
    stage_of: dict[tuple[str, int], int] = {("input", -1): 0}
    for step in range(graph.n_steps):
        parts = ["head", "mlp"] if graph.clusters[step] else ["head"]
        for part in parts:
            stage_of[part, step] = len(stages)
            stages.append(f"{words[part]}{step}")
    stage_of["logits", graph.n_steps] = len(stages)
    stages.append("logits")
    sizes = {("input", -1): len(graph.inputs), ("logits", graph.n_steps): 1}
    sizes |= {("head", step): graph.n_heads for step in range(graph.n_steps)}
    sizes |= {("mlp", step): len(graph.clusters[step]) for step in range(graph.n_steps)}
    lanes = max(sizes.values())
    places = {}
    for name, node in nodes_of(graph).items():
        column = graph.columns.index(name.removeprefix(f"{node.name}@")) if graph.columns else 0
        row = column * (lanes + 0.5) + (lanes - sizes[node.part, node.step]) / 2 + node.index
        places[name] = (float(stage_of[node.part, node.step]), row)
    return places, tuple(stages), graph.n_columns * (lanes + 0.5) - 0.5


def _line(
    graph: CircuitGraph,
    edge: Edge,
    places: Mapping[str, Point],
    shown: bool,
    value: float | None,
    largest: float,
    status: Status | None,
    chosen: str | None,
) -> Line:
    target, slot = reader_of(graph, edge), graph.ports[edge.port].slot
    colour, dash, width = FAINT, "solid", 1.0
    if status is not None:
        colour, dash = STATUS_LOOKS[status]
        width = 2.5
    elif shown:
        size = 0.0 if value is None else abs(value) / largest
        colour = PLAIN if value is None else HELPS if value >= 0 else HURTS
        width = 1 + (WIDEST - 1) * size
    touched = chosen is None or chosen in (edge.name, edge.source, target)
    opacity = (1.0 if shown else 0.5) if touched else 0.15
    said = "" if value is None else f"<br>{'helps' if value >= 0 else 'hurts'} by <b>{abs(value):.4g}</b>"
    return Line(
        name=edge.name,
        source=edge.source,
        target=target,
        slot=slot or "",
        colour=colour,
        width=width + (2 if edge.name == chosen else 0),
        dash=dash,
        bend=_bend(places[edge.source], places[target], slot),
        opacity=1.0 if edge.name == chosen else opacity,
        tip=html.escape(edge.name) + said + (f"<br>{status}" if status else "" if shown else "<br>not kept"),
    )


def _bend(start: Point, end: Point, slot: str | None) -> float:
    """Edges that pass over another stage go around it; the slots of a head lie side by side."""
    side = SPREAD * SLOT_SIDES[slot] if slot else 0.0
    return side + (0.0 if end[0] - start[0] <= 1 else BEND if end[1] >= start[1] else -BEND)


def _echarts_dot(dot: Dot, named: bool) -> dict[str, Any]:
    ink = INK if dot.lit else FAINT
    look = {"color": "#ffffff" if named else ink, "borderColor": ink, "borderWidth": 3 if dot.chosen else 1}
    lines = dot.label.split("\n")
    box = [max(40, round(max(map(len, lines)) * LETTER) + 14), 26 + BELOW * (len(lines) - 1)]
    shape = {"symbol": "roundRect", "symbolSize": box} if named else {"symbol": "circle", "symbolSize": 11}
    return {
        "name": dot.name,
        "value": list(dot.at),
        **shape,
        "itemStyle": look,
        # The page's address says what is chosen, so ECharts' own selection stays unseen.
        "select": {"itemStyle": look},
        "label": {
            "show": named,
            "color": ink,
            "fontSize": FONT_SIZE,
            "lineHeight": BELOW,
            # Braces of a name, which is what is shown without a formatter, would be places for values in one.
            **({} if dot.label == dot.name else {"formatter": dot.label}),
        },
        "tooltip": {"formatter": _template(html.escape(dot.name))},
    }


def _echarts_line(line: Line, labelled: bool) -> dict[str, Any]:
    look = {
        "color": line.colour,
        "width": line.width,
        "type": line.dash,
        "curveness": line.bend,
        "opacity": line.opacity,
    }
    return {
        # ECharts knows what is selected by this; the three slots of a head have the same two ends.
        "id": line.name,
        "source": line.source,
        "target": line.target,
        "lineStyle": look,
        "select": {"lineStyle": look},
        "label": {
            "show": labelled and bool(line.slot) and line.opacity == 1,
            "formatter": line.slot,
            "fontSize": 12,
            "color": INK,
            "backgroundColor": "#ffffff",
            "padding": [0, 3],
            "verticalAlign": "middle",
        },
        "tooltip": {"formatter": _template(line.tip)},
    }


def _curve(start: Point, end: Point, bend: float) -> list[Point]:
    """The quadratic curve that ECharts draws, here in stages and rows."""
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + bend * (end[0] - start[0]))
    shares = [step / 12 for step in range(13)]
    return [
        (
            (1 - t) ** 2 * start[0] + 2 * t * (1 - t) * middle[0] + t**2 * end[0],
            (1 - t) ** 2 * start[1] + 2 * t * (1 - t) * middle[1] + t**2 * end[1],
        )
        for t in shares
    ]


def legend_key(colour: str, dash: Dash, text: str) -> str:
    """One line's look and what it means, as HTML."""
    return (
        f'<span style="white-space: nowrap; margin-right: 1.2em"><span style="display: inline-block; width: 2.4em; '
        f'border-top: 3px {dash} {colour}; vertical-align: middle; margin-right: 0.4em"></span>'
        f"{html.escape(text)}</span>"
    )


def _template(text: str) -> str:
    """Text of a tooltip, in which braces would be places for values."""
    return text.replace("{", "&#123;").replace("}", "&#125;")
