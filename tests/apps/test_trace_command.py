"""`workbench trace` on a run whose last checkpoint is the model that is wired to merge paths."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps import tracing
from apps.cli import main
from circuits.path_merging import trace_paths
from circuits.search_prompts import SearchPrompt
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import generator
from workbench.store import new_run, write_json
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import load, save_checkpoint
from workbench.training.recipe import Recipe

TASK = GraphSearch(size=26, test_size=4)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    wired = path_doubling(TASK.layout)
    recipe = Recipe(name="wired", task=TASK, model=wired.config, train=None, shows="Merges paths.")
    folder = new_run("wired", tmp_path)
    write_json(folder.path / "recipe.json", recipe.to_json())
    first = Transformer(wired.config, generator=generator(0, "first"))
    for step, model in enumerate((first, wired)):
        save_checkpoint(folder, step, model.state_dict(), ["imported"], dtype=torch.float32)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_trace_prints_shares_controls_and_the_causal_test(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = printed(capsys, "trace", "wired", "--runs", str(runs), "--n", "2")
    assert found["step"] == 1
    assert found["explained_strict"] == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 1.0}
    assert found["controls"]["hand_built"] == 1
    assert found["controls"]["wrong_graph"] == 0
    assert found["judged"]["n"] == 4
    assert {"explained_strict_low", "explained_strict_high"} <= set(found["judged"])
    assert found["seconds_per_input"] > 0
    assert found["seconds"] > 0
    assert len(found["causal"]["conditions"]) == 9
    monkeypatch.setattr(tracing, "trace_inputs", lambda *args, **options: pytest.fail("was kept"))
    again = printed(capsys, "trace", "wired", "--runs", str(runs), "--n", "2")
    assert again["rows"] == found["rows"]


def test_one_lookahead_of_one_checkpoint_as_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["trace", "wired", "--runs", str(runs), "--n", "1", "--checkpoint"]
    assert main([*arguments, "0", "--lookahead", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["variant", "lookahead", "n", "explained"]
    assert [line.split()[:3] for line in lines[1:3]] == [["model", "3", "1"], ["model", "2+", "1"]]
    assert any(line.split()[:2] == ["zero", "removed"] for line in lines)
    assert any(line.split() == ["step", "0"] for line in lines)
    # At lookahead 1 nothing is judged, and nothing ablated.
    assert main([*arguments, "1", "--lookahead", "1"]) == 0
    assert "removed" not in capsys.readouterr().out
    assert main([*arguments, "all", "--lookahead", "1"]) == 0
    assert capsys.readouterr().out.count("seconds_per_input") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lookahead", "4"], "Prompts of size 26 have lookaheads 0 to 3, got 4."),
        (["--n", "5"], "Each lookahead has 1 to 4 test inputs, got 5."),
        (["--n", "0"], "Each lookahead has 1 to 4 test inputs, got 0."),
        (["--checkpoint", "7"], "step 7"),
    ],
)
def test_bad_input(runs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "wired", "--runs", str(runs), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_graph_of_ones_own(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("trace", "wired", "--runs", str(runs), "--graph", "1>2 2>3 1>4 4>5 Q 1 3")
    found = printed(capsys, *command)
    assert (found["predicted"], found["correct"], found["explained_strict"]) == (2, True, True)
    prompt = SearchPrompt.read(TASK.prompt(command[-1]).tokens[0], TASK.layout)
    trace = trace_paths(load("wired", runs=runs).model(), prompt)
    assert found["operations"] == json.loads(json.dumps(trace.summary()["operations"]))
    assert main([*command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["predicted", "2"] in [line.split() for line in lines]
    assert lines[-len(found["operations"]) - 1].split()[:3] == ["layer", "dest", "src"]
    # A model that answers by nothing has no operations to print.
    assert main([*command, "--checkpoint", "all"]) == 0
    monkeypatch.setattr(tracing, "trace_paths", lambda *arguments: replace(trace, operations=()))
    assert main(["trace", "wired", "--runs", str(runs), "--graph", "1>2 2>3 Q 1 3"]) == 0
    assert "dest_token" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("1>2 2>3 3>1 Q 1 3", "This graph has a cycle through 1, 2, 3"),
        ("1>2 4>5 Q 1 2", "This graph is in several parts: nothing connects 4, 5 with the start 1"),
        ("1>2 1>3 3>4 Q 2 4", "Goal 4 cannot be reached from start 2"),
        ("1>2 1>3 1>4 1>5 1>6 1>7 1>8 2>3 Q 1 3", "This graph has 8 edges; the model reads 1 to 7"),
        ("1>2 1>2 Q 1 2", "Edge 1>2 is given twice"),
        ("1>9 Q 1 9", "Vertex 9 is not in the vocabulary: vertices go from 1 to 8"),
        ("1>2 Q 1 1", "Start and goal are both 1"),
        ("one to two", "Cannot read 'one to two' as a prompt"),
    ],
)
def test_a_graph_that_cannot_be_asked_about(
    runs: Path, graph: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "wired", "--runs", str(runs), "--graph", graph]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--n", "--lookahead"])
def test_a_graph_is_not_a_test_input(runs: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "wired", "--runs", str(runs), "--graph", "1>2 Q 1 2", option, "2"]) == 2
    assert "--graph traces that graph alone: leave --n and --lookahead out." in capsys.readouterr().err


def test_another_task(runs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "small", "--runs", str(runs_folder)]) == 2
    error = capsys.readouterr().err
    assert "Path merging is traced in runs on graph search; 'small' learnt 'modular'" in error


def test_without_a_first_checkpoint_there_is_no_control(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (runs / "wired" / "checkpoints").glob("step_00000000.*"):
        path.unlink()
    assert main(["trace", "wired", "--runs", str(runs), "--n", "1"]) == 2
    assert "needs the checkpoint of step 0; the first of 'wired' is 1" in capsys.readouterr().err


def test_several_heads(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load("wired", runs=runs)
    recipe = json.loads((run.folder.path / "recipe.json").read_text())
    shutil.rmtree(run.folder.path / "checkpoints")
    recipe["model"]["n_heads"] = 2
    write_json(run.folder.path / "recipe.json", recipe)
    config = load("wired", runs=runs).recipe.model
    model = Transformer(config, generator=generator(0, "heads"))
    save_checkpoint(run.folder, 0, model.state_dict(), ["imported"], dtype=torch.float32)
    assert main(["trace", "wired", "--runs", str(runs), "--n", "1"]) == 2
    assert "one head a layer; this one has 2. Train one with n_heads=1." in capsys.readouterr().err
