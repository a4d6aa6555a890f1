"""What the tasks over synthetic facts share (Wang et al. 2024): drawing pairs, choosing candidates, checking fractions.

Each of these worlds holds atomic facts, given one by one, and inferred facts, which follow from several of them. Some
atomic facts are out of distribution (OOD): no inference of training rests on them. The question is whether a model that
has learnt to infer from the others (in distribution: ID) can also infer from those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, check_choice, join, sample_pairs

ROWS = 8192
"""Prompts that get their counterfactuals at once: bounds the table of candidates."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Change:
    """Prompts with one thing changed."""

    tokens: Int[Tensor, "batch pos"]
    answer: Int[Tensor, " batch"]
    """What is then right, valid where `kept`."""
    kept: Bool[Tensor, " batch"]
    """Which prompts have such a counterfactual."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Perturbed:
    """Prompts with one cause changed so that the old answer is no longer right, whether or not there is a new one."""

    tokens: Int[Tensor, "batch pos"]
    """The prompts as they are changed; unchanged where not `kept`."""
    defined: Bool[Tensor, " batch"]
    """Whether the changed prompt asks for something that has an answer."""
    answer: Int[Tensor, " batch"]
    """That answer, valid where `defined`."""
    kept: Bool[Tensor, " batch"]
    """Whether there is any such change."""

    def select(self, rows: Tensor | slice) -> Perturbed:
        """Those of these rows."""
        return Perturbed(**{name: getattr(self, name)[rows] for name in ("tokens", "defined", "answer", "kept")})


@dataclass(frozen=True, kw_only=True, slots=True)
class FactTask(ABC):
    """How any task over facts deals out its examples; what they are is the task's own."""

    # Without annotations this is the class's, not a field.
    memorised_accuracy = 0.99
    name: ClassVar[str]
    contrasts: ClassVar[Sequence[str]]

    @abstractmethod
    def examples(self, split: str) -> Batch:
        """Every example of a split, in an order fixed by the seed, without counterfactuals."""

    @abstractmethod
    def _change(self, batch: Batch, kind: str, rng: torch.Generator) -> Change:
        """One counterfactual of each prompt, drawn at random among those of a kind."""

    def sample(self, n: int, *, split: str = "test", seed: int | torch.Generator = 0) -> Batch:
        """`n` examples of a split without repeats, each with a counterfactual of the default kind.

        Raises:
            WorkbenchError: the split has fewer than `n` examples with headroom.
        """
        return sample_pairs(
            self.examples(split), n, split=split, seed=seed, contrast=lambda batch, rng: self.contrast(batch, seed=rng)
        )

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with counterfactuals of a kind; prompts that have none are dropped and counted in `dropped`."""
        kind = self.contrasts[0] if kind is None else kind
        check_choice("contrast", kind, self.contrasts)
        rng = generator(seed, "contrast")
        return join([_paired(part, self._change(part, kind, rng)) for part in _parts(batch)])

    def to_json(self) -> dict[str, object]:
        """The fields, with the task's name."""
        return {"name": self.name, **asdict(self)}


def choose(
    allowed: Bool[Tensor, "batch candidate"], rng: torch.Generator
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """One allowed candidate of each row, all equally likely, and which rows have any."""
    score = torch.rand(allowed.shape, generator=rng).masked_fill(~allowed, -1)
    return score.argmax(1), allowed.any(1)


def draw_below(bound: Int[Tensor, " batch"], rng: torch.Generator) -> Int[Tensor, " batch"]:
    """A number from 0 to each bound, the bound excluded; 0 where the bound is."""
    # In float64 the product rounds up to the bound itself for no number of facts that fits in memory.
    return (torch.rand(bound.shape, generator=rng, dtype=torch.float64) * bound).long()


def count_share(share: float, n: int) -> int:
    """How many of `n` a share is."""
    return round(share * n)


def check_counts(**counts: int) -> None:
    """Raise a WorkbenchError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise WorkbenchError(f"{name} must be at least 1, got {count}.")


def check_fractions(**fractions: float) -> None:
    """Raise a WorkbenchError unless every fraction lies between 0 and 1, both excluded."""
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise WorkbenchError(f"{name} must lie between 0 and 1, both excluded, got {fraction}. Try 0.1.")


def check_phi(phi: float, *, n_id: int, pool: int) -> None:
    """Raise a WorkbenchError unless training can be given `phi` inferred facts for each ID atomic one.

    Args:
        phi: inferred facts in training, for each ID atomic fact.
        n_id: ID atomic facts.
        pool: inferred facts that training may be given.
    """
    if not 0 < phi < math.inf:
        raise WorkbenchError(f"phi must be above 0, got {phi}. Try 7.2.")
    check_filled({"train_inferred": min(pool, count_share(phi, n_id))})
    if count_share(phi, n_id) > pool:
        largest = math.floor(pool / n_id * 1000) / 1000
        raise WorkbenchError(
            f"phi={phi:g} asks for {count_share(phi, n_id)} inferred facts in training; this world holds {pool} "
            f"for {n_id} ID atomic facts. Set phi to at most {largest:g}."
        )


def check_filled(sizes: Mapping[str, int]) -> None:
    """Raise a WorkbenchError if a split has no examples."""
    for split, size in sizes.items():
        if not size:
            raise WorkbenchError(
                f"This world leaves split {split!r} empty. Enlarge the world or its fractions, or try another seed."
            )


def _parts(batch: Batch) -> Iterator[Batch]:
    for first in range(0, max(len(batch), 1), ROWS):
        yield batch.select(slice(first, first + ROWS))


def _paired(batch: Batch, change: Change) -> Batch:
    distractor = torch.where(batch.read, change.answer[:, None], 0)
    whole = replace(batch, corrupt=change.tokens, distractor=distractor)
    return replace(whole.select(change.kept), dropped=int((~change.kept).sum()))
