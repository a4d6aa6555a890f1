"""`workbench forget`: the tasks of several donors one after the other in one base."""

from __future__ import annotations

import argparse

from apps.graft_pairs import answers_of, pair_of_runs
from apps.printing import Printout, as_columns, share_bar, stopwatch
from circuits.forgetting import Lesson, learn_in_sequence
from circuits.graft_masks import find_graft
from workbench.models.real_models import PREFIX
from workbench.runtime import WorkbenchError
from workbench.training.checkpoints import Run, load
from workbench.training.sweeps import read_seeds

STEPS = ("way", "learnt_last", "task", "accuracy", "accuracy_low", "accuracy_high")


def forget(options: argparse.Namespace) -> Printout:
    """Find each donor's region, teach the base their tasks in sequence in each way, and say what is forgotten."""
    if options.base.startswith(PREFIX):
        raise WorkbenchError("`workbench forget` takes a run of the recipe skills as its base, not a real model.")
    if len(set(options.donors)) < 2:
        raise WorkbenchError("Something can be forgotten from the second task on: name two donors or more, got 1.")
    seeds = read_seeds(options.seeds)
    with stopwatch() as clock, share_bar(f"forget {', '.join(options.donors)}") as on_progress:
        base = load(options.base, runs=options.runs)
        lessons = {}
        for name in options.donors:
            lessons[name] = _lesson(base, load(name, runs=options.runs), options)
            on_progress(0.5 * len(lessons) / len(options.donors))
        found = learn_in_sequence(
            base.model(),
            lessons,
            read=answers_of,
            seeds=seeds,
            on_progress=lambda share: on_progress(0.5 + share / 2),
        )
    content = {"base": options.base, "density": options.density, **found.summary(), **clock}
    ways, steps = found.summary_rows.to_dict("records"), found.tables()[0].frame.to_dict("records")
    text = "\n\n".join([found.tables()[1].caption, as_columns(ways, list(ways[0])), as_columns(steps, STEPS)])
    return Printout(content=content, text=text)


def _lesson(base: Run, donor: Run, options: argparse.Namespace) -> Lesson:
    """What a donor learnt, where a graft found it, and the settings that it was trained with."""
    pair, train = pair_of_runs(base, donor), donor.recipe.trainable()
    if train.optimiser not in ("adamw", "sgd") or train.batch_size is None:
        raise WorkbenchError(
            f"{donor.reference!r} was trained by {train.optimiser} in batches of {train.batch_size}; tasks in sequence "
            "are trained by adamw or sgd in batches of some size. Make a donor without these settings."
        )
    graft = find_graft(
        pair.delta(),
        pair.examples_to_learn(options.examples),
        method=options.method,
        density=options.density,
        steps=options.steps,
    )
    train_part = donor.task.examples("train")
    return Lesson(
        inputs=train_part.tokens,
        labels=train_part.targets[train_part.read],
        test=pair.examples("test"),
        region=graft.mask,
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        optimiser=train.optimiser,
        l1_to_start=train.l1_to_start,
    )
