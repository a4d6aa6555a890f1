"""The Task protocol and the Batch that every task deals out.

A task knows its world (drawn from a seed), its vocabulary, its splits, how to change one latent of a prompt and keep
the others, and where each latent stands in the prompt. Nothing else in the workbench knows what a token means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator, nearest

TENSORS = ("tokens", "targets", "read", "right", "corrupt", "distractor")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Latent:
    """A quantity behind a prompt, as the token that names it, and the position where it is first determined."""

    value: Int[Tensor, " batch"]
    position: int
    among: range | None = None
    """The tokens that could name it, where they stand side by side in the vocabulary."""
    group: Int[Tensor, " batch"] | None = None
    """Prompts of one group share what the value could be known by heart from: a split of prompts into those that fit
    something and those that judge it keeps them together."""

    def of(self, change: Callable[[Tensor], Tensor]) -> Latent:
        """The latent of the prompts that a change of the batch leaves."""
        group = None if self.group is None else change(self.group)
        return replace(self, value=change(self.value), group=group)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Prompts with their answers and, where drawn, their counterfactuals."""

    tokens: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    """The right next token, valid where `read`."""
    read: Bool[Tensor, "batch pos"]
    """Where the loss and the metrics look."""
    right: Bool[Tensor, "batch vocab"] | None = None
    """All tokens that are right where the prompt is read, of which the target is one; None where it is the only one."""
    latents: Mapping[str, Latent] = field(default_factory=dict)
    corrupt: Int[Tensor, "batch pos"] | None = None
    """The same prompts with one thing changed."""
    distractor: Int[Tensor, "batch pos"] | None = None
    """The answer to `corrupt`, valid where `read`."""
    dropped: int = 0
    """Pairs left out because the change did not change the answer (no headroom)."""

    def __post_init__(self) -> None:
        if self.targets.shape != self.tokens.shape or self.read.shape != self.tokens.shape:
            raise WorkbenchError(
                f"Batch needs targets and read of the tokens' shape {tuple(self.tokens.shape)}, "
                f"got {tuple(self.targets.shape)} and {tuple(self.read.shape)}."
            )
        if (self.corrupt is None) != (self.distractor is None):
            raise WorkbenchError("Batch needs corrupt and distractor together: one came without the other.")
        for what, tensor in (("prompts", self.corrupt), ("answers", self.distractor)):
            if tensor is not None and tensor.shape != self.tokens.shape:
                raise WorkbenchError(
                    f"Counterfactual {what} must have the clean prompts' shape {tuple(self.tokens.shape)}, "
                    f"got {tuple(tensor.shape)}."
                )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.tokens)

    def select(self, rows: Tensor | slice) -> Batch:
        """The batch of these rows."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: change(value) for name in TENSORS if (value := getattr(self, name)) is not None}
        latents = {name: latent.of(change) for name, latent in self.latents.items()}
        return replace(self, **tensors, latents=latents)

    def pairs(self) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Counterfactual prompts and their answers.

        Raises:
            WorkbenchError: the batch was drawn without counterfactuals.
        """
        if self.corrupt is None or self.distractor is None:
            raise WorkbenchError("This batch has no counterfactual pairs. Draw them with task.contrast(batch).")
        return self.corrupt, self.distractor


def join(batches: Sequence[Batch]) -> Batch:
    """The batches one after another, their dropped pairs added up."""
    first = batches[0]
    stacked = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in TENSORS
        if getattr(first, name) is not None
    }
    latents = {name: _joined([batch.latents[name] for batch in batches]) for name in first.latents}
    return replace(first, **stacked, latents=latents, dropped=sum(batch.dropped for batch in batches))


def _joined(latents: Sequence[Latent]) -> Latent:
    groups = [latent.group for latent in latents if latent.group is not None]
    group = torch.cat(groups) if len(groups) == len(latents) else None
    return replace(latents[0], value=torch.cat([latent.value for latent in latents]), group=group)


def sample_pairs(
    pool: Batch, n: int, *, split: str, seed: int | torch.Generator, contrast: Callable[[Batch, torch.Generator], Batch]
) -> Batch:
    """`n` examples of a pool without repeats, each with its counterfactual, in a random order.

    Args:
        pool: every example of the split.
        n: how many.
        split: its name, for errors.
        seed: of the order and the counterfactuals.
        contrast: gives examples their counterfactuals, and leaves out and counts those that have none.

    Raises:
        WorkbenchError: there are fewer than `n` examples with headroom.
    """
    if not 1 <= n <= len(pool):
        raise WorkbenchError(f"Asked for {n} examples of split {split!r}, which has {len(pool)}. Ask for 1 to that.")
    rng = generator(seed, "sample")
    order = torch.randperm(len(pool), generator=rng)
    # Drawn one pass at a time, so that `dropped` counts only the pairs that were looked at for these n.
    kept = contrast(pool.select(order[:n]), rng)
    looked_at = n
    while len(kept) < n and looked_at < len(pool):
        missing = n - len(kept)
        more = contrast(pool.select(order[looked_at : looked_at + missing]), rng)
        looked_at += missing
        kept = join([kept, more])
    if len(kept) < n:
        raise WorkbenchError(f"Asked for {n} pairs of split {split!r}; only {len(kept)} have headroom.")
    return kept


@runtime_checkable
class Task(Protocol):
    """What the workbench asks of a task. A task is a value: the same fields give the same world."""

    @property
    def name(self) -> str:
        """Short name, as in recipes and reports."""
        ...

    @property
    def vocab(self) -> Sequence[str]:
        """Token id -> what a person reads."""
        ...

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits; the first is what training sees."""
        ...

    @property
    def measured(self) -> Sequence[str]:
        """Splits whose loss and accuracy training logs; of a task that can be trained, `train` and `test` are two."""
        ...

    @property
    def contrasts(self) -> Sequence[str]:
        """Kinds of counterfactual; the first is the default."""
        ...

    @property
    def pad_token(self) -> int | None:
        """Token that fills short prompts, if the task has any."""
        ...

    @property
    def memorised_accuracy(self) -> float:
        """Accuracy on `train` from which it counts as memorised."""
        ...

    @property
    def solved_accuracy(self) -> float:
        """Accuracy on `test` from which the task counts as generalised."""
        ...

    @property
    def position_labels(self) -> Sequence[str]:
        """What stands at each position, for axes of figures."""
        ...

    def examples(self, split: str) -> Batch:
        """Every example of a split, in a fixed order, without counterfactuals."""
        ...

    def sample(self, n: int, *, split: str, seed: int | torch.Generator = 0) -> Batch:
        """`n` examples drawn without replacement, with counterfactuals of the default kind."""
        ...

    def contrast(self, batch: Batch, kind: str | None = None, *, seed: int | torch.Generator = 0) -> Batch:
        """The batch with counterfactuals that change one latent; pairs without headroom are dropped and counted."""
        ...

    def prompt(self, text: str) -> Batch:
        """One prompt typed by a person, with its answer and latents."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as a person reads it."""
        ...

    def to_json(self) -> dict[str, object]:
        """The fields that rebuild this task."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """A task whose training never repeats: a step's examples are drawn when it comes."""

    @property
    def hardest(self) -> int:
        """The hardest level of training."""
        ...

    def stream(self, n: int, *, seed: int | torch.Generator, level: int | None = None) -> Batch:
        """`n` fresh training examples, the same ones for the same seed; no harder than the level, if one is given."""
        ...


@runtime_checkable
class Voted(Protocol):
    """A task whose answers a Transformer Program votes on."""

    @property
    def d_vocab_out(self) -> int:
        """Words that votes are counted for, the first ones of the vocabulary."""
        ...

    @property
    def outputs(self) -> tuple[int, ...]:
        """Those of them that may be an answer."""
        ...

    @property
    def causal(self) -> bool:
        """Whether an answer depends on what stands before it alone."""
        ...

    @property
    def pooled(self) -> bool:
        """Whether all positions together give one answer."""
        ...


def check_choice(kind: str, name: str, known: Sequence[str]) -> None:
    """Raise a WorkbenchError unless `name` is one of `known`."""
    if name not in known:
        raise WorkbenchError(f"Unknown {kind} {name!r}. {nearest(name, known)}")
