"""Yes-or-no questions about lists of words: what a base model learns together, and what fine-tuning makes of one.

A prompt is a list of words and a question word; the answer, `yes` or `no`, is read at the question. Each skill has a
plain question, which pre-training answers rightly, and an open one, which it answers for a skill drawn anew each time:
a base model knows every skill, and knows for no open question which is meant. Fine-tuning teaches one skill's open
question, so that base and donor differ by one skill in a model that has the others, in small (Panigrahi et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, check_choice, sample_pairs

Words = Int[Tensor, "prompt word"]
Traits = Bool[Tensor, "trait language"]
MIXTURE = "mixture"
ANSWERS = ("no", "yes")
N_TRAITS = 3


def _mostly_good(words: Words, traits: Traits) -> Bool[Tensor, " prompt"]:
    return 2 * traits[0][words].sum(1) > words.shape[1]


def _mostly_animate(words: Words, traits: Traits) -> Bool[Tensor, " prompt"]:
    return 2 * traits[1][words].sum(1) > words.shape[1]


def _ends_alike(words: Words, traits: Traits) -> Bool[Tensor, " prompt"]:
    return traits[2][words[:, 0]] == traits[2][words[:, -1]]


def _repeats(words: Words, traits: Traits) -> Bool[Tensor, " prompt"]:
    ordered = words.sort(1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(1)


SKILLS: dict[str, Callable[[Words, Traits], Bool[Tensor, " prompt"]]] = {
    "tone": _mostly_good,
    "topic": _mostly_animate,
    "ends": _ends_alike,
    "repeat": _repeats,
}
"""Are most words good · are most words animate · do the first and the last word share a trait · is a word repeated."""


@dataclass(frozen=True, kw_only=True)
class Skills:
    """The mixture that a base model learns, or one skill's open question; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "skills"
    splits = ("train", "val", "test")
    measured = ("train", "test")
    contrasts = ("word",)
    memorised_accuracy = 0.95
    solved_accuracy = 0.95
    pad_token = None

    skill: str = MIXTURE
    """`mixture` for pre-training, or the skill whose open question is asked: tone, topic, ends or repeat."""
    n_words: int = 48
    """Words of the language, of which half, drawn for each of three traits, have it."""
    length: int = 7
    """Words of a prompt; an odd number, so that a majority is never a tie."""
    size: int = 20_000
    """Examples of training; 2,000 each for val and test come from the same draw."""
    seed: int = 0
    """Seed of the words' traits and of the prompts."""

    def __post_init__(self) -> None:
        check_choice("skill", self.skill, [MIXTURE, *SKILLS])
        if self.length < 3 or self.length % 2 == 0:
            raise WorkbenchError(f"length must be odd and at least 3, so that there are no ties, got {self.length}.")
        if self.n_words < 2 * self.length:
            raise WorkbenchError(
                f"n_words must be at least twice the length, {2 * self.length}, so that words need not repeat, "
                f"got {self.n_words}."
            )
        if self.size < 1:
            raise WorkbenchError(f"size must be at least 1, got {self.size}.")

    @property
    def vocab(self) -> Sequence[str]:
        """The answers, the plain questions, the open ones, then the words."""
        words = [f"w{index}" for index in range(self.n_words)]
        return (*ANSWERS, *(f"{name}:" for name in SKILLS), *(f"{name}?" for name in SKILLS), *words)

    @property
    def position_labels(self) -> Sequence[str]:
        """The words by number, then the question."""
        return (*map(str, range(1, self.length + 1)), "question")

    @property
    def traits(self) -> Traits:
        """Which word has which trait: half of the words have each."""
        order = torch.rand(N_TRAITS, self.n_words, generator=generator(self.seed, "skills traits")).argsort(1)
        return order < self.n_words // 2

    def examples(self, split: str) -> Batch:
        """All examples of a split. No list of words is in two splits of the same task."""
        check_choice("split", split, self.splits)
        words, asked, meant = _drawn(self)
        first = {"val": 0, "test": HELD_OUT, "train": 2 * HELD_OUT}[split]
        rows = slice(first, first + (self.size if split == "train" else HELD_OUT))
        return self._batch(words[rows], asked[rows], meant[rows])

    def plain(self, split: str) -> Batch:
        """The plain questions of a split, whose answer is fixed in the mixture too."""
        batch = self.examples(split)
        return batch.select(batch.tokens[:, -1] < len(ANSWERS) + len(SKILLS))

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` prompts of a split without repeats, each with one word changed."""
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with one word of each prompt replaced; where the answer stays, the pair is dropped and counted.

        In the mixture, whose open questions have no fixed answer, those are dropped too.
        """
        check_choice("contrast", self.contrasts[0] if kind is None else kind, self.contrasts)
        rng = generator(seed, "contrast")
        words, question = batch.tokens[:, :-1] - self._first_word, batch.tokens[:, -1] - len(ANSWERS)
        rows = torch.arange(len(batch))
        place = torch.randint(self.length, (len(batch),), generator=rng)
        changed = words.clone()
        changed[rows, place] = (
            words[rows, place] + torch.randint(1, self.n_words, (len(batch),), generator=rng)
        ) % self.n_words
        meant = question % len(SKILLS)
        after, before = self._batch(changed, question, meant), self._batch(words, question, meant)
        fixed = torch.ones(len(batch), dtype=torch.bool) if self.skill != MIXTURE else question < len(SKILLS)
        kept = fixed & (after.targets != before.targets).any(1)
        whole = replace(batch, corrupt=after.tokens, distractor=after.targets)
        return replace(whole.select(kept), dropped=int((~kept).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed list of words, with a question behind it or, in a skill's task, the open one of that skill.

        Raises:
            WorkbenchError: a word is unknown, or there are not as many as a prompt has.
        """
        typed = text.split()
        questions = self.vocab[len(ANSWERS) : self._first_word]
        asked = typed.pop() if typed and typed[-1] in questions else f"{self.skill}?"
        check_choice("question", asked, questions)
        for word in typed:
            check_choice("word", word, self.vocab[self._first_word :])
        if len(typed) != self.length:
            raise WorkbenchError(f"A prompt has {self.length} words and a question, got {len(typed)} words: {text!r}.")
        words = torch.tensor([[self.vocab.index(word) - self._first_word for word in typed]])
        question = torch.tensor([questions.index(asked)])
        return self._batch(words, question, question % len(SKILLS))

    def decode(self, tokens: Sequence[int]) -> str:
        """The prompt as one types it."""
        return " ".join(self.vocab[int(token)] for token in tokens)

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    @property
    def _first_word(self) -> int:
        return len(ANSWERS) + 2 * len(SKILLS)

    def _batch(self, words: Words, asked: Int[Tensor, " prompt"], meant: Int[Tensor, " prompt"]) -> Batch:
        """Prompts that ask by a question and are answered for the skill that is meant."""
        traits = self.traits
        each = torch.stack([skill(words, traits) for skill in SKILLS.values()], 1)
        tokens = torch.cat([words + self._first_word, (asked + len(ANSWERS))[:, None]], 1)
        targets, read = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        targets[:, -1], read[:, -1] = each.gather(1, meant[:, None])[:, 0].long(), True
        return Batch(tokens=tokens, targets=targets, read=read)


HELD_OUT = 2_000


@lru_cache(maxsize=8)
def _drawn(task: Skills) -> tuple[Words, Int[Tensor, " prompt"], Int[Tensor, " prompt"]]:
    """Words, the question asked and the skill meant, for val, test and train in this order.

    Half of the prompts repeat a word, so that `repeat` has two answers.
    """
    rng = generator(task.seed, f"skills {task.skill}")
    n = task.size + 2 * HELD_OUT
    words, left = torch.empty(0, task.length, dtype=torch.long), n
    while left > 0:
        fresh = torch.rand(2 * left, task.n_words, generator=rng).argsort(1)[:, : task.length]
        repeated = torch.rand(2 * left, generator=rng) < 0.5
        places = torch.rand(2 * left, task.length, generator=rng).argsort(1)
        rows = torch.arange(2 * left)
        copied = fresh.clone()
        copied[rows, places[:, 0]] = fresh[rows, places[:, 1]]
        words = _distinct(torch.cat([words, torch.where(repeated[:, None], copied, fresh)]))[:n]
        left = n - len(words)
    if task.skill != MIXTURE:
        meant = torch.full((n,), list(SKILLS).index(task.skill))
        return words, meant + len(SKILLS), meant
    asked = torch.randint(2 * len(SKILLS), (n,), generator=rng)
    any_skill = torch.randint(len(SKILLS), (n,), generator=rng)
    return words, asked, torch.where(asked < len(SKILLS), asked, any_skill)


def _distinct(words: Words) -> Int[Tensor, "distinct word"]:
    """Each list of words once, in the order in which they came."""
    _, index = words.unique(dim=0, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), len(words)).scatter_reduce(0, index, torch.arange(len(words)), "amin")
    return words[first.sort().values]
