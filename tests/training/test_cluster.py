"""Sweeps on Ray: two nodes, one of which is killed half-way; one that is stopped; addresses that do not answer."""

import builtins
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from apps.cli import main
from workbench.training import cluster
from workbench.training.checkpoints import Run
from workbench.training.engines import train_members
from workbench.training.loop import Interrupted
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import Member, plan_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
from ray.cluster_utils import Cluster  # noqa: E402

# Nodes and workers are processes that import Ray or torch: seconds each.
pytestmark = pytest.mark.slow

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "evaluate_every=50", "stop_when_clean=false"]


def plan(steps: int, seeds: int) -> tuple[Member, ...]:
    recipe = find_recipe("modular-smoke").override([*TINY, f"steps={steps}"])
    return plan_sweep(recipe, seeds=range(seeds), name="t")


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A cluster of one node with one processor; it sends nothing home."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield nodes
    nodes.shutdown()
    del os.environ["RAY_USAGE_STATS_ENABLED"]


def log(run: Run) -> list[dict[str, float]]:
    return [{**row, "seconds": 0} for row in run.folder.lines("metrics.jsonl")]


def step_of(run: Run) -> int:
    return int(max((row["step"] for row in log(run)), default=0))


def test_a_node_that_is_killed_costs_no_run(head: Cluster, tmp_path: Path) -> None:
    """Two long runs on two nodes: one node dies, another comes, and both runs get past where they were."""
    members, node = plan(100_000, 2), head.add_node(num_cpus=1)
    head.wait_for_nodes()
    came: list[Any] = []
    wanted = 300

    def on_progress(share: float, now: str) -> None:
        nonlocal wanted
        steps = [step_of(member.run(tmp_path)) for member in members]
        if min(steps) <= wanted:
            return
        if came:
            raise KeyboardInterrupt
        head.remove_node(node, allow_graceful=False)
        came.append(head.add_node(num_cpus=1))
        wanted = max(steps) + 300

    with pytest.raises(Interrupted):
        train_members(members, runs=tmp_path, engine="ray", address=head.address, on_progress=on_progress)
    head.remove_node(came[0])
    logs = [log(member.run(tmp_path)) for member in members]
    assert all(rows[-1]["step"] > wanted > 600 for rows in logs)

    def past(share: float, now: str) -> None:
        if all(step_of(member.run(alone)) > rows[-1]["step"] for member, rows in zip(members, logs, strict=True)):
            raise KeyboardInterrupt

    alone = tmp_path / "alone"
    with pytest.raises(Interrupted):
        train_members(members, runs=alone, engine="processes", workers=2, on_progress=past)
    for member, rows in zip(members, logs, strict=True):
        assert rows == log(member.run(alone))[: len(rows)]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_a_sweep_that_is_stopped_leaves_its_states_and_no_worker(head: Cluster, tmp_path: Path) -> None:
    [member] = plan(100_000, 1)

    def on_progress(share: float, now: str) -> None:
        if step_of(member.run(tmp_path)) > 200:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on from there"):
        train_members([member], runs=tmp_path, engine="ray", address=head.address, on_progress=on_progress)
    run = member.run(tmp_path)
    assert not run.folder.busy
    states = sorted((run.folder.path / "state").glob("*.safetensors"))
    assert int(states[-1].stem.removeprefix("step_")) >= step_of(run) > 200


def test_a_run_that_fails_says_why(head: Cluster, tmp_path: Path) -> None:
    members = plan(20, 1)
    # A state that no run can go on from.
    folder = members[0].run(tmp_path).folder.path / "state"
    folder.mkdir(parents=True)
    (folder / "step_00000000.json").write_text("{}")
    found = train_members(members, runs=tmp_path, engine="ray", address=head.address)
    assert list(found) == ["t-s0"]
    assert "has no whole state to resume from" in found["t-s0"]


def test_the_command_takes_a_cluster_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for setting in (*TINY, "steps=20") for flag in ("--set", setting)]
    sweep = ("sweep", "modular-smoke", *flags, "--seeds", "0", "--engine", "ray", "--workers", "1")
    assert main([*sweep, "--runs", str(tmp_path)]) == 0
    assert re.search(r"^modular-smoke +1 +1 ", capsys.readouterr().out, re.MULTILINE)
    assert not ray.is_initialized()


def test_another_version_or_another_disk_is_no_node_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find_recipe("modular-smoke").to_json()
    here = cluster.code_version()
    assert "does not see" in str(
        cluster._work_on_node("a", str(tmp_path / "none"), "workbench.training.workers", recipe, here)
    )
    assert f"has version {here} of the workbench, not 9.9" in str(
        cluster._work_on_node("a", str(tmp_path), "workbench.training.workers", recipe, "9.9")
    )


def refused(capsys: pytest.CaptureFixture[str], runs: Path, *flags: str) -> str:
    """The one line of a command that trains nothing."""
    assert main(["sweep", "modular-smoke", "--seeds", "0", "--runs", str(runs), "--json", *flags]) == 2
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("workbench sweep: ")]
    assert out == ""
    assert not list(runs.iterdir())
    return line


def test_an_address_where_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, "--engine", "ray", "--address", "127.0.0.1:1")
    assert re.search("Nothing answers at the Ray address '127.0.0.1:1': .*Start one with `ray start --head`", line)


def test_an_address_where_somebody_else_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 3.0)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        line = refused(capsys, tmp_path, "--engine", "ray", "--address", address)
    assert f"No Ray cluster at '{address}' answered in 3 seconds." in line
    assert time.monotonic() - begun < 20


def test_an_address_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, "--engine", "ray", "--address", "nonsense")
    assert re.search("The Ray address 'nonsense' cannot be used: .*Invalid address format: nonsense", line)


def test_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    line = refused(capsys, tmp_path, "--engine", "ray")
    assert "Ray is not installed: pip install 'interp-workbench[ray]', or choose --engine processes." in line


MISTAKES: Mapping[str, tuple[str, ...]] = {
    "Unknown engine 'rays'. Did you mean 'ray'": ("--engine", "rays"),
    "Engine 'turn' has one worker, got 2": ("--engine", "turn", "--workers", "2"),
    "Engine 'processes' has no address, got 'auto'": ("--engine", "processes", "--address", "auto"),
    "There must be at least one worker, got 0": ("--engine", "ray", "--workers", "0"),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_options_that_do_not_go_together(says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, tmp_path, *MISTAKES[says])
