"""When runs generalised, by setting: logs written by hand, numbers worked by hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.figures import figure
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, new_run, to_json, write_json
from workbench.training.checkpoints import METRICS, STATUS, Run
from workbench.training.landmarks import SweepResult, settings_of, sweep_result
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe

EVERY, LAST = 10, 400


def recipe(*settings: str, seed: int = 0) -> Recipe:
    return find_recipe("modular-smoke").with_seed(seed).override(settings)


def write_run(
    root: Path, name: str, made_from: Recipe, *, memorised: int | None, generalised: int | None, ended: bool = True
) -> Run:
    """A run whose accuracies are 0.25 before a landmark and 1 from it on; a step takes half a second."""
    folder = new_run(name, root)
    write_json(folder.path / "recipe.json", made_from.to_json())
    rows = [
        {
            "step": step,
            "train_accuracy": 1.0 if memorised is not None and step >= memorised else 0.25,
            "test_accuracy": 1.0 if generalised is not None and step >= generalised else 0.25,
            "sum_squared_weights": 1.0,
            "seconds": step / 2,
        }
        for step in range(0, LAST + 1, EVERY)
    ]
    (folder.path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        write_json(folder.path / STATUS, {"finished": True, "reason": "steps used up", "seconds": LAST / 2})
    return Run(folder=folder, recipe=made_from)


@pytest.fixture
def found(tmp_path: Path) -> SweepResult:
    """Four seeds of `plain`: at 100, 200 and 260, one never; two of `fast`: at 50, and one that was never begun."""
    marks = [(20, 100), (30, 200), (20, 260), (40, None)]
    plain = [
        write_run(tmp_path, f"p{seed}", recipe(seed=seed), memorised=memorised, generalised=generalised)
        for seed, (memorised, generalised) in enumerate(marks)
    ]
    fast = write_run(tmp_path, "f0", recipe("loss=stablemax"), memorised=None, generalised=50)
    never = Run(folder=new_run("f1", tmp_path), recipe=recipe("loss=stablemax", seed=1))
    return sweep_result([*plain, fast, never], ["plain"] * 4 + ["fast"] * 2)


def test_a_setting_by_hand(found: SweepResult) -> None:
    row = found.settings.to_dict("records")[0]
    assert (row["setting"], row["n"], row["ended"]) == ("plain", 4, 4)
    assert (row["memorised"], row["generalised"], row["generalised_rate"]) == (4, 3, 0.75)
    # Wilson's interval of 3 in 4, worked by hand.
    assert row["generalised_rate_low"] == pytest.approx(0.30064, abs=1e-5)
    assert row["generalised_rate_high"] == pytest.approx(0.95441, abs=1e-5)
    # The median and range of those that got there.
    assert [row[f"step_generalised{end}"] for end in ("", "_least", "_most")] == [200, 100, 260]
    assert [row[f"step_memorised{end}"] for end in ("", "_least", "_most")] == [25, 20, 40]
    assert [row[f"seconds_generalised{end}"] for end in ("", "_least", "_most")] == [100, 50, 130]
    # 1, 1, 1 and 0.25: standard error 0.1875, and Student's t of 3 degrees of freedom is 3.18245.
    assert row["test_accuracy"] == pytest.approx(0.8125)
    assert row["test_accuracy_low"] == pytest.approx(0.8125 - 3.18245 * 0.1875, abs=1e-5)
    assert row["train_accuracy"] == row["train_accuracy_high"] == 1


def test_a_run_that_was_never_begun_is_not_dropped(found: SweepResult) -> None:
    row = found.settings.to_dict("records")[1]
    assert (row["n"], row["ended"], row["memorised"], row["generalised"]) == (2, 1, 0, 1)
    assert row["generalised_rate"] == 0.5
    assert row["step_memorised"] is None
    assert row["step_memorised_most"] is None
    # One run that ended has a mean without an interval.
    assert row["test_accuracy"] == 1
    assert math.isnan(row["test_accuracy_low"])
    last = found.runs.to_dict("records")[-1]
    assert (last["run"], last["seed"], last["ended"], last["reason"]) == ("f1", 1, False, "not finished")
    assert (last["steps"], last["step_generalised"], last["test_accuracy"]) == (0, None, None)


def test_every_run_stands_in_the_table_and_in_the_figure(found: SweepResult) -> None:
    settings, runs, points = found.tables()
    assert [len(table.frame) for table in (settings, runs, points)] == [2, 6, 12]
    assert "(6 runs, 2 settings)" in settings.caption
    frame = points.frame
    never = frame[frame["landmark"] == "never generalised"]
    assert never[["setting", "run", "step"]].to_numpy().tolist() == [["plain", "p3", LAST], ["fast", "f1", 0]]
    drawn = figure(points)
    assert [trace.name for trace in drawn.data] == ["memorised", "generalised", "never memorised", "never generalised"]
    assert len({trace.marker.symbol for trace in drawn.data}) == 4
    assert sum(len(trace.x) for trace in drawn.data) == 12


def test_steps_stay_whole_in_files(found: SweepResult) -> None:
    settings, runs, _ = found.tables()
    assert "plain,4,4,4,1.0," in settings.csv()
    assert "f0,0,True,steps used up,400,,50,25.0,0.25,1.0" in runs.csv()
    assert "f1,1,False,not finished,0,,,,," in runs.csv()
    assert r"\bottomrule" in settings.latex()
    assert "None" not in runs.latex()


def test_the_summary_is_json(found: SweepResult) -> None:
    summary = json.loads(to_json(found.summary()))
    assert summary["settings"][1]["test_accuracy_low"] is None
    assert summary["runs"][3]["step_generalised"] is None
    assert found.provenance.recipe == "modular-smoke"


def test_a_broken_off_run_counts_with_what_it_reached(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", recipe(), memorised=20, generalised=100, ended=False)
    [row] = sweep_result([run]).settings.to_dict("records")
    assert (row["setting"], row["ended"], row["generalised"], row["step_generalised"]) == ("modular-smoke", 0, 1, 100)
    # Its last accuracy is not a final one.
    assert row["test_accuracy"] is None


def labels(*recipes: Recipe) -> Sequence[str]:
    nowhere = RunFolder(path=Path("nowhere"), reference="nowhere")
    return settings_of([Run(folder=nowhere, recipe=each) for each in recipes])


def test_settings_are_what_tells_recipes_apart_seeds_aside() -> None:
    assert labels(recipe(seed=0), recipe(seed=1)) == ("modular-smoke", "modular-smoke")
    fast = "train.grokfast=[0.98,2]"
    assert labels(recipe(), recipe(fast, "decay=matrices", seed=4)) == (
        "decay=all grokfast=null",
        "decay=matrices grokfast=[0.98, 2.0]",
    )
    # What the vocabulary follows is told, too; another recipe's settings are its own affair.
    modular = find_recipe("modular")
    assert labels(recipe("p=11"), recipe("p=13"), modular) == (
        "modular-smoke p=11 d_vocab=12 d_vocab_out=11",
        "modular-smoke p=13 d_vocab=14 d_vocab_out=13",
        "modular",
    )


def test_splits_that_only_some_runs_measure_are_empty_for_the_others(tmp_path: Path) -> None:
    other = Run(folder=new_run("c", tmp_path), recipe=find_recipe("composition-smoke"))
    mine = write_run(tmp_path, "a", recipe(), memorised=20, generalised=100)
    found = sweep_result([mine, other])
    columns = [name for name in found.settings if name.endswith("_accuracy")]
    assert set(columns) == {f"{split}_accuracy" for split in {*mine.task.measured, *other.task.measured}}
    assert found.settings["test_accuracy"].tolist() == [1.0, None]


def test_what_has_no_landmarks(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="needs at least one run; got none"):
        sweep_result([])
    imported = Run(folder=new_run("a", tmp_path), recipe=replace(recipe(), train=None))
    with pytest.raises(WorkbenchError, match="Run 'a' was imported: without a training it has no landmarks"):
        sweep_result([imported])
