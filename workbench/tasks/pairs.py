"""A user's own prompts with counterfactuals: what an imported model is looked at with.

Each pair is a clean prompt with its answer and a corrupt one with the answer that it would have (the distractor). The
answer is read at the last token of the clean prompt; shorter prompts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, Latent, check_choice

ANSWER = "=>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Prompt pairs as token ids, with the vocabulary that names them."""

    # Without annotations these are the class's, not fields.
    name = "pairs"
    splits = ("test",)
    contrasts = ("given",)
    solved_accuracy = 0.99

    vocab: tuple[str, ...]
    clean: tuple[tuple[int, ...], ...]
    corrupt: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]
    distractor: tuple[int, ...]
    pad_token: int | None = None

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
        if self.pad_token is None and len({len(prompt) for prompt in self.clean}) != 1:
            raise WorkbenchError(
                "Prompts differ in length, and the model has no padding token. Give prompts of one length."
            )

    @property
    def position_labels(self) -> Sequence[str]:
        """Positions have no names of their own."""
        return tuple(f"t{position}" for position in range(max(map(len, self.clean))))

    def examples(self, split: str) -> Batch:
        """All clean prompts."""
        check_choice("split", split, self.splits)
        return self._batch(self.clean, self.answer)

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` pairs in a random order; those whose answer is their distractor have no headroom and are left out."""
        everything = self.contrast(self.examples(split))
        if not 1 <= n <= len(everything):
            raise WorkbenchError(f"Asked for {n} pairs; there are {len(everything)} with headroom. Ask for 1 to that.")
        order = torch.randperm(len(everything), generator=generator(seed, "sample"))
        return everything.select(order[:n])

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with the counterfactuals that were given; `seed` draws nothing.

        Raises:
            WorkbenchError: a prompt is not among the pairs.
        """
        check_choice("contrast", kind or "given", self.contrasts)
        rows = {self._padded(prompt): row for row, prompt in enumerate(self.clean)}
        found = [rows.get(tuple(prompt)) for prompt in self._wide(batch.tokens).tolist()]
        if None in found:
            raise WorkbenchError(
                "No counterfactual is known for a prompt that is not among the imported pairs. Type one."
            )
        chosen = [row for row in found if row is not None]
        width = batch.tokens.shape[1]
        corrupt = torch.tensor([self._padded(self.corrupt[row])[:width] for row in chosen])
        distractor = torch.zeros_like(batch.targets)
        distractor[batch.read] = torch.tensor([self.distractor[row] for row in chosen])
        headroom = (distractor != batch.targets)[batch.read]
        whole = replace(batch, corrupt=corrupt, distractor=distractor)
        return replace(whole.select(headroom), dropped=int((~headroom).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed prompt: of the pairs, or any with its answer, as in `3 5 => 8`.

        Raises:
            WorkbenchError: a token is not in the vocabulary, or no answer is known.
        """
        question, arrow, told = text.partition(ANSWER)
        tokens = tuple(encode(question, self.vocab))
        known = dict(zip(self.clean, self.answer, strict=True)) | dict(zip(self.corrupt, self.distractor, strict=True))
        if arrow:
            answers = encode(told, self.vocab)
            if len(answers) != 1:
                raise WorkbenchError(f"The answer after {ANSWER} must be one token, got {told.strip()!r}.")
            return self._batch((tokens,), (answers[0],), width=len(tokens))
        if tokens not in known:
            raise WorkbenchError(f"No answer is known for {question.strip()!r}. Write it as 'PROMPT {ANSWER} ANSWER'.")
        return self._batch((tokens,), (known[tokens],), width=len(tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens' names without padding."""
        return " ".join(self.vocab[int(token)] for token in tokens if token != self.pad_token)

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _padded(self, prompt: tuple[int, ...], width: int | None = None) -> tuple[int, ...]:
        missing = (width or len(self.position_labels)) - len(prompt)
        return prompt if missing == 0 else prompt + (self.pad_token or 0,) * missing

    def _wide(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        missing = len(self.position_labels) - tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, missing), value=self.pad_token or 0)

    def _batch(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[int], width: int | None = None) -> Batch:
        tokens = torch.tensor([self._padded(prompt, width) for prompt in prompts])
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        read = torch.arange(tokens.shape[1]) == last[:, None]
        targets = torch.where(read, torch.tensor(answers)[:, None], 0)
        # Where prompts end at different places, the answer has no position of its own.
        latents = (
            {"answer": Latent(value=torch.tensor(answers), position=int(last[0]))} if last.unique().numel() == 1 else {}
        )
        return Batch(tokens=tokens, targets=targets, read=read, latents=latents)


def encode(text: str, vocab: Sequence[str]) -> list[int]:
    """Token ids of words separated by spaces.

    Raises:
        WorkbenchError: a word is not in the vocabulary.
    """
    ids = {word: token for token, word in enumerate(vocab)}
    words = text.split()
    if unknown := [word for word in words if word not in ids]:
        raise WorkbenchError(f"Token {unknown[0]!r} is outside the vocabulary of {len(vocab)} tokens.")
    if not words:
        raise WorkbenchError("An empty prompt has nothing to read. Type tokens of the vocabulary, separated by spaces.")
    return [ids[word] for word in words]
