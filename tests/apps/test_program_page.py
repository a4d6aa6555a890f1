"""Programs in the command line and on their page: what is said of a typed sequence, changed, written and refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.cli import main
from workbench.store import new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe

AppOn = Callable[..., Any]


@pytest.fixture(scope="module")
def programs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a program that was trained until it counts."""
    folder = tmp_path_factory.mktemp("programs")
    settings = ["steps=400", "letters=3", "task.n_ctx=5", "size=60", "batch_size=64", "evaluate_every=200"]
    train(find_recipe("program-smoke").override(settings), new_run("counts", folder))
    return folder


def test_a_sequence_is_answered_and_its_variables_shown(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    assert not app.exception
    assert not app.error
    said, variables = (each.value for each in app.dataframe[:2])
    assert said.loc["right"].tolist() == ["2", "1", "2"]
    assert list(variables.columns) == ["0: <s>", "1: 0", "2: 1", "3: 0"]
    assert variables.loc["tokens"].tolist() == ["<s>", "0", "1", "0"]
    assert variables.loc["ones"].tolist() == ["1"] * 4
    assert "def run(letters: Sequence[str])" in app.code[0].value


def test_a_variable_is_changed(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="counts", sequence="0 1 0")
    assert "changed" not in app.dataframe[0].value.index
    # A token that is another is another sequence.
    names = app.selectbox(key="variable").options
    app.selectbox(key="variable").set_value(names.index("tokens"))
    app.selectbox(key="position").set_value(1).run()
    app.selectbox(key="value").set_value(1).run()
    assert not app.exception
    said = app.dataframe[0].value
    other = app_on("program", programs_folder, run="counts", sequence="1 1 0").dataframe[0].value
    assert said.loc["changed"].tolist() == other.loc["program"].tolist() != said.loc["program"].tolist()


@pytest.mark.parametrize(("text", "message"), [("0 7", "Letter '7' is not in the alphabet"), ("0 0 0 0 0", "too many")])
def test_what_cannot_be_read_is_said(app_on: AppOn, programs_folder: Path, text: str, message: str) -> None:
    app = app_on("program", programs_folder, run="counts", sequence=text)
    assert not app.exception
    assert message in app.error[0].value


def test_another_run_is_no_program(app_on: AppOn, programs_folder: Path) -> None:
    app = app_on("program", programs_folder, run="gallery:modular")
    assert not app.exception
    assert "learnt no Transformer Program" in app.info[0].value


@pytest.mark.parametrize("view", ["runs", "explore", "dynamics", "circuit", "search", "report"])
def test_a_program_is_no_error_of_ours_on_another_page(app_on: AppOn, programs_folder: Path, view: str) -> None:
    assert not app_on(view, programs_folder, run="counts").exception


def test_a_module_is_written_and_runs_alone(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.py"
    assert main(["decompile", "counts", "--runs", str(programs_folder), "--out", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"lines", "lines_unsimplified", "literals", "accuracy", "agreement", "exhaustive", "checked", "seconds"}
    assert wanted <= found.keys()
    assert (found["exhaustive"], found["checked"], found["agreement"]) == (True, 3 + 9 + 27 + 81, 1.0)
    assert found["lines"] == len(file.read_text().splitlines())
    run = [sys.executable, "-I", "-W", "error", str(file), "0", "1", "0"]
    assert len(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()) == 3


def test_variables_are_patched(programs_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runs", str(programs_folder), "--n", "4", "--direction", "denoise", "--json"]
    assert main(["patch", "counts", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    sites = {cell["site"] for cell in found["cells"]}
    assert {"L0.z.h0", "L0.z.h1", "L0.codes.h0", "L0.codes.h1", "L0.sums.h0", "L0.sums.h1"} == sites


def test_what_cannot_be_decompiled_is_one_line(
    programs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["decompile", "counts", "--runs", str(programs_folder)]
    for arguments, message in (
        (
            ["decompile", "gallery:modular", "--out", str(tmp_path / "a.py")],
            "learnt a transformer, no Transformer Program",
        ),
        ([*counts, "--out", "/proc/a.py"], "Cannot write /proc/a.py"),
        ([*counts, "--out", str(tmp_path / "a.py"), "--budget", "2"], "below 1, got 2.0"),
        ([*counts, "--out", str(tmp_path / "a.py"), "--checkpoint", "all"], "takes a step"),
    ):
        assert main(arguments) != 0
        [line] = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert not (tmp_path / "a.py").exists()


def test_training_says_both_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["steps=2", "size=60", "batch_size=16", "d_mlp=4"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert main(["train", "program-smoke", "--runs", str(tmp_path), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_accuracy"] == pytest.approx(found["test_accuracy"])
    assert found["sequence_accuracy_low"] <= found["sequence_accuracy"] <= found["token_accuracy"]
    assert found["n"] == 6
