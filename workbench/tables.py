"""The table: what every result is made of, and all that figures, CSV, LaTeX and reports know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from workbench.runtime import WorkbenchError

Kind = Literal["heatmap", "curve", "bar", "points", "table"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Table:
    """Rows with a plan for drawing them.

    `axes` maps roles to columns: `x`, `y` and `value` for a heat map; `x`, `y`, and, where present, `series` and the
    interval's ends `low` and `high` for curves, bars and points; `facet` for a row of panels. Of points several may
    share an `x`. Kind `table` has no axes.
    """

    name: str
    """Short name, used for files."""
    frame: pd.DataFrame
    kind: Kind
    axes: Mapping[str, str]
    unit: str
    """Unit of the value, as a person would write it at the axis."""
    caption: str
    """What is shown, with n and the meaning of the interval."""
    log_y: bool = False
    """Whether values spread over decades."""

    def __post_init__(self) -> None:
        needed = {"heatmap": {"x", "y", "value"}, "table": set()}.get(self.kind, {"x", "y"})
        if missing := needed - set(self.axes):
            raise WorkbenchError(f"Table {self.name!r} of kind {self.kind!r} lacks the axes {sorted(missing)}.")
        if absent := set(self.axes.values()) - set(self.frame.columns):
            raise WorkbenchError(f"Table {self.name!r} names columns {sorted(absent)} that its frame does not have.")

    def csv(self) -> str:
        """The rows, full precision."""
        return self.frame.to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        """The rows as a booktabs table, four significant digits; columns without any entry are left out."""
        from pandas.io.formats.style import Styler

        filled = self.frame if self.frame.empty else self.frame.dropna(axis="columns", how="all")
        styler = Styler(filled.rename(columns=_escape_latex), uuid="")
        styler.hide(axis="index").format(_format_cell)
        return styler.to_latex(caption=_escape_latex(self.caption), label=f"tab:{self.name}", hrules=True)


# pdflatex knows none of these in text: the first have a meaning of their own, the last no glyph.
LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "−": "$-$",
        "∘": r"$\circ$",
        "·": r"$\cdot$",
        "…": r"\dots{}",
    }
)


def _format_cell(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _escape_latex(str(value))


def _escape_latex(text: object) -> str:
    return str(text).translate(LATEX)
