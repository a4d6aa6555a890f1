"""Clicks on the charts themselves: what was clicked is what the page gets, on a wide page and on a narrow one."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from apps.ui import charts
from apps.ui import server as serving

ROWS, COLUMNS = [f"L{row} attn_out" for row in range(6)], list("abcde")
LABELS = [str(frequency) for frequency in range(1, 9)]
TITLE = "Effect of patching each place"
BLANK = (2, 3)
SCRIPT = f"""
import numpy as np
import plotly.graph_objects as go
import streamlit as st
from apps.ui import charts

st.set_page_config(layout="wide")
values = np.random.default_rng(0).normal(size=(6, 5))
values[{BLANK}] = np.nan
if st.toggle("fewer rows"):
    values = values[:3]
cell = charts.heatmap(values, {ROWS}[: len(values)], {COLUMNS}, key="cell", title="{TITLE}", unit="u", limit=1.0)
st.text(f"cell {{cell}}")
heights = np.array([9.0, 0.001, 0, 2, 3, 0.1, 1, 4])
st.text(f"bar {{charts.bars(heights, {LABELS}, key='bar', title='Spectrum', unit='norm')}}")
curve = go.Figure(go.Scatter(x=[0, 100, 200, 300, 400], y=[4, 3, 2, 1, 0], mode="lines"))
charts.curves(curve, key="loss", on_click=lambda x: st.session_state.update(step=int(x)))
st.text(f"step {{st.select_slider('step', [0, 100, 200, 300, 400], key='step')}}")
"""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A server of the script above."""

    url: str
    log: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    script, log = folder / "script.py", folder / "log"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind((serving.ADDRESS, 0))
        port = probe.getsockname()[1]
    command = [str(script) if part == str(serving.SCRIPT) else part for part in serving.command(port)]
    assert str(script) in command
    with log.open("wb") as output, contextlib.ExitStack() as stack:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
        end = time.monotonic() + 60
        while not serving.answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"the server did not come up:\n{log.read_text()}"
            time.sleep(0.1)
        yield Demo(url=serving.url(port), log=log)


@pytest.fixture
def shown(open_page: Callable[[Demo], Page], demo: Demo) -> Callable[..., Page]:
    def show(query: str = "", width: int = 1440) -> Page:
        page = open_page(demo)
        page.set_viewport_size({"width": width, "height": 1400})
        page.goto(f"/{query}")
        expect(page.locator(".st-key-cell canvas").first).to_be_visible()
        expect(page.get_by_text("step 0", exact=True)).to_be_visible()
        return page

    return show


def click_cell(page: Page, key: str, cell: tuple[int, int], shape: tuple[int, int], around: charts.Margins) -> None:
    """Click the middle of a cell: a canvas has no elements to click, but its frame is known."""
    canvas = page.locator(f".st-key-{key} canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    across = (box["width"] - around.left - around.right) * (cell[1] + 0.5) / shape[1]
    down = (box["height"] - around.top - around.bottom) * (cell[0] + 0.5) / shape[0]
    page.mouse.click(box["x"] + around.left + across, box["y"] + around.top + down)


def click(page: Page, *cell: int) -> None:
    click_cell(page, "cell", (cell[0], cell[1]), (6, 5), charts.margins(ROWS, COLUMNS, TITLE))


def says(page: Page, text: str) -> None:
    expect(page.get_by_text(text, exact=True)).to_be_visible()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1440, 800])
def test_the_cell_that_was_clicked(shown: Callable[..., Page], width: int) -> None:
    page = shown(width=width)
    # Corners, and neighbours in one column and in one row.
    for cell in [(0, 0), (5, 4), (4, 4), (3, 4), (3, 3)]:
        click(page, *cell)
        says(page, f"cell {cell}")
    click(page, 3, 3)
    says(page, "cell None")
    click(page, 3, 3)
    says(page, "cell (3, 3)")
    click(page, *BLANK)
    page.wait_for_timeout(500)
    says(page, "cell (3, 3)")


@pytest.mark.browser
def test_link_reload_and_back_restore_the_cell(shown: Callable[..., Page]) -> None:
    page = shown("?cell=4.1")
    says(page, "cell (4, 1)")
    click(page, 2, 1)
    says(page, "cell (2, 1)")
    page.reload()
    says(page, "cell (2, 1)")
    click(page, 1, 1)
    says(page, "cell (1, 1)")
    page.go_back()
    says(page, "cell (2, 1)")
    click(page, 1, 1)
    says(page, "cell (1, 1)")


@pytest.mark.browser
def test_a_figure_that_lost_the_cell_has_none_chosen(shown: Callable[..., Page]) -> None:
    page = shown("?cell=5.2")
    says(page, "cell (5, 2)")
    page.get_by_text("fewer rows").click()
    says(page, "cell None")


@pytest.mark.browser
def test_a_short_bar_is_clicked_anywhere_above_it(shown: Callable[..., Page]) -> None:
    page = shown()
    canvas = page.locator(".st-key-bar canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    around = charts.margins(["9"], LABELS, "Spectrum")
    for bar in (1, 5, 0):
        across = (box["width"] - around.left - around.right) * (bar + 0.5) / len(LABELS)
        page.mouse.click(box["x"] + around.left + across, box["y"] + box["height"] / 2)
        says(page, f"bar {bar}")


@pytest.mark.browser
def test_a_click_anywhere_among_the_curves_goes_to_the_nearest_x(shown: Callable[..., Page]) -> None:
    page = shown()
    plot = page.locator(".st-key-loss-curves .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    # The middle of the axis, far from the line.
    page.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + 8)
    page.wait_for_timeout(300)
    page.mouse.click(box["x"] + box["width"] / 2 + 5, box["y"] + 8)
    says(page, "step 200")
