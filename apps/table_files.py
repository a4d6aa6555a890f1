"""Tables and their figures as files, as a report and other commands write them.

OUT/tables/NAME.csv, .tex      each table, for programs and for the paper
    figures/NAME.html          each figure for the browser, beside one plotly.min.js
    figures/NAME.svg           each figure for the paper, where it could be drawn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from apps.report_page import PLOTLY_CONFIG
from workbench.store import write_atomic
from workbench.tables import Table


def has_picture(table: Table) -> bool:
    """Whether a table is drawn rather than listed."""
    return table.kind != "table" and not table.frame.empty


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Each table as CSV and LaTeX."""
    for table in tables:
        write_atomic(folder / "tables" / f"{table.name}.csv", table.csv().encode())
        write_atomic(folder / "tables" / f"{table.name}.tex", table.latex().encode())


def write_figures(folder: Path, figures: Mapping[str, go.Figure], svg: Mapping[str, bytes]) -> None:
    """Each figure by its name as HTML, and as SVG those that were drawn so."""
    # One copy for all: each page would otherwise carry its megabytes.
    write_atomic(folder / "figures" / "plotly.min.js", get_plotlyjs().encode())
    for name, drawn in figures.items():
        page = drawn.to_html(include_plotlyjs="directory", div_id=f"figure-{name}", config=PLOTLY_CONFIG)
        write_atomic(folder / "figures" / f"{name}.html", page.encode())
    for name, content in svg.items():
        write_atomic(folder / "figures" / f"{name}.svg", content)
