"""`workbench` on composition and comparison: train, reason, lens, patch and circuit, and what they refuse."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hops import TINY, reasoner_run

from apps.cli import main
from workbench.training.checkpoints import load

pytestmark = pytest.mark.slow

SETTINGS = [flag for setting in (*TINY, "steps=40") for flag in ("--set", setting)]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A finished run, copied so that results may be kept in it."""
    shutil.copytree(reasoner_run("composition").folder.path, tmp_path / "runs" / "reasoner")
    return str(tmp_path / "runs" / "reasoner")


def contents(folder: Path) -> list[Path]:
    """Every file below a folder but for locks."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", ["composition-smoke", "comparison-smoke"])
def test_training_prints_the_accuracy_on_every_measured_split(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "train", recipe, "--runs", str(tmp_path), *SETTINGS)
    run = load(recipe, runs=tmp_path)
    last = run.log.rows[-1]
    for split in run.task.measured:
        assert found[f"{split}_accuracy"] == last[f"{split}_accuracy"]
    assert found["id_accuracy"] == found["test_accuracy"]
    assert {"train_accuracy", "ood_accuracy", "step_memorised", "step_generalised"} <= set(found)
    assert set(run.measures["step"].dropna()) == {checkpoint.step for checkpoint in run.checkpoints}


def test_modular_has_no_ood_and_so_no_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [flag for setting in ("p=13", "d_mlp=8", "steps=5") for flag in ("--set", setting)]
    found = printed(capsys, "train", "modular-smoke", "--no-measures", "--runs", str(tmp_path), *tiny)
    assert "test_accuracy" in found
    assert "id_accuracy" not in found


def test_reason_at_one_checkpoint_is_kept(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = printed(capsys, "reason", run, "--n", "12", "--checkpoint", "64")
    assert (found["step"], found["steps"], found["middle"]) == (64, [64], "L0.resid_post")
    columns = {"step", "measure", "split", "site", "cause", "value", "low", "high", "n", "skipped"}
    assert all(set(row) == columns for row in found["rows"])
    monkeypatch.setattr("apps.reasoning.rows_of", lambda *a: pytest.fail("computed again"))
    assert printed(capsys, "reason", run, "--n", "12", "--checkpoint", "64")["rows"] == found["rows"]


def test_reason_through_training(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "reason", run, "--n", "8", "--checkpoint", "all")
    assert found["steps"] == [checkpoint.step for checkpoint in load(run).checkpoints]
    assert {row["step"] for row in found["rows"]} == {None, *found["steps"]}
    assert main(["reason", run, "--n", "8", "--checkpoint", "all"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^250 +redirect +test +L0.resid_post", out, re.MULTILINE)
    assert not re.search(r"^128 ", out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("lens", "--split", "ood", "--n", "8"),
        ("patch", "--n", "8", "--sites", "resid_post"),
        ("patch", "--n", "8", "--sites", "resid_post", "--split", "train_inferred"),
        ("circuit", "--edges", "10", "--n", "8"),
        ("circuit", "--edges", "10", "--n", "8", "--granularity", "positions"),
    ],
)
@pytest.mark.parametrize("kind", ["composition", "comparison"])
def test_the_other_analyses_know_reasoners(
    arguments: tuple[str, ...], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reasoner_run(kind).folder.path, tmp_path / "run")
    command, *options = arguments
    assert printed(capsys, command, str(tmp_path / "run"), *options)["n"] == 8
    assert main([command, str(tmp_path / "run"), *options]) == 0
    if command == "lens":
        out = capsys.readouterr().out
        assert "reciprocal_rank_" + ("bridge" if kind == "composition" else "v1") in out


TRAIN = ("train", "composition-smoke", "--run", "new", "--set")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*TRAIN, "phi=99"), r"phi=99 asks for .* Set phi to at most \d"),
        ((*TRAIN, "phi=0"), "phi must be above 0, got 0.0"),
        ((*TRAIN, "out_degree=9"), r"out_degree 9 asks for more relations of each entity than there are \(8\)"),
        ((*TRAIN, "ood_fraction=1"), "ood_fraction must lie between 0 and 1"),
        (
            ("train", "complex-comparison-paper", "--run", "new", "--set", "entities=30"),
            "hard questions answered by '<', and 50 are wanted",
        ),
        (("reason", "RUN", "--n", "0"), "at least 1 prompt of each split, got n = 0"),
        (("reason", "RUN", "--checkpoint", "7"), "no checkpoint at step 7; the nearest is 8"),
        (("reason", "gallery:modular"), "need a run on composition or comparison; 'gallery:modular' learnt 'modular'"),
        (("reason", "gallery:modular", "--checkpoint", "all"), "need a run on composition or comparison"),
        (("patch", "RUN", "--split", "ood", "--n", "20"), "Asked for 20 examples of split 'ood', which has 8"),
        (("fourier", "RUN"), "Fourier analysis needs a run on modular arithmetic"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...], says: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Path(run).parent
    before = contents(runs)
    capsys.readouterr()
    assert main([run if each == "RUN" else each for each in arguments] + ["--runs", str(runs)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert re.search(says, line)
    assert contents(runs) == before
