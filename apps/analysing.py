"""Checkpoints analysed apart, by the engines that train sweeps, and the worker that analyses one.

What a worker finds is kept under its key in the run's folder, as by the same command at that checkpoint alone. So the
command at all checkpoints reads what was kept, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from apps.analyses import key_of
from apps.printing import share_bar
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, kept_result
from workbench.training.checkpoints import Run
from workbench.training.engines import check_engine, do_jobs
from workbench.training.workers import Job, work


def analyse_apart(
    run: Run, name: str, arguments: Mapping[str, Any], steps: Sequence[int], options: argparse.Namespace
) -> None:
    """Have workers keep an analysis at these steps, where it is not kept yet.

    Raises:
        WorkbenchError: the engine is none that has workers, or cannot be had, or a checkpoint could not be analysed.
    """
    engine = check_engine(options.engine, workers=options.workers, address=options.address)
    if engine == "batched":
        raise WorkbenchError("Engine 'batched' trains runs as one model. Choose --engine turn, processes or ray.")
    jobs = [
        _job(run, name, step, options)
        for step in steps
        if kept_result(run.folder, key_of(run, name, step, arguments)) is None
    ]
    with share_bar(f"{name} of {len(jobs)} checkpoints") as on_share:

        def look(running: Sequence[Job], waiting: Sequence[Job]) -> None:
            on_share(1 - (len(running) + len(waiting)) / len(jobs))

        failed = do_jobs(jobs, engine, workers=options.workers, address=options.address, on_look=look)
    if failed:
        job, reason = next(iter(failed.items()))
        raise WorkbenchError(f"{len(failed)} of {len(jobs)} checkpoints could not be analysed. {job}: {reason}")


def _job(run: Run, name: str, step: int, options: argparse.Namespace) -> Job:
    """The command that is asked for, at one checkpoint and in turn."""
    alone = {"run": str(run.folder.path.resolve()), "runs": None, "checkpoint": str(step)}
    told = {**vars(options), **alone, "engine": None, "workers": None, "address": None}
    return Job(name=f"{name} at step {step}", folder=run.folder, module="apps.analysing", told=told)


def _analyse(folder: RunFolder, told: Mapping[str, Any]) -> None:
    getattr(import_module(f"apps.{told['room']}"), told["function"])(argparse.Namespace(**told))


if __name__ == "__main__":
    work(_analyse)
