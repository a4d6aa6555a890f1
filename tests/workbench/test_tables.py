"""Tables say what they lack, and write themselves for programs and for LaTeX."""

import csv

import pandas as pd
import pytest

from workbench.runtime import WorkbenchError
from workbench.tables import Kind, Table


def table(frame: pd.DataFrame, *, kind: Kind = "table", caption: str = "", **axes: str) -> Table:
    return Table(name="mine", frame=frame, kind=kind, axes=axes, unit="nats", caption=caption)


@pytest.mark.parametrize(
    ("kind", "axes", "message"),
    [
        ("heatmap", {"x": "a", "y": "b"}, r"Table 'mine' of kind 'heatmap' lacks the axes \['value'\]"),
        ("curve", {"x": "a"}, r"'curve' lacks the axes \['y'\]"),
        ("points", {"y": "b"}, r"'points' lacks the axes \['x'\]"),
        ("bar", {}, r"'bar' lacks the axes \['x', 'y'\]"),
        ("curve", {"x": "a", "y": "b", "low": "l"}, r"names columns \['l'\] that its frame does not have"),
        ("table", {"x": "zzz"}, r"names columns \['zzz'\]"),
    ],
)
def test_axes_that_are_missing(kind: Kind, axes: dict[str, str], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        table(pd.DataFrame({"a": [1], "b": [2]}), kind=kind, **axes)


def test_csv_keeps_every_digit() -> None:
    values, sites = [0.1, 1 / 3, 1e-300, 2.5093682165838484e-07], ["L0.z", 'a "b"', "c,d", "é"]
    text = table(pd.DataFrame({"value": [*values, float("nan")], "site": [*sites, "none"]})).csv()
    assert "\r" not in text
    header, *rows, last = csv.reader(text.splitlines())
    assert header == ["value", "site"]
    assert [float(row[0]) for row in rows] == values
    assert [row[1] for row in rows] == sites
    assert last == ["", "none"]


def test_latex_by_hand() -> None:
    frame = pd.DataFrame({"site": ["L0.attn_out"], "loss": [0.000123456], "n": [12769], "holds": [True]})
    assert table(frame, caption="95 % of it").latex().splitlines() == [
        r"\begin{table}",
        r"\caption{95 \% of it}",
        r"\label{tab:mine}",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"site & loss & n & holds \\",
        r"\midrule",
        r"L0.attn\_out & 0.0001235 & 12769 & True \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_latex_escapes_what_has_a_meaning_or_no_glyph() -> None:
    frame = pd.DataFrame({"a_b": [r"50% & $x_1$ {#} \input{/etc/passwd} ~ ^ <s> ≤ ≥ −1 a ∘ b …"]})
    row = table(frame, caption="c").latex().splitlines()[7]
    assert row == (
        r"50\% \& \$x\_1\$ \{\#\} \textbackslash{}input\{/etc/passwd\} \textasciitilde{} \textasciicircum{} "
        r"\textless{}s\textgreater{} $\leq$ $\geq$ $-$1 a $\circ$ b \dots{} \\"
    )


def test_latex_leaves_out_what_is_empty() -> None:
    frame = pd.DataFrame({"site": ["a", "b"], "head": [None, None], "low": [float("nan"), 1.0]})
    lines = table(frame, caption="c").latex().splitlines()
    assert lines[5] == r"site & low \\"
    assert lines[7:9] == [r"a &  \\", r"b & 1 \\"]


def test_latex_of_no_rows_names_the_columns() -> None:
    frame = pd.DataFrame({"frequency": pd.Series(dtype=int), "neurons": pd.Series(dtype=int)})
    assert r"frequency & neurons \\" in table(frame).latex()
