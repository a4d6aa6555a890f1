"""Recipes of Transformer Programs (Friedman et al. 2023, appendix C), at the paper's sizes with 250 epochs.

What differs from the paper: batches are drawn with replacement, what is evaluated is the discretised model, where the
authors' log evaluates a draw, and a run ends with the program that answered best on the split `val`, where theirs ends
with the last (`--set keep=last`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workbench.models.config import ModelConfig
from workbench.models.program_config import ProgramConfig
from workbench.tasks.sequences import Sequences
from workbench.tasks.words import Words
from workbench.training.recipe import Recipe, TrainConfig

EPOCHS = 250
BATCH = 512
TEMPERATURE = (3.0, 0.01)


def program_smoke() -> Recipe:
    """Counts letters after a few hundred steps: the pipeline in half a minute."""
    recipe = _program(
        "program-smoke", Sequences(size=6000), layers=1, heads=(2, 2), mlps=(1, 1), rows=4860, shows="Counts letters."
    )
    assert recipe.train is not None
    return replace(
        recipe,
        train=replace(recipe.train, steps=600, batch_size=256, evaluate_every=100),
        minutes=0.3,
        shows="Proves the pipeline: counts letters, nearly always rightly, by one numerical head.",
    )


def program_hist() -> Recipe:
    """How often each letter stands in the sequence."""
    return _program(
        "program-hist",
        Sequences(),
        layers=1,
        heads=(2, 2),
        mlps=(1, 1),
        shows="Published: 100.0 % of the test's letters. A numerical head counts the positions with the own letter.",
    )


def program_hist_categorical() -> Recipe:
    """Counting without numbers."""
    return _program(
        "program-hist-categorical",
        Sequences(),
        layers=3,
        heads=(8, 0),
        mlps=(4, 0),
        shows="Published: 83.2 %. Without numerical heads, counting collapses.",
    )


def program_reverse() -> Recipe:
    """The sequence from its end."""
    return _program(
        "program-reverse",
        Sequences(function="reverse", letters=5),
        layers=3,
        heads=(4, 4),
        mlps=(1, 1),
        rows=11_539,
        shows="Published: 99.79 %.",
    )


def program_sort() -> Recipe:
    """The sequence in the alphabet's order."""
    return _program(
        "program-sort",
        Sequences(function="sort", letters=5),
        layers=3,
        heads=(4, 4),
        mlps=(2, 2),
        rows=11_539,
        shows="Published: 99.83 %.",
    )


def program_double_hist() -> Recipe:
    """How many letters stand as often in the sequence."""
    return _program(
        "program-double-hist",
        Sequences(function="double_hist"),
        layers=3,
        heads=(2, 2),
        mlps=(1, 1),
        shows="Published: 98.40 %, at this size; seeds spread from 60 to 99 %.",
    )


def program_most_freq() -> Recipe:
    """The letters, the most frequent first."""
    return _program(
        "program-most-freq",
        Sequences(function="most_freq"),
        layers=3,
        heads=(4, 4),
        mlps=(2, 2),
        shows="Published: 75.69 %: a program of this size does not do it.",
    )


def program_dyck1() -> Recipe:
    """Whether the brackets so far are balanced, of one kind."""
    return _program(
        "program-dyck1",
        Sequences(function="dyck", letters=2, n_ctx=16),
        layers=3,
        heads=(4, 4),
        mlps=(1, 1),
        shows="Published: 99.30 %.",
    )


def program_dyck2() -> Recipe:
    """Whether the brackets so far are balanced, of two kinds."""
    return _program(
        "program-dyck2",
        Sequences(function="dyck", letters=4, n_ctx=16),
        layers=3,
        heads=(2, 2),
        mlps=(2, 2),
        shows="Published: 99.09 %.",
    )


def program_induction() -> Recipe:
    """The digit that followed the letter before."""
    recipe = _program(
        "program-induction",
        Sequences(function="induction", letters=8, n_ctx=10),
        layers=2,
        heads=(1, 0),
        mlps=(0, 0),
        shows="Published: 100 % with the best of 5 seeds. An induction circuit: previous token, then match and copy.",
    )
    assert isinstance(recipe.model, ProgramConfig)
    assert recipe.train is not None
    # A draw of choices is one for the whole batch: many small batches see more of them than few large ones.
    train = replace(recipe.train, steps=2000, batch_size=64, temperature=(0.5, 0.01), evaluate_every=200)
    return replace(recipe, model=replace(recipe.model, fallback="max"), train=train)


def program_text() -> Recipe:
    """The tone of sentences from film reviews."""
    recipe = _program(
        "program-text",
        Words(words=4000),
        layers=2,
        heads=(4, 0),
        mlps=(1, 0),
        columns=4,
        rows=5_411,
        shows="A word is four variables of 32 values; reads the tone of a film review about as well as its words do.",
    )
    assert recipe.train is not None
    return replace(recipe, train=replace(recipe.train, steps=430, batch_size=128, evaluate_every=43))


def program_ner() -> Recipe:
    """Names of persons, places, organisations and others in news."""
    recipe = _program(
        "program-ner",
        Words(text="news", words=5000, n_ctx=24),
        layers=2,
        heads=(4, 0),
        mlps=(1, 0),
        columns=4,
        shows="Finds fewer names than a logistic regression: four epochs, where F1 of 76.1 was published after thirty.",
    )
    assert recipe.train is not None
    train = replace(recipe.train, steps=400, batch_size=128, evaluate_every=100)
    return replace(recipe, train=train)


def sequences_transformer() -> Recipe:
    """An ordinary transformer on the same sequences, padding masked: what programs are compared with."""
    task = Sequences()
    model = ModelConfig(
        n_layers=2,
        d_model=64,
        n_heads=4,
        d_head=16,
        d_mlp=256,
        n_ctx=task.n_ctx,
        d_vocab=len(task.vocab),
        d_vocab_out=len(task.vocab),
        normalization="LN",
        activation="gelu",
        biases=("attn", "mlp", "unembed"),
        causal=task.causal,
        pad_token=task.pad_token,
    )
    train = TrainConfig(
        steps=2000,
        learning_rate=1e-3,
        weight_decay=0.01,
        batch_size=256,
        warmup_steps=100,
        cooldown=0.2,
        average="prompts",
        evaluate_every=200,
        stop_when_clean=False,
    )
    return Recipe(
        name="sequences-transformer",
        task=task,
        model=model,
        train=train,
        shows="Counts letters almost without a mistake; `--set function=sort` and so on for the other tasks.",
        minutes=1.5,
    )


def _program(
    name: str,
    task: Sequences | Words,
    *,
    layers: int,
    heads: tuple[int, int],
    mlps: tuple[int, int],
    shows: str,
    rows: int = 16_200,
    columns: int = 0,
) -> Recipe:
    """A recipe whose layers have so many categorical and numerical heads and MLPs.

    Args:
        name: the recipe's.
        task: what it learns.
        layers: how many.
        heads: categorical and numerical ones of each layer.
        mlps: likewise.
        shows: what a run of it should show.
        rows: of the training split, of which a step takes `BATCH`.
        columns: variables that each word is coded by; 0 leaves it one, its own number.
    """
    model = ProgramConfig(
        n_layers=layers,
        cardinality=max(task.n_ctx, len(task.inputs)) if isinstance(task, Sequences) else task.n_ctx,
        categorical_heads=heads[0],
        numerical_heads=heads[1],
        categorical_mlps=mlps[0],
        numerical_mlps=mlps[1],
        n_ctx=task.n_ctx,
        d_vocab=len(task.vocab),
        d_vocab_out=task.d_vocab_out,
        outputs=task.outputs,
        pad_token=task.pad_token,
        causal=task.causal,
        pooled=task.pooled,
        columns=max(1, columns),
        coded=columns > 0,
    )
    steps_per_epoch = -(-rows // BATCH)
    train = TrainConfig(
        steps=EPOCHS * steps_per_epoch,
        learning_rate=0.05,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        warmup_steps=0,
        batch_size=BATCH,
        average="prompts",
        temperature=TEMPERATURE,
        evaluate_every=10 * steps_per_epoch,
        stop_when_clean=False,
        keep="best",
    )
    return Recipe(name=name, task=task, model=model, train=train, shows=shows)


PROGRAMS: dict[str, Callable[[], Recipe]] = {
    "program-smoke": program_smoke,
    "program-hist": program_hist,
    "program-hist-categorical": program_hist_categorical,
    "program-reverse": program_reverse,
    "program-sort": program_sort,
    "program-double-hist": program_double_hist,
    "program-most-freq": program_most_freq,
    "program-dyck1": program_dyck1,
    "program-dyck2": program_dyck2,
    "program-induction": program_induction,
    "program-text": program_text,
    "program-ner": program_ner,
    "sequences-transformer": sequences_transformer,
}
