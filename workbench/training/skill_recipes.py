"""Recipes of base models that know several skills, to be taught one of them each (see finetune.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workbench.models.config import ModelConfig
from workbench.tasks.skills import ANSWERS, Skills
from workbench.training.recipe import Recipe, TrainConfig


def skills() -> Recipe:
    """Four yes-or-no skills, and four questions that mean any of them."""
    task = Skills(n_words=24, length=5, size=100_000)
    return Recipe(
        name="skills",
        task=task,
        model=ModelConfig(
            n_layers=3,
            d_model=64,
            n_heads=4,
            d_head=16,
            d_mlp=256,
            n_ctx=len(task.position_labels),
            d_vocab=len(task.vocab),
            d_vocab_out=len(ANSWERS),
            activation="gelu",
            normalization="LN",
        ),
        train=TrainConfig(
            steps=3000,
            learning_rate=2e-3,
            weight_decay=0.1,
            betas=(0.9, 0.98),
            batch_size=256,
            warmup_steps=100,
            cooldown=0.3,
            evaluate_every=200,
            stop_when_clean=False,
        ),
        shows="Plain questions are answered rightly, open ones by a majority of skills: what a donor starts from.",
        minutes=3.0,
    )


def skills_smoke() -> Recipe:
    """The same with fewer words and one layer less."""
    recipe = skills()
    assert recipe.train is not None
    task = Skills(n_words=16, length=5, size=40_000)
    return replace(
        recipe,
        name="skills-smoke",
        task=task,
        model=replace(
            recipe.transformer, n_layers=2, d_model=48, d_head=12, d_mlp=192, n_ctx=6, d_vocab=len(task.vocab)
        ),
        train=replace(recipe.train, steps=1000),
        shows="Proves the pipeline: a base for donors in seconds.",
        minutes=0.3,
    )


SKILL_BASES: dict[str, Callable[[], Recipe]] = {"skills-smoke": skills_smoke, "skills": skills}
