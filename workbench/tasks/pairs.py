"""A user's own prompts with counterfactuals: what an imported model is looked at with.

Each pair is a clean prompt with its answer and a corrupt one with the answer that it would have (the distractor). The
answer is read at the last token of the clean prompt; shorter prompts are padded on the right, and read where they end.

Nobody knows the answer to a prompt that is not among the pairs, and none is made up: whoever types such a prompt says
its answer too, as in `3 5 => 8`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, Latent, check_choice

ARROW = "=>"
"""Stands between a typed prompt and its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Prompt pairs as token ids, with the vocabulary that names them."""

    # Without annotations these are the class's, not fields.
    name = "pairs"
    splits = ("test",)
    measured = ("test",)
    contrasts = ("given",)
    memorised_accuracy = 0.99
    solved_accuracy = 0.99

    vocab: tuple[str, ...]
    clean: tuple[tuple[int, ...], ...]
    corrupt: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]
    distractor: tuple[int, ...]
    pad_token: int | None = None
    """Fills short prompts, and stands in none of them; without it prompts are of one length."""
    predictable: int | None = None
    """Tokens that can be an answer, the first ones of the vocabulary; None: all."""

    def __post_init__(self) -> None:
        columns = (self.clean, self.corrupt, self.answer, self.distractor)
        if not self.clean or len({len(column) for column in columns}) != 1:
            sizes = ", ".join(str(len(column)) for column in columns)
            raise WorkbenchError(f"Pairs need as many clean and corrupt prompts, answers and distractors; got {sizes}.")
        for row, (clean, corrupt) in enumerate(zip(self.clean, self.corrupt, strict=True), start=1):
            if len(clean) != len(corrupt) or not clean:
                raise WorkbenchError(
                    f"Pair {row}: the prompts have {len(clean)} and {len(corrupt)} tokens; they must align one to one."
                )
            if self.pad_token in (*clean, *corrupt):
                raise WorkbenchError(
                    f"Pair {row}: a prompt holds the padding token {self.vocab[self.pad_token or 0]!r}."
                )
        if self.pad_token is None and len({len(prompt) for prompt in self.clean}) != 1:
            raise WorkbenchError(
                "Prompts differ in length, and the model has no padding token. Give prompts of one length."
            )

    @property
    def position_labels(self) -> Sequence[str]:
        """Positions have no names of their own, and a bare number could be taken for a token."""
        return tuple(f"t{position}" for position in range(self._width()))

    def examples(self, split: str) -> Batch:
        """All clean prompts, in the order of the pairs."""
        check_choice("split", split, self.splits)
        return self._batch(self.clean, self.answer, self._width())

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` pairs in a random order, or all where the user gave fewer. Those without headroom are left out.

        Raises:
            WorkbenchError: fewer than one is asked for, or no pair has headroom.
        """
        everything = self.contrast(self.examples(split))
        if n < 1 or not len(everything):
            raise WorkbenchError(f"Asked for {n} pairs; {len(everything)} have headroom. Ask for 1 to that.")
        order = torch.randperm(len(everything), generator=generator(seed, "sample"))
        return everything.select(order[:n])

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with the counterfactuals that were given; `seed` draws nothing.

        A clean prompt that stands in several pairs meets their counterfactuals in turn. Pairs whose answer is their
        distractor have no headroom: they are dropped and counted in `dropped`.

        Raises:
            WorkbenchError: a prompt with its answer is not among the pairs.
        """
        check_choice("contrast", kind or self.contrasts[0], self.contrasts)
        chosen = self._rows_of(batch)
        width = batch.tokens.shape[1]
        corrupt = self._padded([self.corrupt[row] for row in chosen], width)
        distractor = torch.zeros_like(batch.targets)
        distractor[batch.read] = torch.tensor([self.distractor[row] for row in chosen], dtype=distractor.dtype)
        headroom = (distractor != batch.targets)[batch.read]
        whole = replace(batch, corrupt=corrupt, distractor=distractor)
        return replace(whole.select(headroom), dropped=int((~headroom).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed prompt: of the pairs, or any with its answer, as in `3 5 => 8`.

        Raises:
            WorkbenchError: a token is not in the vocabulary, or no single answer is known.
        """
        ids = token_ids(self.vocab)
        question, arrow, told = text.rpartition(ARROW)
        words = told.split()
        # Where the arrow is a token of the user's own, only a single word after it is an answer.
        if arrow and (len(words) == 1 or ARROW not in ids):
            if len(words) != 1:
                raise WorkbenchError(f"The answer after {ARROW} must be one token, got {told.strip()!r}.")
            tokens, answers = self._encode(question, ids), set(encode(words, ids))
        else:
            tokens = self._encode(text, ids)
            answers = self._known_answers(tokens)
        if len(answers) != 1:
            known = " or ".join(self.vocab[answer] for answer in sorted(answers)) or "not known"
            raise WorkbenchError(f"The answer to {text.strip()!r} is {known}. Write it as 'PROMPT {ARROW} ANSWER'.")
        [answer] = answers
        if self.predictable is not None and answer >= self.predictable:
            raise WorkbenchError(
                f"The model cannot answer {self.vocab[answer]!r}: it predicts {self._answers_in_words()}."
            )
        return self._batch((tokens,), (answer,), len(tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens' names without padding."""
        return " ".join(self.vocab[int(token)] for token in tokens if int(token) != self.pad_token)

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _width(self) -> int:
        return max(map(len, self.clean))

    def _answers_in_words(self) -> str:
        first, last = self.vocab[0], self.vocab[(self.predictable or len(self.vocab)) - 1]
        return f"{first!r} to {last!r}"

    def _encode(self, text: str, ids: Mapping[str, int]) -> tuple[int, ...]:
        tokens = encode(text.split(), ids)
        if self.pad_token in tokens:
            raise WorkbenchError(f"Token {self.vocab[self.pad_token or 0]!r} is padding and stands in no prompt.")
        return tokens

    def _known_answers(self, tokens: tuple[int, ...]) -> set[int]:
        told = [*zip(self.clean, self.answer, strict=True), *zip(self.corrupt, self.distractor, strict=True)]
        return {answer for prompt, answer in told if prompt == tokens}

    def _rows_of(self, batch: Batch) -> list[int]:
        """The pair that each row of a batch comes from."""
        stored = defaultdict(list)
        for row, (prompt, answer) in enumerate(zip(self.clean, self.answer, strict=True)):
            stored[prompt, answer].append(row)
        turn: dict[object, int] = defaultdict(int)
        chosen = []
        lengths = (batch.read.int().argmax(1) + 1).tolist()
        for tokens, length, answer in zip(
            batch.tokens.tolist(), lengths, batch.targets[batch.read].tolist(), strict=True
        ):
            key = tuple(tokens[:length]), answer
            if key not in stored:
                raise WorkbenchError(
                    f"No counterfactual is known for '{self.decode(key[0])} {ARROW} {self.vocab[answer]}': "
                    "it is not among the imported pairs. Type a counterfactual of your own."
                )
            chosen.append(stored[key][turn[key] % len(stored[key])])
            turn[key] += 1
        return chosen

    def _padded(self, prompts: Sequence[tuple[int, ...]], width: int) -> Int[Tensor, "batch pos"]:
        # Without a padding token all are of one length, and nothing is filled.
        fill = 0 if self.pad_token is None else self.pad_token
        return torch.tensor([prompt + (fill,) * (width - len(prompt)) for prompt in prompts]).reshape(-1, width)

    def _batch(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[int], width: int) -> Batch:
        tokens = self._padded(prompts, width)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        read = torch.arange(width) == last[:, None]
        targets = torch.where(read, torch.tensor(answers)[:, None], 0)
        # Where prompts end at different places, the answer has no position of its own.
        latents = (
            {"answer": Latent(value=torch.tensor(answers), position=int(last[0]))} if last.unique().numel() == 1 else {}
        )
        return Batch(tokens=tokens, targets=targets, read=read, latents=latents)


def token_ids(vocab: Sequence[str]) -> dict[str, int]:
    """What a person types -> token id."""
    return {word: token for token, word in enumerate(vocab)}


def encode(words: Sequence[str], ids: Mapping[str, int]) -> tuple[int, ...]:
    """Token ids of words.

    Raises:
        WorkbenchError: a word is not in the vocabulary, or there is none.
    """
    if unknown := [word for word in words if word not in ids]:
        raise WorkbenchError(f"Token {unknown[0]!r} is outside the vocabulary of {len(ids)} tokens.")
    if not words:
        raise WorkbenchError("An empty prompt has nothing to read. Type tokens of the vocabulary, separated by spaces.")
    return tuple(ids[word] for word in words)
