from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.store import new_run
from workbench.training.checkpoints import load
from workbench.training.finetune import donor_recipe
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

AppOn = Callable[..., Any]


@pytest.fixture(scope="module")
def grafts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a base and two donors that were trained for a moment."""
    folder = tmp_path_factory.mktemp("graft_page")
    settings = ["steps=40", "size=600", "batch_size=32", "evaluate_every=40", "cooldown=0", "n_layers=1"]
    train(find_recipe("skills-smoke").override(settings), new_run("base", folder))
    for skill in ("tone", "ends"):
        recipe = donor_recipe(load("base", runs=folder), skill)
        short = recipe.override(["steps=60", "size=300", "batch_size=32", "evaluate_every=60"])
        train(short, new_run(skill, folder))
    return folder


def test_a_donor_is_grafted_and_judged(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="tone", density="2.0%")
    assert not app.exception
    assert not app.error
    shown = {metric.label: metric.value for metric in app.metric}
    # One block of width 48: 4 matrices of 48 x 48 and two of 48 x 192, biases and LayerNorms.
    size = 4 * 48 * 48 + 2 * 48 * 192 + 192 + 48 + 4 * 48
    assert shown["Weights"] == f"{round(0.02 * size):,}"
    rows = app.dataframe[0].value
    assert {"base", "donor", "graft", "permuted", "foreign", "magnitude"} <= set(rows.index)
    assert "graft_of(" in app.code[0].value


def test_a_chosen_cell_is_left_to_the_base(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="tone", method="magnitude", place="1.0")
    assert not app.exception
    # Rows are components in their order, columns layers: the second component of the only one.
    names = [name for name, _ in load("tone", runs=grafts_folder).model().named_parameters() if "weights." in name]
    assert any(f"Without `{names[1]}`" in text.value for text in app.markdown)


def test_another_method_is_another_graft(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="tone", method="magnitude")
    assert "magnitude" not in app.dataframe[0].value.index
    app.selectbox(key="method").set_value("saliency").run()
    assert not app.exception
    assert "magnitude" in app.dataframe[0].value.index


def test_a_typed_prompt_is_answered_or_refused(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="tone")
    assert list(app.dataframe[1].value.index) == ["base", "graft", "donor"]
    app.text_input(key="prompt_tone").set_value("w1 w2").run()
    assert "5 words and a question, got 2" in app.error[0].value


def test_sizes_and_overlaps_come_when_asked_for(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="tone", method="magnitude")
    before = len(app.dataframe)
    app.toggle(key="overlaps").set_value(True).run()
    assert not app.exception
    assert len(app.dataframe) == before + 1
    overlap = app.dataframe[-1].value
    assert set(overlap["region"]) == {"tone", "ends"}
    app.toggle(key="sizes").set_value(True).run()
    assert not app.exception
    assert any("Share of the donor's gain by the share" in caption.value for caption in app.caption)


def test_a_run_that_is_no_donor_is_told_so(app_on: AppOn, grafts_folder: Path) -> None:
    app = app_on("graft", grafts_folder, run="base")
    assert "was not taught a skill" in app.info[0].value
