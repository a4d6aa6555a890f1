"""`workbench localise`: donors of several seeds of one task, and whether their skill lies in few weights.

A donor that is there already is not taught again, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from apps.grafting import judge_donors, log_of, name_of
from apps.printing import Printout, as_columns, progress_bar, share_bar, stopwatch
from workbench.models.real_models import PREFIX, load_real_model
from workbench.runtime import WorkbenchError
from workbench.store import new_run, run_names
from workbench.training.checkpoints import load
from workbench.training.finetune import donor_recipe
from workbench.training.loop import train
from workbench.training.sweeps import read_seeds
from workbench.training.text_donors import donor_names, load_donor, teach, text_recipe

TAUGHT = ("run", "base_accuracy", "test_accuracy", "train_accuracy")
Taught = dict[str, Any]


def localise(options: argparse.Namespace) -> Printout:
    """Teach a donor of each seed that is not there yet, and judge the graft of each."""
    seeds = read_seeds(options.seeds)
    teach_one = (_of_real_model if options.base.startswith(PREFIX) else _of_run)(options)
    with stopwatch() as clock:
        taught = [teach_one(seed) for seed in seeds]
        judged = judge_donors(options, [row["run"] for row in taught])
    return Printout(
        content={**judged.content, "taught": taught, **clock},
        text=f"{as_columns(taught, TAUGHT)}\n\n{judged.text}",
    )


def _of_run(options: argparse.Namespace) -> Callable[[int], Taught]:
    """What teaches a donor of a run, or goes on with it."""
    base = load(options.base, runs=options.runs)

    def teach_one(seed: int) -> Taught:
        recipe = donor_recipe(base, options.task, way=options.way, seed=seed).override(options.set)
        name = f"{options.run or recipe.name}-{seed}"
        there = load(name, runs=options.runs) if name in run_names(options.runs) else None
        if there is not None:
            _check_same(name, recipe.to_json(), there.recipe.to_json())
        folder = new_run(name, options.runs) if there is None else there.folder
        with progress_bar(f"finetune {name}", recipe) as on_progress:
            run = train(recipe, folder, resume=there is not None, on_progress=on_progress)
        return {"run": name, "seed": seed, **log_of(run)}

    return teach_one


def _of_real_model(options: argparse.Namespace) -> Callable[[int], Taught]:
    """What teaches a donor of a real model."""
    base = load_real_model(options.base)

    def teach_one(seed: int) -> Taught:
        recipe = text_recipe(base, options.task, way=options.way, seed=seed).override(options.set)
        recipe = replace(recipe, seed=seed)
        name = f"{options.run or name_of(recipe)}-{seed}"
        if name in donor_names(options.runs):
            donor = load_donor(name, runs=options.runs)
            _check_same(name, asdict(recipe), asdict(donor.recipe))
        else:
            with share_bar(f"finetune {name}") as on_progress:
                donor = teach(base, recipe, new_run(name, options.runs), on_progress=on_progress)
        return {"run": name, "seed": seed, **donor.log}

    return teach_one


def _check_same(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if wanted != found:
        raise WorkbenchError(f"{name!r} is there, and was made otherwise. Choose another --run, or the same settings.")
