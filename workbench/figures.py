"""Table in, plotly figure out.

A figure is drawn from a `Table` alone, so that a new analysis gets its picture by writing `tables()`. What the pictures
keep to:

- in a heat map white is zero, red above and blue below (which colour-blind readers can tell), with the same reach on
  both sides. Where values have one sign only, only that half of the scale is there. Panels share one scale, and `limit`
  holds it from checkpoint to checkpoint;
- an interval is drawn wherever the table has one: a band around a curve, whiskers on a bar;
- lines differ in colour (Okabe & Ito 2008) and in dash, points in colour and symbol, so that print in black and white
  still tells them apart;
- on a logarithmic axis a bar has no honest foot, so it becomes a dot.

The template rides on each figure; plotly's global default stays as it is.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from plotly.colors import diverging
from plotly.subplots import make_subplots

from workbench.runtime import WorkbenchError
from workbench.tables import Table

Span = tuple[int | float, int | float]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours without the yellow, which a line on white loses."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""One fewer than the colours, so that 42 lines pass before a pair of both comes again."""
SYMBOLS = ("circle", "diamond-open", "x-thin-open", "cross-thin-open", "square-open", "triangle-up-open")
BELOW_AND_ABOVE = tuple(diverging.RdBu_r)
MUTED = "#52606d"
GRID = "#e4e7eb"
NARROW = 620
"""Pixels of a plot's inside in a window of 800: labels are laid out so that they fit there."""
CHARACTER = 8
"""Pixels that a character takes, generously."""
MOST_PANELS_A_ROW = 4
FEW_POINTS = 15
FEW_CELLS = 60
"""Up to so many cells in a panel, each shows its value."""
FEW_BARS = 12
FEW_SERIES = 8
FEW_DECADES = 2
TITLE_LINE = 92
TITLE_MARGIN = 70
BAND_OPACITY = 0.2
SAYS_NOTHING = ("value", "mean")
"""Columns whose name adds nothing to the unit."""

AXIS = {"automargin": True, "showline": True, "linecolor": "#7b8794", "ticks": "outside", "zeroline": False}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 14, "color": "#1f2933"},
        "title": {"font": {"size": 16}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 12}},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": COLOURS,
        "margin": {"l": 64, "r": 24, "t": TITLE_MARGIN, "b": 56},
        "hoverlabel": {"align": "left"},
        "xaxis": {**AXIS, "title": {"standoff": 10}, "gridcolor": GRID},
        "yaxis": {**AXIS, "title": {"standoff": 14}, "gridcolor": GRID},
        "coloraxis": {
            "colorbar": {"thickness": 14, "outlinewidth": 0, "title": {"side": "right", "font": {"size": 12}}}
        },
    }
)


def figure(table: Table, *, limit: int | float | None = None) -> go.Figure:
    """The picture of a table.

    Args:
        table: what to draw.
        limit: the value at the end of a heat map's scale, where several must share one; None takes the largest.

    Raises:
        WorkbenchError: a heat map has two values for one cell.
    """
    if table.kind == "heatmap":
        drawn = _heatmap(table, limit)
    else:
        drawn = {"curve": _curves, "bar": _bars, "points": _bars, "table": _listing}[table.kind](table)
    return drawn.update_layout(template=TEMPLATE, title_text="<br>".join(map(_label, title_lines(table.caption))))


def title_lines(caption: str) -> list[str]:
    """The caption's first clause without what it says in brackets, in at most two lines."""
    clause = re.split(r"[.;](?:\s|$)", re.sub(r"\s\([^()]*\)", "", caption), maxsplit=1)[0]
    return textwrap.wrap(clause, TITLE_LINE, max_lines=2, placeholder=" …")


def with_landmarks(drawn: go.Figure, landmarks: Mapping[str, int | float]) -> go.Figure:
    """The figure with a labelled vertical line at each landmark; labels that would meet stand one above the other."""
    marked = go.Figure(drawn)
    start, end = _x_range(drawn)
    levels: list[list[Span]] = []
    for name, at in sorted(landmarks.items(), key=lambda item: item[1]):
        width = len(name) * CHARACTER / NARROW * (end - start)
        # Near the right end a label stands on the left of its line, where there is room.
        leftwards = at + width > end
        place = (at - width, at) if leftwards else (at, at + width)
        level = next((row for row, taken in enumerate(levels) if not _meets(place, taken)), len(levels))
        levels[level:] = [[*(levels[level] if level < len(levels) else []), place], *levels[level + 1 :]]
        marked.add_vline(x=at, line={"color": MUTED, "dash": "dash", "width": 1})
        marked.add_annotation(
            x=at,
            y=1,
            yref="paper",
            yshift=2 + 18 * level,
            xanchor="right" if leftwards else "left",
            yanchor="bottom",
            text=_label(name),
            showarrow=False,
            font={"size": 13, "color": MUTED},
        )
    raised = 18 * (len(levels) - 1)
    if raised > 0:
        # A figure without a height of its own has plotly's.
        marked.update_layout(margin_t=TITLE_MARGIN + raised, height=(drawn.layout.height or 450) + raised)
    return marked


def _meets(place: Span, taken: Sequence[Span]) -> bool:
    return any(place[0] < other[1] and other[0] < place[1] for other in taken)


def _x_range(drawn: go.Figure) -> tuple[float, float]:
    values = [float(x) for trace in drawn.data if trace.x is not None for x in trace.x]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _heatmap(table: Table, limit: int | float | None) -> go.Figure:
    panels = _panels(table)
    columns = _panels_a_row(list(panels))
    rows = math.ceil(len(panels) / columns)
    across, down = (_places(table.frame[table.axes[role]]) for role in ("x", "y"))
    height = 320 if _is_number(down) else min(640, max(160, 34 * len(down)))
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03,
        vertical_spacing=0.0 if rows == 1 else 40 / (rows * height + 40 * (rows - 1)),
        subplot_titles=_panel_titles(panels),
    )
    for place, frame in enumerate(panels.values()):
        drawn.add_trace(_cells(table, frame, across, down), row=place // columns + 1, col=place % columns + 1)
    drawn.update_xaxes(type=_axis_type(across), showgrid=False)
    # Names read like a table, the first on top; numbers grow upwards.
    drawn.update_yaxes(type=_axis_type(down), showgrid=False, autorange=None if _is_number(down) else "reversed")
    drawn.update_xaxes(title_text=_words(table.axes["x"]), row=rows)
    drawn.update_yaxes(title_text=_words(table.axes["y"]), col=1)
    drawn.update_annotations(font_size=13)
    return drawn.update_layout(
        coloraxis=_scale(table, limit), plot_bgcolor=GRID, height=rows * height + 40 * (rows - 1) + TITLE_MARGIN + 80
    )


def _cells(table: Table, frame: pd.DataFrame, across: pd.Index, down: pd.Index) -> go.Heatmap:
    """One panel; a cell without a row in the table stays empty."""
    axes = table.axes
    if frame.duplicated([axes["x"], axes["y"]]).any():
        raise WorkbenchError(
            f"Table {table.name!r} has two values for one cell of {axes['x']!r} and {axes['y']!r}. "
            "Give it a facet that tells them apart, or average them."
        )

    def grid(role: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        wide = frame.pivot(index=axes["y"], columns=axes["x"], values=axes[role])
        return wide.reindex(index=down, columns=across).to_numpy(dtype=float)

    values = grid("value")
    interval = np.stack([grid("low"), grid("high")], -1) if _has_interval(table) else None
    few = values.size <= FEW_CELLS
    return go.Heatmap(
        x=_shown(across),
        y=_shown(down),
        z=values,
        customdata=interval,
        coloraxis="coloraxis",
        texttemplate=f"%{{z:.{_decimals(values)}f}}" if few else None,
        xgap=1 if few else None,
        ygap=1 if few else None,
        hoverongaps=False,
        hovertemplate=f"{_words(axes['x'])}: %{{x}}<br>{_words(axes['y'])}: %{{y}}<br>{_hover_value(table, 'z')}",
    )


def _scale(table: Table, limit: int | float | None) -> dict[str, Any]:
    """White is zero, and a value has its colour whether or not the table holds the other sign."""
    values = table.frame[table.axes["value"]].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    largest = (float(np.abs(values).max(initial=0.0)) or 1.0) if limit is None else limit
    middle = len(BELOW_AND_ABOVE) // 2
    below, above = bool((values < 0).any()), bool((values > 0).any())
    return {
        "cmin": -largest if below else 0.0,
        "cmax": largest if above or not below else 0.0,
        "colorscale": BELOW_AND_ABOVE[0 if below else middle : None if above or not below else middle + 1],
        "colorbar": {"title": {"text": _label(table.unit)}},
    }


def _decimals(values: np.ndarray[Any, np.dtype[np.float64]]) -> int:
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return 0 if largest == 0 else int(np.clip(2 - math.ceil(math.log10(largest)), 0, 6))


def _panels_a_row(names: Sequence[str]) -> int:
    """As many panels as have room for their titles in a narrow window; without a gap at the end if that can be."""
    room = NARROW // (CHARACTER * (max(map(len, names)) + 2))
    most = max(1, min(len(names), MOST_PANELS_A_ROW, room))
    return next((columns for columns in range(most, 1, -1) if len(names) % columns == 0), most)


def _curves(table: Table) -> go.Figure:
    drawn, panels = _panel_row(table)
    axes, named = table.axes, _first_panels(table, panels)
    for column, frame in enumerate(panels.values(), start=1):
        for place, (name, rows) in enumerate(_series(table, frame)):
            colour = COLOURS[place % len(COLOURS)]
            if _has_interval(table):
                drawn.add_trace(_band(rows, axes, colour, name), row=1, col=column)
            line = go.Scatter(
                x=rows[axes["x"]],
                y=rows[axes["y"]],
                name=name,
                legendgroup=name,
                showlegend=named.get(name) == column,
                mode="lines+markers" if len(rows) <= FEW_POINTS else "lines",
                line={"color": colour, "dash": DASHES[place % len(DASHES)], "width": 2},
                hovertemplate=_hover_value(table, "y"),
                customdata=_interval(table, rows),
            )
            drawn.add_trace(line, row=1, col=column)
    drawn.update_layout(hovermode="x unified", height=420)
    drawn.update_xaxes(title_text=_words(axes["x"]))
    _draw_value_axis(table, drawn.update_yaxes, col=1)
    return _with_legend(drawn, table)


def _band(rows: pd.DataFrame, axes: Mapping[str, str], colour: str, name: str) -> go.Scatter:
    """The interval around a curve: along its lower end and back along the upper one."""
    x, low, high = (rows[axes[role]].tolist() for role in ("x", "low", "high"))
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*low, *reversed(high)],
        fill="toself",
        fillcolor=colour,
        opacity=BAND_OPACITY,
        line={"width": 0},
        mode="lines",
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def _bars(table: Table) -> go.Figure:
    drawn, panels = _panel_row(table)
    labels = _places(table.frame[table.axes["x"]])
    # Names are read across, so their bars lie; numbers keep the axis that they are used to.
    lying = not _is_number(labels)
    named = _first_panels(table, panels)
    for column, frame in enumerate(panels.values(), start=1):
        for place, (name, rows) in enumerate(_series(table, frame)):
            bar = _bar(table, rows, name, place, lying=lying, in_legend=named.get(name) == column)
            drawn.add_trace(bar, row=1, col=column)
    label_axes, value_axes = (drawn.update_xaxes, drawn.update_yaxes)[:: -1 if lying else 1]
    label_axes(title_text=_words(table.axes["x"]), showgrid=False, **({"col": 1} if lying else {}))
    # A few numbers are named one by one.
    label_axes(type="linear" if len(labels) > FEW_BARS and not lying else "category")
    if lying:
        label_axes(autorange="reversed", title_text="")
    _draw_value_axis(table, value_axes, **({} if lying else {"col": 1}))
    side_by_side = sum(1 for _ in _series(table, table.frame))
    thick = 34 if side_by_side == 1 else 18 * side_by_side
    # Dots stand side by side as bars do.
    drawn.update_layout(bargap=0.25, scattermode="group", scattergap=0.25)
    drawn.update_layout(height=TITLE_MARGIN + 90 + thick * len(labels) if lying else 380)
    return _with_legend(drawn, table)


def _bar(
    table: Table, rows: pd.DataFrame, name: str, place: int, *, lying: bool, in_legend: bool
) -> go.Bar | go.Scatter:
    axes, colour = table.axes, COLOURS[place % len(COLOURS)]
    label_axis, value_axis = ("y", "x") if lying else ("x", "y")
    values = rows[axes["y"]]
    look: dict[str, Any] = {
        label_axis: _shown(pd.Index(rows[axes["x"]])),
        value_axis: values,
        "orientation": "h" if lying else "v",
        "name": name,
        "legendgroup": name,
        "showlegend": in_legend,
        "customdata": _interval(table, rows),
        "hovertemplate": f"{_words(axes['x'])}: %{{{label_axis}}}<br>{_hover_value(table, value_axis)}",
    }
    if _has_interval(table):
        ends = {"array": rows[axes["high"]] - values, "arrayminus": values - rows[axes["low"]]}
        look[f"error_{value_axis}"] = {"type": "data", "symmetric": False, "color": "#323f4b", **ends}
    if table.kind == "points":
        marker = {"color": colour, "size": 10, "symbol": SYMBOLS[place % len(SYMBOLS)]}
        marker["line"] = {"width": 2, "color": colour}
        return go.Scatter(mode="markers", marker=marker, **look)
    if table.log_y:
        return go.Scatter(mode="markers", marker={"color": colour, "size": 11}, **look)
    return go.Bar(marker_color=colour, **look)


def _panel_row(table: Table) -> tuple[go.Figure, Mapping[str, pd.DataFrame]]:
    panels = _panels(table)
    drawn = make_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=_panel_titles(panels)
    )
    return drawn.update_annotations(font_size=13), panels


def _series(table: Table, frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    column = table.axes.get("series")
    if column is None:
        yield "", frame
        return
    # All names in every panel, so that a colour and a dash belong to one name.
    for name in table.frame[column].unique():
        yield _words(str(name)), frame[frame[column] == name]


def _first_panels(table: Table, panels: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """The first panel, from 1, in which each series has anything: its entry in the legend belongs to that one."""
    if "series" not in table.axes:
        return {}
    filled = [
        (name, column)
        for column, frame in enumerate(panels.values(), start=1)
        for name, rows in _series(table, frame)
        if len(rows)
    ]
    return dict(reversed(filled))


def _draw_value_axis(table: Table, update: Any, **where: int) -> None:
    name, unit = table.axes["y"], table.unit
    silent = name in SAYS_NOTHING or name == unit
    update(title_text=_label(unit) if silent else f"{_words(name)} ({_label(unit)})", **where)
    if table.log_y:
        # Plotly writes powers larger than other ticks.
        update(type="log", exponentformat="power", tickfont={"size": 11}, **_log_ticks(table))


def _log_ticks(table: Table) -> dict[str, Any]:
    """Powers of ten so far apart that about eight are labelled; over few decades 1, 2 and 5 of each."""
    values = table.frame[table.axes["y"]].to_numpy(dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return {"dtick": 1}
    first, last = math.log10(values.min()), math.log10(values.max())
    if last - first >= FEW_DECADES:
        return {"dtick": max(1, round((last - first) / 8))}
    ticks = [digit * 10.0**power for power in range(math.floor(first), math.ceil(last) + 1) for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _with_legend(drawn: go.Figure, table: Table) -> go.Figure:
    if "series" not in table.axes:
        return drawn
    if table.frame[table.axes["series"]].nunique() > FEW_SERIES:
        return drawn.update_layout(legend={"font": {"size": 12}, "itemwidth": 40})
    below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "itemwidth": 40}
    return drawn.update_layout(legend=below, margin_b=96)


def _listing(table: Table) -> go.Figure:
    """A table without axes, as itself."""
    columns = [[_cell(value) for value in table.frame[column]] for column in table.frame]
    drawn = go.Figure(
        go.Table(
            header={"values": [_words(str(column)) for column in table.frame], "align": "left"},
            cells={"values": columns, "align": "left", "height": 26},
        )
    )
    return drawn.update_layout(height=TITLE_MARGIN + 100 + 27 * len(table.frame))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _label(str(value))


def _panels(table: Table) -> Mapping[str, pd.DataFrame]:
    """A frame for each value of the facet, in the order in which they come."""
    column = table.axes.get("facet")
    if column is None or table.frame.empty:
        return {"": table.frame}
    return {str(name): frame for name, frame in table.frame.groupby(column, sort=False)}


def _panel_titles(panels: Mapping[str, pd.DataFrame]) -> list[str] | None:
    return [_label(name) for name in panels] if len(panels) > 1 else None


def _has_interval(table: Table) -> bool:
    return {"low", "high"} <= set(table.axes)


def _interval(table: Table, rows: pd.DataFrame) -> Any:
    return rows[[table.axes["low"], table.axes["high"]]].to_numpy() if _has_interval(table) else None


def _hover_value(table: Table, letter: str) -> str:
    interval = "<br>%{customdata[0]:.4g} to %{customdata[1]:.4g}" if _has_interval(table) else ""
    end = "" if "series" in table.axes else "<extra></extra>"
    return f"<b>%{{{letter}:.4g}}</b> {_label(table.unit)}{interval}{end}"


def _places(column: pd.Series) -> pd.Index:
    """What stands along an axis: numbers in their order, names as they come."""
    labels = pd.Index(column.unique())
    return labels.sort_values() if _is_number(labels) else labels


def _is_number(labels: pd.Index) -> bool:
    return is_numeric_dtype(labels) and not is_bool_dtype(labels)


def _axis_type(labels: pd.Index) -> str:
    """Plotly takes "7" for a number; as a token it is a name."""
    return "linear" if _is_number(labels) else "category"


def _shown(labels: pd.Index) -> list[Any]:
    return labels.tolist() if _is_number(labels) else [_label(str(label)) for label in labels]


def _words(name: str) -> str:
    return _label(name.replace("_", " "))


def _label(text: str) -> str:
    """Plotly reads tags in its texts; a token such as `<s>` is none."""
    return html.escape(text, quote=False)
