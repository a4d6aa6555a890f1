"""Recipes: what to train, as functions that return one.

The shipped ones are in `RECIPES`; a user's own is a function in a file of theirs, named as `my_recipes.py:name`, that
returns a `Recipe` and works like a shipped one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError, nearest
from workbench.tasks.modular import Modular
from workbench.training.program_recipes import PROGRAMS
from workbench.training.reasoner_recipes import REASONERS
from workbench.training.recipe import Recipe, TrainConfig, import_file
from workbench.training.search_recipes import SEARCHES
from workbench.training.skill_recipes import SKILL_BASES


def modular_smoke() -> Recipe:
    """A small prime that generalises in seconds."""
    task = Modular(p=59, train_fraction=0.5)
    return Recipe(
        name="modular-smoke",
        task=task,
        model=_one_layer(task, d_model=64, d_mlp=256),
        train=TrainConfig(steps=1000, learning_rate=1e-2, evaluate_every=10),
        shows="Generalises almost without delay; a sparse Fourier circuit. Proves the pipeline, not grokking.",
        minutes=0.3,
    )


def modular() -> Recipe:
    """Addition mod 113 from 30 % of all pairs: memorises early, generalises thousands of steps later."""
    task = Modular(p=113, train_fraction=0.3)
    return Recipe(
        name="modular",
        task=task,
        model=_one_layer(task, d_model=128, d_mlp=512),
        # Every 50 steps: more than 50 looks between memorising and generalising, even in a run that is quick.
        train=TrainConfig(steps=25_000, evaluate_every=50),
        shows="Groks: train loss < 1e-4 long before test loss falls; 3 to 6 key frequencies; the Clock-like circuit.",
        minutes=8.0,
    )


def modular_fast() -> Recipe:
    """As `modular`, ten times the learning rate: the circuit without the delay."""
    return replace(
        modular(),
        name="modular-fast",
        # At a rate that stays this high, training falls out of the solution again, at step 1,900 on seed 0.
        train=TrainConfig(steps=1_500, learning_rate=1e-2, cooldown=0.5, evaluate_every=25, stop_when_clean=False),
        shows="Generalises within a thousand steps, almost without delay; the circuit of modular, not its history.",
        minutes=2.7,
    )


def modular_paper() -> Recipe:
    """The mainline setting of Nanda et al. 2023: as `modular`, for all of its 40,000 epochs."""
    return replace(
        modular(),
        name="modular-paper",
        train=TrainConfig(steps=40_000, evaluate_every=50, stop_when_clean=False),
        shows="As modular, and that the circuit stays: the published 40,000 full-batch epochs without early stop.",
        minutes=25.0,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "modular-smoke": modular_smoke,
    "modular": modular,
    "modular-fast": modular_fast,
    "modular-paper": modular_paper,
    **REASONERS,
    **SEARCHES,
    **PROGRAMS,
    **SKILL_BASES,
}


def find_recipe(name: str) -> Recipe:
    """The shipped recipe of that name, or the user's own from `file.py:function`.

    Raises:
        WorkbenchError: there is none, or the user's function does not return a recipe.
    """
    if name in RECIPES:
        return RECIPES[name]()
    file, colon, function = name.rpartition(":")
    if not colon:
        raise WorkbenchError(f"Unknown recipe {name!r}. {nearest(name, RECIPES)} Your own: my_recipes.py:name.")
    make = getattr(import_file(Path(file)), function, None)
    if not callable(make):
        raise WorkbenchError(f"{file} has no function {function!r} that returns a recipe.")
    try:
        recipe = make()
    except WorkbenchError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WorkbenchError(f"{name} failed: {type(error).__name__}: {reason}") from error
    if not isinstance(recipe, Recipe):
        raise WorkbenchError(f"{name} returned a {type(recipe).__name__}; it must return a workbench Recipe.")
    return recipe


def _one_layer(task: Modular, *, d_model: int, d_mlp: int) -> ModelConfig:
    return ModelConfig(
        n_layers=1,
        d_model=d_model,
        n_heads=4,
        d_head=d_model // 4,
        d_mlp=d_mlp,
        n_ctx=3,
        d_vocab=len(task.vocab),
        d_vocab_out=task.p,
    )
