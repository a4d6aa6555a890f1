"""Entities with attributes, and the questions that compare them (Wang et al. 2024, sections 4 and 5).

An atomic fact is the value of an entity's attribute: `e attr`, answered by the value. An inferred fact compares two
entities: `attr <q> e1 <mask> e2`, answered by one of the attribute's own three labels (`attr0<`: the first has less).
Each attribute has its own OOD entities, drawn at random. Two tasks ask for it: `comparison` and `complex-comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, Latent, check_choice, join
from workbench.tasks.facts import Change, FactTask, Perturbed, check_counts, check_fractions, choose, count_share

ASKS, MASK, PAD = "<q>", "<mask>", "<pad>"
SIGNS = "<=>"
"""The order of an attribute's labels."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Register:
    """What each entity's attributes are, which of these facts are OOD, and which comparisons are held out."""

    value: Int[Tensor, "entity attribute"]
    ood: Bool[Tensor, "entity attribute"]
    held_out: Bool[Tensor, "attribute pair"]
    """Whether training never compares two ID entities, whichever comes first; pairs as in `torch.triu_indices`."""

    def questions(self, n_ood: int, *, held_out: bool | None = None) -> Int[Tensor, "question three"]:
        """Attribute and two entities of every comparison with so many OOD entities, in both orders.

        Args:
            n_ood: how many of the two entities are OOD, in this attribute.
            held_out: only pairs that are held out, or only those that are not; None: all.
        """
        first, second = torch.triu_indices(len(self.value), len(self.value), 1)
        present = (self.ood[first].byte() + self.ood[second].byte()).T
        mask = present == n_ood
        if held_out is not None:
            mask &= self.held_out if held_out else ~self.held_out
        attribute, pair = mask.nonzero().unbind(1)
        one_way = torch.stack([attribute, first[pair], second[pair]], 1)
        return torch.cat([one_way, one_way[:, [0, 2, 1]]])

    def n_pool(self) -> int:
        """How many comparisons of ID entities training may be given."""
        n_id = (~self.ood).sum(0)
        return int((n_id * (n_id - 1)).sum()) - 2 * int(self.held_out.sum())

    def atomic(self, *, ood: bool) -> Int[Tensor, "question three"]:
        """Attribute and entity, twice, of every ID or OOD fact."""
        entity, attribute = (self.ood == ood).nonzero().unbind(1)
        return torch.stack([attribute, entity, entity], 1)


# A run asks for one world over and over, and a sweep over phi for one world many times.
@lru_cache(maxsize=4)
def register(
    *, entities: int, attributes: int, values: int, ood_fraction: float, test_fraction: float, seed: int
) -> Register:
    """The world of these numbers: a stream of the seed for each thing that is drawn, so that none moves another."""
    value = torch.randint(values, (entities, attributes), generator=generator(seed, "values"))
    order = torch.rand(entities, attributes, generator=generator(seed, "ood"), dtype=torch.float64).argsort(0)
    ood = torch.zeros(entities, attributes, dtype=torch.bool)
    ood.scatter_(0, order[: count_share(ood_fraction, entities)], torch.tensor(True).expand(order.shape))
    first, second = torch.triu_indices(entities, entities, 1)
    drawn = torch.rand(attributes, len(first), generator=generator(seed, "test")) < test_fraction
    return Register(value=value, ood=ood, held_out=drawn & ~(ood[first] | ood[second]).T)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Question:
    """Prompts taken apart: in an atomic one the second entity is the first."""

    attribute: Int[Tensor, " batch"]
    e1: Int[Tensor, " batch"]
    e2: Int[Tensor, " batch"]
    atomic: Bool[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparing(FactTask):
    """The prompts of both tasks: a value that rebuilds its world."""

    # Without annotations these are the class's, not fields.
    contrasts = ("e1", "e2", "attr", "entity")
    solved_accuracy = 0.97
    position_labels = ("attr", ASKS, "e1", MASK, "e2")
    # With the tokens behind attr and e1, which carry nothing of their own, as the paper has them.
    causes: ClassVar[Mapping[str, Sequence[int]]] = {"attr": (0, 1), "e1": (2, 3), "e2": (4,)}

    entities: int = 200
    attributes: int = 4
    values: int = 10
    """Values of each attribute, from 0."""
    ood_fraction: float = 0.1
    """Share of the entities that is OOD, drawn for each attribute."""
    test_fraction: float = 0.1
    """Share of the pairs of ID entities that is held out in both orders, each pair drawn alone."""
    seed: int = 0
    """Seed of the values and the splits."""

    def __post_init__(self) -> None:
        check_counts(attributes=self.attributes)
        if self.entities < 4 or self.values < 2:
            raise WorkbenchError(
                "Comparing needs at least 4 entities, two of them OOD, and 2 values; "
                f"got {self.entities} entities and {self.values} values."
            )
        check_fractions(ood_fraction=self.ood_fraction, test_fraction=self.test_fraction)
        n_ood = count_share(self.ood_fraction, self.entities)
        if not 2 <= n_ood <= self.entities - 2:
            raise WorkbenchError(
                f"ood_fraction {self.ood_fraction} of {self.entities} entities makes {n_ood} OOD; "
                "comparing needs 2 of either kind. Enlarge the world or move the fraction."
            )

    @property
    def pad_token(self) -> int:
        """Fills atomic prompts."""
        return len(self.vocab) - 1

    @property
    def vocab(self) -> Sequence[str]:
        """Entities, attributes, values, labels by attribute, then `<q>`, `<mask>` and padding."""
        values = tuple(str(value) for value in range(self.values))
        labels = tuple(f"{attribute}{sign}" for attribute in self._attribute_names for sign in SIGNS)
        return (*self._entity_names, *self._attribute_names, *values, *labels, ASKS, MASK, PAD)

    def with_latent(self, batch: Batch, latent: str, values: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """The targets of each prompt if the value of e1 (`v1`) or of e2 (`v2`), or the `answer`, were another token.

        Raises:
            WorkbenchError: no such latent, a token that is no value of it, or an atomic prompt asked for v1 or v2.
        """
        check_choice("latent", latent, ("v1", "v2", "answer"))
        low, high = self._first_value, self._first_label - 1
        high = high + len(SIGNS) * self.attributes if latent == "answer" else high
        if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
            raise WorkbenchError(
                f"Latent {latent!r} takes tokens from {low} to {high}, got {int(values.min())} to {int(values.max())}."
            )
        answer = values
        if latent != "answer":
            question = self._question(batch)
            if n := int(question.atomic.sum()):
                raise WorkbenchError(
                    f"Only a comparison has a latent {latent!r}; {n} of {len(batch)} prompts are single facts. "
                    "Choose a split of comparisons, such as 'test'."
                )
            v1, v2 = self._value(question.attribute, question.e1), self._value(question.attribute, question.e2)
            given = values - self._first_value
            answer = self._label(question.attribute, *((given, v2) if latent == "v1" else (v1, given)))
        return torch.where(batch.read, answer[:, None], 0)

    def labels_of(self, batch: Batch) -> Int[Tensor, "batch label"]:
        """The three labels of each prompt's attribute: less, equal, more."""
        attribute = self._question(batch).attribute
        return self._first_label + len(SIGNS) * attribute[:, None] + torch.arange(len(SIGNS))

    def perturbed(self, batch: Batch, cause: str, *, seed: int | torch.Generator = 0) -> Perturbed:
        """The prompts with another `attr`, `e1` or `e2`, as `contrast` changes them: every such prompt has an answer.

        Raises:
            WorkbenchError: no such cause.
        """
        check_choice("cause", cause, list(self.causes))
        change = self._change(batch, cause, generator(seed, "perturbed"))
        tokens = torch.where(change.kept[:, None], change.tokens, batch.tokens)
        return Perturbed(tokens=tokens, defined=change.kept, answer=change.answer, kept=change.kept)

    def prompt(self, text: str) -> Batch:
        """One typed prompt: a comparison, `attr2 <q> e3 <mask> e5` or `attr2 e3 e5` for short, or a fact, `e3 attr2`.

        Raises:
            WorkbenchError: it is no prompt of this task, names something unknown, or compares an entity with itself.
        """
        words = [word for word in text.split() if word not in (ASKS, MASK, PAD)]
        if len(words) not in (2, 3):
            raise WorkbenchError(
                f"Cannot read {text!r} as a prompt. Write a comparison like 'attr2 {ASKS} e3 {MASK} e1' "
                "or a fact like 'e3 attr2'."
            )
        atomic = len(words) == 2
        named = [words[1], words[0], words[0]] if atomic else words
        check_choice("attribute", named[0], self._attribute_names)
        for word in named[1:]:
            check_choice("entity", word, self._entity_names)
        e1, e2 = (self._entity_names.index(word) for word in named[1:])
        if e1 == e2 and not atomic:
            raise WorkbenchError(f"{words[1]} is compared with itself. Name two entities.")
        row = torch.tensor([[self._attribute_names.index(named[0]), e1, e2]])
        return self._batch(row, atomic=atomic)

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as one types it, without padding."""
        vocab = self.vocab
        return " ".join(vocab[int(token)] for token in tokens if vocab[int(token)] != PAD)

    def _change(self, batch: Batch, kind: str, rng: torch.Generator) -> Change:
        """Another entity or attribute, as in the paper's causal tracing (section 4), but never an entity with itself.

        `e1` becomes an entity of e2's value, so that the two are equal; if they are, then of a value next to it. `e2`
        is its mirror. `attr` becomes any other attribute, whose labels are others. `entity` replaces e1 or e2 by any
        that changes the answer. New entities are ID in the attribute. Of an atomic prompt's entity (`e1`, `entity`) or
        attribute, the new one has another value.
        """
        question = self._question(batch)
        if kind == "attr":
            candidate = torch.arange(self.attributes).expand(len(batch), -1)
            entity = question.e1[:, None].expand_as(candidate)
            changes = self._value(candidate, entity) != self._value(question.attribute, question.e1)[:, None]
            allowed = (candidate != question.attribute[:, None]) & (changes | ~question.atomic[:, None])
            chosen, kept = choose(allowed, rng)
            return self._changed(replace(question, attribute=chosen), kept)
        second = torch.full((len(batch),), kind == "e2")
        if kind == "entity":
            second = (torch.rand(len(batch), generator=rng) < 0.5) & ~question.atomic
        chosen, kept = choose(self._replacements(question, second, any_answer=kind == "entity"), rng)
        e1 = torch.where(second, question.e1, chosen)
        # A fact has no second entity: the first stands for it.
        e2 = torch.where(second, chosen, torch.where(question.atomic, chosen, question.e2))
        return self._changed(replace(question, e1=e1, e2=e2), kept & ~(second & question.atomic))

    def _replacements(
        self, question: Question, second: Bool[Tensor, " batch"], *, any_answer: bool
    ) -> Bool[Tensor, "batch entity"]:
        """Which entities may take the place of the first or the second one."""
        v1, v2 = self._value(question.attribute, question.e1), self._value(question.attribute, question.e2)
        # Seen from the entity that is replaced; the answer's sign turns with it.
        own, other = (torch.where(second, *pair)[:, None] for pair in ((v2, v1), (v1, v2)))
        value = self._world.value.T[question.attribute]
        # The paper's: equal to the other one, or next to it where the two were equal.
        wanted = torch.where(own == other, (value - other).abs() == 1, value == other)
        if any_answer:
            wanted = (value - other).sign() != (own - other).sign()
        wanted = torch.where(question.atomic[:, None], value != own, wanted)
        present = torch.stack([question.e1, question.e2], 1)
        return (wanted & ~self._world.ood.T[question.attribute]).scatter(1, present, False)

    def _changed(self, question: Question, kept: Bool[Tensor, " batch"]) -> Change:
        return Change(tokens=self._tokens(question), answer=self._answer(question), kept=kept)

    @property
    def _world(self) -> Register:
        return register(
            entities=self.entities,
            attributes=self.attributes,
            values=self.values,
            ood_fraction=self.ood_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )

    @property
    def _entity_names(self) -> Sequence[str]:
        return tuple(f"e{entity}" for entity in range(self.entities))

    @property
    def _attribute_names(self) -> Sequence[str]:
        return tuple(f"attr{attribute}" for attribute in range(self.attributes))

    @property
    def _first_value(self) -> int:
        return self.entities + self.attributes

    @property
    def _first_label(self) -> int:
        return self._first_value + self.values

    def _value(self, attribute: Int[Tensor, "*shape"], entity: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        return self._world.value[entity, attribute]

    def _label(
        self, attribute: Int[Tensor, " batch"], v1: Int[Tensor, " batch"], v2: Int[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        return self._first_label + len(SIGNS) * attribute + 1 + (v1 - v2).sign()

    def _answer(self, question: Question) -> Int[Tensor, " batch"]:
        v1, v2 = self._value(question.attribute, question.e1), self._value(question.attribute, question.e2)
        return torch.where(question.atomic, self._first_value + v1, self._label(question.attribute, v1, v2))

    def _tokens(self, question: Question) -> Int[Tensor, "batch pos"]:
        asks, mask, pad = (torch.full_like(question.e1, self.pad_token - back) for back in (2, 1, 0))
        attribute = self.entities + question.attribute
        atomic = torch.stack([question.e1, attribute, pad, pad, pad], 1)
        comparison = torch.stack([attribute, asks, question.e1, mask, question.e2], 1)
        return torch.where(question.atomic[:, None], atomic, comparison)

    def _question(self, batch: Batch) -> Question:
        tokens = batch.tokens
        atomic = tokens[:, 2] == self.pad_token
        e1 = torch.where(atomic, tokens[:, 0], tokens[:, 2])
        return Question(
            attribute=torch.where(atomic, tokens[:, 1], tokens[:, 0]) - self.entities,
            e1=e1,
            e2=torch.where(atomic, e1, tokens[:, 4]),
            atomic=atomic,
        )

    def _told(self, facts: Sequence[Batch]) -> Batch:
        """Facts and comparisons together: they have no latents in common."""
        return join([replace(batch, latents={}) for batch in facts])

    def _batch(self, rows: Int[Tensor, "question three"], *, atomic: bool = False) -> Batch:
        """The prompts of these attributes and entities."""
        attribute, e1, e2 = rows.unbind(1)
        question = Question(attribute=attribute, e1=e1, e2=e2, atomic=torch.full((len(rows),), atomic))
        answer, at = self._answer(question), 1 if atomic else 4
        read = (torch.arange(5) == at).repeat(len(rows), 1)
        latents: Mapping[str, Latent] = {"answer": Latent(value=answer, position=at, group=e1)}
        if not atomic:
            v1, v2 = (self._first_value + self._value(attribute, entity) for entity in (e1, e2))
            values = range(self._first_value, self._first_label)
            latents = {
                "v1": Latent(value=v1, position=2, among=values, group=e1),
                "v2": Latent(value=v2, position=4, among=values, group=e2),
                **latents,
            }
        targets = torch.where(read, answer[:, None], 0)
        return Batch(tokens=self._tokens(question), targets=targets, read=read, latents=latents)
