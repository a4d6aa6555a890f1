"""A made-up text whose label, or whose words' tags, are told by its words alone."""

import random

from workbench.tasks import words
from workbench.tasks.text_sources import Tagged
from workbench.tasks.words import Corpus, Words

FILLERS = ("film", "story", "scene", "actor")
TOLD = {"bad": ("dull", "bad"), "good": ("good", "fun")}


def tiny_corpus(monkeypatch, *, each=False):
    """The task of that text: which label it has, or which words come after `film`."""
    rng = random.Random(0)
    sizes = {"train": 300, "val": 60, "test": 60}
    splits = {name: [_text(rng, each=each) for _ in range(size)] for name, size in sizes.items()}
    corpus = Corpus(
        about="made up",
        labels=("O", "B-PER") if each else tuple(TOLD),
        source=lambda: splits,
        each=each,
    )
    monkeypatch.setitem(words.CORPORA, "tiny", corpus)
    for cached in (words._splits, words._vocab, words._ids):
        cached.cache_clear()
    return Words(text="tiny", words=8, n_ctx=8)


def _text(rng, *, each):
    label = rng.choice(list(TOLD))
    said = [rng.choice([*FILLERS, rng.choice(TOLD[label])]) for _ in range(rng.choice((4, 5)))]
    said[rng.randrange(len(said))] = rng.choice(TOLD[label])
    tags = ["B-PER" if before == "film" else "O" for before in ["", *said[:-1]]]
    return Tagged(words=tuple(said), tags=tuple(tags) if each else (label,))
