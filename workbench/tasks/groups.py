"""Splits of prompts that cannot leak: what shares an entity stays together.

Whoever fits something to a latent and scores it on other prompts must not meet there what the fit has learnt by heart.
A task says for each latent which prompts belong together (`Latent.group`: the head of the fact that a bridge entity is
looked up in, say); a split puts whole groups into the training part or into the test part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, derive_seed
from workbench.tasks.base import Batch, Latent, check_choice

TEST_GROUPS = 0.25
"""Share of the groups in the test part."""
TRIES = 100
"""Splits that are drawn until one leaves every class in training."""
SHOWN = 5
"""Values of a latent that an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupSplit:
    """A latent's classes, and prompts that fit and prompts that judge."""

    values: Int[Tensor, " value"]
    """The value of each class, sorted."""
    labels: Int[Tensor, " batch"]
    """Class of each prompt, counted from 0."""
    group: Int[Tensor, " batch"]
    """Group of each prompt, counted from 0."""
    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]
    """Prompts of groups that are not in `train`."""

    @property
    def n_groups(self) -> int:
        """Groups in all."""
        return int(self.group.max()) + 1


def split_by_group(batch: Batch, latent: str, *, groups: Int[Tensor, " batch"] | None = None, seed: int) -> GroupSplit:
    """The first random split of groups in which no value of the latent is in the test part alone.

    Args:
        batch: prompts with this latent.
        latent: its name.
        groups: which prompts belong together; None takes what the task says, or the token at the latent's position.
        seed: of the split.

    Raises:
        WorkbenchError: no such latent, one value in all prompts, or no split has all values in training.
    """
    found = _known(batch, latent)
    values, labels = found.value.cpu().unique(return_inverse=True)
    if len(values) < 2:
        raise WorkbenchError(
            f"Latent {latent!r} has one value in all {len(labels)} prompts; a probe needs two or more."
        )
    group = _groups(batch, latent, groups)
    mend = "Give `groups` of which each class has several, or leave those prompts out with batch.select(…)."
    single = _groups_of_values(labels, group) < 2
    if single.any():
        listed = ", ".join(map(str, values[single][:SHOWN].tolist())) + (", …" if int(single.sum()) > SHOWN else "")
        raise WorkbenchError(
            f"Latent {latent!r} cannot be split by group: {int(single.sum())} of its {len(values)} values ({listed}) "
            f"are in one group only, and lack examples in training or in the test. {mend}"
        )
    from sklearn.model_selection import GroupShuffleSplit

    state = derive_seed(seed, "probe split", latent) % 2**32
    splits = GroupShuffleSplit(n_splits=TRIES, test_size=TEST_GROUPS, random_state=state)
    for train, test in splits.split(np.zeros(len(labels)), groups=group.numpy()):
        if np.isin(np.arange(len(values)), labels.numpy()[train]).all():
            parts = {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}
            return GroupSplit(values=values, labels=labels, group=group, **parts)
    raise WorkbenchError(
        f"Latent {latent!r} cannot be split by group: in each of {TRIES} random splits some of its {len(values)} "
        f"values lacks examples in training. {mend}"
    )


def in_several_groups(
    batch: Batch, latent: str, *, groups: Int[Tensor, " batch"] | None = None
) -> Bool[Tensor, " batch"]:
    """Which prompts have a value of the latent that stands in two groups or more: those that a split can use.

    Raises:
        WorkbenchError: no such latent.
    """
    labels = _known(batch, latent).value.cpu().unique(return_inverse=True)[1]
    return _groups_of_values(labels, _groups(batch, latent, groups))[labels] > 1


def _known(batch: Batch, latent: str) -> Latent:
    check_choice("latent", latent, tuple(batch.latents))
    return batch.latents[latent]


def _groups(batch: Batch, latent: str, groups: Int[Tensor, " batch"] | None) -> Int[Tensor, " batch"]:
    if groups is None:
        found = batch.latents[latent]
        groups = batch.tokens[:, found.position] if found.group is None else found.group
    return groups.cpu().unique(return_inverse=True)[1]


def _groups_of_values(labels: Int[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Int[Tensor, " value"]:
    """In how many groups each value stands."""
    return torch.stack([labels, group], 1).unique(dim=0)[:, 0].bincount(minlength=int(labels.max()) + 1)
