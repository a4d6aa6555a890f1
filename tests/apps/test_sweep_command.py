"""`workbench sweep`: one table of when runs generalised, a sweep that goes on, and mistakes in one line."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from apps.cli import main
from apps.sweeping import setting_rows
from workbench.training.landmarks import sweep_result
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import plan_sweep

# Whole trainings in processes of their own: seconds each.
pytestmark = pytest.mark.slow

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "steps=60", "stop_when_clean=false"]
FLAGS = [flag for setting in TINY for flag in ("--set", setting)]
SWEEP = ("sweep", "modular-smoke", *FLAGS, "--seeds", "0..1", "--set", "weight_decay=0.1,1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of a sweep, and what it wrote with --out."""
    folder = tmp_path_factory.mktemp("swept")
    assert main([*SWEEP, "--runs", str(folder / "runs"), "--out", str(folder / "out"), "--workers", "2"]) == 0
    return folder


def test_the_same_sweep_again_trains_nothing_and_says_the_same(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("*")}
    assert main([*SWEEP, "--runs", str(swept / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("*")} == before
    assert (found["trained"], found["failed"]) == (0, {})
    assert [row["setting"] for row in found["settings"]] == ["weight_decay=0.1", "weight_decay=1"]
    assert [row["n"] for row in found["settings"]] == [2, 2]
    assert [row["run"] for row in found["runs"]] == [
        f"modular-smoke-weight_decay-{decay}-s{seed}" for seed in (0, 1) for decay in ("0.1", "1")
    ]


def test_tables_and_figure_are_files(swept: Path) -> None:
    written = {str(path.relative_to(swept / "out")) for path in (swept / "out").rglob("*") if path.is_file()}
    names = ("sweep_settings", "sweep_runs", "sweep_landmarks")
    wanted = {f"tables/{name}{suffix}" for name in names for suffix in (".csv", ".tex")}
    assert wanted | {"figures/sweep_landmarks.html", "figures/plotly.min.js"} <= written
    assert "figures/sweep_settings.html" not in written
    assert (swept / "out" / "tables" / "sweep_runs.csv").read_text().count("modular-smoke") == 4


def test_people_get_a_line_a_setting(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, "--runs", str(swept / "runs")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.split("  +", head)[:6] == ["setting", "seeds", "ended", "memorised", "generalised", "rate"]
    assert re.match(r"weight_decay=0\.1 +2 +2 +\d +0 +0\.00 \[0\.00, 0\.66\]", lines[0])
    assert len(lines) == 2


def test_medians_with_ranges_and_means_with_intervals(swept: Path) -> None:
    recipe = find_recipe("modular-smoke").override(TINY)
    members = plan_sweep(recipe, seeds=[0, 1], alternatives={"weight_decay": ["0.1", "1"]})
    runs = [member.run(swept / "runs") for member in members]
    [one] = setting_rows(sweep_result(runs[:1]))
    assert one["setting"] == "modular-smoke"
    assert re.fullmatch(r"\d\.\d{3}", one["train accuracy"])
    rows = setting_rows(sweep_result(runs))
    assert re.fullmatch(r"\d\.\d{3} \[-?\d\.\d{3}, \d\.\d{3}\]", rows[0]["train accuracy"])
    assert rows[0]["generalised at"] == "-"


def test_more_seeds_go_on_with_what_is_there(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = swept / "runs" / "modular-smoke-weight_decay-0.1-s0" / "metrics.jsonl"
    before = log.read_bytes()
    more = ("sweep", "modular-smoke", *FLAGS, "--set", "weight_decay=0.1,1", "--seeds", "0..1,7")
    assert main([*more, "--runs", str(swept / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trained"], [row["n"] for row in found["settings"]]) == (2, [3, 3])
    assert log.read_bytes() == before


def test_a_run_that_fails_is_in_the_table_and_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(
        "from dataclasses import dataclass, replace\n"
        "from workbench.tasks.modular import Modular\n"
        "from workbench.training.recipes import modular_smoke\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Faulty(Modular):\n"
        "    def examples(self, split):\n"
        "        assert split != 'test' or self.seed, 'no test today'\n"
        "        return super().examples(split)\n"
        "def faulty():\n"
        "    return replace(modular_smoke(), task=Faulty(p=59, train_fraction=0.5)).override(['steps=20', 'p=13'])\n"
    )
    command = ("sweep", f"{file}:faulty", "--seeds", "0..1", "--workers", "2", "--runs", str(tmp_path / "runs"))
    assert main(command) == 1
    out = capsys.readouterr().out
    assert re.search(r"^modular-smoke +2 +1 ", out, re.MULTILINE)
    assert "Failed: modular-smoke-s0: AssertionError: no test today" in out


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = ("sweep", "modular-smoke", *FLAGS, "--seeds", "0", "--runs", str(tmp_path))
    command = tuple(flag.replace("steps=60", "steps=100000") for flag in command)
    child = subprocess.Popen([sys.executable, "-m", "apps.cli", *command], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "modular-smoke-s0" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "workbench sweep: interrupted. What was trained is saved; the same command goes on from there." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sweep", "modula"), r"Unknown recipe 'modula'"),
        (("sweep", "modular-smoke", "--seeds", "few"), r"Seeds are listed as 0\.\.2 or as 0,3,7, got 'few'"),
        (("sweep", "modular-smoke", "--seeds", "3..1"), "The sweep is empty"),
        (("sweep", "modular-smoke", "--set", "stepz=1,2"), r"Unknown setting 'stepz'.*Did you mean 'train\.steps'"),
        (("sweep", "modular-smoke", "--set", "steps=1,"), "must be key=value or key=value,value"),
        (("sweep", "modular-smoke", "--variant", "steps=1"), "must be 'NAME: KEY=VALUE KEY=VALUE'"),
        (("sweep", "modular-smoke", "--workers", "0"), "There must be at least one worker, got 0"),
        (("sweep", "modular-smoke", "--out", "FILE"), "is a file; tables and figures go into a folder"),
        ((*SWEEP[:-1], "weight_decay=0.1", "--set", "lr=1"), "Unknown setting 'lr'"),
        ((*SWEEP[:-1], "weight_decay=0.1,1", "--set", "evaluate_every=20"), "made by another recipe"),
    ],
)
def test_mistakes(swept: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*")}
    given: Mapping[str, Any] = {"FILE": str(swept / "out" / "tables" / "sweep_runs.csv")}
    assert main([*(given.get(each, each) for each in arguments), "--runs", str(swept / "runs"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("workbench sweep: ")
    assert re.search(says, line)
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*")} == before
