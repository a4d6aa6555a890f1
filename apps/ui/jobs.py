"""Jobs: long commands as processes of their own, which outlive the page that started them, and the server.

    <runs>/.jobs/<id>/job.json       what was started; without it the folder is no job
                      lock           held by every process of the job for as long as it lives
                      output         what the command printed: with --json, one object
                      log            what it told on standard error
                      cancel         there once somebody asked it to stop
                      exit.json      the exit code, written by the supervisor

The folder is all there is: no list in memory. Whether a job runs is whether its lock is held, so that neither a process
id that was given to another process nor a zombie is mistaken for it. The supervisor (`python -m apps.ui.jobs FOLDER`)
is there because only a parent learns an exit code, and the server may be gone by then. A job is the leader of its own
session: the Ctrl-C that ends the server does not reach it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.runtime import WorkbenchError
from workbench.store import read_json, runs_root, write_json, writing

FOLDER = ".jobs"
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
TAIL_BYTES = 65_536

Status = Literal["running", "stopping", "finished", "cancelled", "failed", "died"]
"""`failed` ended by itself with an error; `died` vanished without an exit code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that was started, and where it keeps its state."""

    path: Path
    arguments: tuple[str, ...]
    """What follows `workbench` on the command line."""
    subject: str
    """What the job is about: the name of a run."""
    started: float
    """Seconds since the epoch."""
    group: int
    """Process group of the job."""

    @property
    def id(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def kind(self) -> str:
        """The command: train, report, ..."""
        return self.arguments[0]

    @property
    def running(self) -> bool:
        """Whether any process of the job lives."""
        try:
            with (self.path / "lock").open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def exit_code(self) -> int | None:
        """The command's exit code (minus the signal that killed it); None while it runs, or if it died unseen."""
        path = self.path / "exit.json"
        return read_json(path)["code"] if path.exists() else None

    @property
    def status(self) -> Status:
        """How it stands."""
        asked = (self.path / "cancel").exists()
        # The lock is looked at before the exit code: a job that ends in between is then seen as ended.
        if self.running:
            return "stopping" if asked else "running"
        if self.exit_code == 0:
            return "finished"
        # A job cancelled before it was quite up leaves no exit code.
        if asked:
            return "cancelled"
        return "died" if self.exit_code is None else "failed"

    @property
    def seconds(self) -> float:
        """Wall time so far, or in all; for a job that died, until its last sign of life."""
        if self.running:
            return time.time() - self.started
        path = self.path / "exit.json"
        return (path if path.exists() else self.path / "log").stat().st_mtime - self.started

    @property
    def result(self) -> dict[str, Any] | None:
        """The JSON object that the command printed; None if it printed none."""
        try:
            content = json.loads((self.path / "output").read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def tail(self, lines: int = 20) -> str:
        """The last lines of what it told."""
        path = self.path / "log"
        if not path.exists():
            return ""
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = handle.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def cancel(self) -> None:
        """Ask it to stop as Ctrl-C does, so that it saves its state; asked again, it stops at once."""
        if not self.running:
            return
        with writing(self.path):
            (self.path / "cancel").touch()
        # The group may end between the look at the lock and here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGINT)

    def forget(self) -> None:
        """Remove the job's folder; what the command made stays.

        Raises:
            WorkbenchError: it still runs.
        """
        if self.running:
            raise WorkbenchError(f"Job {self.id} still runs. Cancel it first.")
        shutil.rmtree(self.path, ignore_errors=True)


def start(arguments: Sequence[str], *, subject: str, runs: Path | None = None) -> Job:
    """Start `workbench ARGUMENTS` over a runs folder, as a process of its own."""
    return start_process([sys.executable, "-m", "apps.cli", *arguments], arguments, subject=subject, runs=runs)


def start_process(command: Sequence[str], arguments: Sequence[str], *, subject: str, runs: Path | None = None) -> Job:
    """Start any command as a job that goes by the given arguments."""
    root = runs_root(runs).resolve()
    path = root / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with writing(path), contextlib.ExitStack() as stack:
        path.mkdir(parents=True)
        lock = stack.enter_context((path / "lock").open("wb"))
        log = stack.enter_context((path / "log").open("wb"))
        output = stack.enter_context((path / "output").open("wb"))
        # The job is born with the lock: there is no moment at which it lives without it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "apps.ui.jobs", str(path), str(lock.fileno()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],
            env={**os.environ, "WORKBENCH_RUNS": str(root)},
        )
    # Reaps the process when it ends.
    threading.Thread(target=process.wait, daemon=True).start()
    content = {"arguments": list(arguments), "subject": subject, "started": time.time(), "group": process.pid}
    try:
        write_json(path / "job.json", content)
    except BaseException:
        # Nothing may run that no page can find.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return _read(path)


def find_job(job_id: str, runs: Path | None = None) -> Job:
    """The job with that id.

    Raises:
        WorkbenchError: there is none.
    """
    path = runs_root(runs).resolve() / FOLDER / job_id
    if not ID.fullmatch(job_id) or not (path / "job.json").is_file():
        raise WorkbenchError(f"No job {job_id!r} in {path.parent}. Start one from the page Train or Report.")
    return _read(path)


def list_jobs(runs: Path | None = None, kind: str | None = None) -> list[Job]:
    """Jobs, newest first; of one command, if it is named."""
    folder = runs_root(runs).resolve() / FOLDER
    paths = [path.parent for path in folder.glob("*/job.json") if ID.fullmatch(path.parent.name)]
    jobs = sorted(map(_read, paths), key=lambda job: job.started, reverse=True)
    return [job for job in jobs if kind in (None, job.kind)]


def supervise(folder: Path, lock: int, command: Sequence[str]) -> int:
    """Run a command to its end and leave its exit code in the job's folder."""
    # The group's Ctrl-C is for the command. A handler, unlike "ignore", is not inherited by it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    code = subprocess.call(command, pass_fds=[lock])
    write_json(folder / "exit.json", {"code": code})
    return code


def _read(path: Path) -> Job:
    content = read_json(path / "job.json")
    return Job(
        path=path,
        arguments=tuple(content["arguments"]),
        subject=content["subject"],
        started=content["started"],
        group=content["group"],
    )


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
