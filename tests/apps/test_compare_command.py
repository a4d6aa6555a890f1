"""`workbench compare`: several runs on the same examples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.accuracies_of_runs import accuracies_of, right_of
from apps.cli import main
from workbench.instrument.passes import run as run_model
from workbench.intervals import mean_of, share_of
from workbench.models.kinds import build
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.store import new_run, write_json
from workbench.tables import Table
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import load, save_checkpoint
from workbench.training.loop import train
from workbench.training.recipe import Recipe
from workbench.training.recipes import find_recipe

TASK = GraphSearch(size=26, test_size=40)
TESTS = ["test", "test_0", "test_1", "test_2", "test_3", "test_naive", "test_star"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is wired to search, and tiny trainings on naive, star and other balanced graphs."""
    folder = tmp_path_factory.mktemp("runs")
    wired = path_doubling(TASK.layout)
    recipe = Recipe(name="wired", task=TASK, model=wired.config, train=None, shows="Merges paths.")
    run = new_run("balanced", folder)
    write_json(run.path / "recipe.json", recipe.to_json())
    untrained = Transformer(wired.config, generator=generator(0, "first"))
    for step, model in enumerate((untrained, wired)):
        save_checkpoint(run, step, model.state_dict(), ["wired"], dtype=torch.float32)
    tiny = ["steps=1", "batch_size=8", "test_size=40"]
    for name in ("naive", "star"):
        train(find_recipe(f"search-{name}").override(tiny), new_run(name, folder))
    train(find_recipe("search-smoke").override([*tiny, "task.seed=1"]), new_run("other", folder))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_three_runs_on_one_balanced_test(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compare", "balanced", "naive", "star", "--runs", str(runs))
    found = printed(capsys, *command)
    assert found["runs"] == ["balanced", "naive", "star"]
    rows = {(row["split"], row["run"]): row for row in found["rows"]}
    assert list(rows) == [(split, run) for split in TESTS for run in found["runs"]]
    # Training differs, which is what is compared.
    assert found["left_out"] == {"train": "Split 'train' holds other examples in 'naive', or is not there."}
    batch = TASK.examples("test_3")
    right = {}
    for name in found["runs"]:
        model = load(name, runs=runs).model()
        right[name] = run_model(model, batch.tokens).logits[:, -1].argmax(1) == batch.targets[:, -1]
        row, share = rows["test_3", name], share_of(right[name])
        assert [row[f"accuracy{end}"] for end in ("", "_low", "_high")] == [share.mean, share.low, share.high]
        assert row["n"] == 40
    assert rows["test_3", "balanced"]["accuracy"] == 1
    assert rows["test_3", "balanced"]["difference"] is None
    for name in ("naive", "star"):
        row = rows["test_3", name]
        behind = mean_of(right[name].double() - right["balanced"].double())
        assert [row[f"difference{end}"] for end in ("", "_low", "_high")] == [behind.mean, behind.low, behind.high]
        assert row["difference_high"] < 0

    def unasked(*arguments: object) -> None:
        raise AssertionError("it was kept")

    monkeypatch.setattr("apps.accuracies_of_runs.right_of", unasked)
    assert printed(capsys, *command)["rows"] == found["rows"]


def test_an_earlier_checkpoint_as_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "balanced", "naive", "--checkpoint", "0", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("split", "run", "accuracy", "accuracy_low", "accuracy_high"),
        *("difference", "difference_low", "difference_high", "n"),
    ]
    # Before its wiring the first searches no more than the other.
    accuracy = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("test_3")}
    assert accuracy["balanced"] < 1
    assert lines[-1] == "Split 'train' holds other examples in 'naive', or is not there."


def test_what_does_not_compare_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*names: str) -> str:
        assert main(["compare", *names, "--runs", str(runs)]) == 2
        return capsys.readouterr().err

    assert "two different runs or more, got naive, naive" in refused("naive", "naive")
    other = refused("balanced", "other")
    assert "balanced, other have no split with the same examples." in other
    assert "The task of 'balanced' differs in task.seed (0, in 'other' 1). Train with the same world" in other
    assert "no checkpoint at step 9" in refused("balanced", "naive", "--checkpoint", "9")


def test_tables_are_drawn_from(runs: Path) -> None:
    found = accuracies_of([load(name, runs=runs) for name in ("balanced", "star")])
    accuracies, differences = found.tables()
    assert isinstance(accuracies, Table)
    assert set(accuracies.frame["run"]) == {"balanced", "star"}
    assert set(differences.frame["run"]) == {"star"}
    assert "that of balanced" in differences.caption
    assert found.provenance.parents == tuple(load(name, runs=runs).checkpoint().sha256 for name in ("balanced", "star"))


def test_an_example_is_right_where_all_its_answers_are() -> None:
    recipe = find_recipe("program-smoke")
    model = build(recipe.model, generator=generator(0, "weights"))
    batch = recipe.task.examples("test").select(slice(50))
    answers = model.forward(batch.tokens).argmax(2)
    wanted = ((answers == batch.targets) | ~batch.read).all(1)
    assert right_of(model, batch).tolist() == wanted.tolist()
    told = replace(batch, targets=torch.where(batch.read, answers, batch.targets))
    assert right_of(model, told).all()
