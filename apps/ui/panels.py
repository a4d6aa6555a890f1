"""Tables laid out for the pages: curves under one another on one axis of steps, effects by site and position."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.patching import Direction, PatchMap
from workbench.figures import figure
from workbench.tables import Table

PANEL, FRAME = 150, 70
"""Pixels of one panel with its gap, and of what lies around all of them."""
TITLE = 16
"""Characters of an axis title that stand in one line."""
NAME, GAP = 18, 40
"""Pixels of one name in a panel's legend, and of the gap below a panel: many names need a higher one."""
FROM_0_TO_1 = ("fraction", "mean reciprocal rank")
"""Units whose axis shows all of their range."""
HERE = "#b35806"
INK = "#1f2328"


def stacked(
    tables: Sequence[Table],
    *,
    landmarks: Mapping[str, float],
    here: float | None = None,
    titles: Mapping[str, str] | None = None,
) -> go.Figure:
    """The curves of several tables on one x axis.

    Args:
        tables: of kind `curve`, one panel each.
        landmarks: dashed lines through all panels, by their label.
        here: a solid line.
        titles: what stands at the axis of some tables, by their name, instead of their unit.
    """
    heights = [panel_height(table) for table in tables]
    spacing = GAP / sum(heights) if len(tables) > 1 else 0.0
    drawn = make_subplots(rows=len(tables), shared_xaxes=True, vertical_spacing=spacing, row_heights=heights)
    for row, table in enumerate(tables, start=1):
        single = figure(table)
        for trace in single.data:
            # One legend a panel: the same name may mean another curve in the next.
            trace.update(legend=f"legend{row}", legendgroup=f"{row} {trace.name}")
            drawn.add_trace(trace, row=row, col=1)
        title = (titles or {}).get(table.name)
        written = single.layout.yaxis.title if title is None else "<br>".join(textwrap.wrap(title, TITLE))
        drawn.update_yaxes(type=single.layout.yaxis.type, title=written, row=row, col=1)
        top = drawn.layout[f"yaxis{row if row > 1 else ''}"].domain[1]
        place = {"y": top, "yanchor": "top", "x": 1.01, "xanchor": "left"}
        drawn.update_layout({f"legend{row}": {**place, "tracegroupgap": 0, "font": {"size": 12}}})
        if table.log_y:
            drawn.update_yaxes(exponentformat="power", row=row, col=1)
        if table.unit in FROM_0_TO_1:
            drawn.update_yaxes(range=[-0.03, 1.03], row=row, col=1)
    for name, step in landmarks.items():
        drawn.add_vline(step, line={"dash": "dash", "width": 1, "color": INK})
        drawn.add_annotation(x=step, y=1, yref="paper", yanchor="bottom", showarrow=False, text=name)
    if here is not None:
        drawn.add_vline(here, line={"width": 2, "color": HERE})
    last = max(float(table.frame[table.axes["x"]].max()) for table in tables)
    # A little room at both ends, or the solid line at the last step is cut in half.
    drawn.update_xaxes(range=[-0.01 * last, 1.01 * last])
    drawn.update_xaxes(title=tables[-1].axes["x"], row=len(tables), col=1)
    template = figure(tables[0]).layout.template
    return drawn.update_layout(
        template=template, height=sum(heights) + FRAME, margin={"t": 28, "b": 46, "l": 76, "r": 12}
    )


def panel_height(table: Table) -> int:
    """Pixels of a panel, enough for the names of all its curves."""
    series = table.axes.get("series")
    names = 1 if series is None else int(table.frame[series].nunique())
    return max(PANEL, NAME * names + GAP)


def effect_grid(patches: PatchMap, direction: Direction) -> pd.DataFrame:
    """Effects of patching in one direction: a row a site, by depth, and a column a position."""
    frame = patches.frame
    frame = frame[(frame["direction"] == direction) & frame["dest"].isna()]
    sites, places = frame["site"].unique(), frame["at"].unique()
    return frame.pivot(index="site", columns="at", values="effect").loc[sites, places]
