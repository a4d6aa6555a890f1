"""The one way a figure becomes clickable.

Heat maps and bars are Apache ECharts, which Streamlit brings with it: Streamlit reports no clicks on the cells of a
plotly heat map. What is clicked is kept in the URL, in the query parameter named like the chart's key: a link, a
reload and the browser's back button restore it, a second click takes it back, and a place that the figure no longer
has counts as nothing chosen. Curves are the figures of `workbench.figures`, and a click on one is an event: it
usually moves another widget, so nothing of it is kept.

The frame around the plotted area has a fixed width in pixels, so that a cell's place on the screen is known.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from workbench.runtime import WorkbenchError

Place = tuple[int, ...]
NodeOrEdge = Literal["node", "edge"]

# Blue through white to orange (ColorBrewer's RdBu and PuOr): the ends stay apart for every colour blindness.
DIVERGING = (
    "#053061",
    "#2166ac",
    "#4393c3",
    "#92c5de",
    "#d1e5f0",
    "#f7f7f7",
    "#fee0b6",
    "#fdb863",
    "#e08214",
    "#b35806",
    "#7f3b08",
)
SEQUENTIAL = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
BLANK = "#e4e7eb"
"""As in `workbench.figures`: white would pass for zero."""
BAR = MARKED = "#2166ac"
PLAIN = "#9aa5b1"
CHOSEN = "#b35806"
INK = "#1f2328"
FONT_SIZE = 13
# Of the font, on average: where it matters, labels are cut by the chart and not by this.
LETTER = 7.2
NARROW = 620
ALL_LABELS = 40
NUMBERED = 120
"""Up to this many cells, each shows its number."""
SIGNIFICANT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """Pixels between the chart's edges and the plotted area."""

    left: int
    top: int
    right: int
    bottom: int


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    key: str,
    title: str,
    unit: str,
    limit: float | None = None,
    diverging: bool = True,
    height: int | None = None,
    choice: str | None = None,
    default: tuple[int, int] | None = None,
) -> tuple[int, int] | None:
    """Draw a heat map; the (row, column) of the chosen cell.

    Values that are not finite are blank and cannot be chosen. `limit` fixes the ends of the scale, `-limit` (0, if not
    `diverging`) and `limit`, so that maps of several checkpoints compare; what lies beyond has the end's colour.
    `choice` names the query parameter, where several charts share what is chosen; the key, if it is None. `default` is
    chosen as long as nothing else is.
    """
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise WorkbenchError(f"A heat map of {len(rows)} rows and {len(columns)} columns got values {values.shape}.")
    low, high = scale(values, limit=limit, diverging=diverging)
    choice = choice or key
    chosen = _chosen(choice, values) or default
    around = margins(rows, columns, title)
    spec = {
        **_frame(around, title, ground=BLANK),
        "dataset": {"source": _cells(values, rows, columns, low, high)},
        "tooltip": {
            **_tooltip(),
            "formatter": f"{{@row}}<br>{{@column}}<br><b>{{@value}}</b> {_plain(unit)}",
        },
        "xAxis": {**_axis(columns), "axisLabel": _column_labels(columns, around)},
        "yAxis": {**_axis(rows), "inverse": True, "axisLabel": _row_labels(rows, around)},
        "visualMap": _colour_bar(low, high, unit, DIVERGING if diverging else SEQUENTIAL),
        "series": [_clickable_cells(values.size), _outline(chosen, values, low, high)],
    }
    # A row's label stays readable, and many rows still fit on one screen.
    tall = around.top + around.bottom + max(120, min(560, 26 * len(rows))) if height is None else height
    alt = f"{title}, {unit}: {len(rows)} x {len(columns)} cells"
    _draw(spec, key=key, choice=choice, shape=values.shape, height=tall, alt=alt)
    return None if chosen is None else (chosen[0], chosen[1])


def bars(
    values: np.ndarray,
    labels: Sequence[str],
    *,
    key: str,
    title: str,
    unit: str,
    height: int = 280,
    limit: float | None = None,
    marked: Collection[int] = (),
    choice: str | None = None,
    default: int | None = None,
) -> int | None:
    """Draw a bar for every label; the index of the chosen one. A short bar is clicked anywhere above it.

    `limit` fixes the upper end of the axis, `marked` bars stand out, `choice` and `default` are as in `heatmap`.
    """
    if values.shape != (len(labels),) or not values.size:
        raise WorkbenchError(f"A bar chart of {len(labels)} labels got values {values.shape}.")
    choice = choice or key
    chosen = _chosen(choice, values) or (None if default is None else (default,))
    around = margins([f"{number:.3g}" for number in values if math.isfinite(number)], labels, title)
    # The unit stands above the axis, and there is no colour bar below.
    inside = replace(around, top=around.top + 18, bottom=around.bottom - 48)
    reach = scale(values, limit=limit, diverging=True)[1]
    frame = pd.DataFrame(
        {
            # Bars stand at their index: two labels may be the same.
            "place": np.arange(values.size),
            "label": list(labels),
            "value": [rounded(number) for number in values],
            "reach": [math.copysign(reach, number) if math.isfinite(number) else None for number in values],
        }
    )
    lit = [_lit(index, rounded(values[index]), MARKED) for index in marked]
    lit += [] if chosen is None else [_lit(chosen[0], rounded(values[chosen]), CHOSEN)]
    spec = {
        **_frame(inside, title),
        "dataset": {"source": frame},
        "tooltip": {**_tooltip(), "formatter": f"{{@label}}<br><b>{{@value}}</b> {_plain(unit)}"},
        "xAxis": {**_axis(labels), "axisLabel": _column_labels(labels, around)},
        "yAxis": {
            "type": "value",
            "name": unit,
            "nameTextStyle": _ink(align="left"),
            "axisLabel": _ink(),
            **({} if limit is None else {"max": limit}),
        },
        "series": [
            {
                "type": "bar",
                "encode": {"x": "place", "y": "value"},
                "silent": True,
                "itemStyle": {"color": PLAIN if marked else BAR},
            },
            {"type": "bar", "data": lit, "barGap": "-100%", "silent": True},
            {
                "type": "bar",
                "encode": {"x": "place", "y": "reach", "itemName": "place"},
                "barGap": "-100%",
                "barCategoryGap": "0%",
                "itemStyle": {"color": "transparent"},
                "emphasis": {"itemStyle": {"color": "rgba(31, 35, 40, 0.08)"}},
                **_selectable(),
            },
        ],
    }
    _draw(spec, key=key, choice=choice, shape=values.shape, height=height, alt=f"{title}, {unit}: {len(labels)} bars")
    return None if chosen is None else chosen[0]


def curves(figure: go.Figure, *, key: str, on_click: Callable[[float], None]) -> None:
    """Draw curves; a click anywhere calls `on_click` with the x of the nearest point, before the page runs again.

    So `on_click` may set the state of any widget, such as the slider of checkpoints.
    """
    widget = f"{key}-curves"
    st.plotly_chart(
        clickable(figure),
        key=widget,
        on_select=lambda: _report(widget, on_click),
        selection_mode="points",
        config={"displaylogo": False},
    )


def graph(
    spec: Mapping[str, Any], *, key: str, height: int, alt: str, on_click: Callable[[NodeOrEdge, int], None]
) -> None:
    """Draw an ECharts graph; a click calls `on_click` with whether it hit a node or an edge, and its index."""
    widget = f"{key}-graph"
    with st.container(key=key):
        st.echarts_chart(
            dict(spec),
            key=widget,
            on_select=lambda: _report_part(widget, on_click),
            height=height,
            width="stretch",
            alt=alt,
        )


def clickable(figure: go.Figure) -> go.Figure:
    """A copy whose lines can be clicked: plotly selects points only, so each line gets points that nobody sees."""
    copy = go.Figure(figure)
    unseen = {"marker": {"opacity": 0}}
    for trace in cast(Iterable[Any], copy.select_traces({"type": "scatter"})):
        if (trace.mode or "lines") == "lines" and trace.hoverinfo != "skip":
            trace.update(mode="lines+markers", marker_opacity=0, selected=unseen, unselected=unseen)
    return copy.update_layout(hovermode="x", hoverdistance=-1, clickmode="event+select")


def clicked_x(event: Mapping[str, Any]) -> float | None:
    """The x that Streamlit's event of a plotly chart reports; None if it reports that a selection was cleared."""
    points = event["selection"]["points"]
    return float(points[0]["x"]) if points else None


def clicked_index(event: Mapping[str, Any]) -> int | None:
    """The index that Streamlit's event of an ECharts chart reports; None if it reports that one was cleared."""
    indices = [index for group in event["selection"]["selected"] for index in group["data_indices"]]
    return indices[0] if indices else None


def clicked_part(event: Mapping[str, Any]) -> tuple[NodeOrEdge, int] | None:
    """The node or edge that Streamlit's event of an ECharts graph reports; None if it reports that one was cleared."""
    parts = [(group["data_type"], index) for group in event["selection"]["selected"] for index in group["data_indices"]]
    return parts[0] if parts else None


def name_place(place: Place) -> str:
    """A place as it stands in the URL: `3.5`."""
    return ".".join(str(index) for index in place)


def read_place(text: str | None, shape: tuple[int, ...]) -> Place | None:
    """The place that the URL names; None if it names none of this shape."""
    parts = (text or "").split(".")
    if len(parts) != len(shape) or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    place = tuple(int(part) for part in parts)
    return place if all(index < size for index, size in zip(place, shape, strict=True)) else None


def scale(values: np.ndarray, *, limit: float | None, diverging: bool) -> tuple[float, float]:
    """The values at the ends of the colours."""
    finite = values[np.isfinite(values)]
    if diverging:
        reach = limit or (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0
        return -reach, reach
    if limit is not None:
        return 0.0, limit
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low, low + 1.0)


def margins(rows: Sequence[str], columns: Sequence[str], title: str) -> Margins:
    """The frame around the plotted area: room for the longest label, within reason, and for the title's lines."""
    lines = math.ceil(len(title) * LETTER * 1.15 / NARROW)
    row_width = _longest(rows) * LETTER
    column_width = _longest(columns) * LETTER
    return Margins(
        left=round(min(240, max(36, row_width + 14))),
        top=round(16 + 20 * lines),
        right=16,
        bottom=62 + (round(min(110, column_width)) if _upright(columns) else 16),
    )


def rounded(number: float) -> float | None:
    """A number as it is shown; None where there is none."""
    return float(f"{number:.{SIGNIFICANT}g}") if math.isfinite(number) else None


def _chosen(choice: str, values: np.ndarray) -> Place | None:
    place = read_place(st.query_params.get(choice), values.shape)
    return place if place is not None and math.isfinite(values[place]) else None


def _draw(spec: dict[str, Any], *, key: str, choice: str, shape: tuple[int, ...], height: int, alt: str) -> None:
    # The chart's own selection only tells of clicks. Another shape is another chart: its selection starts empty.
    widget = f"{key}-{name_place(shape)}"
    with st.container(key=key):
        st.echarts_chart(
            spec, key=widget, on_select=lambda: _keep(widget, choice, shape), height=height, width="stretch", alt=alt
        )


def _keep(widget: str, choice: str, shape: tuple[int, ...]) -> None:
    """Put what was clicked into the URL, or take it out if it was there.

    ECharts clears its selection at every second click on a place, so what was clicked then is what it had before.
    """
    before = f"{widget}-before"
    index = clicked_index(st.session_state[widget])
    index = st.session_state.get(before) if index is None else index
    if index is None:
        return
    st.session_state[before] = index
    place = tuple(int(part) for part in np.unravel_index(index, shape))
    if read_place(st.query_params.get(choice), shape) == place:
        del st.query_params[choice]
    else:
        st.query_params[choice] = name_place(place)


def _report(widget: str, on_click: Callable[[float], None]) -> None:
    x = clicked_x(st.session_state[widget])
    if x is not None:
        on_click(x)


def _report_part(widget: str, on_click: Callable[[NodeOrEdge, int], None]) -> None:
    """Tell what was clicked; at every second click on a part ECharts clears its selection, as `_keep` says."""
    before = f"{widget}-before"
    part = clicked_part(st.session_state[widget]) or st.session_state.get(before)
    if part is not None:
        st.session_state[before] = part
        on_click(*part)


def _cells(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float, high: float) -> pd.DataFrame:
    """A row for every cell, in the order of their indices. The colour is the third column: `_outline` counts on it."""
    row, column = (index.ravel() for index in np.indices(values.shape))
    flat = [rounded(number) for number in values.ravel()]
    colour = [None if number is None else min(max(number, low), high) for number in flat]
    return pd.DataFrame(
        {
            "x": column,
            "y": row,
            "colour": colour,
            "place": np.arange(values.size),
            "row": np.asarray(rows, dtype=object)[row],
            "column": np.asarray(columns, dtype=object)[column],
            "value": flat,
            "shown": ["" if number is None else f"{round(number, 2) + 0.0:.2f}" for number in flat],
        }
    )


def _clickable_cells(count: int) -> dict[str, Any]:
    edge = {"borderColor": "#ffffff", "borderWidth": 1 if count <= 2_000 else 0}
    return {
        "type": "heatmap",
        # ECharts knows what is selected by name, and by itself would name all cells of a column alike.
        "encode": {"x": "x", "y": "y", "value": "colour", "itemName": "place"},
        "label": {"show": count <= NUMBERED, "formatter": "{@shown}", "fontSize": 11},
        "itemStyle": edge,
        "emphasis": {"itemStyle": {"borderColor": INK, "borderWidth": 1}},
        **_selectable(),
    }


def _selectable() -> dict[str, Any]:
    # The URL says what is chosen, so ECharts' own selection stays unseen.
    return {"selectedMode": "single", "select": {"itemStyle": {"borderColor": "transparent", "borderWidth": 0}}}


def _outline(chosen: Place | None, values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    data = []
    if chosen is not None and math.isfinite(values[chosen]):
        row, column = chosen
        data = [[column, row, float(np.clip(values[chosen], low, high))]]
    return {"type": "heatmap", "data": data, "silent": True, "itemStyle": {"borderColor": INK, "borderWidth": 3}}


def _lit(index: int, value: float | None, colour: str) -> dict[str, Any]:
    return {"value": [index, value], "itemStyle": {"color": colour}}


def _colour_bar(low: float, high: float, unit: str, colours: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "continuous",
        "min": low,
        "max": high,
        "dimension": 2,
        "seriesIndex": [0, 1],
        "orient": "horizontal",
        "left": "center",
        "bottom": 2,
        "itemWidth": 14,
        "itemHeight": 120,
        "text": [f"{high:.3g} {unit}", f"{low:.3g}"],
        "textStyle": _ink(),
        "inRange": {"color": list(colours)},
    }


def _frame(around: Margins, title: str, *, ground: str = "transparent") -> dict[str, Any]:
    return {
        "animation": False,
        "title": {
            "text": title,
            "left": 0,
            "top": 0,
            "textStyle": _ink(fontSize=15, fontWeight="bold", width=NARROW, overflow="break", lineHeight=20),
        },
        "grid": {
            "left": around.left,
            "top": around.top,
            "right": around.right,
            "bottom": around.bottom,
            # Both keep labels inside by moving the plotted area, which would then lie where nobody knows.
            "containLabel": False,
            "outerBoundsMode": "none",
            "show": True,
            "borderWidth": 0,
            "backgroundColor": ground,
        },
    }


def _axis(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "category",
        "data": list(labels),
        "axisTick": {"show": False},
        "axisLine": {"show": False},
        "splitLine": {"show": False},
    }


def _row_labels(rows: Sequence[str], around: Margins) -> dict[str, Any]:
    cut = {"width": around.left - 12, "overflow": "truncate"}
    return {**_ink(), **cut, "interval": 0 if len(rows) <= ALL_LABELS else "auto"}


def _column_labels(columns: Sequence[str], around: Margins) -> dict[str, Any]:
    interval = 0 if len(columns) <= ALL_LABELS else "auto"
    if not _upright(columns):
        return {**_ink(), "interval": interval}
    return {**_ink(), "interval": interval, "rotate": 90, "width": around.bottom - 66, "overflow": "truncate"}


def _upright(columns: Sequence[str]) -> bool:
    """Whether the columns' labels must stand upright to fit a narrow page."""
    return len(columns) <= ALL_LABELS and len(columns) * (_longest(columns) * LETTER + 10) > NARROW - 120


def _longest(labels: Sequence[str]) -> int:
    return max((len(label) for label in labels), default=0)


def _tooltip() -> dict[str, Any]:
    return {"trigger": "item", "confine": True, "textStyle": _ink(), "transitionDuration": 0}


def _ink(**more: object) -> dict[str, Any]:
    return {"color": INK, "fontSize": FONT_SIZE, **more}


def _plain(text: str) -> str:
    """Text in a tooltip's template, where braces would be places for values."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;")
