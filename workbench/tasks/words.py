"""Real text word by word: its label is asked for, or a tag for each word, as Transformer Programs answer.

    `<s>` a word ... `</s>` `<pad>`     read at position 0 for the whole text's label, at every word for tags

Labels are the first words of the vocabulary, then come the special ones, then the most frequent words of the training
split; a word that is none of them is `<unk>`. A task is a value without its text, which is read from a package that pip
brought (see archives.py) when a word or an example is first asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial

import torch

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, check_choice, sample_pairs
from workbench.tasks.pairs import ARROW
from workbench.tasks.sequences import BEGIN, END, PAD
from workbench.tasks.text import SPLITS, TEXTS
from workbench.tasks.text_sources import Tagged, tagged_news

UNKNOWN = "<unk>"
SPECIAL = (PAD, BEGIN, END, UNKNOWN)
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]")
"""A word, a number or a mark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A text with what is asked about it."""

    about: str
    labels: tuple[str, ...]
    source: Callable[[], Mapping[str, Iterable[Tagged]]]
    """By split."""
    each: bool
    """Whether every word has a tag; otherwise the text has one label."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """Texts as words of a vocabulary."""

    # Without annotations these are the class's, not fields.
    name = "words"
    splits = SPLITS
    measured = SPLITS
    contrasts = ("other text",)
    memorised_accuracy = 0.99
    solved_accuracy = 0.99
    causal = False

    text: str = "movies"
    """movies, products, brands, authors, computers: what the text says of itself; news: which words are names."""
    words: int = 4000
    """Words that are known: the most frequent of the training split."""
    n_ctx: int = 32
    """Positions of a prompt, special tokens included; a longer text is cut."""

    def __post_init__(self) -> None:
        check_choice("text", self.text, list(CORPORA))
        if self.words < 1:
            raise WorkbenchError(f"words must be at least 1, got {self.words}.")
        if self.n_ctx < 3:
            raise WorkbenchError(f"n_ctx {self.n_ctx} leaves no room for a word. Give at least 3.")

    @property
    def corpus(self) -> Corpus:
        """The text."""
        return CORPORA[self.text]

    @property
    def vocab(self) -> Vocabulary:
        """Labels, special tokens, words; their number is known without the text."""
        return Vocabulary(task=self)

    @property
    def d_vocab_out(self) -> int:
        """Labels, which are the vocabulary's first words."""
        return len(self.corpus.labels)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Tokens that may be an answer: the labels."""
        return tuple(range(self.d_vocab_out))

    @property
    def pooled(self) -> bool:
        """Whether all positions together give one answer."""
        return not self.corpus.each

    @property
    def pad_token(self) -> int:
        """What fills short prompts."""
        return self.d_vocab_out

    @property
    def position_labels(self) -> Sequence[str]:
        """Positions by number; 0 is `<s>`."""
        return tuple(map(str, range(self.n_ctx)))

    def examples(self, split: str) -> Batch:
        """All texts of a split.

        Raises:
            WorkbenchError: there is no such split, or the package has not been downloaded.
        """
        check_choice("split", split, self.splits)
        return self._batch(_splits(self.text)[split])

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` texts of a split without repeats, each beside another of as many words."""
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch, each text beside another one of it with as many words and another answer.

        Those that have none are dropped.
        """
        check_choice("contrast", self.contrasts[0] if kind is None else kind, self.contrasts)
        rng = generator(seed, "contrast")
        length = (batch.tokens != self.pad_token).sum(1)
        differs = ((batch.targets[:, None] != batch.targets) & batch.read).any(2)
        fits = (length[:, None] == length) & differs
        found = fits.any(1)
        other = (fits * torch.rand(fits.shape, generator=rng)).argmax(1)
        whole = replace(batch, corrupt=batch.tokens[other], distractor=batch.targets[other])
        return replace(whole.select(found), dropped=int((~found).sum()))

    def prompt(self, text: str) -> Batch:
        """A typed text with its answer, as in `a great film => positive` or `Rome waits => B-LOC O`.

        Raises:
            WorkbenchError: it has no word, no answer, or not an answer for each word that is read.
        """
        typed, arrow, told = text.rpartition(ARROW)
        words, tags = _split_words(typed), tuple(told.split())
        wanted = len(words) if self.corpus.each else 1
        if not arrow or not words or len(tags) != wanted:
            raise WorkbenchError(
                f"Write the text with {'a tag for each of its words' if self.corpus.each else 'its label'}, such as "
                f"'word {ARROW} {self.corpus.labels[0]}': got {len(words)} words and {len(tags)} answers."
            )
        for tag in tags:
            check_choice("label", tag, self.corpus.labels)
        return self._batch([_normal(Tagged(words=words, tags=tags), lower=not self.corpus.each)])

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of a prompt."""
        shown = [int(token) for token in tokens if self.vocab[int(token)] not in (PAD, BEGIN, END)]
        return " ".join(self.vocab[token] for token in shown)

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _batch(self, texts: Sequence[Tagged]) -> Batch:
        ids = _ids(self)
        known = {label: place for place, label in enumerate(self.corpus.labels)}
        pad, begin, end, unknown = range(self.pad_token, self.pad_token + len(SPECIAL))
        tokens = torch.full((len(texts), self.n_ctx), pad)
        targets = torch.zeros_like(tokens)
        read = torch.zeros_like(tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = [ids.get(word, unknown) for word in text.words[: self.n_ctx - 2]]
            tokens[row, : len(words) + 2] = torch.tensor([begin, *words, end])
            tags = [known[tag] for tag in text.tags]
            at = slice(1, len(words) + 1) if self.corpus.each else slice(0, 1)
            targets[row, at] = torch.tensor(tags[: len(words)])
            read[row, at] = True
        return Batch(tokens=tokens, targets=targets, read=read)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Sequence[str]):
    """Words by token, whose number is known before the text is read."""

    task: Words

    def __len__(self) -> int:
        return self.task.d_vocab_out + len(SPECIAL) + self.task.words

    def __getitem__(self, place):
        return _vocab(self.task)[place]


def apart(splits: Mapping[str, Iterable[Tagged]]) -> dict[str, list[Tagged]]:
    """The splits without texts that stand in a later one of train, val and test too, word for word."""
    found, seen = {}, set()
    for name in reversed(SPLITS):
        found[name] = [text for text in splits[name] if text.words not in seen]
        seen |= {text.words for text in found[name]}
    return found


def _split_words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text))


def _normal(text: Tagged, *, lower: bool) -> Tagged:
    """Numbers as one digit, so that all of a kind are one word; in small letters if case does not matter."""
    words = tuple(re.sub(r"\d+", "0", word.lower() if lower else word) for word in text.words)
    return replace(text, words=words)


@lru_cache(maxsize=2)
def _splits(name: str) -> dict[str, list[Tagged]]:
    corpus = CORPORA[name]
    return apart(
        {split: [_normal(text, lower=not corpus.each) for text in texts] for split, texts in corpus.source().items()}
    )


@lru_cache(maxsize=4)
def _vocab(task: Words) -> tuple[str, ...]:
    counts = Counter(word for text in _splits(task.text)["train"] for word in text.words)
    if len(counts) < task.words:
        raise WorkbenchError(
            f"{task.text!r} has {len(counts):,} different words to train on, fewer than {task.words:,}. "
            "Set words to at most that."
        )
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: task.words]
    return (*task.corpus.labels, *SPECIAL, *frequent)


@lru_cache(maxsize=4)
def _ids(task: Words) -> dict[str, int]:
    """Tokens of the words; labels, which may be words as well, are none."""
    words = _vocab(task)
    return {words[place]: place for place in range(len(words) - task.words, len(words))}


def _labelled(name: str) -> dict[str, list[Tagged]]:
    return {
        split: [Tagged(words=_split_words(line.text), tags=(line.label,)) for line in TEXTS[name].split(split)]
        for split in SPLITS
    }


def _tags(*kinds: str) -> tuple[str, ...]:
    return ("O", *(f"{side}-{kind}" for kind in kinds for side in "BI"))


CORPORA: dict[str, Corpus] = {
    **{
        name: Corpus(about=text.about, labels=text.labels, source=partial(_labelled, name), each=False)
        for name, text in TEXTS.items()
    },
    "news": Corpus(
        about="names in news (CoNLL-2003)",
        labels=_tags("PER", "LOC", "ORG", "MISC"),
        source=tagged_news,
        each=True,
    ),
}
