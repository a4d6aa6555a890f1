"""Comparison: which of two entities has more of an attribute (Wang et al. 2024, section 4).

A model is told every value, and some comparisons of ID entities. Both values can be looked up in parallel, where facts
that are told are kept, so that here a model that groks answers for OOD entities too, as it does not in composition.

Answers are read at the second entity. The paper has a further token `</a>` after each answer, always the same; it
carries nothing, and is left out. `<q>` and `<mask>` are always the same too, but stand between the parts of a question,
where attention can lay down what it found: they are kept, and with them the places that the paper patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.runtime import generator
from workbench.tasks.base import Batch, check_choice
from workbench.tasks.comparing import Comparing
from workbench.tasks.facts import check_filled, check_phi, count_share


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison(Comparing):
    """All values and some comparisons; a value that rebuilds its world.

    Worlds that differ in `phi` alone are one world: the same values, the same test set, and the comparisons of a
    smaller training set are among those of a larger one.
    """

    # Without annotations these are the class's, not fields.
    name = "comparison"
    splits = ("train", "test", "ood", "train_inferred", "atomic_id", "atomic_ood", "mixed")
    measured = ("train", "test", "ood", "train_inferred", "atomic_id", "atomic_ood")

    phi: float = 40.0
    """Comparisons in training for each ID fact; the paper's go from 3.6 to 12.6."""

    def __post_init__(self) -> None:
        # Zero-argument super() does not know a class that was made anew to have slots.
        Comparing.__post_init__(self)
        check_filled({"test": int(self._world.held_out.sum())})
        check_phi(self.phi, n_id=self._n_id(), pool=self._world.n_pool())

    def examples(self, split: str) -> Batch:
        """Every example of a split: facts by entity, comparisons in training in the order in which they are drawn.

        `train` is all facts, ID and OOD, then the comparisons of `train_inferred`. `test` are the held-out comparisons
        of two ID entities, `ood` those of two OOD entities, and `mixed`, which the paper leaves out, those of one each.
        """
        check_choice("split", split, self.splits)
        match split:
            case "train":
                told = ("atomic_id", "atomic_ood", "train_inferred")
                return self._told([self.examples(part) for part in told])
            case "train_inferred":
                return self._batch(_training_questions(self))
            case "atomic_id" | "atomic_ood":
                return self._batch(self._world.atomic(ood=split == "atomic_ood"), atomic=True)
            case "test":
                return self._batch(self._world.questions(0, held_out=True))
            case _:
                return self._batch(self._world.questions({"mixed": 1, "ood": 2}[split]))

    def _n_id(self) -> int:
        return int((~self._world.ood).sum())


# The paper's world has 14 million comparisons to choose from, of which a run needs the same few each time.
@lru_cache(maxsize=4)
def _training_questions(task: Comparison) -> Int[Tensor, "question three"]:
    pool = task._world.questions(0, held_out=False)
    order = torch.randperm(len(pool), generator=generator(task.seed, "train"))
    return pool[order[: count_share(task.phi, task._n_id())]]
