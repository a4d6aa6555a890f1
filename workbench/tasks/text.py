"""Real labelled text to fine-tune a model on: duplicates dropped before splitting, documents never split.

A task is a value without its text; `split` reads the text from the package that pip brought (see archives.py). Each
label has sentences that name it: their mean embedding is what an encoder that was taught nothing compares a text with;
and a word, which a language model says after the task's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.archives import Archive
from workbench.tasks.base import check_choice
from workbench.tasks.text_sources import (
    BRANDS,
    ORANGE,
    RATINGS,
    Line,
    brand_tweets,
    election_tweets,
    newsgroup_messages,
    rated,
)

SPLITS = ("train", "val", "test")
HELD_OUT = {"test": 0.3, "val": 0.1}
"""Share of the lines that a split has, about: a document goes into one whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTask:
    """Texts to tell apart."""

    name: str
    about: str
    archive: Archive
    source: Callable[[], Iterable[Line]]
    names: Mapping[str, tuple[str, ...]]
    """Label -> sentences that name it."""
    prompt: str
    """What a language model reads, `{}` for the text."""
    words: tuple[str, ...]
    """What it then says, for each label in the order of their numbers."""
    by_time: bool = False
    """Whether lines come in order of time, so that what is tested is later than what is trained on."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of their numbers."""
        return tuple(self.names)

    def split(self, name: str) -> Sequence[Line]:
        """The lines of train, val or test.

        Raises:
            WorkbenchError: there is no such split, or the package has not been downloaded.
        """
        check_choice("split", name, SPLITS)
        return _splits(self.name)[name]

    def shots(self, count: int, seed: int) -> list[Line]:
        """`count` training lines of each label, drawn by this seed, in a mixed order.

        Raises:
            WorkbenchError: a label has fewer.
        """
        lines = self.split("train")
        rng = generator(seed, "shots", self.name)
        mixed = [lines[place] for place in torch.randperm(len(lines), generator=rng).tolist()]
        found = {label: [line for line in mixed if line.label == label] for label in self.labels}
        fewest = min(found, key=lambda label: len(found[label]))
        if not 1 <= count <= len(found[fewest]):
            raise WorkbenchError(
                f"Asked for {count} lines of each label; {self.name!r} has {len(found[fewest])} of {fewest!r} "
                "to train on. Set shots to 1 to that."
            )
        chosen = {line for each in found.values() for line in each[:count]}
        return [line for line in mixed if line in chosen]


def distinct(lines: Iterable[Line]) -> list[Line]:
    """Each text once, whatever its case and spacing; texts with two different labels not at all."""
    found: dict[str, Line] = {}
    disputed = set()
    for line in lines:
        key = " ".join(line.text.lower().split())
        if found.setdefault(key, line).label != line.label:
            disputed.add(key)
    return [line for key, line in found.items() if key not in disputed]


def in_splits(lines: Sequence[Line], *, by_time: bool, seed: int = 0) -> dict[str, list[Line]]:
    """Lines in train, val and test, no group in two of them: drawn by the seed, or the latest for test, then val."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    order = list(groups)
    if not by_time:
        order = [order[place] for place in torch.randperm(len(order), generator=generator(seed, "text splits"))]
    found: dict[str, list[Line]] = {name: [] for name in SPLITS}
    for group in reversed(order):
        name = next((each for each, share in HELD_OUT.items() if len(found[each]) < share * len(lines)), "train")
        found[name] += groups[group]
    return found


def find_task(name: str) -> TextTask:
    """The task of this name.

    Raises:
        WorkbenchError: there is none.
    """
    check_choice("task", name, list(TEXTS))
    return TEXTS[name]


@lru_cache(maxsize=4)
def _splits(name: str) -> dict[str, list[Line]]:
    task = TEXTS[name]
    return in_splits(distinct(task.source()), by_time=task.by_time)


TONE = '"{}" has a tone that is'
"""The published prompt for sentiment; that for authors is made after the published ones for topics."""


def _tone(what: str) -> dict[str, tuple[str, ...]]:
    return {
        "negative": (f"a terrible {what}", f"this {what} is bad", f"a negative {what}"),
        "positive": (f"a great {what}", f"this {what} is good", f"a positive {what}"),
    }


COMPUTERS = {
    "comp.graphics": ("a message about computer graphics", "images, rendering and file formats"),
    "comp.os.ms-windows.misc": ("a message about Microsoft Windows", "drivers and programs under Windows"),
    "comp.sys.ibm.pc.hardware": ("a message about PC hardware", "disks, boards and cards of a PC"),
    "comp.sys.mac.hardware": ("a message about Apple Macintosh hardware", "a Mac, its screen and its memory"),
    "comp.windows.x": ("a message about the X window system", "X servers, widgets and Motif on Unix"),
}

TEXTS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(
            name="movies",
            about="tone of sentences from film reviews",
            archive=RATINGS,
            source=partial(rated, "movieReviewSnippets"),
            names=_tone("movie"),
            prompt=TONE,
            words=(" negative", " positive"),
        ),
        TextTask(
            name="products",
            about="tone of sentences from product reviews",
            archive=RATINGS,
            source=partial(rated, "amazonReviewSnippets"),
            names=_tone("product"),
            prompt=TONE,
            words=(" negative", " positive"),
        ),
        TextTask(
            name="brands",
            about="tone of tweets on airlines, brands and news",
            archive=BRANDS,
            source=brand_tweets,
            names={
                "negative": ("a negative tweet", "I hate this", "this is terrible"),
                "neutral": ("a neutral tweet", "a plain statement of fact", "a news headline"),
                "positive": ("a positive tweet", "I love this", "this is great"),
            },
            prompt=TONE,
            words=(" negative", " neutral", " positive"),
        ),
        TextTask(
            name="authors",
            about="which of two candidates wrote a tweet",
            archive=ORANGE,
            source=election_tweets,
            names={
                "HillaryClinton": ("a tweet by Hillary Clinton", "the Democratic candidate speaks"),
                "realDonaldTrump": ("a tweet by Donald Trump", "the Republican candidate speaks"),
            },
            prompt=" tweet: {}\n author:",
            words=(" Clinton", " Trump"),
            by_time=True,
        ),
        TextTask(
            name="computers",
            about="which of five newsgroups on computers a message was sent to",
            archive=ORANGE,
            source=partial(newsgroup_messages, tuple(COMPUTERS)),
            names=COMPUTERS,
            prompt=" message: {}\n topic:",
            words=(" graphics", " Windows", " PC", " Mac", " X"),
            by_time=True,
        ),
    )
}
