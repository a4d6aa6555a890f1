"""Sweeps in processes: stopped and gone on with, killed and tried again, one at a time or two."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from workbench.runtime import WorkbenchError
from workbench.training.checkpoints import METRICS
from workbench.training.engines import train_members
from workbench.training.loop import Interrupted
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import Member, members_to_train, plan_sweep

# Every worker is a process that imports torch: seconds each.
pytestmark = pytest.mark.slow

TINY = ["p=13", "d_model=16", "d_head=4", "d_mlp=32", "batch_size=32", "evaluate_every=20", "stop_when_clean=false"]
FAULTY = """
import os
from dataclasses import dataclass, replace

from workbench.runtime import WorkbenchError
from workbench.tasks.modular import Modular
from workbench.training.recipes import modular_smoke


@dataclass(frozen=True, kw_only=True)
class Faulty(Modular):
    def examples(self, split):
        if split == "test" and self.p == 13:
            raise RuntimeError("no test today")
        if split == "test" and self.p == 17:
            raise WorkbenchError("bad,\\n  bad world")
        if split == "test" and self.p == 19:
            os.kill(os.getpid(), 9)
        return super().examples(split)


def faulty():
    recipe = modular_smoke()
    return replace(recipe, task=Faulty(p=recipe.task.p, train_fraction=0.5))
"""


def plan(*settings: str, seeds: Sequence[int] = (0, 1), decays: Sequence[str] = ("0.1", "1")) -> tuple[Member, ...]:
    recipe = find_recipe("modular-smoke").override([*TINY, "steps=60", *settings])
    return plan_sweep(recipe, seeds=seeds, alternatives={"weight_decay": decays}, name="t")


def logs(members: Sequence[Member], runs: Path) -> Mapping[str, list[dict[str, float]]]:
    return {each.name: [{**row, "seconds": 0} for row in each.run(runs).log.rows] for each in members}


def contents(folder: Path) -> Mapping[str, tuple[int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings times two seeds, one after another; nobody writes to it."""
    runs = tmp_path_factory.mktemp("in_turn")
    assert train_members(plan(), runs=runs) == {}
    return runs


def workers() -> list[psutil.Process]:
    """The processes that train for this one, which other tests may have given servers and browsers too."""
    children = psutil.Process().children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "workbench.training.workers" in child.cmdline()]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    assert workers() == []


def test_every_run_is_trained_to_its_end(in_turn: Path) -> None:
    for member in plan():
        run = member.run(in_turn)
        assert run.status["reason"] == "steps used up"
        assert run.log.rows[-1]["step"] == 60
        assert run.folder.recipe_json()["train"]["weight_decay"] == member.recipe.train.weight_decay
    rows = logs(plan(), in_turn)
    assert len({str(each) for each in rows.values()}) == 4


def test_two_workers_leave_the_logs_of_one(in_turn: Path, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    train_members(plan(), runs=tmp_path, workers=2, on_progress=lambda *each: told.append(each))
    assert logs(plan(), tmp_path) == logs(plan(), in_turn)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert told[0][1] == "t-weight_decay-0.1-s0, t-weight_decay-1-s0"
    assert max(len(now.split(", ")) for _, now in told) == 2


def stop_when(members: Sequence[Member], runs: Path, step: int, act: Callable[[], None]) -> Callable[..., None]:
    """Acts once, when the last of the runs is beyond a step."""
    acted = False

    def on_progress(share: float, now: str) -> None:
        nonlocal acted
        rows = members[-1].run(runs).log.rows
        if not acted and rows and rows[-1]["step"] > step:
            acted = True
            act()

    return on_progress


def ctrl_c() -> None:
    raise KeyboardInterrupt


def kill_workers() -> list[int]:
    found = workers()
    for worker in found:
        worker.kill()
    return [worker.pid for worker in found]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    members = plan("steps=2000", "evaluate_every=100", seeds=[0])
    first, second = members
    with pytest.raises(Interrupted, match="What was trained is saved; the same command goes on"):
        train_members(members, runs=tmp_path, on_progress=stop_when(members, tmp_path, 100, ctrl_c))
    assert members_to_train(members, tmp_path) == (second,)
    untouched = contents(tmp_path / first.name)
    broken = (tmp_path / second.name / METRICS).read_bytes()
    step = second.run(tmp_path).log.rows[-1]["step"]
    assert 100 < step < 2000
    # And the worker that goes on with it is killed once, and tried again.
    killed: list[int] = []
    killing = stop_when(members, tmp_path, step, lambda: killed.extend(kill_workers()))
    assert train_members(members_to_train(members, tmp_path), runs=tmp_path, on_progress=killing) == {}
    assert len(killed) == 1
    assert contents(tmp_path / first.name) == untouched
    # The seconds are those of the first try: nothing up to the state was trained twice.
    assert (tmp_path / second.name / METRICS).read_bytes().startswith(broken)
    train_members([second], runs=tmp_path / "unbroken")
    assert logs([second], tmp_path) == logs([second], tmp_path / "unbroken")
    checkpoints = [second.run(runs).checkpoint().path.read_bytes() for runs in (tmp_path, tmp_path / "unbroken")]
    assert checkpoints[0] == checkpoints[1]


def test_runs_that_fail_again_and_again_take_no_other_with_them(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    recipe = find_recipe(f"{tmp_path}/faulty.py:faulty").override([*TINY, "steps=20"])
    members = plan_sweep(recipe, seeds=[0], alternatives={"p": ["13", "17", "19", "11"]}, name="t")
    assert train_members(members, runs=tmp_path / "runs", workers=2) == {
        "t-p-13-s0": "RuntimeError: no test today",
        "t-p-17-s0": "bad, bad world",
        "t-p-19-s0": "killed by SIGKILL",
    }
    assert [each.run(tmp_path / "runs").status["finished"] for each in members] == [False, False, False, True]
    # What they left is no obstacle once the fault is mended.
    assert members_to_train(members, tmp_path / "runs") == members[:3]


def test_what_died_before_its_first_state_begins_anew(tmp_path: Path) -> None:
    [member] = plan(seeds=[0], decays=["1"])
    train_members([member], runs=tmp_path)
    whole = logs([member], tmp_path)
    folder = tmp_path / member.name
    for path in [*(folder / "state").iterdir(), folder / "status.json"]:
        path.unlink()
    assert train_members(members_to_train([member], tmp_path), runs=tmp_path) == {}
    assert logs([member], tmp_path) == whole


def test_workers_leave_when_nobody_is_there_to_tell_them(tmp_path: Path) -> None:
    """The process that started them is killed: they see their input close, save and go."""
    [member] = plan("steps=30000", seeds=[0], decays=["1"])
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException):
            train_members([member], runs=tmp_path)
        os._exit(0)
    try:
        wait_until(lambda: len(member.run(tmp_path).log.rows) > 3)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    wait_until(lambda: not member.run(tmp_path).folder.busy)
    run = member.run(tmp_path)
    states = sorted((run.folder.path / "state").glob("*.safetensors"))
    assert int(states[-1].stem.removeprefix("step_")) >= run.log.rows[-1]["step"] > 0


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, -1])
def test_without_workers_nothing_is_trained(tmp_path: Path, workers: int) -> None:
    with pytest.raises(WorkbenchError, match=f"There must be at least one worker, got {workers}"):
        train_members(plan(), runs=tmp_path, workers=workers)
    assert not list(tmp_path.iterdir())
