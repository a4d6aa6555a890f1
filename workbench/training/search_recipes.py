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
        shows="Proves the pipeline: lookaheads 0 and 1, where the goal is next to the start, are nearly learnt.",
        minutes=0.5,
    )


def search() -> Recipe:
    """Balanced graphs of up to 7 edges: lookaheads 0 to 3 fall into place one after another."""
    return _one_hot(
        "search",
        GraphSearch(size=26),
        layers=3,
        shows="Answers at every lookahead from 0 to 3, on graphs that it was never given; each is learnt in turn.",
    )


def search_naive() -> Recipe:
    """The same model on graphs whose edges are drawn at random: hardly any needs more than a look at the children."""
    return _one_hot(
        "search-naive",
        GraphSearch(size=26, distribution="naive"),
        layers=3,
        shows="Learns what random graphs ask for, and stays behind search on balanced graphs of larger lookaheads.",
    )


def search_star() -> Recipe:
    """The same model on stars, whose goal can be followed back along a chain without a branch."""
    return _one_hot(
        "search-star",
        GraphSearch(size=26, distribution="star"),
        layers=3,
        shows="Answers stars, and stays behind search on balanced graphs of the same lookahead.",
    )


def search_learned() -> Recipe:
    """As search, with ordinary learned embeddings: whether the fixed ones matter."""
    recipe = search()
    return replace(
        recipe,
        name="search-learned",
        model=replace(recipe.model, embedding="learned"),
        shows="As search, in a stream without coordinates that stand for a token or a position.",
    )


def search_curriculum() -> Recipe:
    """As search, with lookahead 1 first, and one more each time a fresh batch is answered at 0.99."""
    recipe = search()
    assert recipe.train is not None
    return replace(
        recipe,
        name="search-curriculum",
        train=replace(recipe.train, curriculum=0.99),
        shows="As search, each lookahead given once those before it are learnt.",
    )


def search_32() -> Recipe:
    """Balanced graphs of up to 9 edges and a fourth layer: lookaheads 0 to 4."""
    recipe = _one_hot(
        "search-32",
        GraphSearch(size=32),
        layers=4,
        shows="Answers at lookaheads 0 to 3, then at 4, which takes as long as the others together.",
    )
    assert recipe.train is not None
    return replace(recipe, train=replace(recipe.train, steps=9000, evaluate_every=250))


def search_paper() -> Recipe:
    """The paper's scale: graphs of up to 41 edges, 6 layers, 883 million examples; for a GPU."""
    recipe = _one_hot(
        "search-paper",
        GraphSearch(size=128),
        layers=6,
        shows="The published curves: near 1.00 at every lookahead from 0 to 20. Never run by us.",
    )
    assert recipe.train is not None
    train = replace(recipe.train, steps=862_000, batch_size=1024, learning_rate=3e-4, evaluate_every=2000)
    return replace(recipe, train=train)


def _one_hot(name: str, task: GraphSearch, *, layers: int, shows: str) -> Recipe:
    width = len(task.vocab) + SCRATCH + task.size
    model = ModelConfig(
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
        init="uniform",
        tied=True,
        biases=("attn", "mlp"),
        causal=False,
        pad_token=task.pad_token,
    )
    return Recipe(name=name, task=task, model=model, train=_training(steps=6000, evaluate_every=100), shows=shows)


def _training(*, steps: int, evaluate_every: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        evaluate_every=evaluate_every,
        learning_rate=2e-3,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        warmup_steps=50,
        batch_size=256,
        clip_norm=1.0,
        stop_when_clean=False,
    )


SEARCHES: dict[str, Callable[[], Recipe]] = {
    "search-smoke": search_smoke,
    "search": search,
    "search-32": search_32,
    "search-naive": search_naive,
    "search-star": search_star,
    "search-learned": search_learned,
    "search-curriculum": search_curriculum,
    "search-paper": search_paper,
}
