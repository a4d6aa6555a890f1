"""Page Train: its words and numbers, then a training that is started, watched, cancelled and gone on with."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from typing_in_pages import settled

from apps.ui import jobs
from apps.ui.views import train
from workbench.runtime import WorkbenchError
from workbench.store import write_json
from workbench.training.checkpoints import METRICS, Run, load
from workbench.training.recipes import modular_smoke

TINY = "p=13\nd_model=16\nd_head=4\nd_mlp=32\n"


@pytest.fixture
def run(runs_folder: Path, tmp_path: Path) -> Run:
    """A copy of the run `small` to play with."""
    shutil.copytree(runs_folder / "small", tmp_path / "small")
    return load("small", runs=tmp_path)


def with_log(run: Run, rows: list[dict[str, Any]]) -> Run:
    lines = [f'{{"step": {row["step"]}, "seconds": {row["seconds"]}}}\n' for row in rows]
    (run.folder.path / METRICS).write_text("".join(lines))
    return Run(folder=run.folder, recipe=run.recipe)


def test_time_left_is_told_from_the_latest_evaluations(run: Run) -> None:
    # 400 steps in all. The first ten are slow, as the first always are; then a step takes 0.1 s.
    rows = [{"step": step, "seconds": 50 + step * 0.1 if step else 0.0} for step in range(0, 301, 5)]
    progress = train.progress_of(with_log(run, rows))
    assert (progress.step, progress.steps, progress.share) == (300, 400, 0.75)
    assert progress.seconds_left == pytest.approx(100 * 0.1)


def test_before_there_are_two_evaluations_nothing_is_told_of_the_time_left(run: Run) -> None:
    assert train.progress_of(with_log(run, [])) is None
    assert train.progress_of(with_log(run, [{"step": 0, "seconds": 0.0}])).seconds_left is None


def test_an_imported_run_has_no_progress(run: Run) -> None:
    assert train.progress_of(Run(folder=run.folder, recipe=replace(run.recipe, train=None))) is None


def test_only_an_unfinished_run_with_a_state_can_go_on(run: Run) -> None:
    assert not train.can_resume(run), "it is finished"
    write_json(run.folder.path / "status.json", {"finished": False, "reason": "not finished", "seconds": None})
    assert train.can_resume(run)
    with run.folder.lock():
        assert not train.can_resume(run), "somebody trains it"
    shutil.rmtree(run.folder.path / "state")
    assert not train.can_resume(run)


def test_settings_are_lines(run: Run) -> None:
    assert train.setting_lines("\n p=13 \n# a note\n\ntrain.steps=5\n") == ["p=13", "train.steps=5"]
    table = train.setting_table(modular_smoke(), modular_smoke().override(["p=13"])).set_index("setting")
    assert table.loc["task.p"].tolist() == ["13", "59"]
    assert table.loc["train.steps"].tolist() == ["1000", ""]
    # Each key is one that --set knows.
    for key, value in train.flat_settings(modular_smoke()).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert modular_smoke().override([f"{key}={value}"]) == modular_smoke()


def test_names_are_free() -> None:
    assert train.free_name("a", []) == "a"
    assert train.free_name("a", ["a", "a-2", "b"]) == "a-3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.9, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert train.clock(seconds) == text


def test_copied_python_trains_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    settings = [*TINY.split(), "train.steps=20"]
    exec(train.python_for("modular-smoke", "copied", 4, settings), {})
    assert load("copied", runs=tmp_path).recipe == modular_smoke().with_seed(4).override(settings)


# In the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playground(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs folder of this module's own; what it started is ended with it."""
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(runs_folder / "small", folder / "small")
    yield folder
    for job in jobs.list_jobs(folder):
        if job.running:
            os.killpg(job.group, signal.SIGKILL)


@pytest.fixture
def train_page(playground: Path, server_on: Callable, open_page: Callable) -> Page:
    page = open_page(server_on(playground))
    page.goto("/")
    page.get_by_role("link", name="Train", exact=True).click()
    expect(page.get_by_role("heading", name="Train", exact=True)).to_be_visible()
    return page


def start(page: Page, name: str, settings: str) -> None:
    fill(page, "Settings", settings)
    fill(page, "Name of the run", name)
    expect(page.get_by_text(re.compile(f"workbench train modular-smoke --run {name} "))).to_be_visible()
    page.get_by_role("button", name="Start training").click()


def fill(page: Page, label: str, text: str) -> None:
    box = page.get_by_role("textbox", name=label, exact=True)
    box.fill(text)
    box.press("Control+Enter")


@pytest.mark.browser
@pytest.mark.slow
def test_a_training_finishes_and_appears_in_runs(train_page: Page, playground: Path) -> None:
    page = train_page
    start(page, "from-page", TINY + "steps=300")
    expect(page.get_by_text(re.compile("step 300 of at most 300 · steps used up"))).to_be_visible()
    expect(page.get_by_text("finished", exact=True)).to_be_visible()
    expect(page.locator(".js-plotly-plot")).to_have_count(2)
    [job] = jobs.list_jobs(playground, "train")
    assert (job.status, job.result["run"], job.result["steps"]) == ("finished", "from-page", 300)
    # The name is taken now, and the next one is offered.
    fill(page, "Name of the run", "from-page")
    expect(page.get_by_text("Run 'from-page' exists.")).to_be_visible()
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()
    settled(page)
    page.get_by_test_id("stMain").get_by_role("link", name="Runs").click()
    expect(page).to_have_url(re.compile(r"/\?run=from-page"))
    expect(page.get_by_role("heading", name="from-page")).to_be_visible()
    # In the run's own line: the table of all runs holds the words too, in cells that count as hidden.
    expect(page.get_by_role("paragraph").filter(has_text="steps used up")).to_be_visible()


@pytest.mark.browser
@pytest.mark.slow
def test_a_training_is_cancelled_survives_a_reload_and_goes_on(train_page: Page, playground: Path) -> None:
    page = train_page
    start(page, "cut", TINY + "steps=100000\nstop_when_clean=false")
    expect(page.get_by_text(re.compile(r"step [\d,]+ of at most 100,000 · at most .* left"))).to_be_visible()
    page.reload()
    expect(page.get_by_text(re.compile("of at most 100,000"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("cancelled", exact=True)).to_be_visible()
    stopped_at = load("cut", runs=playground).log.rows[-1]["step"]
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("went on in a later training above")).to_be_visible()
    newest = jobs.list_jobs(playground, "train")[0]
    assert newest.arguments[-2:] == ("--resume", "--json")
    expect(page.get_by_text(re.compile(r"of at most 100,000 · at most"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("cancelled", exact=True)).to_have_count(2)
    assert newest.status == "cancelled"
    assert load("cut", runs=playground).log.rows[-1]["step"] >= stopped_at
    settled(page)
    page.get_by_role("button", name="close").first.click()
    expect(page.get_by_text("went on in a later training above")).to_be_hidden()
    assert (playground / "cut" / "recipe.json").exists()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("p=1", "Modulus p must be at least 3, got 1"),
        ("stepz=4", "Unknown setting 'stepz'"),
        ("train_fraction=1", "train_fraction must lie between 0 and 1"),
        ("train.steps=-1", "steps must be at least 1, got -1"),
    ],
)
def test_settings_are_checked_before_anything_starts(settings: str, says: str, train_page: Page) -> None:
    fill(train_page, "Settings", settings)
    expect(train_page.get_by_text(says)).to_be_visible()
    expect(train_page.get_by_role("button", name="Start training")).to_be_disabled()


@pytest.mark.browser
def test_a_recipe_of_ones_own(train_page: Page, tmp_path: Path) -> None:
    page = train_page
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom workbench.training.recipes import modular_smoke\n"
        "def tiny():\n    return replace(modular_smoke(), name='my-tiny', shows='That mine works too.')\n"
    )
    # Of a long list only a part is on the page: one types what one looks for.
    page.get_by_role("combobox", name="Recipe").fill(train.OWN)
    page.get_by_role("option", name=train.OWN).click()
    fill(page, "Your recipe", f"{file}:tinny")
    expect(page.get_by_text("has no function 'tinny'")).to_be_visible()
    fill(page, "Your recipe", f"{file}:tiny")
    expect(page.get_by_text("That mine works too.")).to_be_visible()
    expect(page.get_by_role("textbox", name="Name of the run")).to_have_value("my-tiny")


@pytest.mark.browser
@pytest.mark.slow
def test_a_training_that_fails_says_why(train_page: Page, playground: Path) -> None:
    # The name becomes taken between the page's look and the process's.
    job = jobs.start(["train", "modular-smoke", "--run", "small", "--json"], subject="small", runs=playground)
    while job.running:
        time.sleep(0.1)
    train_page.reload()
    expect(
        train_page.get_by_text(re.compile("workbench train: Run 'small' exists at .* choose another --run"))
    ).to_be_visible()


def test_a_job_of_a_run_that_was_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    job = jobs.Job(path=tmp_path, arguments=("train", "modular-smoke"), subject="gone", started=0.0, group=1)
    assert train._run_of(job) is None
    write_json(tmp_path / "gone" / "recipe.json", {"name": "foreign"})
    assert train._run_of(job) is None
    with pytest.raises(WorkbenchError, match="not a recipe"):
        load("gone", runs=tmp_path)
