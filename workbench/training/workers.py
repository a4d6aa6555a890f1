"""Who does a job, such as training a run of a sweep: a process, here or on a node of a cluster.

A worker (`python -m MODULE FOLDER`) reads what it is told from standard input, works on the folder, and stops as soon
as its input is closed. So one mechanism serves Ctrl-C, an error in the process that started it, and the death of that
process, after which nobody could close it. This module's own trains: it is told a recipe, goes on with what is in the
folder, and saves its state before it stops.

Who minds a worker needs no torch, so what trains is imported by the worker itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, writing

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker does."""

    name: str
    """Of its own among all that are done together."""
    folder: RunFolder
    module: str
    """Run as a program, on the folder."""
    told: Mapping[str, Any]
    """What it reads, as JSON."""


@runtime_checkable
class Worker(Protocol):
    """Does a job, wherever that is."""

    def ended(self) -> bool:
        """Whether it is no longer at work."""
        ...

    def complaint(self) -> str | None:
        """Of one that has ended: why the job is not done; None if it is."""
        ...

    def stop(self) -> None:
        """Ask it to leave."""
        ...

    def wait(self) -> None:
        """Return when it has left."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProcessWorker:
    """A process on this machine."""

    process: subprocess.Popen[bytes]
    log: Path
    """What it says."""

    @classmethod
    def start(cls, job: Job, *, logs: Path, alone: bool) -> ProcessWorker:
        """A new process; unless it is alone it gets one thread."""
        log = logs / job.name
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", job.module, str(job.folder.path)],
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
            process.stdin.write(json.dumps(job.told).encode() + b"\n")
            process.stdin.flush()
        return cls(process=process, log=log)

    def ended(self) -> bool:
        """Whether the process has exited."""
        return self.process.poll() is not None

    def complaint(self) -> str | None:
        """Its error's last line, or how it died."""
        self.stop()
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"

    def stop(self) -> None:
        """Close its input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self) -> None:
        """Return when it has exited."""
        self.process.wait()


def train_job(folder: RunFolder, recipe: Mapping[str, Any]) -> Job:
    """Training a run by a recipe as JSON keeps it."""
    return Job(name=folder.path.name, folder=folder, module="workbench.training.workers", told=recipe)


def work(do: Callable[[RunFolder, Any], None]) -> None:
    """A worker's life: told on standard input what to do with its folder, it does that, and leaves when asked to."""
    path = Path(sys.argv[1])
    told = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    try:
        do(RunFolder(path=path, reference=path.name), told)
    except WorkbenchError as error:
        sys.exit(" ".join(str(error).split()))


def _train(folder: RunFolder, recipe: Mapping[str, Any]) -> None:
    from workbench.training.loop import train
    from workbench.training.recipe import Recipe

    train(Recipe.from_json(recipe), folder, resume=prepare(folder))


def prepare(folder: RunFolder) -> bool:
    """Whether there is a state to resume from; if not, the folder is emptied of what a run left that died at birth."""
    if any((folder.path / "state").glob("step_*.json")):
        return True
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.lock():
            for path in folder.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
    return False


def _stop_when_input_closes() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    work(_train)
