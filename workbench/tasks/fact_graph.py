"""The world behind two-hop composition: entities joined by relations, and the chains that two facts make.

A fact is an edge from a head, over a relation, to a tail; a head and a relation have one tail at most. Edges are
counted by head: edge `head * degree + place`. A chain is an edge and one of its tail's edges: chain
`edge * degree + place`. After Wang et al. 2024, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.runtime import generator
from workbench.tasks.facts import count_share, draw_below


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Incoming:
    """The ID edges in the order of their tails, so that those into one entity stand together."""

    edges: Int[Tensor, " id_edge"]
    start: Int[Tensor, " entity"]
    """Where an entity's edges start."""
    count: Int[Tensor, " entity"]
    """How many it has."""
    place: Int[Tensor, " edge"]
    """Where an edge stands; -1 for an OOD edge, which does not."""

    def draw(self, tail: Int[Tensor, " batch"], rng: torch.Generator) -> Int[Tensor, " batch"]:
        """An edge into each tail, valid where there is one."""
        return self._edge(self.start[tail] + draw_below(self.count[tail], rng))

    def draw_other(
        self, edge: Int[Tensor, " batch"], tail: Int[Tensor, " batch"], rng: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Another edge into the tail of each edge, and where there is one."""
        own = self.place[edge]
        n = self.count[tail] - (own >= 0).long()
        drawn = self.start[tail] + draw_below(n, rng)
        return self._edge(torch.where((own >= 0) & (drawn >= own), drawn + 1, drawn)), n > 0

    def draw_elsewhere(
        self, tail: Int[Tensor, " batch"], rng: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """An edge into any entity but each tail, and where there is one."""
        n = len(self.edges) - self.count[tail]
        drawn = draw_below(n, rng)
        return self._edge(torch.where(drawn >= self.start[tail], drawn + self.count[tail], drawn)), n > 0

    def _edge(self, place: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        # Where there is no edge, the place is any; the caller knows.
        return self.edges[place.clamp(max=len(self.edges) - 1)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FactGraph:
    """Every fact, which of them are OOD, and which chains are held out or may be trained on."""

    degree: int
    """Edges of a head."""
    relation: Int[Tensor, " edge"]
    tail: Int[Tensor, " edge"]
    ood: Bool[Tensor, " edge"]
    table: Int[Tensor, "entity relation"]
    """The tail of a head and a relation; -1 where there is no such fact."""
    id_table: Int[Tensor, "entity relation"]
    """The same of the ID facts alone."""
    by_relation: Int[Tensor, "relation width"]
    """The ID edges of each relation, filled up with -1."""
    incoming: Incoming
    held_out: Bool[Tensor, " chain"]
    """Chains over two ID edges that training never sees."""
    pool: Int[Tensor, " pool"]
    """Chains that training may be given, in the order in which it is given them."""

    def ends(self, chain: Int[Tensor, " batch"]) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """The two edges of each chain."""
        first = chain // self.degree
        return first, self.tail[first] * self.degree + chain % self.degree

    def chains(self, *, first_ood: bool, second_ood: bool) -> Int[Tensor, " chain"]:
        """Every chain whose edges are ID or OOD as asked."""
        return _chains(self.tail, self.ood, self.degree, first_ood=first_ood, second_ood=second_ood)


# A run asks for one world over and over, and a sweep over phi for one world many times.
@lru_cache(maxsize=8)
def fact_graph(
    *,
    entities: int,
    relations: int,
    out_degree: int,
    ood_fraction: float,
    test_fraction: float,
    role_coverage: float,
    seed: int,
) -> FactGraph:
    """The world of these numbers: a stream of the seed for each thing that is drawn, so that none moves another."""
    n_edges = entities * out_degree
    relation = _distinct(entities, relations, out_degree, generator(seed, "relations")).flatten()
    tail = torch.randint(entities, (n_edges,), generator=generator(seed, "tails"))
    ood_edges = torch.randperm(n_edges, generator=generator(seed, "ood"))[: count_share(ood_fraction, n_edges)]
    ood = _marked(ood_edges, n_edges)

    both_id = _chains(tail, ood, out_degree, first_ood=False, second_ood=False)
    held = torch.rand(len(both_id), generator=generator(seed, "test"), dtype=torch.float64) < test_fraction
    # The OOD edges are in a random order, so the first ones are a random share that grows with the coverage.
    covered = _marked(ood_edges[: count_share(role_coverage, len(ood_edges))], n_edges)
    id_ood = _chains(tail, ood, out_degree, first_ood=False, second_ood=True)
    second = tail[id_ood // out_degree] * out_degree + id_ood % out_degree
    pool = torch.cat([both_id[~held], id_ood[covered[second]]])

    head = torch.arange(n_edges) // out_degree
    id_edges = (~ood).nonzero()[:, 0]
    return FactGraph(
        degree=out_degree,
        relation=relation,
        tail=tail,
        ood=ood,
        table=_table(head, relation, tail, (entities, relations)),
        id_table=_table(head[id_edges], relation[id_edges], tail[id_edges], (entities, relations)),
        by_relation=_grouped(id_edges, relation[id_edges], relations),
        incoming=_incoming(id_edges, tail, entities),
        held_out=_marked(both_id[held], n_edges * out_degree),
        pool=pool[torch.randperm(len(pool), generator=generator(seed, "train"))],
    )


def _distinct(rows: int, n: int, wanted: int, rng: torch.Generator) -> Int[Tensor, "row wanted"]:
    """Distinct numbers below `n` in each row, every set of them equally likely."""
    # Float64: two equal float32 draws would favour the lower number.
    return torch.rand(rows, n, generator=rng, dtype=torch.float64).argsort(1)[:, :wanted]


def _chains(
    tail: Int[Tensor, " edge"], ood: Bool[Tensor, " edge"], degree: int, *, first_ood: bool, second_ood: bool
) -> Int[Tensor, " chain"]:
    second = ood.unflatten(0, (-1, degree))[tail]
    return ((ood == first_ood)[:, None] & (second == second_ood)).flatten().nonzero()[:, 0]


def _marked(places: Int[Tensor, " place"], n: int) -> Bool[Tensor, " n"]:
    marks = torch.zeros(n, dtype=torch.bool)
    marks[places] = True
    return marks


def _table(
    head: Int[Tensor, " fact"], relation: Int[Tensor, " fact"], tail: Int[Tensor, " fact"], shape: tuple[int, int]
) -> Int[Tensor, "entity relation"]:
    table = torch.full(shape, -1)
    table[head, relation] = tail
    return table


def _grouped(items: Int[Tensor, " item"], group: Int[Tensor, " item"], n_groups: int) -> Int[Tensor, "group width"]:
    """The items of each group in a row of their own, filled up with -1."""
    order = group.argsort(stable=True)
    count = torch.bincount(group, minlength=n_groups)
    place = torch.arange(len(items)) - (count.cumsum(0) - count)[group[order]]
    rows = torch.full((n_groups, int(count.max())), -1)
    rows[group[order], place] = items[order]
    return rows


def _incoming(id_edges: Int[Tensor, " id_edge"], tail: Int[Tensor, " edge"], entities: int) -> Incoming:
    edges = id_edges[tail[id_edges].argsort(stable=True)]
    count = torch.bincount(tail[id_edges], minlength=entities)
    place = torch.full_like(tail, -1)
    place[edges] = torch.arange(len(edges))
    return Incoming(edges=edges, start=count.cumsum(0) - count, count=count, place=place)
