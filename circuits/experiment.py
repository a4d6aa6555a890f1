"""What an intervention lies between: a clean run, the values that stand in for it, and a metric that tells them apart.

Keeping a set of edges means that every other edge carries the ablated value of its writer instead of the current one.
The value can be the counterfactual run's (`resample`), the clean run's mean over examples at each position (`mean`), or
`zero`. What is in a circuit differs between the three, so every result names its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.components import columns_of, constant_before, edge_readable, everything, inputs_of, run_parts
from circuits.graph import CircuitGraph, circuit_graph
from workbench.instrument.passes import check_tokens
from workbench.instrument.sites import EdgeReadable, Instrumented
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.models.known import ABLATIONS, Ablation
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tasks.base import Batch, check_choice

HEADROOM = 1e-6
"""Share of the metric's size below which its difference between the two runs counts as none."""


class NoHeadroom(WorkbenchError):
    """The metric does not tell the whole model from the empty circuit, so that no share of the difference says much."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A model, its graph, examples, an ablation and a metric, with the two runs between which circuits lie."""

    model: EdgeReadable
    graph: CircuitGraph
    batch: Batch
    ablation: Ablation
    metric: Metric
    clean: Float[Tensor, "batch pos writer d_model"]
    """What every writer writes in the clean run."""
    ablated: Float[Tensor, "batch pos writer d_model"]
    """What stands in for it."""
    reference: Float[Tensor, "reads vocab"]
    """Logits of the clean run where the batch is read."""
    full: Float[Tensor, " batch"]
    """The metric of the whole model."""
    empty: Float[Tensor, " batch"]
    """The metric of the model with every edge ablated."""
    provenance: Provenance

    @property
    def headroom(self) -> float:
        """Mean metric of the whole model minus that of the empty circuit."""
        return float(self.full.mean() - self.empty.mean())

    @functools.cached_property
    def live(self) -> Bool[Tensor, " edge"]:
        """Edges that lie in a circuit of carrying edges: with all others ablated, every answer is the model's.

        An edge that is not live can still change an answer alone: it carries, but into a node that writes the same in
        both runs, and writes something else once its input is taken away.
        """
        return self.graph.pruned(self.carrying, self.ablation)

    @functools.cached_property
    def carrying(self) -> Bool[Tensor, " edge"]:
        """Edges that carry something else under ablation, at a position from which a read answer can depend on them.

        No other edge changes an answer when it is ablated alone.
        """
        changed = (self.clean - self.ablated).abs().amax(-1) > 1e-6 * self.clean.abs().amax()
        needed = self._needed()
        columns = columns_of(self.graph, changed.shape[1])
        found = torch.zeros(len(self.graph.edges), dtype=torch.bool)
        for port, reader in enumerate(self.graph.ports):
            where = needed[port]
            carried = changed[:, :, : reader.n_writers] & where[:, :, None]
            by_column = torch.stack(
                [carried[:, columns == c].flatten(0, 1).any(0) for c in range(self.graph.n_columns)]
            )
            found[self.graph.of_port(port)] = by_column.flatten()
        return found

    def measure(self, logits: Float[Tensor, "reads vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each example."""
        return self.metric(logits, self.batch, self.reference)

    def measured_by(self, metric: str | Metric) -> Experiment:
        """The same runs under another metric; headroom is not asked for."""
        found = find_metric(metric)
        swapped = replace(self, metric=found)
        return replace(swapped, full=swapped.measure(self.reference), empty=swapped.measure(self._empty_logits()))

    def check_headroom(self) -> None:
        """Raise NoHeadroom unless the metric tells the whole model from the empty circuit.

        Raises:
            NoHeadroom: it does not.
            WorkbenchError: it is not a finite number on one of them.
        """
        if not bool((self.full.isfinite() & self.empty.isfinite()).all()):
            raise WorkbenchError(
                f"Metric {self.metric.name!r} is not finite on the whole model or with every edge ablated "
                f"({self.ablation}). Look at the model's weights and logits."
            )
        size = max(float(self.full.abs().mean()), float(self.empty.abs().mean()))
        if not abs(self.headroom) > HEADROOM * max(size, HEADROOM):
            raise NoHeadroom(
                f"No headroom: mean {self.metric.name} is {float(self.full.mean()):.4g} on the whole model and "
                f"{float(self.empty.mean()):.4g} with every edge ablated ({self.ablation}, n = {len(self.batch)}). "
                "Choose pairs that the model tells apart, or another metric."
            )

    def _empty_logits(self) -> Float[Tensor, "reads vocab"]:
        constant = constant_before(self.model, self.graph, self.graph.n_steps)
        x = self.ablated.sum(2) + constant
        return self.model.finish(x[self.batch.read], {})

    def _needed(self) -> list[Bool[Tensor, "batch pos"]]:
        """For each port the positions at which a read answer can depend on what it reads."""
        allowed = self.model.allowed(self.batch.tokens).expand(len(self.batch), -1, -1)
        after = self.batch.read
        found: list[Tensor] = [after]
        for step in reversed(range(self.graph.n_steps)):
            found += [after] * len(self.graph.clusters[step])
            attended = (allowed & after[:, :, None]).any(1)
            found += [attended] * (2 * self.graph.n_heads) + [after] * self.graph.n_heads
            after = after | attended
        return found[::-1]


def experiment(
    model: Instrumented,
    batch: Batch,
    *,
    graph: CircuitGraph | None = None,
    ablation: Ablation = "resample",
    metric: str | Metric = "logit_difference",
) -> Experiment:
    """Run the clean prompts and what stands in for them.

    Args:
        model: one that runs in parts, or a GPT-2-shaped bridge.
        batch: examples, with counterfactuals where the ablation or the metric needs them.
        graph: of this model; None is the component graph.
        ablation: what an ablated edge carries.
        metric: by name, or one of your own.

    Raises:
        WorkbenchError: a model without edges, another model's graph, pairs of different padding, or a metric that is
            not finite.
        NoHeadroom: the metric does not tell the whole model from the empty circuit.
    """
    check_choice("ablation", ablation, ABLATIONS)
    if not len(batch):
        raise WorkbenchError("Circuits need at least one example; the batch is empty.")
    readable, measure = edge_readable(model), find_metric(metric)
    check_tokens(batch.tokens, readable)
    graph = circuit_graph(readable) if graph is None else _of_model(readable, graph)
    with torch.no_grad():
        clean, stream = run_parts(readable, graph, batch.tokens, inputs_of(readable, graph, batch.tokens), everything)
        reference = readable.finish(stream[batch.read], {})
        ablated = _ablated(readable, graph, batch, ablation, clean)
        made = Experiment(
            model=readable,
            graph=graph,
            batch=batch,
            ablation=ablation,
            metric=measure,
            clean=clean,
            ablated=ablated,
            reference=reference,
            full=measure(reference, batch, reference),
            empty=clean.new_zeros(len(batch)),
            provenance=model.provenance,
        )
        made = made.measured_by(measure)
    made.check_headroom()
    return made


def _of_model(model: EdgeReadable, graph: CircuitGraph) -> CircuitGraph:
    """The graph, if the model's own with the same splits is the same."""
    own = circuit_graph(
        model,
        split_inputs=len(graph.inputs) > 1,
        columns=[graph.columns[column] for column in graph.column_of] or None,
        clusters={step: groups for step, groups in enumerate(graph.clusters) if any(groups)},
    )
    own.check_same(graph)
    return graph


def _ablated(
    model: EdgeReadable, graph: CircuitGraph, batch: Batch, ablation: Ablation, clean: Float[Tensor, "b p w d"]
) -> Float[Tensor, "b p w d"]:
    if ablation == "zero":
        return torch.zeros_like(clean)
    if ablation == "mean":
        pad_token = getattr(model.config, "pad_token", None)
        present = torch.ones_like(batch.read) if pad_token is None else batch.tokens != pad_token
        weights = present.to(clean.dtype)[:, :, None, None]
        return ((clean * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True).clamp(min=1)).expand_as(clean)
    corrupt, _ = batch.pairs()
    check_tokens(corrupt, model)
    if not torch.equal(model.allowed(batch.tokens), model.allowed(corrupt)):
        raise WorkbenchError(
            "Some pairs differ in length: a counterfactual hides other positions as padding than its clean prompt. "
            "Give pairs of one length."
        )
    return run_parts(model, graph, corrupt, inputs_of(model, graph, corrupt), everything)[0]
