"""Analyses of all checkpoints by the engines of sweeps: what workers keep is what one process finds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from apps import analysing
from apps.cli import main
from workbench.store import RunFolder, new_run
from workbench.training.loop import train
from workbench.training.recipes import find_recipe
from workbench.training.workers import Job, ProcessWorker

TINY = ["d_model=16", "d_head=4", "d_mlp=32", "stop_when_clean=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on modular arithmetic with checkpoints at 0, 1, 2, 3, and one on composition."""
    folder = tmp_path_factory.mktemp("runs")
    train(find_recipe("modular-smoke").override([*TINY, "p=13", "steps=3"]), new_run("modular", folder))
    train(find_recipe("composition-smoke").override([*TINY, "steps=2"]), new_run("composition", folder))
    return folder


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What workers are asked for; it is done here."""
    asked: list[Job] = []

    def do(given: Sequence[Job], engine: str, **options: Any) -> Mapping[str, str]:
        asked.extend(given)
        for job in given:
            analysing._analyse(job.folder, json.loads(json.dumps(job.told)))
            options["on_look"]([], [])
        return {}

    monkeypatch.setattr(analysing, "do_jobs", do)
    return asked


def found(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    return {name: value for name, value in content.items() if name not in ("seconds", "cpu_seconds")}


@pytest.mark.parametrize(
    "command",
    [
        ("fourier", "modular"),
        ("lens", "modular", "--n", "20"),
        ("patch", "modular", "--n", "20", "--sites", "resid_pre"),
        ("probe", "modular", "--n", "60", "--latent", "a"),
        ("reason", "composition", "--n", "20"),
    ],
)
def test_workers_keep_what_one_process_finds(
    command: Sequence[str], runs: Path, jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = (*command, "--runs", str(runs), "--checkpoint", "all")
    apart = found(capsys, *every, "--engine", "processes", "--workers", "2")
    steps = [json.loads(json.dumps(job.told))["checkpoint"] for job in jobs]
    assert steps == (["0", "1", "2"] if command[0] == "reason" else ["0", "1", "2", "3"])
    # Again there is nothing to do.
    assert found(capsys, *every, "--engine", "ray") == apart
    assert len(jobs) == len(steps)
    for kept in (runs / command[1] / "results").iterdir():
        kept.rename(tmp_path / kept.name)
    assert found(capsys, *every) == apart
    assert len(jobs) == len(steps)


def test_a_worker_is_a_process_that_keeps_one_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ("fourier", "modular", "--runs", str(runs), "--checkpoint", "all")
    assert len(found(capsys, *every, "--engine", "turn")["checkpoints"]) == 4


def test_what_workers_say_is_told_in_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(analysing, "do_jobs", lambda jobs, engine, **options: {jobs[1].name: "killed by SIGKILL"})
    every = ["lens", "modular", "--runs", str(runs), "--n", "7", "--checkpoint", "all", "--workers", "2"]
    assert main(every) == 2
    assert "1 of 4 checkpoints could not be analysed. lens at step 1: killed by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engine", "ray"], "One checkpoint is analysed here: leave --engine out, or add --checkpoint all"),
        (["--checkpoint", "1", "--workers", "2"], "leave --workers out"),
        (["--checkpoint", "all", "--engine", "batched"], "Engine 'batched' trains runs as one model"),
        (["--checkpoint", "all", "--engine", "fast"], "Unknown engine 'fast'"),
        (["--checkpoint", "all", "--workers", "0"], "There must be at least one worker, got 0"),
        (["--checkpoint", "all", "--address", "a:1"], "Engine 'turn' has no address, got 'a:1'"),
    ],
)
def test_bad_input_is_one_line(
    options: Sequence[str], why: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fourier", "modular", "--runs", str(runs), *options]) == 2
    assert why in capsys.readouterr().err


def test_a_worker_says_a_mistake_in_one_line(runs: Path, tmp_path: Path) -> None:
    told = {"room": "analysis_commands", "function": "fourier", "run": str(runs / "composition"), "runs": None}
    told |= {"checkpoint": "1", "json": True, "engine": None, "workers": None, "address": None}
    folder = RunFolder(path=runs / "composition", reference="composition")
    worker = ProcessWorker.start(
        Job(name="a", folder=folder, module="apps.analysing", told=told), logs=tmp_path, alone=True
    )
    while not worker.ended():
        time.sleep(0.1)
    assert "Fourier analysis needs a run on modular arithmetic" in str(worker.complaint())
