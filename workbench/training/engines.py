"""How many jobs are done, such as the runs of a sweep: in turn, several at a time, as one model, or on a Ray cluster.

Whatever does them, a result is what it would be alone: a run with its own log, checkpoints and states, an analysis kept
under its key. So what was stopped goes on where it was, by any engine. A worker that dies takes no other with it, and
its job is tried once more.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from workbench.runtime import WorkbenchError, processors
from workbench.tasks.base import check_choice
from workbench.training.checkpoints import METRICS, Run
from workbench.training.loop import Interrupted
from workbench.training.sweeps import Member
from workbench.training.workers import Job, ProcessWorker, Worker, train_job

ENGINES = ("turn", "processes", "batched", "ray")
TRIES = 2
TICK = 0.1
"""Seconds between two looks at the workers."""

log = logging.getLogger(__name__)

OnSweep = Callable[[float, str], None]
"""Called with the share of all steps that is done, and what is trained now."""
OnLook = Callable[[Sequence[Job], Sequence[Job]], None]
"""Called with the jobs that are being done, and those that wait."""


def train_members(
    members: Sequence[Member],
    *,
    runs: Path | None = None,
    engine: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    on_progress: OnSweep | None = None,
) -> dict[str, str]:
    """Train the runs of a sweep.

    Args:
        members: what to train, or go on with.
        runs: the runs folder.
        engine: one of `ENGINES`; by default in turn, or in processes where several workers are asked for.
        workers: runs trained at a time, by the engines that have workers; by default as many as there are processors.
        address: of the Ray cluster; by default one on this machine for as long as the sweep takes.
        on_progress: told of what is done.

    Returns:
        Name of each run that failed as often as it was tried -> what its worker said last.

    Raises:
        WorkbenchError: the engine is unknown, cannot be had, or does not take these options.
        Interrupted: it was asked to stop; every state is saved.
    """
    engine = check_engine(engine, workers=workers, address=address)
    if not members:
        return {}
    if engine == "batched":
        return _train_batched(members, runs=runs, on_progress=on_progress)
    return _train_apart(members, engine, runs=runs, workers=workers, address=address, on_progress=on_progress)


def check_engine(engine: str | None, *, workers: int | None, address: str | None) -> str:
    """The engine that is asked for, or that these options ask for.

    Raises:
        WorkbenchError: it is unknown or does not take these options.
    """
    engine = engine or ("turn" if workers in (None, 1) else "processes")
    check_choice("engine", engine, ENGINES)
    if workers is not None and workers < 1:
        raise WorkbenchError(f"There must be at least one worker, got {workers}.")
    if workers not in (None, 1) and engine in ("turn", "batched"):
        raise WorkbenchError(f"Engine {engine!r} has one worker, got {workers}. Choose --engine processes or ray.")
    if address is not None and engine != "ray":
        raise WorkbenchError(f"Engine {engine!r} has no address, got {address!r}. Choose --engine ray.")
    return engine


def do_jobs(
    jobs: Sequence[Job],
    engine: str,
    *,
    workers: int | None = None,
    address: str | None = None,
    on_look: OnLook = lambda running, waiting: None,
) -> dict[str, str]:
    """Every job by a worker of its own: one after another, in processes, or on a Ray cluster.

    Args:
        jobs: what to do.
        engine: one of `ENGINES` but `batched`.
        workers: jobs done at a time; by default as many as there are processors.
        address: of the Ray cluster; by default one on this machine for as long as the jobs take.
        on_look: told, a few times a second, what is done and what waits.

    Returns:
        Name of each job that failed as often as it was tried -> what its worker said last.

    Raises:
        WorkbenchError: the engine cannot be had.
        Interrupted: it was asked to stop.
    """
    if engine == "ray":
        from workbench.training.cluster import connected

        with connected(address, workers=workers) as cluster:
            return _do_apart(jobs, cluster.start, cluster.room, on_look)
    at_once = 1 if engine == "turn" else workers or processors()
    with tempfile.TemporaryDirectory() as logs:
        start = partial(ProcessWorker.start, logs=Path(logs), alone=at_once == 1)
        return _do_apart(jobs, start, lambda: at_once, on_look)


def _train_batched(members: Sequence[Member], *, runs: Path | None, on_progress: OnSweep | None) -> dict[str, str]:
    """As one model each family of runs that can be; what has no company in turn, and that is said."""
    from workbench.training.batched import batch_key, train_together

    families: dict[str | None, list[Member]] = {}
    for member in members:
        families.setdefault(batch_key(member.recipe), []).append(member)
    alone = families.pop(None, [])
    alone += [family.pop() for family in families.values() if len(family) == 1]
    together = [family for family in families.values() if family]
    most, done, failed = sum(member.recipe.trainable().steps for member in members), 0, {}

    def tell(part: Sequence[Member], share: float, now: str) -> None:
        """The share of some of the members as one of all."""
        if on_progress is not None:
            own = sum(member.recipe.trainable().steps for member in part)
            on_progress((done + share * own) / most, now)

    for family in together:
        failed |= train_together(family, runs=runs, on_progress=partial(tell, family))
        done += sum(member.recipe.trainable().steps for member in family)
    if alone:
        log.warning(
            "%d of %d runs are trained in turn: they are no plain AdamW on the whole training split, or no other run "
            "has their architecture and schedule.",
            len(alone),
            len(members),
        )
        failed |= _train_apart(alone, "turn", runs=runs, on_progress=partial(tell, alone))
    return failed


def _train_apart(
    members: Sequence[Member],
    engine: str,
    *,
    runs: Path | None,
    workers: int | None = None,
    address: str | None = None,
    on_progress: OnSweep | None,
) -> dict[str, str]:
    """Every run by a worker of its own."""
    by_name = {run.folder.path.name: run for run in (member.run(runs) for member in members)}

    def look(running: Sequence[Job], waiting: Sequence[Job]) -> None:
        if on_progress is not None:
            now, later = ([by_name[job.name] for job in jobs] for jobs in (running, waiting))
            on_progress(_share(members, now, later), ", ".join(run.reference for run in now))

    jobs = [train_job(run.folder, run.recipe.to_json()) for run in by_name.values()]
    failed = do_jobs(jobs, engine, workers=workers, address=address, on_look=look)
    return {by_name[name].reference: reason for name, reason in failed.items()}


def _do_apart(
    jobs: Sequence[Job], start: Callable[[Job], Worker], room: Callable[[], int], on_look: OnLook
) -> dict[str, str]:
    """As many jobs at a time as there is room for now."""
    waiting, tries = deque(jobs), Counter[str]()
    running: list[tuple[Job, Worker]] = []
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < room():
                job = waiting.popleft()
                running.append((job, start(job)))
            time.sleep(TICK)
            for job, worker in [each for each in running if each[1].ended()]:
                running.remove((job, worker))
                complaint = worker.complaint()
                tries[job.name] += 1
                if complaint is not None and tries[job.name] < TRIES:
                    waiting.appendleft(job)
                elif complaint is not None:
                    failed[job.name] = complaint
            on_look([job for job, _ in running], waiting)
    except KeyboardInterrupt as error:
        raise Interrupted("What was trained is saved; the same command goes on from there.") from error
    finally:
        for _, worker in running:
            worker.stop()
        for _, worker in running:
            worker.wait()
    return failed


def _share(members: Sequence[Member], running: Sequence[Run], waiting: Sequence[Run]) -> float:
    """Steps that are done, of the most that all runs may take; a run that has ended needs none of the others."""
    most = {member.name: member.recipe.trainable().steps for member in members}
    rows = {run.reference: run.folder.lines(METRICS) for run in running}
    left = {name: most[name] - (lines[-1]["step"] if lines else 0) for name, lines in rows.items()}
    left |= {run.reference: most[run.reference] for run in waiting}
    return 1 - sum(left.values()) / sum(most.values())
