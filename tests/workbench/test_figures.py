"""Pictures that say what the table says: hand-made tables, read back from the plotly figure."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.figures import BELOW_AND_ABOVE, COLOURS, DASHES, TEMPLATE, figure, title_lines, with_landmarks
from workbench.runtime import WorkbenchError
from workbench.tables import Kind, Table

WHITE = BELOW_AND_ABOVE[5]


def table(rows: Sequence[dict[str, Any]], kind: Kind, *, caption: str = "A caption", **options: Any) -> Table:
    axes = {key: options.pop(key) for key in ("x", "y", "value", "series", "low", "high", "facet") if key in options}
    frame = pd.DataFrame(rows)
    return Table(name="mine", frame=frame, kind=kind, axes=axes, unit="nats", caption=caption, **options)


def heatmap(rows: Sequence[dict[str, Any]], **options: Any) -> Table:
    return table(rows, "heatmap", x="at", y="site", value="effect", **options)


def cells(values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"at": str(place), "site": "L0.z", "effect": value} for place, value in enumerate(values)]


def lines(drawn: go.Figure) -> list[go.Scatter]:
    return [trace for trace in drawn.data if trace.fill is None]


def test_a_heat_map_by_hand() -> None:
    rows = [
        {"at": "b", "site": "L1.z", "effect": 1.0},
        {"at": "a", "site": "L1.z", "effect": 2.0},
        {"at": "a", "site": "L0.z", "effect": 3.0},
    ]
    drawn = figure(heatmap(rows))
    [panel] = drawn.data
    # Names in the order in which they come; the cell that no row has is empty.
    assert (list(panel.x), list(panel.y)) == (["b", "a"], ["L1.z", "L0.z"])
    np.testing.assert_array_equal(panel.z, [[1.0, 2.0], [np.nan, 3.0]])
    assert drawn.layout.yaxis.autorange == "reversed"
    assert panel.hoverongaps is False
    assert drawn.layout.xaxis.title.text == "at"
    assert drawn.layout.coloraxis.colorbar.title.text == "nats"


def test_numbers_along_a_heat_map_keep_their_distances_and_grow_upwards() -> None:
    rows = [{"at": at, "site": site, "effect": 1.0} for at in (100, 1, 10) for site in (2, 1)]
    drawn = figure(heatmap(rows))
    assert (list(drawn.data[0].x), list(drawn.data[0].y)) == ([1, 10, 100], [1, 2])
    assert (drawn.layout.xaxis.type, drawn.layout.yaxis.autorange) == ("linear", None)


def test_tokens_that_look_like_numbers_are_names() -> None:
    drawn = figure(heatmap(cells([1, 2, 3])))
    assert drawn.layout.xaxis.type == "category"
    assert list(drawn.data[0].x) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("values", "ends", "colours"),
    [
        ([-1.0, 0.5], (-1.0, 1.0), (BELOW_AND_ABOVE[0], BELOW_AND_ABOVE[-1])),
        ([-0.25, 2.0], (-2.0, 2.0), (BELOW_AND_ABOVE[0], BELOW_AND_ABOVE[-1])),
        ([0.5, 2.0], (0.0, 2.0), (WHITE, BELOW_AND_ABOVE[-1])),
        ([-0.5, -2.0], (-2.0, 0.0), (BELOW_AND_ABOVE[0], WHITE)),
        ([0.0, 0.0], (0.0, 1.0), (WHITE, BELOW_AND_ABOVE[-1])),
        ([float("nan"), 2.0], (0.0, 2.0), (WHITE, BELOW_AND_ABOVE[-1])),
    ],
)
def test_white_is_zero(values: list[float], ends: tuple[float, float], colours: tuple[str, str]) -> None:
    scale = figure(heatmap(cells(values))).layout.coloraxis
    assert (scale.cmin, scale.cmax) == ends
    assert (scale.colorscale[0][1], scale.colorscale[-1][1]) == colours
    if ends[0] < 0 < ends[1]:
        assert scale.colorscale[len(scale.colorscale) // 2] == (0.5, WHITE)


@settings(max_examples=15)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.1, 5))
def test_with_a_limit_a_value_has_one_colour_whatever_stands_beside_it(values: list[float], limit: float) -> None:
    """So that the scale does not jump from checkpoint to checkpoint."""
    for sign, share in ((1, 1.0), (-1, 0.0)):
        held = figure(heatmap(cells([sign * limit, *values])), limit=limit).layout.coloraxis
        place = (sign * limit - held.cmin) / (held.cmax - held.cmin)
        assert place == share
        assert held.colorscale[-1 if sign > 0 else 0][1] == BELOW_AND_ABOVE[-1 if sign > 0 else 0]


def test_the_limit_holds_the_scale() -> None:
    one, other = (figure(heatmap(cells(values)), limit=2.0).layout.coloraxis for values in ([-1, 0.5], [-0.1, 7.0]))
    assert (one.cmin, one.cmax) == (other.cmin, other.cmax) == (-2.0, 2.0)
    assert figure(heatmap(cells([-1, 0.5]))).layout.coloraxis.cmax == 1.0


def test_panels_share_one_scale_and_their_axes() -> None:
    rows = [
        {"at": at, "site": "L0.z", "effect": value, "way": way}
        for way, values in (("denoise", [1.0, 0.0]), ("noise", [-3.0, 0.5]))
        for at, value in zip("ab", values, strict=True)
    ]
    drawn = figure(heatmap(rows, facet="way"))
    assert [panel.coloraxis for panel in drawn.data] == ["coloraxis", "coloraxis"]
    assert (drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax) == (-3.0, 3.0)
    assert [note.text for note in drawn.layout.annotations] == ["denoise", "noise"]
    assert [list(panel.z[0]) for panel in drawn.data] == [[1.0, 0.0], [-3.0, 0.5]]
    assert drawn.layout.yaxis2.matches == "y"


@pytest.mark.parametrize(
    ("names", "columns"),
    [(["a", "b", "c"], 3), ([f"head {i}" for i in range(8)], 4), ([f"L0.pattern.h{i} denoise" for i in range(8)], 2)],
)
def test_panels_have_room_for_their_titles(names: list[str], columns: int) -> None:
    drawn = figure(heatmap([{**cells([1.0])[0], "panel": name} for name in names], facet="panel"))
    assert len({note.x for note in drawn.layout.annotations}) == columns


def test_hover_says_label_value_unit_and_interval() -> None:
    rows = [{**cells([0.5])[0], "low": 0.25, "high": 0.75}]
    [panel] = figure(heatmap(rows, low="low", high="high")).data
    assert panel.customdata.tolist() == [[[0.25, 0.75]]]
    for piece in ("at: %{x}", "site: %{y}", "%{z:.4g}</b> nats", "%{customdata[0]:.4g} to %{customdata[1]:.4g}"):
        assert piece in panel.hovertemplate
    assert "customdata" not in figure(heatmap(rows)).data[0].hovertemplate


def test_few_cells_show_their_values() -> None:
    assert figure(heatmap(cells([0.031, 0.5]))).data[0].texttemplate == "%{z:.2f}"
    assert figure(heatmap(cells([0.031, 0.001]))).data[0].texttemplate == "%{z:.3f}"
    assert figure(heatmap(cells([55.0, 3.0]))).data[0].texttemplate == "%{z:.0f}"
    assert figure(heatmap(cells([1.0] * 61))).data[0].texttemplate is None


def test_two_values_for_one_cell() -> None:
    with pytest.raises(WorkbenchError, match="'mine' has two values for one cell of 'at' and 'site'. Give it a facet"):
        figure(heatmap([*cells([1.0]), *cells([2.0])]))


def curves(n: int, points: int = 3) -> Table:
    rows = [
        {"step": step, "loss": 0.1 * (which + 1) * (step + 1), "split": f"split_{which}"}
        for which in range(n)
        for step in range(points)
    ]
    return table(rows, "curve", x="step", y="loss", series="split", log_y=True)


def test_curves_by_hand() -> None:
    drawn = figure(curves(2))
    train, test = drawn.data
    assert (train.name, test.name) == ("split 0", "split 1")
    np.testing.assert_allclose(test.y, [0.2, 0.4, 0.6])
    assert (train.line.color, train.line.dash) != (test.line.color, test.line.dash)
    assert train.line.dash != test.line.dash
    assert drawn.layout.yaxis.type == "log"
    assert (drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text) == ("step", "loss (nats)")
    assert train.showlegend


def test_forty_lines_are_forty_looks() -> None:
    drawn = figure(curves(40))
    assert len({(line.line.color, line.line.dash) for line in drawn.data}) == 40
    assert len(COLOURS) * len(DASHES) == 42
    # A list this long stands beside the plot, a short one below it.
    assert drawn.layout.legend.orientation is None
    assert figure(curves(3)).layout.legend.orientation == "h"


def test_few_points_are_marked() -> None:
    assert figure(curves(1, points=3)).data[0].mode == "lines+markers"
    assert figure(curves(1, points=40)).data[0].mode == "lines"


def test_a_band_runs_along_the_low_end_and_back_along_the_high_one() -> None:
    rows = [{"step": step, "loss": 1.0, "low": 0.5 - step / 10, "high": 2.0 + step} for step in range(3)]
    drawn = figure(table(rows, "curve", x="step", y="loss", low="low", high="high"))
    band, line = drawn.data
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    np.testing.assert_allclose(band.y, [0.5, 0.4, 0.3, 4.0, 3.0, 2.0])
    assert (band.fill, band.fillcolor, band.opacity) == ("toself", line.line.color, 0.2)
    assert not line.showlegend


def test_panels_of_curves() -> None:
    rows = [
        {"step": 0, "loss": 1.0, "split": split, "run": run} for run in ("one", "two") for split in ("train", "test")
    ]
    drawn = figure(table(rows[:-1], "curve", x="step", y="loss", series="split", facet="run"))
    assert [note.text for note in drawn.layout.annotations] == ["one", "two"]
    # A colour belongs to a name also where a panel lacks another.
    assert len({trace.line.color for trace in drawn.data if trace.name == "train"}) == 1
    assert [trace.showlegend for trace in drawn.data if trace.name == "train"] == [True, False]


@pytest.mark.parametrize("kind", ["curve", "bar"])
def test_a_series_that_the_first_panel_lacks_is_in_the_legend(kind: Kind) -> None:
    rows = [
        {"step": 0, "loss": 1.0, "split": split, "run": run} for run in ("one", "two") for split in ("train", "test")
    ]
    drawn = figure(table(rows[1:], kind, x="step", y="loss", series="split", facet="run"))
    shown = [(trace.name, len(trace.x)) for trace in drawn.data if trace.showlegend]
    assert shown == [("test", 1), ("train", 1)]


def bars(labels: Sequence[Any], **options: Any) -> Table:
    rows = [{"part": label, "effect": i + 1.0, "low": i + 0.5, "high": i + 3.0} for i, label in enumerate(labels)]
    return table(rows, "bar", x="part", y="effect", low="low", high="high", **options)


def test_bars_of_names_lie_and_carry_whiskers() -> None:
    drawn = figure(bars(["mlp", "attn"]))
    [bar] = drawn.data
    assert (bar.orientation, list(bar.x), list(bar.y)) == ("h", [1.0, 2.0], ["mlp", "attn"])
    assert (list(bar.error_x.array), list(bar.error_x.arrayminus)) == ([2.0, 2.0], [0.5, 0.5])
    assert drawn.layout.yaxis.autorange == "reversed"
    assert drawn.layout.xaxis.title.text == "effect (nats)"


def test_bars_of_numbers_stand() -> None:
    drawn = figure(bars(range(1, 20)))
    assert (drawn.data[0].orientation, drawn.layout.xaxis.type) == ("v", "linear")
    # A few are named one by one.
    assert figure(bars([5, 19, 23])).layout.xaxis.type == "category"


def test_on_a_logarithmic_axis_a_bar_is_a_dot() -> None:
    drawn = figure(bars(["whole", "without"], log_y=True))
    [dots] = drawn.data
    assert (dots.type, dots.mode, dots.orientation) == ("scatter", "markers", "h")
    assert list(dots.error_x.array) == [2.0, 2.0]
    assert drawn.layout.xaxis.type == "log"


def test_bars_of_several_series_stand_side_by_side() -> None:
    rows = [{"part": part, "effect": 1.0, "run": run} for run in ("one", "two") for part in ("mlp", "attn")]
    drawn = figure(table(rows, "bar", x="part", y="effect", series="run"))
    assert drawn.layout.barmode is None or drawn.layout.barmode == "group"
    assert [bar.name for bar in drawn.data] == ["one", "two"]
    assert drawn.layout.height > figure(bars(["mlp", "attn"])).layout.height


def test_points_share_a_place_and_differ_in_symbol() -> None:
    rows = [{"run": run, "step": step, "mark": mark} for run, step, mark in POINTS]
    drawn = figure(table(rows, "points", x="run", y="step", series="mark"))
    learnt, never = drawn.data
    assert (learnt.type, learnt.mode, learnt.orientation) == ("scatter", "markers", "h")
    assert (list(learnt.x), list(learnt.y)) == ([10, 20, 40], ["slow", "slow", "fast"])
    assert learnt.marker.symbol != never.marker.symbol
    assert [learnt.marker.color, never.marker.color] == list(COLOURS[:2])
    assert drawn.layout.yaxis.autorange == "reversed"


POINTS = [("slow", 10, "learnt"), ("slow", 20, "learnt"), ("fast", 40, "learnt"), ("fast", 80, "never")]


@pytest.mark.parametrize(
    ("values", "labelled"),
    [
        ([30.0, 400.0], ["10", "20", "50", "100", "200", "500", "1000", "2000", "5000"]),
        ([0.02, 0.03], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]),
        ([0.0, float("nan"), 7.0], ["1", "2", "5", "10", "20", "50"]),
    ],
)
def test_a_short_logarithmic_axis_is_labelled_between_the_powers_of_ten(
    values: list[float], labelled: list[str]
) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(values)]
    drawn = figure(table(rows, "curve", x="step", y="loss", log_y=True))
    assert list(drawn.layout.yaxis.ticktext) == labelled
    assert [float(text) for text in labelled] == pytest.approx(list(drawn.layout.yaxis.tickvals))


@pytest.mark.parametrize(("decades", "apart"), [(2, 1), (8, 1), (16, 2)])
def test_a_long_logarithmic_axis_is_labelled_at_powers_of_ten(decades: int, apart: int) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([1.0, 10.0**-decades])]
    axis = figure(table(rows, "curve", x="step", y="loss", log_y=True)).layout.yaxis
    assert (axis.dtick, axis.tickvals) == (apart, None)


@pytest.mark.parametrize("kind", ["curve", "bar", "points", "heatmap"])
def test_a_table_without_rows_gives_an_empty_picture(kind: Kind) -> None:
    frame = pd.DataFrame({"x": pd.Series(dtype=object), "y": pd.Series(dtype=float), "z": pd.Series(dtype=float)})
    axes = {"x": "x", "y": "y", **({"value": "z"} if kind == "heatmap" else {})}
    drawn = figure(
        Table(name="mine", frame=frame, kind=kind, axes=axes, unit="", caption="", log_y=kind in ("bar", "points"))
    )
    assert sum(np.size(trace.x) for trace in drawn.data) == 0


def test_a_plain_table_is_drawn_as_one() -> None:
    drawn = figure(table([{"my_measure": "loss", "value": 0.123456}], "table"))
    assert list(drawn.data[0].header["values"]) == ["my measure", "value"]
    assert [list(column) for column in drawn.data[0].cells["values"]] == [["loss"], ["0.1235"]]
    missing = pd.DataFrame({"step": [12, None]}, dtype=object)
    drawn = figure(Table(name="mine", frame=missing, kind="table", axes={}, unit="", caption=""))
    assert [list(column) for column in drawn.data[0].cells["values"]] == [["12", ""]]


def test_names_are_never_markup() -> None:
    """Plotly reads tags in its texts: a padding token would vanish."""
    rows = [{"at": "<s>", "site": "a & b", "effect": 1.0}]
    drawn = figure(heatmap(rows, caption="The token <s> at L0.z"))
    assert (list(drawn.data[0].x), list(drawn.data[0].y)) == (["&lt;s&gt;"], ["a &amp; b"])
    assert drawn.layout.title.text == "The token &lt;s&gt; at L0.z"


@pytest.mark.parametrize(
    ("caption", "lines"),
    [
        ("Test loss; n = 12 pairs.", ["Test loss"]),
        ("Effect on x (mean 48.6) of clean (1.0) and corrupt; n = 64.", ["Effect on x of clean and corrupt"]),
        ("Logit lens: mean rank. More.", ["Logit lens: mean rank"]),
        ("Coefficient of cos(w(a+b-c)) in the logits; more", ["Coefficient of cos(w(a+b-c)) in the logits"]),
        ("", []),
    ],
)
def test_titles_are_the_first_clause(caption: str, lines: list[str]) -> None:
    assert title_lines(caption) == lines


@given(st.text(max_size=400))
def test_titles_are_short(caption: str) -> None:
    assert len(title_lines(caption)) <= 2
    assert all(len(line) <= 92 for line in title_lines(caption))


def marks(drawn: go.Figure) -> dict[str, tuple[float, float, str]]:
    return {note.text: (note.x, note.yshift, note.xanchor) for note in drawn.layout.annotations}


def test_landmarks_that_are_far_apart_share_a_line() -> None:
    drawn = figure(curves(1, points=10_001))
    marked = with_landmarks(drawn, {"generalised": 6700, "memorised": 200})
    assert sorted(shape.x0 for shape in marked.layout.shapes) == [200, 6700]
    found = marks(marked)
    assert found["memorised"][0] == 200
    assert found["memorised"][1] == found["generalised"][1]
    assert marked.layout.height == drawn.layout.height
    # The figure that was given stays as it was.
    assert len(drawn.layout.shapes) == len(drawn.layout.annotations) == 0


def test_landmarks_that_are_close_stand_one_above_the_other() -> None:
    drawn = figure(curves(1, points=10_001))
    marked = with_landmarks(drawn, {"memorised": 200, "excluded": 260, "restricted": 320, "generalised": 8000})
    levels = {name: shift for name, (_, shift, _) in marks(marked).items()}
    assert len({levels[name] for name in ("memorised", "excluded", "restricted")}) == 3
    assert levels["generalised"] == levels["memorised"]
    assert marked.layout.height == drawn.layout.height + 36


def test_a_landmark_near_the_end_is_named_on_its_left() -> None:
    marked = with_landmarks(figure(curves(1, points=10_001)), {"generalised": 9900, "memorised": 9000})
    found = marks(marked)
    assert found["generalised"][2] == "right"
    assert found["generalised"][1] != found["memorised"][1]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True))
def test_labels_of_one_level_never_meet(steps: list[int]) -> None:
    line = go.Figure(go.Scatter(x=[0, 1000], y=[0, 1]))
    marked = with_landmarks(line, {f"landmark {step}": step for step in steps})
    width = len("landmark 1000") * 8 / 620 * 1000
    taken: dict[float, list[tuple[float, float]]] = {}
    for at, level, anchor in marks(marked).values():
        # The shortest label is three characters shorter than the longest.
        place = (at, at + width * 10 / 13) if anchor == "left" else (at - width * 10 / 13, at)
        assert all(place[0] >= other[1] or other[0] >= place[1] for other in taken.get(level, []))
        taken.setdefault(level, []).append(place)


def test_without_landmarks_nothing_changes() -> None:
    drawn = figure(curves(1))
    assert with_landmarks(drawn, {}) == drawn


def test_the_template_rides_on_the_figure_alone() -> None:
    before = plotly.io.templates.default
    assert figure(curves(1)).layout.template == TEMPLATE
    assert plotly.io.templates.default == before


def test_a_figure_is_the_same_every_time() -> None:
    assert figure(curves(2)).to_json() == figure(curves(2)).to_json()


def test_import_leaves_plotly_as_it_is() -> None:
    code = (
        "import plotly.io as io; before = io.templates.default; import workbench.figures; "
        "assert io.templates.default == before; assert 'workbench' not in list(io.templates)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
