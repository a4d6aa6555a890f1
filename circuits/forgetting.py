"""Tasks learnt one after the other in one model: what the later ones do to the earlier ones.

Each task is trained from where the one before it ended, in one of `WAYS`: all weights may change; all but those of the
earlier tasks' regions (the setting of Panigrahi et al. 2023, section 6); or the task's own region alone, as far as no
earlier task holds it. After each task all are tested again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.graft_masks import Labelled, OnProgress
from circuits.grafting import Mask
from workbench.intervals import Estimate, columns_of, mean_of, student_of
from workbench.runtime import WorkbenchError, generator
from workbench.tables import Table
from workbench.training.finetune import fit

Way = Literal["all weights", "outside earlier regions", "own region"]
WAYS: tuple[Way, ...] = ("all weights", "outside earlier regions", "own region")
BEFORE = "nothing"
"""What was learnt last where nothing has been yet."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """A task in the sequence, and how it is taught."""

    inputs: Int[Tensor, "example pos"]
    labels: Int[Tensor, " example"]
    test: Labelled
    region: Mask
    """Where a graft found the task: of each tensor that is trained."""
    steps: int
    batch_size: int
    learning_rate: float
    """At the first step; it falls linearly to 0."""
    optimiser: Literal["adamw", "sgd"]
    l1_to_start: float

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each step, drawn with repeats."""
        rng = generator(seed, "lesson batches")
        for _ in range(self.steps):
            rows = torch.randint(len(self.labels), (self.batch_size,), generator=rng).to(self.labels.device)
            yield self.inputs[rows], self.labels[rows]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Forgetting:
    """What each task's test said after each lesson."""

    tasks: tuple[str, ...]
    right: Mapping[Way, Bool[Tensor, "seed stage task example"]]
    """The first stage is the base; each other one, what comes after a lesson."""

    @property
    def summary_rows(self) -> pd.DataFrame:
        """Of each way: accuracy of a task just learnt and of all at the end, and what earlier tasks lost between."""
        rows = []
        for way, right in self.right.items():
            share = right.double()
            last, tasks = len(self.tasks), range(len(self.tasks))
            learnt = torch.stack([share[:, task + 1, task] for task in tasks], 1)
            end = share[:, last]
            figures = {
                "just_learnt": learnt.mean(1),
                "at_the_end": end.mean(1),
                "forgotten": (learnt - end)[:, :-1].mean(1),
            }
            row = {name: columns_of(name, _estimate(values)) for name, values in figures.items()}
            rows.append({"way": way, **{key: value for each in row.values() for key, value in each.items()}})
        return pd.DataFrame(rows)

    def tables(self) -> tuple[Table, ...]:
        """Accuracy of each task after each lesson, and what was learnt and forgotten in each way."""
        seeds, _, _, n = next(iter(self.right.values())).shape
        said = f"n = {n:,} test examples of each task, {_said(seeds)}"
        rows = [
            {
                "way": way,
                "learnt_last": after,
                "task": task,
                **columns_of("accuracy", _estimate(right[:, stage, place])),
            }
            for way, right in self.right.items()
            for stage, after in enumerate((BEFORE, *self.tasks))
            for place, task in enumerate(self.tasks)
        ]
        return (
            Table(
                name="forgetting_steps",
                frame=pd.DataFrame(rows),
                kind="table",
                axes={},
                unit="accuracy",
                caption=f"Accuracy of each task after each lesson; {said}.",
            ),
            Table(
                name="forgetting",
                frame=self.summary_rows,
                kind="bar",
                axes={"x": "way", "y": "forgotten", "low": "forgotten_low", "high": "forgotten_high"},
                unit="accuracy",
                caption=f"Accuracy that earlier tasks lost to later ones, mean over them; {said}.",
            ),
        )

    def summary(self) -> dict[str, object]:
        """All rows of both tables."""
        steps, ways = (table.frame.to_dict("records") for table in self.tables())
        seeds, _, _, n = next(iter(self.right.values())).shape
        return {"tasks": list(self.tasks), "n": n, "seeds": seeds, "ways": ways, "steps": steps}


def learn_in_sequence(
    module: nn.Module,
    lessons: Mapping[str, Lesson],
    *,
    read: Callable[[Any], Float[Tensor, "batch label"]],
    seeds: Sequence[int] = (0,),
    on_progress: OnProgress = lambda share: None,
) -> Forgetting:
    """Teach a copy of a model one task after the other in each way.

    Args:
        module: the base; it is not changed.
        lessons: in their order, by name.
        read: from what the module returns to the labels' logits.
        seeds: of the batches.
        on_progress: told the share that is done.

    Raises:
        WorkbenchError: there are fewer than two tasks, or their tests differ in size.
    """
    if len(lessons) < 2:
        raise WorkbenchError(f"Something can be forgotten from the second task on; got {len(lessons)} of them.")
    if len({len(lesson.test) for lesson in lessons.values()}) > 1:
        raise WorkbenchError("The tasks' tests must have as many examples each.")
    total = len(WAYS) * len(seeds)
    right = {}
    for place, way in enumerate(WAYS):
        found = []
        for seed in seeds:
            found.append(_taught(module, lessons, way, read, seed))
            on_progress((place * len(seeds) + len(found)) / total)
        right[way] = torch.stack(found)
    return Forgetting(tasks=tuple(lessons), right=right)


def _taught(
    module: nn.Module, lessons: Mapping[str, Lesson], way: Way, read: Callable[[Any], Tensor], seed: int
) -> Bool[Tensor, "stage task example"]:
    """Whether each test example is right before all lessons and after each."""
    taught = copy.deepcopy(module)
    names = list(next(iter(lessons.values())).region)
    taken = {name: torch.zeros_like(mask) for name, mask in next(iter(lessons.values())).region.items()}
    stages = [_right(taught, names, lessons)]
    for lesson in lessons.values():
        within = {
            "all weights": None,
            "outside earlier regions": {name: ~mask for name, mask in taken.items()},
            "own region": {name: mask & ~taken[name] for name, mask in lesson.region.items()},
        }[way]
        fit(
            taught,
            names,
            lesson.batches(seed),
            rate=partial(_falling, lesson),
            optimiser=lesson.optimiser,
            l1_to_start=lesson.l1_to_start,
            within=within,
            read=read,
        )
        taken = {name: mask | lesson.region[name] for name, mask in taken.items()}
        stages.append(_right(taught, names, lessons))
    return torch.stack(stages)


def _falling(lesson: Lesson, step: int) -> float:
    return lesson.learning_rate * (1 - step / lesson.steps)


def _right(module: nn.Module, names: Sequence[str], lessons: Mapping[str, Lesson]) -> Bool[Tensor, "task example"]:
    weights = {name: module.get_parameter(name).detach() for name in names}
    return torch.stack([lesson.test.logits(weights).argmax(1) == lesson.test.answers for lesson in lessons.values()])


def _estimate(values: Tensor) -> Estimate:
    """The mean over examples of one seed, or over seeds of their means; values are [seed, example]."""
    values = values.double()
    return mean_of(values[0]) if len(values) == 1 else student_of(values.mean(1))


def _said(seeds: int) -> str:
    return "95 % bootstrap intervals" if seeds == 1 else f"means over {seeds} seeds with Student's 95 % intervals"
