"""Recipes of search transformers (Saparov et al. 2025), small and at scale.

The model is the paper's: one-hot tokens and positions side by side, one head as wide as the stream, MLPs no wider, tied
unembedding, attention in both directions. What differs from the paper: AdamW at a high learning rate, which a small
model needs to learn in minutes, and graphs of a few edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workbench.models.config import ModelConfig
from workbench.tasks.graph_search import GraphSearch
from workbench.training.recipe import Recipe, TrainConfig

SCRATCH = 16
"""Dimensions of the stream that hold neither a token nor a position."""


def search_smoke() -> Recipe:
    """The small search for a few seconds: the first lookaheads are learnt."""
    return replace(
        search(),
        name="search-smoke",
        task=GraphSearch(size=26, test_size=300),
        train=_training(steps=300, evaluate_every=50),
        shows="Proves the pipeline: lookahead 0 is learnt, 1 is under way, more is not.",
        minutes=0.6,
    )


def search() -> Recipe:
    """Balanced graphs of up to 7 edges: lookaheads 0 to 3 fall into place one after another."""
    task = GraphSearch(size=26)
    return Recipe(
        name="search",
        task=task,
        model=_one_hot(task, layers=3),
        train=_training(steps=3600, evaluate_every=100),
        shows="Answers at every lookahead from 0 to 3, on graphs that it was never given; each is learnt in turn.",
        minutes=6.0,
    )


def _one_hot(task: GraphSearch, *, layers: int) -> ModelConfig:
    width = len(task.vocab) + SCRATCH + task.size
    return ModelConfig(
        n_layers=layers,
        d_model=width,
        n_heads=1,
        d_head=width,
        d_mlp=width,
        n_ctx=task.size,
        d_vocab=len(task.vocab),
        d_vocab_out=len(task.vocab),
        normalization="LN",
        embedding="one_hot",
        tied=True,
        biases=("attn", "mlp"),
        causal=False,
        pad_token=task.pad_token,
    )


def _training(*, steps: int, evaluate_every: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        evaluate_every=evaluate_every,
        learning_rate=2e-3,
        weight_decay=0.01,
        warmup_steps=50,
        batch_size=256,
        clip_norm=1.0,
        stop_when_clean=False,
    )


SEARCHES: dict[str, Callable[[], Recipe]] = {"search-smoke": search_smoke, "search": search}
