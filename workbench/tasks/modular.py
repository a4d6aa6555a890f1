"""Modular arithmetic: `a ∘ b =` with the answer read at `=` (Power et al. 2022; Nanda et al. 2023).

The world is every pair of residues; a seed splits it into train and test. A counterfactual changes exactly one operand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, Latent, check_choice, sample_pairs

Operation = Literal["add", "sub", "mul", "div"]
SYMBOLS: dict[str, str] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
PROMPT = re.compile(r"\s*(\d+)\s*([-+*/]?)\s*(\d+)\s*=?\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Modular:
    """One operation on residues modulo `p`; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "modular"
    splits = ("train", "test", "all")
    measured = ("train", "test")
    contrasts = ("operand", "a", "b")
    pad_token = None
    memorised_accuracy = 0.99
    solved_accuracy = 0.99

    operation: Operation = "add"
    """Division is by non-zero residues and needs a prime modulus."""
    p: int = 113
    """The modulus: residues are 0 to p - 1, and `=` is token p."""
    train_fraction: float = 0.3
    """Share of all pairs that training sees, above 0 and below 1."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self) -> None:
        check_choice("operation", self.operation, get_args(Operation))
        if self.p < 3:
            raise WorkbenchError(f"Modulus p must be at least 3, got {self.p}. Try p=113.")
        if self.operation == "div" and not is_prime(self.p):
            raise WorkbenchError(f"Division needs a prime modulus, got p={self.p}. Try p=113 or p=97.")
        if not 0 < self.train_fraction < 1:
            raise WorkbenchError(
                f"train_fraction must lie between 0 and 1, both excluded, got {self.train_fraction}. Try 0.3."
            )
        if not 0 < self._train_size() < self._size():
            raise WorkbenchError(
                f"train_fraction {self.train_fraction} of {self._size()} pairs leaves a split empty. "
                "Choose a fraction that leaves pairs on both sides."
            )

    @property
    def vocab(self) -> Sequence[str]:
        """Residues, then `=`."""
        return (*map(str, range(self.p)), "=")

    @property
    def position_labels(self) -> Sequence[str]:
        """The operands and the place where the answer is read."""
        return ("a", "b", "=")

    def answer(self, a: Int[Tensor, " batch"], b: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The residue `a ∘ b`."""
        match self.operation:
            case "add":
                return (a + b) % self.p
            case "sub":
                return (a - b) % self.p
            case "mul":
                return (a * b) % self.p
            case "div":
                return (a * self._inverses()[b]) % self.p

    def with_latent(self, batch: Batch, latent: str, values: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """The targets of each prompt if `a`, `b` or `answer` had another value, and the other operands their own.

        Raises:
            WorkbenchError: no such latent, a value that is no residue, or a divisor of 0.
        """
        check_choice("latent", latent, ("a", "b", "answer"))
        lowest = 1 if latent == "b" and self.operation == "div" else 0
        if len(values) and not lowest <= int(values.min()) <= int(values.max()) < self.p:
            raise WorkbenchError(
                f"Latent {latent!r} takes values from {lowest} to {self.p - 1}, "
                f"got {int(values.min())} to {int(values.max())}."
            )
        a, b = (values if latent == name else batch.tokens[:, place] for place, name in enumerate("ab"))
        targets = torch.zeros_like(batch.targets)
        targets[:, 2] = values if latent == "answer" else self.answer(a, b)
        return targets

    def examples(self, split: str) -> Batch:
        """All pairs of a split: `all` in the order of a then b, the others in a random order fixed by the seed."""
        check_choice("split", split, self.splits)
        a, b = self._pairs().unbind(1)
        if split != "all":
            order = torch.randperm(len(a), generator=generator(self.seed, "modular split"))
            train = self._train_size()
            chosen = order[:train] if split == "train" else order[train:]
            a, b = a[chosen], b[chosen]
        return self._batch(a, b)

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` pairs of a split without repeats, each with a counterfactual that changes one operand.

        Raises:
            WorkbenchError: the split has fewer than `n` pairs with headroom.
        """
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with counterfactuals: operand `a`, `b`, or either one (`operand`) replaced by another residue.

        Pairs whose answer does not change are dropped and counted in `dropped`.
        """
        kind = self.contrasts[0] if kind is None else kind
        check_choice("contrast", kind, self.contrasts)
        rng = generator(seed, "contrast")
        n = len(batch)
        place = torch.randint(0, 2, (n,), generator=rng) if kind == "operand" else torch.full((n,), "ab".index(kind))
        corrupt = batch.tokens.clone()
        rows = torch.arange(n)
        lowest = torch.where((place == 1) & torch.tensor(self.operation == "div"), 1, 0)
        shift = 1 + (torch.rand(n, generator=rng) * (self.p - lowest - 1)).long()
        corrupt[rows, place] = lowest + (corrupt[rows, place] - lowest + shift) % (self.p - lowest)
        distractor = torch.zeros_like(batch.targets)
        distractor[:, 2] = self.answer(corrupt[:, 0], corrupt[:, 1])
        headroom = distractor[:, 2] != batch.targets[:, 2]
        whole = replace(batch, corrupt=corrupt, distractor=distractor)
        return replace(whole.select(headroom), dropped=int((~headroom).sum()))

    def prompt(self, text: str) -> Batch:
        """One typed prompt, such as `3 + 5 =`.

        Raises:
            WorkbenchError: it is no prompt of this task, or a number is not a residue.
        """
        symbol = SYMBOLS[self.operation]
        match = PROMPT.fullmatch(text)
        if match is None or match[2] not in ("", symbol):
            raise WorkbenchError(f"Cannot read {text!r} as a prompt. Write it like '3 {symbol} 5 ='.")
        a, b = int(match[1]), int(match[3])
        for operand in (a, b):
            if operand >= self.p:
                raise WorkbenchError(f"Token {operand} is outside the vocabulary: residues go from 0 to {self.p - 1}.")
        if self.operation == "div" and b == 0:
            raise WorkbenchError("Division by 0 has no answer. Use a divisor from 1.")
        return self._batch(torch.tensor([a]), torch.tensor([b]))

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as one types it."""
        a, b, equals = (self.vocab[int(token)] for token in tokens)
        return f"{a} {SYMBOLS[self.operation]} {b} {equals}"

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}

    def _size(self) -> int:
        return self.p * (self.p - 1 if self.operation == "div" else self.p)

    def _train_size(self) -> int:
        return round(self.train_fraction * self._size())

    def _pairs(self) -> Int[Tensor, "pair two"]:
        lowest_b = 1 if self.operation == "div" else 0
        return torch.cartesian_prod(torch.arange(self.p), torch.arange(lowest_b, self.p))

    def _inverses(self) -> Int[Tensor, " residue"]:
        return torch.tensor([0, *(pow(b, -1, self.p) for b in range(1, self.p))])

    def _batch(self, a: Int[Tensor, " batch"], b: Int[Tensor, " batch"]) -> Batch:
        answer = self.answer(a, b)
        tokens = torch.stack([a, b, torch.full_like(a, self.p)], 1)
        targets = torch.zeros_like(tokens)
        targets[:, 2] = answer
        read = torch.zeros_like(tokens, dtype=torch.bool)
        read[:, 2] = True
        latents = {
            "a": Latent(value=a, position=0, group=b),
            "b": Latent(value=b, position=1, group=a),
            "answer": Latent(value=answer, position=2, group=a),
        }
        return Batch(tokens=tokens, targets=targets, read=read, latents=latents)


def is_prime(n: int) -> bool:
    """Whether `n` is prime, by trial division."""
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))
