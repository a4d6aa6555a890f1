"""Workers on a Ray cluster: each a task that starts the same process on a node, and minds it.

The runs folder must be on a disk that all nodes share, for there a run goes on from its last state wherever its node
has gone. Ray (extra `ray`) is imported here alone, and only when asked for. Whether an address answers is tried by a
process of its own first: Ray waits two minutes for one that does not, and then ends the process that asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.runtime import WorkbenchError, code_version
from workbench.store import RunFolder
from workbench.training.workers import Job, ProcessWorker

LOCAL = "local"
"""Ray's name for a cluster that is started on this machine and goes with this process."""
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 5.0
RELEASE_SECONDS = 60.0
"""How long a run may still be held by the worker before, which leaves when its node has died."""
LEAVE_SECONDS = 60.0
TICK = 0.1
QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}
PROBE = "import logging, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    ray: Any
    workers: int | None
    """Most runs at a time; None for as many as there are processors."""

    def room(self) -> int:
        """Runs that it has processors for, as its nodes are now."""
        processors = int(self.ray.cluster_resources().get("CPU", 0))
        return processors if self.workers is None else min(self.workers, processors)

    def start(self, job: Job) -> RayWorker:
        """A worker on whichever node has a processor to spare."""
        path = job.folder.path.resolve()
        # Its node must see it.
        path.mkdir(parents=True, exist_ok=True)
        # A node that dies is no reason for Ray to try again: that is counted in one place, with every other death.
        task = self.ray.remote(_work_on_node).options(num_cpus=1, max_retries=0, name=job.name)
        return RayWorker(
            ray=self.ray, result=task.remote(job.name, str(path), job.module, dict(job.told), code_version())
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RayWorker:
    """A task that does a job on a node."""

    ray: Any
    result: Any
    """Ray's reference to what it returns."""

    def ended(self) -> bool:
        """Whether it has returned, or died."""
        return bool(self.ray.wait([self.result], timeout=0)[0])

    def complaint(self) -> str | None:
        """What its process said last, or how it was lost."""
        try:
            return self.ray.get(self.result)
        except self.ray.exceptions.RayError as error:
            return f"lost: {type(error).__name__}"

    def stop(self) -> None:
        """Have the task interrupted, which stops its process."""
        self.ray.cancel(self.result)

    def wait(self) -> None:
        """Return when it has ended, or can no longer be waited for."""
        self.ray.wait([self.result], timeout=LEAVE_SECONDS)


@contextlib.contextmanager
def connected(address: str | None, *, workers: int | None) -> Iterator[Cluster]:
    """A connection to a cluster.

    Args:
        address: `host:port`, or `auto` for one that runs on this machine; None for the one that RAY_ADDRESS names, or
            else one that is started here and ends with the connection.
        workers: most runs at a time.

    Raises:
        WorkbenchError: Ray is not installed, or the address does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise WorkbenchError(
            "Ray is not installed: pip install 'interp-workbench[ray]', or choose --engine processes."
        ) from error
    address = address or os.environ.get("RAY_ADDRESS", LOCAL)
    if address == LOCAL:
        with _environment(RAY_USAGE_STATS_ENABLED="0"):
            ray.init(address=LOCAL, num_cpus=workers, include_dashboard=False, **QUIET)
    else:
        _check_answers(address)
        ray.init(address=address, **QUIET)
    try:
        yield Cluster(ray=ray, workers=workers)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise a WorkbenchError unless a Ray cluster answers there in time."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    fix = "Start one with `ray start --head`, or leave --address out for one on this machine."
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        subprocess.run(
            [sys.executable, "-c", PROBE, address], capture_output=True, check=True, text=True, timeout=ANSWER_SECONDS
        )
    except OSError as error:
        raise WorkbenchError(f"Nothing answers at the Ray address {address!r}: {error}. {fix}") from error
    except subprocess.TimeoutExpired as error:
        raise WorkbenchError(f"No Ray cluster at {address!r} answered in {ANSWER_SECONDS:g} seconds. {fix}") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["it said nothing"]
        raise WorkbenchError(f"The Ray address {address!r} cannot be used: {said[-1]} {fix}") from error


def _work_on_node(name: str, path: str, module: str, told: dict[str, Any], version: str) -> str | None:
    """A task's life, on its node: what its process said last if the job is not done."""
    folder = RunFolder(path=Path(path), reference=Path(path).name)
    if code_version() != version:
        return f"node {socket.gethostname()} has version {code_version()} of the workbench, not {version}"
    if not folder.path.is_dir():
        return f"node {socket.gethostname()} does not see {path}: put the runs on a disk that all nodes share"
    end = time.monotonic() + RELEASE_SECONDS
    while folder.busy and time.monotonic() < end:
        time.sleep(TICK)
    with tempfile.TemporaryDirectory() as logs:
        job = Job(name=name, folder=folder, module=module, told=told)
        worker = ProcessWorker.start(job, logs=Path(logs), alone=False)
        try:
            # Not in one wait, which Ray could not interrupt.
            while not worker.ended():
                time.sleep(TICK)
        finally:
            worker.stop()
            worker.wait()
        return worker.complaint()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables, unless they are set, until the block ends."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
