"""Page Dynamics: the slider, the spectrum, ablation and the pinned checkpoint."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from apps.analyses import fourier_of
from apps.ui.views import dynamics
from probes.fourier import ablate_frequencies
from workbench import load, store
from workbench.tasks.modular import Modular
from workbench.training.checkpoints import Run

AppOn = Callable[..., Any]


@pytest.fixture(scope="module")
def run(runs_folder: Path) -> Run:
    return load("small", runs=runs_folder)


def values(app: Any) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def texts(app: Any) -> str:
    shown = [*app.markdown, *app.caption, *app.info, *app.warning, *app.error, *app.subheader, *app.header]
    return "\n".join(element.value for element in shown)


def code_of(app: Any) -> str:
    return app.code[0].value


def test_the_nearest_checkpoint() -> None:
    assert dynamics.nearest_step([0, 100, 250], 120.0) == 100
    assert dynamics.nearest_step([0, 100, 250], 900.0) == 250


def test_spectra_show_what_the_analysis_found(run: Run) -> None:
    result = fourier_of(run)
    assert result.neurons is not None
    owned = dynamics.spectrum_of(result, "neurons")
    assert {int(k) + 1: int(owned[k]) for k in owned.nonzero()[0]} == result.neurons.owners()
    np.testing.assert_allclose(dynamics.spectrum_of(result, "embedding"), result.embedding_norm)
    np.testing.assert_allclose(dynamics.spectrum_of(result, "logits"), result.logits.coefficient)
    assert {len(dynamics.spectrum_of(result, which)) for which in dynamics.SPECTRA} == {11}


def test_the_page_shows_the_last_checkpoint_first(app_on: AppOn, runs_folder: Path, run: Run) -> None:
    app = app_on("dynamics", runs_folder, run="small")
    assert not app.exception
    assert not app.error
    assert app.select_slider(key="step").value == run.checkpoint().step
    last = run.log.rows[-1]
    assert values(app)["Test loss"] == f"{last['test_loss']:.3g}"


def test_the_slider_moves_the_numbers(app_on: AppOn, runs_folder: Path, run: Run) -> None:
    app = app_on("dynamics", runs_folder, run="small")
    step = run.log.landmarks()["memorised"]
    app.select_slider(key="step").set_value(step).run()
    row = next(row for row in run.log.rows if row["step"] == step)
    assert values(app)["Test loss"] == f"{row['test_loss']:.3g}"
    assert values(app)["Train accuracy"] == f"{row['train_accuracy']:.1%}"
    assert f"at step {step}" in texts(app)


def test_a_link_brings_back_what_was_seen(app_on: AppOn, runs_folder: Path, run: Run) -> None:
    app = app_on(
        "dynamics", runs_folder, run="small", step="100", pin="0", frequency="2", ablate="true", spectrum="logits"
    )
    assert not app.exception
    assert (app.select_slider(key="step").value, app.selectbox(key="pin").value) == (100, 0)
    assert app.subheader[0].value == "Frequency 3 at step 100"
    assert app.toggle(key="ablate").value
    assert isinstance(run.task, Modular)
    losses = ablate_frequencies(run.model(100), run.task, [3])
    assert values(app)["Test loss without it"] == f"{losses['test_loss_ablated']:.3g}"
    titles = [chart.proto.spec for chart in app.get("echarts_chart")]
    assert any("in the logits, step 0" in spec for spec in titles)
    assert any("in the logits, step 100" in spec for spec in titles)


def test_a_checkpoint_pinned_beside_itself_is_shown_once(app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("dynamics", runs_folder, run="small", step="100", pin="100")
    assert not app.exception
    assert sum("Embedding by frequency" in chart.proto.spec for chart in app.get("echarts_chart")) == 1


def test_ablation_is_off_until_asked_for(app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("dynamics", runs_folder, run="small")
    assert "Test loss without it" not in values(app)
    app.toggle(key="ablate").set_value(True).run()
    assert "Test loss without it" in values(app)


@pytest.mark.parametrize("query", [{"step": "7"}, {"step": "x"}, {"pin": "7"}, {"frequency": "99"}, {"neuron": "5000"}])
def test_a_stale_link_falls_back(query: dict[str, str], app_on: AppOn, runs_folder: Path, run: Run) -> None:
    app = app_on("dynamics", runs_folder, run="small", **query)
    assert not app.exception
    assert not app.error
    assert app.select_slider(key="step").value == run.checkpoint().step


def test_the_copied_code_finds_the_same(app_on: AppOn, runs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = app_on("dynamics", runs_folder, run="small", step="100")
    exec(code_of(app), {})
    printed = capsys.readouterr().out
    assert "key_frequencies" in printed
    assert "test_loss_ablated" in printed


def test_an_empty_runs_folder_says_how_to_get_a_run(
    app_on: AppOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "GALLERY", tmp_path / "gallery")
    app = app_on("dynamics", tmp_path)
    assert not app.exception
    assert "workbench train modular-smoke" in app.info[0].value


def test_a_run_that_has_vanished_is_named(app_on: AppOn, runs_folder: Path) -> None:
    app = app_on("dynamics", runs_folder, run="gone")
    assert not app.exception
    assert "There is no run 'gone' any more" in app.warning[0].value


def test_a_run_that_vanishes_while_it_is_looked_at(app_on: AppOn, runs_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs_folder / "small", tmp_path / name)
    app = app_on("dynamics", tmp_path, run="one")
    assert not app.warning
    shutil.rmtree(tmp_path / "one")
    app.run()
    assert not app.exception
    assert "There is no run 'one' any more" in app.warning[0].value


def test_a_run_that_was_not_measured_says_so(app_on: AppOn, runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder / "small", tmp_path / "bare")
    (tmp_path / "bare" / "measures.jsonl").unlink()
    app = app_on("dynamics", tmp_path, run="bare")
    assert not app.exception
    assert "no progress measures" in texts(app)
    assert "no progress measures" not in texts(app_on("dynamics", runs_folder, run="small"))


def test_a_damaged_checkpoint_is_one_line(app_on: AppOn, runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder / "small", tmp_path / "hurt")
    weights = sorted((tmp_path / "hurt" / "checkpoints").glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    card = weights.with_suffix(".json")
    # Another hash than the whole run's: what is in memory under that one must not be shown.
    card.write_text(re.sub(r'"sha256": "..', '"sha256": "00', card.read_text()))
    app = app_on("dynamics", tmp_path, run="hurt")
    assert not app.exception
    assert "is damaged" in texts(app)


def test_a_run_without_fourier_basis_shows_what_applies(app_on: AppOn, pairs_folder: Path) -> None:
    app = app_on("dynamics", pairs_folder, run="own")
    assert not app.exception
    assert not app.error
    assert "Fourier analysis needs a run on modular arithmetic" in app.info[0].value
    assert "it has no curves" in texts(app)
    assert "Effect of patching" in app.get("echarts_chart")[0].proto.spec
    assert "fourier" not in code_of(app)


def click_bar(page: Page, key: str, index: int, count: int) -> None:
    """Click into the column of a bar."""
    canvas = page.locator(f".st-key-{key} canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    left, right = 36, 16
    x = left + (box["width"] - left - right) * (index + 0.5) / count
    # A layer for tooltips lies over the canvas and hands on what it gets.
    canvas.click(position={"x": x, "y": box["height"] / 2}, force=True)


@pytest.mark.browser
def test_dynamics_in_the_browser(page: Page, run: Run) -> None:
    page.goto("/dynamics?run=small")
    expect(page.get_by_text("Test loss", exact=True)).to_be_visible()
    value = page.get_by_test_id("stMetricValue").nth(1)
    end = value.inner_text()

    # From generalised back to memorised, step by step, as with the mouse.
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("Home")
    expect(value).not_to_have_text(end)
    expect(page).to_have_url(re.compile("step=0"))
    expect(page.get_by_text(re.compile(r"Frequency \d+ at step 0"))).to_be_visible()

    # A click on a bar chooses a frequency, and ablating it changes the losses of this checkpoint.
    click_bar(page, "spectrum_now", 6, 11)
    expect(page.get_by_role("heading", name="Frequency 7 at step 0")).to_be_visible()
    expect(page).to_have_url(re.compile("frequency=6"))
    page.get_by_text("Ablate frequency 7").click()
    expect(page.get_by_text("Test loss without it")).to_be_visible()

    # A click into the curves moves the slider.
    plot = page.locator(".st-key-curves_chart-curves .nsewdrag").first
    box = plot.bounding_box()
    assert box is not None
    plot.click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.5}, force=True)
    expect(page.get_by_role("heading", name=re.compile(r"Frequency 7 at step [12]\d\d"))).to_be_visible()

    # Pinned, it stays while the slider goes on.
    pinned = re.search(r"step=(\d+)", page.url)
    assert pinned is not None
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page).to_have_url(re.compile(f"pin={pinned[1]}"))
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("End")
    expect(page.get_by_role("heading", name=f"Frequency 7 at step {run.checkpoint().step}")).to_be_visible()
    expect(page.locator(".st-key-spectrum_pinned canvas").first).to_be_visible()
    expect(page.locator(".st-key-patches_pinned canvas").first).to_be_visible()
