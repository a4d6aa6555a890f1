"""What a click becomes, and what a chart is told to draw. That clicks arrive is tested on the pages, in a browser."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as some

from apps.ui import charts

if TYPE_CHECKING:
    from streamlit.testing.v1 import AppTest

HEATMAP = """
import numpy as np
import streamlit as st
from apps.ui import charts

values = np.array([[0.5, -2.0, float("nan")], [1.0, 0.0, 0.25]])
rows = st.session_state.get("rows", ["r0", "r1"])
st.write(str(charts.heatmap(values, rows, ["a", "b", "c"], key="cell", title="T", unit="u", limit=1.0, default=(1, 2))))
"""
BARS = """
import numpy as np
import streamlit as st
from apps.ui import charts

st.write(str(charts.bars(np.array([1.0, 3.0]), ["x", "y"], key="bar", title="T", unit="u", limit=4.0, marked=[1])))
"""


def event(*indices: int) -> dict[str, Any]:
    return {"selection": {"selected": [{"series_index": 0, "data_indices": list(indices)}], "areas": []}}


def drawn(app: AppTest) -> dict[str, Any]:
    return json.loads(app.get("echarts_chart")[0].proto.spec)


def app(script: str, *, state: dict[str, Any] | None = None, **query: str) -> AppTest:
    from streamlit.testing.v1 import AppTest

    started = AppTest.from_string(script, default_timeout=60)
    for name, value in query.items():
        started.query_params[name] = value
    for name, value in (state or {}).items():
        started.session_state[name] = value
    return started.run()


def test_a_click_reports_an_index_and_clearing_reports_none() -> None:
    assert charts.clicked_index(event(4)) == 4
    assert charts.clicked_index({"selection": {"selected": [], "areas": []}}) is None


def test_a_click_on_a_curve_reports_its_x() -> None:
    assert charts.clicked_x({"selection": {"points": [{"x": 200, "y": 1.0}]}}) == 200.0
    assert charts.clicked_x({"selection": {"points": []}}) is None


@given(some.lists(some.tuples(some.integers(0, 200), some.integers(1, 50)), min_size=1, max_size=3))
def test_a_place_survives_the_url(parts: list[tuple[int, int]]) -> None:
    place = tuple(index for index, _ in parts)
    shape = tuple(index + more for index, more in parts)
    assert charts.read_place(charts.name_place(place), shape) == place
    # The figure has shrunk since: the place is gone.
    assert charts.read_place(charts.name_place(place), place) is None


@pytest.mark.parametrize("text", [None, "", "1", "1.2.3", "a.b", "-1.0", "1.²", "2.0", "0.3", "1. 2"])
def test_what_is_no_place_of_the_figure_is_nothing(text: str | None) -> None:
    assert charts.read_place(text, (2, 3)) is None


def test_a_scale_is_centred_on_zero_or_fixed() -> None:
    values = np.array([[0.5, -2.0], [np.nan, 1.0]])
    assert charts.scale(values, limit=None, diverging=True) == (-2.0, 2.0)
    assert charts.scale(values, limit=1.0, diverging=True) == (-1.0, 1.0)
    assert charts.scale(values, limit=None, diverging=False) == (-2.0, 1.0)
    assert charts.scale(values, limit=3.0, diverging=False) == (0.0, 3.0)
    assert charts.scale(np.array([[np.nan]]), limit=None, diverging=True) == (-1.0, 1.0)
    assert charts.scale(np.array([[2.0, 2.0]]), limit=None, diverging=False) == (2.0, 3.0)


def test_longer_labels_get_more_room() -> None:
    short, long = (charts.margins(["a" * length], ["x"], "T") for length in (1, 20))
    assert long.left > short.left
    assert charts.margins(["a"], ["a long column label"] * 30, "T").bottom > short.bottom
    assert charts.margins(["a"], ["x"], "T" * 200).top > short.top


def test_numbers_are_shown_with_four_digits() -> None:
    assert charts.rounded(1 / 3) == 0.3333
    assert charts.rounded(math.inf) is None


def test_lines_get_points_that_can_be_clicked_and_the_figure_is_left_alone() -> None:
    figure = go.Figure([go.Scatter(x=[1, 2], y=[3, 4], mode="lines"), go.Scatter(x=[1], y=[2], hoverinfo="skip")])
    copy = charts.clickable(figure)
    assert [trace.mode for trace in copy.data] == ["lines+markers", None]
    assert figure.data[0].mode == "lines"


def test_a_heat_map_draws_every_cell_in_the_order_of_its_clicks() -> None:
    started = app(HEATMAP)
    assert not started.exception
    cells = started.get("echarts_chart")[0]
    spec = drawn(started)
    assert spec["visualMap"]["min"] == -1.0
    assert spec["visualMap"]["max"] == 1.0
    assert [series["type"] for series in spec["series"]] == ["heatmap", "heatmap"]
    # The outline of what is chosen: column, row, and the value within the scale.
    assert spec["series"][1]["data"] == [[2, 1, 0.25]]
    assert started.markdown[0].value == "(1, 2)"
    assert "2 x 3 cells" in cells.proto.alt


def test_the_url_says_what_is_chosen() -> None:
    started = app(HEATMAP, cell="0.1")
    assert started.markdown[0].value == "(0, 1)"
    assert drawn(started)["series"][1]["data"] == [[1, 0, -1.0]]


@pytest.mark.parametrize("stale", ["7.0", "0.9", "x", "0.2"])
def test_a_stale_choice_falls_back_to_the_default(stale: str) -> None:
    # 0.2 is a cell without a value.
    assert app(HEATMAP, cell=stale).markdown[0].value == "(1, 2)"


def test_values_that_do_not_fit_the_labels_are_refused() -> None:
    started = app(HEATMAP, state={"rows": ["only one"]})
    assert "A heat map of 1 rows and 3 columns got values (2, 3)" in started.exception[0].message


def test_bars_mark_and_light_what_they_are_told_to() -> None:
    nothing, something = app(BARS), app(BARS, bar="0")
    assert nothing.markdown[0].value == "None"
    assert something.markdown[0].value == "0"
    lit = drawn(something)["series"][1]["data"]
    assert [(item["value"], item["itemStyle"]["color"]) for item in lit] == [
        ([1, 3.0], charts.MARKED),
        ([0, 1.0], charts.CHOSEN),
    ]
    assert drawn(something)["yAxis"]["max"] == 4.0
