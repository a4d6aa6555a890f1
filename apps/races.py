"""Time to generalise, in two parts that are never multiplied: what the engine gains, and what the recipe gains.

Both race to the first evaluation from which the test accuracy holds 0.99 for ten evaluations, seed by seed. The engine
runs one recipe by plain eager PyTorch and by the workbench: CPU seconds of the steps, evaluations aside. The recipe is
changed on one engine, the workbench's: steps. A round is a seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from apps.bench import cpu_seconds, median, ratio_interval
from apps.step_benchmarks import plain_step
from workbench.runtime import WorkbenchError, one_thread
from workbench.store import RunFolder
from workbench.tasks.modular import Modular
from workbench.training.curves import TrainLog
from workbench.training.loop import Trainer, is_evaluation
from workbench.training.recipe import Recipe
from workbench.training.recipes import modular, modular_fast

ACCURACY = 0.99
Step = Callable[[Trainer], Callable[[], None]]
"""A trainer to one update of its model's weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """One seed on one side."""

    seed: int
    steps: int | None
    """When it generalised; None if it never did."""
    cpu_seconds: float | None
    """What the steps up to there took."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Race:
    """Two ways to a model that has generalised."""

    name: str
    compares: str
    peer: str
    theirs: tuple[Recipe, Step]
    ours: tuple[Recipe, Step]
    unit: Literal["steps", "cpu_seconds"]
    target: float
    gate: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RaceResult:
    """Every seed on both sides; the factor is over seeds in which both generalised."""

    race: Race
    theirs: tuple[Finish, ...]
    ours: tuple[Finish, ...]

    def summary(self) -> dict[str, object]:
        """What the command line prints, by the names that benchmarks have."""
        race, sides = self.race, {"peer": self.theirs, "ours": self.ours}
        pairs = [(one, other) for one, other in zip(self.theirs, self.ours, strict=True) if one.steps and other.steps]
        theirs, ours = ([float(getattr(each, race.unit)) for each in side] for side in zip(*pairs, strict=True))
        low, high = ratio_interval(theirs, ours, seed=0)
        return {
            "name": race.name,
            "compares": race.compares,
            "peer": race.peer,
            "unit": race.unit,
            "ratio": median(theirs) / median(ours),
            "ratio_interval": [low, high],
            "target": race.target,
            "gate": race.gate,
            "met": low >= race.gate,
            "n": len(pairs),
            "seeds": [each.seed for each in self.ours],
            "steps": {name: [each.steps for each in side] for name, side in sides.items()},
            "cpu_seconds": {name: [each.cpu_seconds for each in side] for name, side in sides.items()},
        }


def run_race(race: Race, *, seeds: int) -> RaceResult:
    """Both sides, seed after seed, on one thread.

    Raises:
        WorkbenchError: there is no seed, or none in which both sides generalise.
    """
    if seeds < 1:
        raise WorkbenchError(f"A race needs at least 1 seed, got {seeds}.")
    with one_thread():
        found = [tuple(_finish(*side, seed) for side in (race.theirs, race.ours)) for seed in range(seeds)]
    theirs, ours = zip(*found, strict=True)
    if not any(one.steps and other.steps for one, other in found):
        raise WorkbenchError(f"{race.name}: there is no seed of {seeds} in which both sides generalise.")
    return RaceResult(race=race, theirs=theirs, ours=ours)


def _finish(recipe: Recipe, step_of: Step, seed: int) -> Finish:
    """Steps until the accuracy has held for ten evaluations, or all that the recipe has."""
    recipe, spent, at = recipe.with_seed(seed), 0.0, dict[int, float]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, RunFolder(path=Path(folder), reference=recipe.name), Accelerator(cpu=True))
        trainer.start()
        step = step_of(trainer)
        while (landmark := _held(trainer)) is None and trainer.position.step < trainer.config.steps:
            while True:
                begun = cpu_seconds()
                step()
                spent += cpu_seconds() - begun
                if is_evaluation(trainer.position.step, trainer.config):
                    break
            at[trainer.position.step] = spent
            trainer.evaluate()
    return Finish(seed=seed, steps=landmark, cpu_seconds=None if landmark is None else at[landmark])


def _held(trainer: Trainer) -> int | None:
    log = TrainLog.of(trainer.recipe.task, trainer.position.rows)
    return replace(log, solved_accuracy=ACCURACY).step_generalised


def workbench_step(trainer: Trainer) -> Callable[[], None]:
    """The workbench's own."""
    return trainer.step


def eager_step(trainer: Trainer) -> Callable[[], None]:
    """The hooked forward at every position, and AdamW as it comes."""
    config, data = trainer.config, trainer.draw()[0]

    def rate() -> float:
        return config.rate(trainer.position.step)

    update = plain_step(trainer.model, trainer.model, config, data, rate=rate)

    def step() -> None:
        update()
        trainer.position.step += 1

    return step


def small(recipe: Recipe) -> Recipe:
    """The recipe at p = 59, 40 % told: minutes where p = 113 takes hours of a plain engine."""
    task = Modular(p=59, train_fraction=0.4)
    model = replace(recipe.transformer, d_vocab=len(task.vocab), d_vocab_out=task.p)
    train = replace(recipe.trainable(), evaluate_every=25)
    return replace(recipe, task=task, model=model, train=train)


def engine_race() -> Race:
    """One recipe, two engines."""
    recipe = small(modular_fast())
    return Race(
        name="generalise-engine",
        compares="CPU seconds until modular addition, p = 59, has generalised by the recipe modular-fast.",
        peer="plain eager PyTorch",
        theirs=(recipe, eager_step),
        ours=(recipe, workbench_step),
        unit="cpu_seconds",
        target=4.0,
        gate=3.0,
    )


def recipe_race() -> Race:
    """Two recipes, one engine."""
    return Race(
        name="generalise-recipe",
        compares="Steps until modular addition, p = 59, has generalised by the recipe modular-fast.",
        peer="the recipe modular",
        theirs=(small(modular()), workbench_step),
        ours=(small(modular_fast()), workbench_step),
        unit="steps",
        target=8.0,
        gate=4.0,
    )


RACES: Mapping[str, Callable[[], Race]] = {"generalise-engine": engine_race, "generalise-recipe": recipe_race}
"""What can be raced, by name."""
