"""Complex comparison: two entities whose values were never told, compared over others (Wang et al. 2024, section 5).

A model is told the values of ID entities, and some comparisons of them with each other and with OOD entities. What an
OOD entity's value is, nobody says: comparisons bound it. A question about two OOD entities can be solved if a chain of
`at least` leads from one to the other. It is hard if every such chain goes over values that were told, so that
comparisons alone do not solve it (appendix F).

The paper's prompts are longer: `<q> e attr <mask> </q>` for a fact, `attr <q> e1 <mask> e2 </q>` for a comparison, each
answered between `<a>` and `</a>`. These tokens are always the same. What follows an answer carries nothing; `</q> <a>`
before it would give a model two more places to compute in. They are left out, and both kinds of prompt are those of
`comparison`, so that what is measured there can be measured here. The paper's accuracies are those of longer prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, check_choice
from workbench.tasks.comparing import SIGNS, Comparing, Register
from workbench.tasks.facts import check_counts, check_filled, check_fractions, count_share


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Questions:
    """Attribute and two entities of the comparisons that training is given, and of the hard questions by label."""

    told: Int[Tensor, "question three"]
    hard: tuple[Int[Tensor, "_ three"], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComplexComparison(Comparing):
    """Values of ID entities and some comparisons; a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    name = "complex-comparison"
    splits = ("train", "test", "hard", "train_inferred", "atomic_id", "atomic_ood")
    measured = ("train", "test", "hard", "train_inferred", "atomic_ood")

    attributes: int = 10
    """More than in `comparison`, or a small world has too few hard questions; the paper has 20."""
    pair_fraction: float = 0.03
    """Share of the comparisons in training: of two ID entities (not held out), and of an ID and an OOD entity."""
    questions_per_label: int = 50
    """Hard questions answered by each of less, equal and more."""

    def __post_init__(self) -> None:
        # Zero-argument super() does not know a class that was made anew to have slots.
        Comparing.__post_init__(self)
        check_fractions(pair_fraction=self.pair_fraction)
        check_counts(questions_per_label=self.questions_per_label)

    def examples(self, split: str) -> Batch:
        """Every example of a split: facts by entity, comparisons in the order in which they are drawn.

        `train` is the ID facts, then the comparisons of `train_inferred`. `test` are the held-out comparisons of two ID
        entities; `hard` are hard questions about two OOD entities, as many of each label. `atomic_ood` asks for values
        that training never states.

        Raises:
            WorkbenchError: the world leaves a split empty, or has too few hard questions. To know takes seconds at the
                paper's scale, so that it is not looked at before.
        """
        check_choice("split", split, self.splits)
        found = _questions(self)
        match split:
            case "train":
                return self._told([self.examples(part) for part in ("atomic_id", "train_inferred")])
            case "train_inferred":
                return self._batch(found.told)
            case "test":
                return self._batch(self._world.questions(0, held_out=True))
            case "hard":
                return self._batch(torch.cat([hard[: self.questions_per_label] for hard in found.hard]))
            case _:
                return self._batch(self._world.atomic(ood=split == "atomic_ood"), atomic=True)


# The paper's world has 18 million comparisons to choose from, of which a run needs the same few each time.
@lru_cache(maxsize=4)
def _questions(task: ComplexComparison) -> Questions:
    world = task._world
    id_told, cross_told = (
        _some(world.questions(n_ood, held_out=False), task.pair_fraction, generator(task.seed, "train", n_ood))
        for n_ood in (0, 1)
    )
    told = torch.cat([id_told, cross_told])
    hard = torch.cat([_hard_questions(world, attribute, id_told, cross_told) for attribute in range(task.attributes)])
    hard = hard[torch.randperm(len(hard), generator=generator(task.seed, "hard"))]
    attribute, e1, e2 = hard.unbind(1)
    sign = (world.value[e1, attribute] - world.value[e2, attribute]).sign()
    found = Questions(told=told, hard=tuple(hard[sign == wanted] for wanted in (-1, 0, 1)))
    _check_enough(task, found)
    return found


def _check_enough(task: ComplexComparison, found: Questions) -> None:
    check_filled({"test": int(task._world.held_out.sum()), "train_inferred": len(found.told)})
    for sign, hard in zip(SIGNS, found.hard, strict=True):
        if len(hard) < task.questions_per_label:
            raise WorkbenchError(
                f"This world has {len(hard)} hard questions answered by '{sign}', and {task.questions_per_label} are "
                "wanted. Lower questions_per_label, enlarge the world, or change pair_fraction: with few comparisons "
                "nothing can be solved, with many nothing is hard."
            )


def _some(questions: Int[Tensor, "question three"], share: float, rng: torch.Generator) -> Int[Tensor, "chosen three"]:
    return questions[torch.randperm(len(questions), generator=rng)[: count_share(share, len(questions))]]


def _hard_questions(
    world: Register,
    attribute: int,
    id_told: Int[Tensor, "id_question three"],
    cross_told: Int[Tensor, "cross_question three"],
) -> Int[Tensor, "question three"]:
    """Questions about two OOD entities that values and comparisons solve, and comparisons alone do not."""
    value, ood = world.value[:, attribute], world.ood[:, attribute]
    at_least = value[:, None] >= value
    compared = [torch.zeros_like(at_least) for _ in range(2)]
    for known, told in zip(compared, (id_told, cross_told), strict=True):
        _, e1, e2 = told[told[:, 0] == attribute].unbind(1)
        known[e1, e2] = known[e2, e1] = True
    id_compared, cross_compared = compared
    by_value = ~(ood[:, None] | ood)
    entities = ood.nonzero()[:, 0]
    solved, easy = (
        _solved(at_least & known, entities) for known in (by_value | cross_compared, id_compared | cross_compared)
    )
    e1, e2 = (solved & ~easy).fill_diagonal_(False).nonzero().unbind(1)
    return torch.stack([torch.full_like(e1, attribute), entities[e1], entities[e2]], 1)


def _solved(step: Bool[Tensor, "entity entity"], entities: Int[Tensor, " some"]) -> Bool[Tensor, "some some"]:
    """Which pairs of entities a chain of steps joins, in one direction or both.

    One direction suffices: were the two equal along that chain, the chain could be walked back.
    """
    reached, steps = step[entities], step.float()
    while True:
        further = reached | (reached.float() @ steps > 0)
        if torch.equal(further, reached):
            joined = reached[:, entities]
            return joined | joined.T
        reached = further
