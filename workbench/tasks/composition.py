"""Two-hop composition: `h r1 r2`, answered by the tail of r2 from the tail of r1 from h (Wang et al. 2024, section 3).

A model is told every fact (`h r1`, an atomic prompt) and some of the chains that two facts make (`h r1 r2`). It groks
when it answers the chains over ID facts that it was not told, which takes the bridge entity between the two hops. OOD
facts are told, but stand in no chain of training: to answer over them it would need them where the second hop is made.

Answers are read at the last relation. The paper has a further token `</a>` after each answer, always the same; it
carries nothing, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch, Latent, check_choice, join
from workbench.tasks.fact_graph import FactGraph, fact_graph
from workbench.tasks.facts import (
    Change,
    FactTask,
    Perturbed,
    check_counts,
    check_filled,
    check_fractions,
    check_phi,
    choose,
    count_share,
)

PAD = "<pad>"
SHOWN = 12
"""Relations that an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Question:
    """A batch taken apart; `second` is -1 in an atomic prompt, whose answer is its bridge."""

    head: Int[Tensor, " batch"]
    first: Int[Tensor, " batch"]
    second: Int[Tensor, " batch"]
    bridge: Int[Tensor, " batch"]
    answer: Int[Tensor, " batch"]

    @property
    def atomic(self) -> Bool[Tensor, " batch"]:
        return self.second < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition(FactTask):
    """A graph of facts and the chains over it; a value that rebuilds its world.

    Worlds that differ in `phi` alone are one world: the same facts, the same test set, and the chains of a smaller
    training set are among those of a larger one.
    """

    # Without annotations these are the class's, not fields.
    name = "composition"
    splits = ("train", "test", "ood", "train_inferred", "atomic_id", "atomic_ood", "id_ood", "ood_id")
    measured = ("train", "test", "ood", "train_inferred", "atomic_ood", "id_ood", "ood_id")
    contrasts = ("bridge", "head", "first", "second", "same_bridge")
    solved_accuracy = 0.9
    position_labels = ("h", "r1", "r2")
    causes: ClassVar[Mapping[str, Sequence[int]]] = {"head": (0,), "first": (1,), "second": (2,)}

    entities: int = 100
    relations: int = 20
    out_degree: int = 10
    """Facts of each entity as a head, each over another relation."""
    ood_fraction: float = 0.1
    """Share of the facts that stand in no chain of training; the paper's is 0.05."""
    test_fraction: float = 0.1
    """Share of the chains over two ID facts that is held out, each drawn alone; the paper's is 0.005."""
    phi: float = 7.0
    """Chains in training for each ID fact; the paper's go from 3.6 to 18."""
    role_coverage: float = 0.0
    """Share of the OOD facts that training may use as a second hop after an ID fact; the paper's is 0."""
    seed: int = 0
    """Seed of the facts and the splits."""

    def __post_init__(self) -> None:
        check_counts(entities=self.entities, relations=self.relations, out_degree=self.out_degree)
        if self.out_degree > self.relations:
            raise WorkbenchError(
                f"out_degree {self.out_degree} asks for more relations of each entity than there are "
                f"({self.relations}). Set out_degree to at most {self.relations}."
            )
        check_fractions(ood_fraction=self.ood_fraction, test_fraction=self.test_fraction)
        if not 0 <= self.role_coverage <= 1:
            raise WorkbenchError(f"role_coverage must lie between 0 and 1, got {self.role_coverage}.")
        n_facts = self.entities * self.out_degree
        n_ood = count_share(self.ood_fraction, n_facts)
        check_filled({"atomic_ood": n_ood, "atomic_id": n_facts - n_ood})
        check_phi(self.phi, n_id=n_facts - n_ood, pool=len(self._world.pool))
        check_filled({split: len(self._chains(split)) for split in self.splits[1:] if not split.startswith("atomic")})

    @property
    def pad_token(self) -> int:
        """Fills the place of r2 in atomic prompts."""
        return self.entities + self.relations

    @property
    def vocab(self) -> Sequence[str]:
        """Entities, relations, then padding."""
        return (*self._entity_names, *self._relation_names, PAD)

    def fact(self, head: Int[Tensor, " batch"], relation: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The tail of each head and relation, given as tokens; -1 where there is no such fact, or no such token."""
        relation = relation - self.entities
        known = (head >= 0) & (head < self.entities) & (relation >= 0) & (relation < self.relations)
        return torch.where(known, self._world.table[head.where(known, 0), relation.where(known, 0)], -1)

    def with_latent(self, batch: Batch, latent: str, values: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """The targets of each prompt if its `bridge`, `relation` (r2) or `answer` were another token.

        Where the bridge then lacks the relation there is no such answer, and the prompt's own target is returned: an
        exchange drops what changes no answer, and counts it.

        Raises:
            WorkbenchError: no such latent, a token that is no value of it, or an atomic prompt asked for its hops.
        """
        check_choice("latent", latent, ("bridge", "relation", "answer"))
        low, high = (self.entities, self.pad_token - 1) if latent == "relation" else (0, self.entities - 1)
        if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
            raise WorkbenchError(
                f"Latent {latent!r} takes tokens from {low} to {high}, got {int(values.min())} to {int(values.max())}."
            )
        question = self._question(batch)
        if latent == "answer":
            answer = values
        else:
            _check_chains(question, f"latent {latent!r}")
            bridge = values if latent == "bridge" else question.bridge
            answer = self.fact(bridge, values if latent == "relation" else batch.tokens[:, 2])
        return torch.where(batch.read & (answer >= 0)[:, None], answer[:, None], batch.targets)

    def examples(self, split: str) -> Batch:
        """Every example of a split: facts in the order of their heads, chains in training in the order they are drawn.

        `train` is all facts, then the chains of `train_inferred`. `test` are the held-out chains over two ID facts,
        `ood` those over two OOD facts. `id_ood` and `ood_id`, which the paper leaves out, say by their first and second
        hop which one fails; chains that training was given through `role_coverage` are not in `id_ood`.
        """
        check_choice("split", split, self.splits)
        if split == "train":
            told = [self._atomic(torch.arange(len(self._world.tail))), self._inferred("train_inferred")]
            # An atomic prompt has no bridge, so the two together have no latents in common.
            return join([replace(batch, latents={}) for batch in told])
        if split in ("atomic_id", "atomic_ood"):
            return self._atomic((self._world.ood == (split == "atomic_ood")).nonzero()[:, 0])
        return self._inferred(split)

    def perturbed(self, batch: Batch, cause: str, *, seed: int | torch.Generator = 0) -> Perturbed:
        """The chains with another head or relation, as the paper's causal tracing has them (its section 3.3).

        The new token is a head with an ID fact, or makes an ID fact with the entity before it; the whole prompt may
        then be no chain at all. By all facts, OOD ones too, its answer is not the old one. A prompt without such a
        token is not `kept`. For pairs that always have an answer, see `contrast`.

        Raises:
            WorkbenchError: no such cause, or an atomic prompt.
        """
        check_choice("cause", cause, list(self.causes))
        question = self._question(batch)
        _check_chains(question, "perturbation")
        world, rng = self._world, generator(seed, "perturbed")
        if cause == "head":
            candidate = torch.arange(self.entities).expand(len(batch), -1)
            allowed = (world.id_table >= 0).any(1)[candidate]
            bridge = world.table[candidate, question.first[:, None]]
        else:
            edges = self._edges_of(question.head if cause == "first" else question.bridge)
            candidate, allowed, bridge = world.relation[edges], ~world.ood[edges], world.tail[edges]
        if cause == "second":
            answer = bridge
        else:
            answer = torch.where(bridge >= 0, world.table[bridge.clamp(min=0), question.second[:, None]], -1)
        chosen, kept = choose(allowed & (answer != question.answer[:, None]), rng)
        rows, column = torch.arange(len(batch)), list(self.causes).index(cause)
        token = candidate[rows, chosen] + (0 if cause == "head" else self.entities)
        tokens = batch.tokens.clone()
        tokens[:, column] = torch.where(kept, token, tokens[:, column])
        answer = answer[rows, chosen]
        return Perturbed(tokens=tokens, defined=kept & (answer >= 0), answer=answer, kept=kept)

    def prompt(self, text: str) -> Batch:
        """One typed prompt: a chain such as `e3 r5 r7`, or a fact such as `e3 r5`.

        Raises:
            WorkbenchError: it is no prompt of this task, names something unknown, or asks for a fact there is not.
        """
        words = [word for word in text.split() if word != PAD]
        if len(words) not in (2, 3):
            raise WorkbenchError(f"Cannot read {text!r} as a prompt. Write a chain like 'e3 r5 r7' or a fact 'e3 r5'.")
        check_choice("entity", words[0], self._entity_names)
        for word in words[1:]:
            check_choice("relation", word, self._relation_names)
        head = self._entity_names.index(words[0])
        path = [self._relation_names.index(word) for word in words[1:]]
        at = head
        for hop, relation in enumerate(path):
            known = [self._relation_names[int(each)] for each in (self._world.table[at] >= 0).nonzero()[:, 0].tolist()]
            if self._relation_names[relation] not in known:
                subject = f"e{at}" + (f", where {' '.join(words[:2])} leads," if hop else "")
                listed = ", ".join(known[:SHOWN]) + (", …" if len(known) > SHOWN else "")
                raise WorkbenchError(
                    f"{subject} has no relation {words[hop + 1]}; it has {listed}. Ask for one of these."
                )
            at = int(self._world.table[at, relation])
        first, second = torch.tensor([path[0]]), torch.tensor(path[1:]) if path[1:] else None
        return self._batch(torch.tensor([head]), first, second)

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as one types it, without padding."""
        return " ".join(self.vocab[int(token)] for token in tokens if int(token) != self.pad_token)

    def _change(self, batch: Batch, kind: str, rng: torch.Generator) -> Change:
        """Another prompt over ID facts: what is asked stays one that a model can be expected to know.

        `bridge` draws another bridge that has r2, then a fact that leads there; `head`, `first` and `second` change the
        token of that name; `same_bridge` is another fact with the same tail, so that the answer stays too: it is the
        control of causal tracing, and the only kind without headroom. An atomic prompt has its answer for a bridge.
        """
        question = self._question(batch)
        head, first, second = question.head, question.first, question.second
        match kind:
            case "bridge" | "same_bridge":
                change = self._other_bridge if kind == "bridge" else self._same_bridge
                edge, kept = change(question, rng)
            case "head":
                edge, kept = self._pick(question, self._world.by_relation[first], rng)
            case "first":
                edge, kept = self._pick(question, self._edges_of(head), rng)
            case _:
                edges = self._edges_of(question.bridge)
                differ = ~self._world.ood[edges] & (self._world.tail[edges] != question.answer[:, None])
                place, kept = choose(differ & ~question.atomic[:, None], rng)
                last = edges[torch.arange(len(batch)), place]
                return self._changed(head, first, self._world.relation[last], self._world.tail[last], kept)
        tail = self._world.tail[edge]
        answer = torch.where(question.atomic, tail, self._world.id_table[tail, second.clamp(min=0)])
        # The control keeps its answer, whichever kind of fact the second hop is.
        answer = question.answer if kind == "same_bridge" else answer
        return self._changed(edge // self.out_degree, self._world.relation[edge], second, answer, kept)

    def _pick(
        self, question: _Question, edges: Int[Tensor, "batch candidate"], rng: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """An ID edge that puts another bridge, and by an ID fact another answer, in its place."""
        bridge = self._world.tail[edges]
        answer = self._world.id_table[bridge, question.second.clamp(min=0)[:, None]]
        answer = torch.where(question.atomic[:, None], bridge, answer)
        present = (edges >= 0) & ~self._world.ood[edges]
        place, kept = choose(present & (answer >= 0) & (answer != question.answer[:, None]), rng)
        return edges[torch.arange(len(edges)), place], kept

    def _other_bridge(
        self, question: _Question, rng: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """An ID edge to another bridge that has r2 and answers otherwise."""
        world = self._world
        onward = world.by_relation[question.second.clamp(min=0)]
        bridge = onward // self.out_degree
        other = (bridge != question.bridge[:, None]) & (world.tail[onward] != question.answer[:, None])
        place, found = choose((onward >= 0) & other & (world.incoming.count[bridge] > 0), rng)
        to_bridge = world.incoming.draw(bridge[torch.arange(len(bridge)), place], rng)
        elsewhere, any_elsewhere = world.incoming.draw_elsewhere(question.bridge, rng)
        edge = torch.where(question.atomic, elsewhere, to_bridge)
        return edge, torch.where(question.atomic, any_elsewhere, found)

    def _same_bridge(
        self, question: _Question, rng: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Another ID edge to the same bridge."""
        edges = self._edges_of(question.head)
        own = edges[torch.arange(len(edges)), (self._world.relation[edges] == question.first[:, None]).int().argmax(1)]
        return self._world.incoming.draw_other(own, question.bridge, rng)

    def _changed(
        self,
        head: Int[Tensor, " batch"],
        first: Int[Tensor, " batch"],
        second: Int[Tensor, " batch"],
        answer: Int[Tensor, " batch"],
        kept: Bool[Tensor, " batch"],
    ) -> Change:
        last = torch.where(second < 0, self.pad_token, self.entities + second)
        return Change(tokens=torch.stack([head, self.entities + first, last], 1), answer=answer, kept=kept)

    @property
    def _world(self) -> FactGraph:
        return fact_graph(
            entities=self.entities,
            relations=self.relations,
            out_degree=self.out_degree,
            ood_fraction=self.ood_fraction,
            test_fraction=self.test_fraction,
            role_coverage=self.role_coverage,
            seed=self.seed,
        )

    @property
    def _entity_names(self) -> Sequence[str]:
        return tuple(f"e{entity}" for entity in range(self.entities))

    @property
    def _relation_names(self) -> Sequence[str]:
        return tuple(f"r{relation}" for relation in range(self.relations))

    def _train_size(self) -> int:
        return count_share(self.phi, int((~self._world.ood).sum()))

    def _chains(self, split: str) -> Int[Tensor, " chain"]:
        """The chains of a split of inferred facts."""
        world = self._world
        if split == "train_inferred":
            return world.pool[: self._train_size()]
        if split == "test":
            return world.held_out.nonzero()[:, 0]
        hops = {"ood": (True, True), "id_ood": (False, True), "ood_id": (True, False)}
        first_ood, second_ood = hops[split]
        chains = world.chains(first_ood=first_ood, second_ood=second_ood)
        if split != "id_ood" or not self.role_coverage:
            return chains
        told = torch.zeros_like(world.held_out)
        told[world.pool[: self._train_size()]] = True
        return chains[~told[chains]]

    def _edges_of(self, head: Int[Tensor, " batch"]) -> Int[Tensor, "batch degree"]:
        return head[:, None] * self.out_degree + torch.arange(self.out_degree)

    def _question(self, batch: Batch) -> _Question:
        head, first, last = batch.tokens.unbind(1)
        first, second = first - self.entities, torch.where(last == self.pad_token, -1, last - self.entities)
        answer = batch.targets[batch.read]
        return _Question(head=head, first=first, second=second, bridge=self._world.table[head, first], answer=answer)

    def _atomic(self, edge: Int[Tensor, " batch"]) -> Batch:
        return self._batch(edge // self.out_degree, self._world.relation[edge], None)

    def _inferred(self, split: str) -> Batch:
        first, second = self._world.ends(self._chains(split))
        return self._batch(first // self.out_degree, self._world.relation[first], self._world.relation[second])

    def _batch(
        self, head: Int[Tensor, " batch"], first: Int[Tensor, " batch"], second: Int[Tensor, " batch"] | None
    ) -> Batch:
        """The prompts of these facts, or of these chains."""
        bridge = self._world.table[head, first]
        last = torch.full_like(head, self.pad_token) if second is None else self.entities + second
        answer = bridge if second is None else self._world.table[bridge, second]
        tokens = torch.stack([head, self.entities + first, last], 1)
        at = 1 if second is None else 2
        read = (torch.arange(3) == at).repeat(len(head), 1)
        entities, relations = range(self.entities), range(self.entities, self.pad_token)
        # A fact's tail can be known by heart from its head, which in the second fact is the bridge.
        asked = head if second is None else bridge
        latents = {"answer": Latent(value=answer, position=at, among=entities, group=asked)}
        if second is not None:
            latents = {
                "bridge": Latent(value=bridge, position=1, among=entities, group=head),
                "relation": Latent(value=last, position=2, among=relations, group=head),
                **latents,
            }
        return Batch(tokens=tokens, targets=torch.where(read, answer[:, None], 0), read=read, latents=latents)


def _check_chains(question: _Question, wanted: str) -> None:
    if n := int(question.atomic.sum()):
        raise WorkbenchError(
            f"Only a chain has a {wanted}; {n} of {len(question.head)} prompts are single facts. "
            "Choose a split of chains, such as 'test'."
        )
