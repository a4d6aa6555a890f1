"""The metric of many circuits at once, with nothing computed twice.

What a head computes depends only on what its three ports read; what a port reads depends only on which writers' edges
are kept and on what those writers computed. So every component's output has *variants*, and variant 0 is the clean
run's, which is already there. For each port the circuits are grouped by the variants that it reads; each distinct
combination is computed once, and gives its node a new variant. A circuit that differs from the model by one edge costs
what lies behind this edge; the sizes of a curve share all that they have in common; equal circuits cost nothing.

Behind the last step's keys and values, only the positions that are read are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.components import columns_of, constant_before
from circuits.experiment import Experiment
from circuits.graph import SLOTS
from workbench.runtime import WorkbenchError

ELEMENTS = 2**24
"""Numbers that the variants of one pass may hold, in the worst case."""
ABLATED = 2**40
"""Stands for the ablated value among the ids of variants: larger than any, so that the clean run sorts first."""


def circuit_values(experiment: Experiment, keep: Bool[Tensor, "circuit edge"]) -> Float[Tensor, "circuit batch"]:
    """The metric of each example in each circuit: kept edges carry what is computed, the others the ablated value.

    Raises:
        WorkbenchError: the masks are for another number of edges, or a value is not a number.
    """
    n_edges = len(experiment.graph.edges)
    if keep.ndim != 2 or keep.shape[1] != n_edges:
        raise WorkbenchError(f"Masks of shape {list(keep.shape)} came for a graph of {n_edges} edges.")
    with torch.inference_mode():
        cache = _Cache(experiment)
        values = [_values(cache, chunk) for chunk in keep.split(_circuits_a_pass(experiment))]
    found = torch.cat(values).clone() if values else experiment.full.new_zeros(0, len(experiment.batch))
    if found.isnan().any():
        raise WorkbenchError(
            f"Metric {experiment.metric.name!r} gave NaN for some circuits. Look at the model's logits."
        )
    return found


def _circuits_a_pass(experiment: Experiment) -> int:
    return max(1, ELEMENTS // experiment.clean.numel())


@dataclass(eq=False)
class _Table:
    """Rows that grow in place: memory is asked for once, not in every pass."""

    rows: Float[Tensor, "capacity pos batch d_model"]
    filled: int = 0

    def append(self, new: Float[Tensor, "row pos batch d_model"]) -> None:
        """Put rows behind the others."""
        end = self.filled + len(new)
        if end > len(self.rows):
            larger = self.rows.new_empty(2 * end, *self.rows.shape[1:])
            larger[: self.filled] = self.rows[: self.filled]
            self.rows = larger
        self.rows[self.filled : end] = new
        self.filled = end


@dataclass(eq=False)
class _Cache:
    """The clean run, laid out as [writer, pos, batch, d_model]: what variant 0 of everything is."""

    experiment: Experiment
    clean: Tensor = field(init=False)
    ablation: Tensor = field(init=False)
    """Ablated minus clean."""
    columns: Tensor = field(init=False)
    reads: Tensor = field(init=False)
    """Positions that are read, in any example."""
    allowed: Tensor = field(init=False)
    table: _Table = field(init=False)

    def __post_init__(self) -> None:
        experiment = self.experiment
        self.clean = experiment.clean.permute(2, 1, 0, 3).contiguous()
        self.ablation = experiment.ablated.permute(2, 1, 0, 3) - self.clean
        self.columns = columns_of(experiment.graph, self.clean.shape[1])
        self.reads = experiment.batch.read.any(0).nonzero()[:, 0]
        self.allowed = experiment.model.allowed(experiment.batch.tokens)
        self.table = _Table(rows=self.clean.new_empty(0, *self.clean.shape[1:]))

    def stream(self, n_writers: int, step: int, *, mlp: bool) -> Float[Tensor, "pos batch d_model"]:
        """The clean residual stream that is read behind these writers."""
        constant = constant_before(self.experiment.model, self.experiment.graph, step, mlp=mlp)
        return self.clean[:n_writers].sum(0) + constant


@dataclass(eq=False)
class _Variants:
    """Of every writer so far: which variant each circuit has, and how each variant differs from the clean run."""

    ids: Int[Tensor, "circuit writer"]
    """Which variant of each writer each circuit has; 0 is the clean one."""
    rows: list[int]
    """For each writer the first of its rows in `table`; its variant v stands in row `rows + v`, the ablated one in
    row `rows`, where the clean one would stand."""
    table: _Table
    """Differences from the clean run."""

    def add(self, ids: Int[Tensor, " circuit"], new: Tensor | None, ablation: Tensor) -> None:
        """A writer's variants: circuits' ids, and the new ones as differences from the clean output."""
        self.rows.append(self.table.filled)
        self.ids = torch.cat([self.ids, ids[:, None]], 1)
        self.table.append(ablation[None])
        if new is not None:
            self.table.append(new)


def _values(cache: _Cache, keep: Bool[Tensor, "circuit edge"]) -> Float[Tensor, "circuit batch"]:
    """One pass over the graph for these circuits."""
    graph = cache.experiment.graph
    cache.table.filled = 0
    variants = _Variants(ids=torch.zeros(len(keep), 0, dtype=torch.long), rows=[], table=cache.table)
    unchanged = torch.zeros(len(keep), dtype=torch.long)
    for index in range(len(graph.inputs)):
        variants.add(unchanged, None, cache.ablation[index])
    every = torch.arange(cache.clean.shape[1])
    port = 0
    for step in range(graph.n_steps):
        last = step == graph.n_steps - 1
        where = cache.reads if last else every
        for ids, new in _heads(cache, keep, variants, step, port, where):
            variants.add(ids, new, cache.ablation[len(variants.rows)])
        port += len(SLOTS) * graph.n_heads
        clusters = len(graph.clusters[step])
        found = [_cluster(cache, keep, variants, step, port + place, where) for place in range(clusters)]
        for ids, new in found:
            variants.add(ids, new, cache.ablation[len(variants.rows)])
        port += clusters
    return _finish(cache, keep, variants, port)


def _heads(
    cache: _Cache,
    keep: Bool[Tensor, "circuit edge"],
    variants: _Variants,
    step: int,
    first_port: int,
    where: Int[Tensor, " some_pos"],
) -> Iterator[tuple[Int[Tensor, " circuit"], Tensor | None]]:
    """Each head's variants at a step: circuits' ids, and what is new. All heads read the writers before the step."""
    graph, model = cache.experiment.graph, cache.experiment.model
    before = variants.ids
    every = torch.arange(cache.clean.shape[1])
    clean = cache.stream(before.shape[1], step, mlp=False)
    for head in range(graph.n_heads):
        chosen, read, of_circuit = slice(head, head + 1), {}, []
        ports = [first_port + place * graph.n_heads + head for place in range(len(SLOTS))]
        alive = _alive(cache, keep, before, ports)
        for port, slot in zip(ports, SLOTS, strict=True):
            states, ids = _states(cache, keep[alive], before[alive], port)
            x = _inputs(cache, variants, states, clean, where if slot == "q" else every)
            read[slot] = model.read_heads(step, slot, chosen, x[..., None, :])[..., 0, :]
            of_circuit.append(ids)
        combinations, which = _distinct(torch.stack(of_circuit, 1))
        ids = torch.full_like(before[:, 0], ABLATED).masked_scatter(alive, which)
        if len(combinations) == 1:
            yield ids, None
            continue
        look = partial(model.patterns, step, chosen, allowed=cache.allowed[:, None, where], dest=where)
        z = _attend(read["q"], read["k"], read["v"], combinations[1:], look)
        written = model.write_heads(step, chosen, z[..., None, :])[..., 0, :]
        yield ids, _changes(cache, before.shape[1] + head, written, where)


def _cluster(
    cache: _Cache,
    keep: Bool[Tensor, "circuit edge"],
    variants: _Variants,
    step: int,
    port: int,
    where: Int[Tensor, " some_pos"],
) -> tuple[Int[Tensor, " circuit"], Tensor | None]:
    """The variants of an MLP, or of a cluster of its neurons."""
    graph, model = cache.experiment.graph, cache.experiment.model
    reader = graph.ports[port]
    before = variants.ids[:, : reader.n_writers]
    alive = _alive(cache, keep, before, [port])
    states, which = _states(cache, keep[alive], before[alive], port)
    ids = torch.full_like(before[:, 0], ABLATED).masked_scatter(alive, which)
    if len(states) == 1:
        return ids, None
    clean = cache.stream(reader.n_writers, step, mlp=True)
    x = _inputs(cache, variants, states[1:], clean, where)
    written = model.write_neurons(step, graph.neurons(reader.node), x)
    return ids, _changes(cache, reader.n_writers + reader.node.index, written, where)


def _finish(
    cache: _Cache, keep: Bool[Tensor, "circuit edge"], variants: _Variants, port: int
) -> Float[Tensor, "circuit batch"]:
    """The metric of what the logits read."""
    experiment, graph = cache.experiment, cache.experiment.graph
    states, ids = _states(cache, keep, variants.ids, port)
    clean = cache.stream(variants.ids.shape[1], graph.n_steps, mlp=False)
    x = _inputs(cache, variants, states, clean, cache.reads)
    example, position = experiment.batch.read.nonzero().unbind(1)
    at_reads = x[torch.searchsorted(cache.reads, position), :, example].transpose(0, 1)
    per_pass = max(1, ELEMENTS // (len(example) * experiment.reference.shape[1]))
    return torch.cat([_measured(experiment, some) for some in at_reads.split(per_pass)])[ids]


def _measured(experiment: Experiment, x: Float[Tensor, "state read d_model"]) -> Float[Tensor, "state batch"]:
    n, states = len(experiment.batch), len(x)
    logits = experiment.model.finish(x, {}).flatten(0, 1)
    tiled = experiment.batch.select(torch.arange(n).repeat(states))
    return experiment.metric(logits, tiled, experiment.reference.repeat(states, 1)).view(states, n)


def _alive(
    cache: _Cache, keep: Bool[Tensor, "circuit edge"], ids: Int[Tensor, "circuit writer"], ports: Sequence[int]
) -> Bool[Tensor, " circuit"]:
    """Circuits in which a node reads anything but ablated values.

    Where these are the counterfactual run's, a node that reads nothing else writes what it writes in that run: its
    ablated value. Zeros and means are of no run.
    """
    if cache.experiment.ablation != "resample":
        return torch.ones(len(keep), dtype=torch.bool)
    alive = torch.zeros(len(keep), dtype=torch.bool)
    for port in ports:
        kept = keep[:, cache.experiment.graph.of_port(port)].unflatten(1, (-1, ids.shape[1]))
        alive |= (kept & (ids != ABLATED)[:, None]).flatten(1).any(1)
    return alive


def _states(
    cache: _Cache, keep: Bool[Tensor, "circuit edge"], ids: Int[Tensor, "circuit writer"], port: int
) -> tuple[Int[Tensor, "state column writer"], Int[Tensor, " circuit"]]:
    """What a port can read, the clean run's sum first, and which of these each circuit has."""
    graph = cache.experiment.graph
    kept = keep[:, graph.of_port(port)].unflatten(1, (graph.n_columns, ids.shape[1]))
    states, of_circuit = _distinct(torch.where(kept, ids[:, None], ABLATED).flatten(1))
    return states.unflatten(1, kept.shape[1:]), of_circuit


def _distinct(rows: Int[Tensor, "circuit column"]) -> tuple[Int[Tensor, "distinct column"], Int[Tensor, " circuit"]]:
    """The distinct rows, all zeros first whether it occurs or not, and which of them each row is."""
    found, which = torch.unique(torch.cat([torch.zeros_like(rows[:1]), rows]), dim=0, return_inverse=True)
    return found, which[1:]


def _inputs(
    cache: _Cache,
    variants: _Variants,
    states: Int[Tensor, "state column writer"],
    clean: Float[Tensor, "pos batch d_model"],
    where: Int[Tensor, " some_pos"],
) -> Float[Tensor, "some_pos state batch d_model"]:
    """What a port reads in each state at some positions: the clean sum, and every change on top."""
    n_positions, n_examples, d_model = clean.shape
    state, column, writer = states.nonzero().unbind(1)
    which = states[state, column, writer]
    items = torch.tensor(variants.rows, dtype=torch.long)[writer] + torch.where(which == ABLATED, 0, which)
    table = variants.table.rows.view(-1, n_examples * d_model)
    found = clean[where][:, None].repeat(1, len(states), 1, 1)
    for each in column.unique().tolist():
        in_column = column == each
        here = (cache.columns[where] == each).nonzero()[:, 0]
        counts = torch.bincount(state[in_column], minlength=len(states))
        firsts = (counts.cumsum(0) - counts) + len(items[in_column]) * torch.arange(len(here))[:, None]
        bags = items[in_column] * n_positions + where[here][:, None]
        added = functional.embedding_bag(bags.flatten(), table, firsts.flatten(), mode="sum")
        found[here] += added.view(len(here), len(states), n_examples, d_model)
    return found


def _attend(
    q: Float[Tensor, "dest q_state batch d_head"],
    k: Float[Tensor, "src k_state batch d_head"],
    v: Float[Tensor, "src v_state batch d_head"],
    combinations: Int[Tensor, "combination three"],
    look: Callable[[Float[Tensor, "pattern batch one dest src"]], Float[Tensor, "pattern batch one dest src"]],
) -> Float[Tensor, "dest combination batch d_head"]:
    """Attention of the combinations of queries, keys and values; equal patterns are computed once."""
    patterns, of_combination = torch.unique(combinations[:, :2], dim=0, return_inverse=True)
    q, k = q[:, patterns[:, 0]], k[:, patterns[:, 1]]
    scores = torch.einsum("dcbe,scbe->cbds", q, k) / q.shape[-1] ** 0.5
    pattern = look(scores[:, :, None])[:, :, 0]
    return torch.einsum("cbds,scbe->dcbe", pattern[of_combination], v[:, combinations[:, 2]])


def _changes(
    cache: _Cache, writer: int, written: Float[Tensor, "some_pos state batch d_model"], where: Int[Tensor, " some_pos"]
) -> Float[Tensor, "state pos batch d_model"]:
    """New variants as differences from the clean output; nothing changes at positions that nobody reads any more."""
    changes = written.new_zeros(written.shape[1], *cache.clean.shape[1:])
    changes[:, where] = (written - cache.clean[writer][where][:, None]).transpose(0, 1)
    return changes
