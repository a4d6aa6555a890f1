"""How the runs of a sweep are trained: each in a process of its own, a few at a time.

A worker (`python -m workbench.training.engines FOLDER`) reads its recipe from standard input, trains it into the folder
or goes on with what is there, and stops, its state saved, as soon as its input is closed. So one mechanism serves
Ctrl-C, an error here, and the death of this process, after which nobody could close it. A worker that dies takes no
other with it, and is tried once more from its last state.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, writing
from workbench.training.checkpoints import METRICS, Run
from workbench.training.loop import Interrupted, train
from workbench.training.recipe import Recipe
from workbench.training.sweeps import Member

TRIES = 2
TICK = 0.1
"""Seconds between two looks at the workers."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

OnSweep = Callable[[float, str], None]
"""Called with the share of all steps that is done, and what is trained now."""


def train_in_processes(
    members: Sequence[Member], *, runs: Path | None = None, workers: int = 1, on_progress: OnSweep | None = None
) -> dict[str, str]:
    """Train the runs of a sweep, `workers` at a time; of several each has one thread.

    Returns:
        Name of each run that failed as often as it was tried -> what its worker said last.

    Raises:
        WorkbenchError: there is no worker.
        Interrupted: it was asked to stop; every state is saved.
    """
    if workers < 1:
        raise WorkbenchError(f"A sweep needs at least one worker, got {workers}.")
    waiting, tries = deque(member.run(runs) for member in members), Counter[str]()
    running: list[_Worker] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as logs:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_Worker.start(waiting.popleft(), Path(logs), alone=workers == 1))
                time.sleep(TICK)
                for worker in _ended(running):
                    name = worker.run.reference
                    tries[name] += 1
                    if worker.process.returncode != 0 and tries[name] < TRIES:
                        waiting.appendleft(worker.run)
                    elif worker.process.returncode != 0:
                        failed[name] = worker.last_words()
                if on_progress is not None:
                    on_progress(_share(members, running, waiting), ", ".join(each.run.reference for each in running))
        except KeyboardInterrupt as error:
            raise Interrupted("What was trained is saved; the same command goes on from there.") from error
        finally:
            _stop(running)
    return failed


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Worker:
    """A process that trains a run."""

    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    """What it says."""

    @classmethod
    def start(cls, run: Run, logs: Path, *, alone: bool) -> _Worker:
        log = logs / run.reference
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "workbench.training.engines", str(run.folder.path)],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
                env=dict(os.environ) if alone else {**os.environ, **ONE_THREAD},
                # A terminal's Ctrl-C goes to its whole group: it is for this process alone, which tells the workers.
                start_new_session=True,
            )
        assert process.stdin is not None
        # One that died at birth reads nothing; its exit code is seen later.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(run.recipe.to_json()).encode() + b"\n")
            process.stdin.flush()
        return cls(run=run, process=process, log=log)

    def last_words(self) -> str:
        """Its error's last line, or how it died."""
        code = self.process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"

    def close_input(self) -> None:
        """Let it save its state and leave, if it has not."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _ended(running: list[_Worker]) -> list[_Worker]:
    """Takes those that have ended out of the list."""
    ended = [worker for worker in running if worker.process.poll() is not None]
    for worker in ended:
        worker.close_input()
        running.remove(worker)
    return ended


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close_input()
    for worker in workers:
        worker.process.wait()


def _share(members: Sequence[Member], running: Sequence[_Worker], waiting: Sequence[Run]) -> float:
    """Steps that are done, of the most that all runs may take; a run that has ended needs none of the others."""
    most = {member.name: member.recipe.trainable().steps for member in members}
    rows = {worker.run.reference: worker.run.folder.lines(METRICS) for worker in running}
    left = {name: most[name] - (lines[-1]["step"] if lines else 0) for name, lines in rows.items()}
    left |= {run.reference: most[run.reference] for run in waiting}
    return 1 - sum(left.values()) / sum(most.values())


def _work(folder: RunFolder) -> None:
    """A worker's life: recipe in, run out."""
    recipe = Recipe.from_json(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    resume = any((folder.path / "state").glob("step_*.json"))
    if not resume:
        _clear(folder)
    train(recipe, folder, resume=resume)


def _clear(folder: RunFolder) -> None:
    """An empty folder: without a state there is no work to lose, only what a run that died at birth has left."""
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.lock():
            for path in folder.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()


def _stop_when_input_closes() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    try:
        _work(RunFolder(path=path, reference=path.name))
    except WorkbenchError as error:
        sys.exit(" ".join(str(error).split()))
