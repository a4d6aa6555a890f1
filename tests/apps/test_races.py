"""Time to generalise: what is counted, seed by seed, and what is said of seeds that never get there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from apps import races
from apps.benchmarks import run_benchmark
from apps.races import (
    RACES,
    Finish,
    Race,
    RaceResult,
    eager_step,
    engine_race,
    recipe_race,
    run_race,
    small,
    workbench_step,
)
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder
from workbench.training.recipe import Recipe
from workbench.training.recipes import modular, modular_fast, modular_smoke


def toy(*settings: str) -> Recipe:
    return modular_smoke().override(
        [
            "p=7",
            "d_model=16",
            "d_head=4",
            "d_mlp=32",
            "evaluate_every=5",
            "steps=100",
            "stop_when_clean=false",
            *settings,
        ]
    )


def race(recipe: Recipe | None = None) -> Race:
    recipe = recipe or toy()
    return replace(engine_race(), theirs=(recipe, eager_step), ours=(recipe, workbench_step), gate=0.01)


def test_what_counts_are_the_steps_up_to_the_landmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "_held", lambda trainer: 10 if trainer.position.step >= 20 else None)
    result = run_race(race(), seeds=2)
    assert [each.steps for each in (*result.theirs, *result.ours)] == [10] * 4
    summary = result.summary()
    assert summary["n"] == 2
    assert summary["seeds"] == [0, 1]
    assert summary["ratio"] > 0
    assert summary["met"]
    assert all(seconds > 0 for side in ("peer", "ours") for seconds in summary["cpu_seconds"][side])


def test_ninety_nine_in_a_hundred_must_hold_for_ten_evaluations(tmp_path: Path) -> None:
    trainer = races.Trainer(toy(), RunFolder(path=tmp_path, reference="toy"), Accelerator(cpu=True))
    accuracies = [0.5, 1.0, 0.98, *[0.99] * 9]
    rows = [{"step": 5 * at, "test_accuracy": accuracy} for at, accuracy in enumerate(accuracies)]
    trainer.position.rows = rows
    assert races._held(trainer) is None
    trainer.position.rows = [*rows, {"step": 60, "test_accuracy": 1.0}]
    assert races._held(trainer) == 15


def test_the_plain_engine_learns_what_ours_learns() -> None:
    """The same losses after as many steps, so that the step counts are those of one recipe."""
    losses = []
    for step_of in (eager_step, workbench_step):
        seen: list[float] = []

        def watched(trainer: races.Trainer, step_of: races.Step = step_of, seen: list[float] = seen) -> object:
            step = step_of(trainer)

            def once() -> None:
                step()
                if trainer.position.step == 20:
                    seen.append(trainer.evaluate()["train_loss"])

            return once

        races._finish(toy("steps=20"), watched, 0)
        losses += seen
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 1.9


def test_the_factor_is_over_seeds_in_which_both_generalise() -> None:
    theirs = tuple(Finish(seed=seed, steps=steps, cpu_seconds=9.0) for seed, steps in enumerate((800, None, 1200)))
    ours = tuple(Finish(seed=seed, steps=steps, cpu_seconds=1.0) for seed, steps in enumerate((100, 50, 100)))
    summary = RaceResult(race=recipe_race(), theirs=theirs, ours=ours).summary()
    assert (summary["n"], summary["ratio"]) == (2, 10.0)
    assert summary["steps"] == {"peer": [800, None, 1200], "ours": [100, 50, 100]}
    seconds = RaceResult(race=engine_race(), theirs=theirs, ours=ours).summary()
    assert seconds["ratio"] == 9.0


def test_a_race_that_nobody_finishes_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "ACCURACY", 1.1)
    with pytest.raises(WorkbenchError, match="there is no seed of 1 in which both sides generalise"):
        run_race(race(toy("steps=5")), seeds=1)
    with pytest.raises(WorkbenchError, match="at least 1 seed, got 0"):
        run_benchmark("generalise-engine", repeats=0)


def test_one_thing_differs_between_the_sides() -> None:
    engine, recipe = engine_race(), recipe_race()
    assert engine.theirs[0] == engine.ours[0]
    assert recipe.theirs[1] is recipe.ours[1]
    slow, fast = (side[0].trainable() for side in (recipe.theirs, recipe.ours))
    assert (slow.learning_rate, fast.learning_rate) == (1e-3, 1e-2)
    assert slow.weight_decay == fast.weight_decay == 1
    assert slow.evaluate_every == fast.evaluate_every
    assert {make().name for make in RACES.values()} == set(RACES)


def test_the_fast_preset_is_modular_at_another_rate() -> None:
    slow, fast = modular(), modular_fast()
    assert (fast.task, fast.model) == (slow.task, slow.model)
    assert (fast.trainable().learning_rate, fast.trainable().weight_decay) == (1e-2, 1.0)
    assert small(fast).transformer.d_vocab == len(small(fast).task.vocab) == 60
