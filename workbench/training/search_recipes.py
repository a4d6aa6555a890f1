"""Recipes of search transformers (Saparov et al. 2025), small and at scale.

The model is the paper's: one-hot tokens and positions side by side, one head as wide as the stream, MLPs no wider, tied
unembedding, attention in both directions. What differs from the paper: graphs of a few edges; and, so that a small
model learns in minutes, Muon at a high learning rate that cools down at the end, one more lookahead each time the last
is learnt, and large ones more often than small ones. The recipes that are older (`search-curriculum` and
`search-at-once`) take AdamW, larger batches, and every lookahead equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workbench.models.config import ModelConfig
from workbench.tasks.graph_search import GraphSearch
from workbench.training.recipe import Recipe, TrainConfig

CURRICULUM = 0.95
"""Accuracy on a batch not yet trained on, from which the next lookahead is given too."""
SCRATCH = 16
"""Dimensions of the stream that hold neither a token nor a position."""


def search_smoke() -> Recipe:
    """The small search for a few seconds: the first lookaheads are learnt."""
    return replace(
        search(),
        name="search-smoke",
        task=GraphSearch(size=26, test_size=300),
        train=_adamw(steps=300, evaluate_every=50, curriculum=None),
        shows="Proves the pipeline: lookaheads 0 and 1, where the goal is next to the start, are nearly learnt.",
        minutes=0.5,
    )


def search() -> Recipe:
    """Balanced graphs of up to 7 edges: lookahead 1 first, and one more each time a fresh batch is answered at 0.95."""
    return _one_hot(
        "search",
        GraphSearch(size=26, level_draws=2),
        layers=3,
        shows="Lookaheads 0 to 3 are learnt in turn, and hold on new graphs.",
        train=_muon(steps=8000, curriculum=CURRICULUM),
        minutes=8.0,
    )


def search_curriculum() -> Recipe:
    """As `gallery:search` was trained: by AdamW, the lookaheads given so far equally often."""
    return _one_hot(
        "search-curriculum",
        GraphSearch(size=26),
        layers=3,
        shows="Lookaheads 0 to 3 are learnt in turn, and hold on new graphs; some seeds are caught before the last.",
        train=_adamw(steps=9000, evaluate_every=100, curriculum=CURRICULUM),
    )


def search_naive() -> Recipe:
    """The same model on graphs whose edges are drawn at random: hardly any needs more than a look at the children."""
    return _one_hot(
        "search-naive",
        GraphSearch(size=26, distribution="naive"),
        layers=3,
        shows="Learns what random graphs ask for, and stays behind search on balanced graphs of larger lookaheads.",
        train=_muon(steps=8000, curriculum=None),
    )


def search_star() -> Recipe:
    """The same model on stars, whose goal can be followed back along a chain without a branch."""
    return _one_hot(
        "search-star",
        GraphSearch(size=26, distribution="star"),
        layers=3,
        shows="Answers stars, and stays behind search on balanced graphs of the same lookahead.",
        train=_muon(steps=8000, curriculum=None),
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


def search_at_once() -> Recipe:
    """As search-curriculum, with all lookaheads from the start, equally often, as in the paper."""
    recipe = search_curriculum()
    assert recipe.train is not None
    return replace(
        recipe,
        name="search-at-once",
        train=replace(recipe.train, curriculum=None),
        shows="Learns lookaheads 0 and 1, and then, by the luck of the seed, those beyond.",
    )


def search_32() -> Recipe:
    """Balanced graphs of up to 9 edges and a fourth layer: lookaheads 0 to 4."""
    return _one_hot(
        "search-32",
        GraphSearch(size=32, level_draws=2),
        layers=4,
        shows="Answers at lookaheads 0 to 3, then at 4.",
        train=_muon(steps=8000, curriculum=CURRICULUM),
    )


def search_paper() -> Recipe:
    """The paper's scale: graphs of up to 41 edges, 6 layers, 883 million examples; for a GPU."""
    return _one_hot(
        "search-paper",
        GraphSearch(size=128),
        layers=6,
        shows="The published curves: near 1.00 at every lookahead from 0 to 20. Never run by us.",
        train=replace(
            _adamw(steps=862_000, evaluate_every=2000, curriculum=None),
            batch_size=1024,
            learning_rate=3e-4,
            cooldown=0.0,
        ),
    )


def _one_hot(
    name: str, task: GraphSearch, *, layers: int, shows: str, train: TrainConfig, minutes: float | None = None
) -> Recipe:
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
        tied=True,
        biases=("attn", "mlp"),
        causal=False,
        pad_token=task.pad_token,
    )
    return Recipe(name=name, task=task, model=model, train=train, shows=shows, minutes=minutes)


def _muon(*, steps: int, curriculum: float | None) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        evaluate_every=200,
        optimiser="muon",
        learning_rate=2e-3,
        weight_decay=0.01,
        betas=(0.95, 0.98),
        warmup_steps=50,
        cooldown=0.2,
        batch_size=256,
        curriculum=curriculum,
        clip_norm=1.0,
        stop_when_clean=False,
    )


def _adamw(*, steps: int, evaluate_every: int, curriculum: float | None) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        evaluate_every=evaluate_every,
        learning_rate=4e-3,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        warmup_steps=50,
        cooldown=0.15,
        batch_size=512,
        curriculum=curriculum,
        clip_norm=1.0,
        stop_when_clean=False,
    )


SEARCHES: dict[str, Callable[[], Recipe]] = {
    "search-smoke": search_smoke,
    "search": search,
    "search-curriculum": search_curriculum,
    "search-32": search_32,
    "search-naive": search_naive,
    "search-star": search_star,
    "search-learned": search_learned,
    "search-at-once": search_at_once,
    "search-paper": search_paper,
}
