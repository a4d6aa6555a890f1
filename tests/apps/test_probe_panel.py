"""Probes of the latents on page Dynamics, and the tuned lens on page Explore."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from typing_in_pages import settled

from apps.analyses import kept
from apps.probing import PROBE_SITES, PROMPTS, Probing, probes_of
from apps.ui import jobs
from apps.ui.probe_panels import latent_grid
from workbench import load
from workbench.training.checkpoints import Run

AppOn = Callable[..., Any]
pytestmark = pytest.mark.slow
DEFAULTS = {"latent": None, "sites": PROBE_SITES, "n": PROMPTS, "split": "test", "positions": None}


@pytest.fixture(scope="module")
def runs(reasoners_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a comparison of which the last checkpoint was probed, and none other."""
    folder = tmp_path_factory.mktemp("probed")
    shutil.copytree(reasoners_folder / "values", folder / "values")
    kept(load("values", runs=folder), "probe", probes_of, None, DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def run(runs: Path) -> Run:
    return load("values", runs=runs)


@pytest.fixture(scope="module")
def summary(run: Run) -> dict[str, Any]:
    def unasked(*arguments: object, **options: object) -> None:
        raise AssertionError("it was kept")

    return kept(run, "probe", unasked, None, DEFAULTS)  # type: ignore[type-var]


def charts(app: Any) -> list[str]:
    return [each.proto.spec for each in app.get("echarts_chart")]


def titles(app: Any, start: str) -> list[str]:
    return [
        title["text"]
        for spec in map(json.loads, charts(app))
        for title in ([spec["title"]] if isinstance(spec["title"], dict) else spec["title"])
        if title["text"].startswith(start)
    ]


def test_what_was_kept_is_shown_beside_the_untrained_model(app_on: AppOn, runs: Path, run: Run) -> None:
    app = app_on("dynamics", runs, run="values")
    assert not app.exception
    assert not app.error
    last = run.checkpoint().step
    assert titles(app, "v1: ") == [f"v1: accuracy, step {last}", "v1: accuracy, untrained"]
    app = app_on("dynamics", runs, run="values", latent="answer", probe="amnesic", probed="0.4")
    assert titles(app, "answer: ") == [f"answer: amnesic, step {last}", "answer: amnesic, untrained"]


def test_a_cell_says_its_numbers(app_on: AppOn, runs: Path, summary: dict[str, Any]) -> None:
    app = app_on("dynamics", runs, run="values", latent="v2", probed="1.4")
    shown = next(each.value for each in app.dataframe if "compression" in each.value.columns)
    assert shown["model"].tolist()[-1] == "untrained"
    site = shown["site"][0]
    cell = next(row for row in summary["cells"] if (row["latent"], row["site"], row["position"]) == ("v2", site, 4))
    assert shown["accuracy"][0] == f"{cell['accuracy']:.3f} [{cell['accuracy_low']:.3f}, {cell['accuracy_high']:.3f}]"
    assert shown["selectivity"].tolist() == [f"{cell[name]:.3f}" for name in ("selectivity", "selectivity_untrained")]
    assert shown["at"][0] == "4: e2"


def test_the_grid_is_by_depth_and_position(summary: dict[str, Any]) -> None:
    grid = latent_grid(summary, "v1", "accuracy")
    assert list(grid.columns) == ["0: attr", "1: <q>", "2: e1", "3: <mask>", "4: e2"]
    assert list(grid.index) == sorted(grid.index)
    cell = next(row for row in summary["cells"] if row["latent"] == "v1" and row["position"] == 3)
    assert grid.loc[cell["site"], "3: <mask>"] == cell["accuracy"]


def test_a_checkpoint_that_was_not_probed_offers_the_job(
    app_on: AppOn, runs: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run.checkpoints[0].step
    app = app_on("dynamics", runs, run="values", step=str(step))
    assert not app.exception
    assert titles(app, "v1: ") == []
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(jobs, "start", lambda arguments, subject: started.append(tuple(arguments)))
    app.button(key="probes_start").click().run()
    assert started == [("probe", "values", "--checkpoint", str(step), "--split", "test", "--json")]


def test_the_copied_code_finds_the_same(app_on: AppOn, runs: Path, summary: dict[str, Any]) -> None:
    app = app_on("dynamics", runs, run="values")
    code = next(each.value for each in app.code if "probes_of" in each.value)
    names: dict[str, Any] = {}
    exec(code, names)
    assert list(names["found"].cells) == [row for row in summary["cells"] if row["latent"] == "v1"]


def test_what_a_search_knows_of_reachability(app_on: AppOn, searches_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(searches_folder / "searching", tmp_path / "searching")

    def at_the_answer(run: Run, step: int | None, **arguments: object) -> Probing:
        return probes_of(run, step, sites="L2.resid_post", positions=(25,))

    found = kept(load("searching", runs=tmp_path), "probe", at_the_answer, None, DEFAULTS)
    app = app_on("dynamics", tmp_path, run="searching", reach="backward")
    assert not app.exception
    assert not app.error
    assert "Reachability" in [each.value for each in app.subheader]
    assert app.button_group(key="reach").value == "backward"
    numbers = next(each.value for each in app.dataframe if "distance" in each.value.columns)
    assert numbers.to_dict("records")[0] == found["reachability"]["cells"][0]
    assert any("Whether a vertex reaches the row's vertex" in each.value for each in app.caption)
    app.button_group(key="reach").set_value(["forward"]).run()
    assert any("Whether a vertex can be reached" in each.value for each in app.caption)


def test_pairs_of_ones_own_offer_their_answer(app_on: AppOn, pairs_folder: Path) -> None:
    app = app_on("dynamics", pairs_folder, run="own")
    assert not app.exception
    assert "Probes of the latents" in [each.value for each in app.subheader]


def test_the_tuned_lens_is_fitted_when_it_is_asked_for(app_on: AppOn, runs: Path, run: Run) -> None:
    plain = app_on("explore", runs, run="values")
    assert not any("translators were fitted" in each.value for each in plain.caption)
    tuned = app_on("explore", runs, run="values", tuned="true", lenses="reciprocal rank")
    assert not tuned.exception
    assert not tuned.error
    n_test = round(0.25 * len(run.task.examples("test")))
    assert any(f"mean reciprocal rank on {n_test} prompts held out" in each.value for each in tuned.caption)


@pytest.mark.browser
def test_probing_in_the_browser(
    server_on: Callable[[Path], Any], open_page: Callable[[Any], Page], runs: Path, run: Run
) -> None:
    """What was probed is looked at; a checkpoint that was not is probed by a click, and then shown beside it."""
    page = open_page(server_on(runs))
    page.goto("/dynamics?run=values")
    maps = page.locator("[class*='st-key-probes_'] canvas")
    expect(page.get_by_role("heading", name="Probes of the latents")).to_be_visible()
    expect(maps.nth(1)).to_be_visible()
    settled(page)
    page.get_by_text("selectivity", exact=True).filter(visible=True).click()
    expect(page).to_have_url(re.compile("probe=selectivity"))

    first = run.checkpoints[0].step
    page.goto(f"/dynamics?run=values&pin={first}")
    start = page.get_by_role("button", name=f"Probe step {first}")
    expect(start).to_be_visible()
    settled(page)
    start.click()
    # The step that was pinned, the last one, and the model before training.
    expect(maps.nth(2)).to_be_visible(timeout=180_000)
