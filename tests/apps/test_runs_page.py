"""Page Runs: one run in full, two beside each other, and a model of one's own that is imported and patched."""

import csv
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from safetensors.torch import save_file
from typing_in_pages import settled, type_until

from apps.analyses import lens_of
from apps.ui.views import importing, runs
from workbench.runtime import WorkbenchError
from workbench.store import save_result, write_json
from workbench.training.checkpoints import Run, load

PAIRS = 24


@dataclass(frozen=True)
class Upload:
    name: str
    content: bytes = b""

    def getvalue(self) -> bytes:
        return self.content


@pytest.fixture(scope="module")
def playground(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder of this module's own, with the run `small` and an unfinished relative, `other`."""
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(runs_folder / "small", folder / "small", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(folder / "small", folder / "other")
    recipe = load("small", runs=folder).recipe.with_seed(5).override(["train.learning_rate=0.5"])
    write_json(folder / "other" / "recipe.json", recipe.to_json())
    log = folder / "other" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    (folder / "other" / "status.json").unlink()
    return folder


@pytest.fixture(scope="module")
def small(playground: Path) -> Run:
    return load("small", runs=playground)


@pytest.fixture(scope="module")
def other(playground: Path) -> Run:
    return load("other", runs=playground)


@pytest.fixture(scope="module")
def model_files(small: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights of `small` with a configuration, and pairs of its task, as somebody else would bring them."""
    folder = tmp_path_factory.mktemp("brought")
    save_file(small.model().state_dict(), folder / "brought.safetensors")
    write_json(folder / "config.json", small.recipe.model.to_json())
    batch = small.task.sample(PAIRS, split="test", seed=0)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["clean", "corrupt", "answer", "distractor"])
    for row in range(len(batch)):
        prompts = [" ".join(map(str, tokens[row].tolist())) for tokens in (batch.tokens, batch.corrupt)]
        rows.writerow(
            [*prompts, *(int(answers[row][batch.read[row]]) for answers in (batch.targets, batch.distractor))]
        )
    (folder / "pairs.csv").write_text(text.getvalue())
    (folder / "faulty.csv").write_text("clean,corrupt,answer,distractor\n1 2 13,1 2 99,3,4\n")
    return {path.name: path for path in folder.iterdir()}


# Two runs ---------------------------------------------------------------------------------------------------------


def test_both_losses_are_on_one_axis(small: Run, other: Run) -> None:
    table = runs.both_losses(small, other)
    ends = table.frame.groupby("run")["step"].max()
    assert ends.to_dict() == {
        "small · train": small.log.rows[-1]["step"],
        "small · test": small.log.rows[-1]["step"],
        "other · train": other.log.rows[-1]["step"],
        "other · test": other.log.rows[-1]["step"],
    }
    last = table.frame[(table.frame["run"] == "small · test")].iloc[-1]
    assert last["loss"] == small.log.rows[-1]["test_loss"]


def test_numbers_side_by_side(small: Run, other: Run) -> None:
    frame = runs.side_by_side(small, other).set_index("what")
    assert frame.loc["memorised at"].tolist() == [str(small.log.step_memorised), "–"]
    assert frame.loc["steps"].tolist() == [f"{run.log.rows[-1]['step']:,}" for run in (small, other)]
    assert frame.loc["train loss", "small"] == f"{small.log.rows[-1]['train_loss']:.4g}"


def test_texts() -> None:
    assert [runs.text_of(value) for value in (None, 0.123456, [1, 2], "x")] == ["–", "0.1235", "1, 2", "x"]
    assert len(runs.text_of(list(range(1000)))) == runs.LONGEST_TEXT + 2


def test_kept_results_are_listed(small: Run, tmp_path: Path) -> None:
    shutil.copytree(small.folder.path, tmp_path / "mine")
    run = load("mine", runs=tmp_path)
    assert runs.kept_results(run) == []
    save_result(run.folder, "abc", lens_of(run, n=8))
    [row] = runs.kept_results(run)
    assert row["key"] == "abc"
    assert "lens" in row["tables"]


def test_runs_are_told_apart_by_setting(playground: Path, app_on: Callable) -> None:
    app = app_on("runs", playground, run="small")
    app.multiselect(key="sweep").set_value(["small", "other"]).run()
    assert not app.exception
    [table] = [each.value for each in app.dataframe if "generalised at" in each.value and "seeds" in each.value]
    assert table["setting"].tolist() == ["learning_rate=0.01", "learning_rate=0.5"]
    assert table["ended"].tolist() == ["1", "0"]
    app.multiselect(key="sweep").set_value([]).run()
    assert not any("seeds" in each.value for each in app.dataframe)


def test_an_imported_run_has_no_landmarks(pairs_folder: Path, app_on: Callable) -> None:
    app = app_on("runs", pairs_folder, run="own")
    app.multiselect(key="sweep").set_value(["own"]).run()
    assert [error.value for error in app.error] == ["Run 'own' was imported: without a training it has no landmarks."]


# Import -----------------------------------------------------------------------------------------------------------


def test_uploads_lie_under_their_own_names_while_they_are_needed() -> None:
    uploads = {"model": [Upload("../../evil.pt", b"1")], "pairs": [Upload("same.csv", b"2")], "vocab": []}
    with importing.on_disk(uploads) as saved:
        [model], [pairs] = saved["model"], saved["pairs"]
        assert (model.name, model.read_bytes()) == ("evil.pt", b"1")
        assert model.parent.parent == pairs.parent.parent
        assert saved["vocab"] == []
    assert not model.parent.parent.exists()


def test_errors_name_the_file_that_was_chosen() -> None:
    with (
        pytest.raises(WorkbenchError, match=r"^Cannot read faulty\.csv: no\.$"),
        importing.on_disk({"pairs": [Upload("faulty.csv")]}) as saved,
    ):
        raise WorkbenchError(f"Cannot read {saved['pairs'][0]}: no.")


@pytest.mark.parametrize(
    "names", [[], ["a.pt"], ["a.json"], ["a.pt", "b.safetensors", "c.json"], ["a.pt", "b.json", "c.json"]]
)
def test_one_file_of_weights_and_one_configuration(names: list[str]) -> None:
    with pytest.raises(WorkbenchError, match=r"Upload one file of weights .* got \d and \d"):
        importing.model_file([Path(name) for name in names])


def test_the_configuration_goes_beside_the_weights(tmp_path: Path) -> None:
    files = [tmp_path / "model.PT", tmp_path / "config.json"]
    for file in files:
        file.touch()
    assert importing.model_file(files) == tmp_path / "model.PT"
    assert (tmp_path / "model.json").exists()


@pytest.mark.parametrize(
    ("uploads", "path", "name"),
    [
        ([Upload("c.json"), Upload("my net.v2.safetensors")], "", "my-net-v2"),
        ([], "/models/folder/", "folder"),
        ([], "code/mine.py:make", "mine"),
        ([], "", "my-model"),
        ([Upload("..pt")], "", "my-model"),
    ],
)
def test_the_name_is_proposed(uploads: list[Upload], path: str, name: str) -> None:
    assert importing.proposed_name(uploads, path) == name


# In the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runs_page(playground: Path, server_on: Callable, open_page: Callable) -> Page:
    page = open_page(server_on(playground))
    page.goto("/?run=small")
    expect(page.get_by_role("heading", name="small")).to_be_visible()
    return page


@pytest.mark.browser
def test_two_runs_are_compared_and_the_link_says_so(runs_page: Page) -> None:
    page = runs_page
    settled(page)
    compared = page.get_by_role("combobox", name="Compare with")
    type_until(compared, "other", page.locator(".js-plotly-plot"))
    expect(page.locator(".js-plotly-plot")).to_be_visible()
    expect(page.get_by_text("other · test").first).to_be_visible()
    expect(page.get_by_text("Differing settings")).to_be_visible()
    expect(page).to_have_url(re.compile("with=other"))
    page.reload()
    expect(page.get_by_text("other · test").first).to_be_visible()


@pytest.mark.browser
def test_a_run_is_shown_in_full(runs_page: Page, small: Run) -> None:
    page = runs_page
    expect(page.get_by_text(small.recipe.shows)).to_be_visible()
    expect(page.get_by_text("Generalised at", exact=True)).to_be_visible()
    for panel in ("Checkpoints", "Provenance", "Kept results"):
        page.get_by_role("tab", name=panel).click()
        expect(page).to_have_url(re.compile(f"panel={panel.replace(' ', '.')}"))
    expect(page.get_by_text("Nothing was computed on this run yet")).to_be_visible()
    page.get_by_role("link", name="Explore").last.click()
    expect(page.get_by_role("heading", name="Explore", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile("explore.*run=small"))


@pytest.mark.browser
@pytest.mark.slow
def test_a_model_and_pairs_are_imported_and_patched(runs_page: Page, model_files: dict[str, Path]) -> None:
    page = runs_page
    page.get_by_role("tab", name="Import").click()
    upload(page, "model_files", model_files["brought.safetensors"], model_files["config.json"])
    upload(page, "pairs_file", model_files["pairs.csv"])
    expect(page.get_by_role("textbox", name="Name of the run")).to_have_value("brought")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.get_by_text("Imported as run 'brought'.")).to_be_visible()
    expect(page.get_by_text("What the validator found")).to_be_visible()
    page.get_by_role("link", name="Explore brought").click()
    expect(page).to_have_url(re.compile("explore.*run=brought"))
    expect(page.get_by_role("heading", name="Patching")).to_be_visible()
    page.get_by_role("button", name="Measure over n").click()
    expect(page.get_by_text("95 % bootstrap interval").first).to_be_visible()


@pytest.mark.browser
def test_faulty_pairs_are_one_line_and_leave_nothing(
    runs_page: Page, model_files: dict[str, Path], playground: Path
) -> None:
    page = runs_page
    page.get_by_role("tab", name="Import").click()
    expect(page.get_by_role("button", name="Import", exact=True)).to_be_disabled()
    upload(page, "model_files", model_files["brought.safetensors"], model_files["config.json"])
    upload(page, "pairs_file", model_files["faulty.csv"])
    name = page.get_by_role("textbox", name="Name of the run")
    # The files suggest a name first.
    expect(name).to_have_value(re.compile("brought"))
    name.fill("never")
    name.press("Enter")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.get_by_text(re.compile("^faulty.csv: 1 of 1 pairs are faulty. line 2: .*99"))).to_be_visible()
    assert not (playground / "never").exists()


@pytest.mark.browser
def test_an_empty_runs_folder_still_lets_one_in(
    tmp_path: Path, server_on: Callable, open_page: Callable, model_files: dict[str, Path]
) -> None:
    page = open_page(server_on(tmp_path))
    page.goto("/?tab=Import")
    expect(page.get_by_text("Bring a model that you trained elsewhere")).to_be_visible()


def upload(page: Page, key: str, *files: Path) -> None:
    settled(page)
    page.locator(f".st-key-{key} input[type=file]").set_input_files([str(file) for file in files])
    for file in files:
        expect(page.locator(f".st-key-{key}").get_by_text(file.name)).to_be_visible()
