"""The gradient of the metric at what every port reads, from one ordinary forward and backward pass.

In the model all heads of a layer read the same stream, and only the sum of what they write is added to it. So nothing
needs to be split in the forward pass: what each head reads is told apart afterwards, by its queries, keys and values.
Positions before the first that ablation changes are not computed again, and behind the last layer's keys and values
only those that are read are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.components import attend, constant_before
from circuits.experiment import Experiment
from circuits.graph import SLOTS
from workbench.instrument.sites import Slot
from workbench.runtime import WorkbenchError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PortGradient:
    """The gradient at ports that read the same writers, averaged over the points of a path."""

    ports: slice
    positions: Int[Tensor, " some_pos"]
    """Where it was computed; elsewhere it is 0, or what is read there is the same in both runs."""
    gradient: Float[Tensor, "row some_pos port d_model"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tap:
    """A tensor of the forward pass at which the gradient is taken."""

    ports: slice
    positions: Int[Tensor, " some_pos"]
    at: Float[Tensor, "row some_pos *part"]
    """The stream that one port reads; of heads their queries, keys or values."""
    heads: tuple[int, Slot, Float[Tensor, "row some_pos d_model"]] | None = None
    """Step and slot of heads, and the stream that all of them read."""


def port_gradients(
    plan: Experiment, rows: Int[Tensor, " row"], given: Float[Tensor, "point row pos given d_model"]
) -> Sequence[PortGradient]:
    """Gradients of the metric's sum at every port behind what is given.

    Args:
        plan: the experiment.
        rows: examples.
        given: at each point of a path what the first writers write: the inputs, and as many whole layers behind them.

    Raises:
        WorkbenchError: the metric has no gradient.
    """
    with torch.enable_grad():
        forward = _Forward(plan, rows, given)
        values = forward.metric()
        if not values.requires_grad:
            raise WorkbenchError(
                f"Metric {plan.metric.name!r} has no gradient, so that nothing can be attributed with it. "
                "Use 'logit_difference' or 'loss', or the methods 'exact', 'acdc' and 'greedy'."
            )
        gradients = torch.autograd.grad(values.sum(), [tap.at for tap in forward.taps])
    with torch.no_grad():
        return [
            PortGradient(
                ports=tap.ports,
                positions=tap.positions,
                gradient=_at_ports(plan, tap, gradient, points=len(given)),
            )
            for tap, gradient in zip(forward.taps, gradients, strict=True)
        ]


def _at_ports(
    plan: Experiment, tap: _Tap, gradient: Float[Tensor, "pointrow some_pos *part"], *, points: int
) -> Float[Tensor, "row some_pos port d_model"]:
    """The gradient at what each port of a tap reads, averaged over the points."""
    gradient = gradient.unflatten(0, (points, -1))
    if tap.heads is None:
        return gradient.mean(0)[:, :, None]
    step, slot, stream = tap.heads
    return plan.model.pull_heads(step, slot, stream.unflatten(0, (points, -1)), gradient)


class _Forward:
    """A forward pass from what is given, with a tap at every port."""

    def __init__(self, plan: Experiment, rows: Tensor, given: Tensor) -> None:
        self.plan, self.rows, self.points = plan, rows, len(given)
        self.batch = plan.batch.select(rows.repeat(self.points))
        n_positions = given.shape[2]
        first = _first_changed(plan)
        self.positions = torch.arange(first, n_positions)
        self.reads = plan.batch.read.any(0).nonzero()[:, 0]
        self.allowed = plan.model.allowed(self.batch.tokens)
        self.stream = given[:, :, first:].flatten(0, 1).sum(2).requires_grad_()
        self.n_given = given.shape[3]
        self.taps: list[_Tap] = []

    def metric(self) -> Float[Tensor, " pointrow"]:
        """Run on to the metric of every row."""
        plan, graph = self.plan, self.plan.graph
        port, before = 0, len(graph.inputs)
        for step in range(graph.n_steps):
            if before >= self.n_given:
                self._heads(step, port, before)
            port, before = port + len(SLOTS) * graph.n_heads, before + graph.n_heads
            if step == graph.n_steps - 1:
                self._narrow()
            n_clusters = len(graph.clusters[step])
            if before >= self.n_given:
                self._clusters(step, port, n_clusters)
            port, before = port + n_clusters, before + n_clusters
        last = self._tap(port, self.stream + constant_before(plan.model, graph, graph.n_steps))
        logits = plan.model.finish(last[self.batch.read[:, self.positions]], {})
        chosen = torch.isin(plan.batch.read.nonzero()[:, 0], self.rows)
        return plan.metric(logits, self.batch, plan.reference[chosen].repeat(self.points, 1))

    def _heads(self, step: int, port: int, before: int) -> None:
        """One layer of attention: keys and values at all positions, queries where they are wanted."""
        plan, n_heads = self.plan, self.plan.graph.n_heads
        constant = constant_before(plan.model, plan.graph, step)
        x, computed = self.stream + constant, self.positions
        with torch.no_grad():
            earlier = plan.clean[self.rows, : int(computed[0]), :before].sum(2) + constant
        if step == plan.graph.n_steps - 1:
            self._narrow()
        read = {}
        for place, slot in enumerate(SLOTS):
            queries = slot == "q"
            positions = self.positions if queries else computed
            stream = x[:, positions - computed[0]]
            at = plan.model.read_heads(step, slot, slice(None), stream[:, :, None])
            ports = slice(port + place * n_heads, port + (place + 1) * n_heads)
            self.taps.append(_Tap(ports=ports, positions=positions, at=at, heads=(step, slot, stream)))
            if not queries:
                with torch.no_grad():
                    known = plan.model.read_heads(step, slot, slice(None), earlier[:, :, None])
                at = torch.cat([known.repeat(self.points, 1, 1, 1), at], 1)
            read[slot] = at
        allowed = self.allowed[:, self.positions]
        z = attend(plan.model, step, read["q"], read["k"], read["v"], allowed, self.positions)
        self.stream = self.stream + plan.model.sum_heads(step, z)

    def _clusters(self, step: int, port: int, n_clusters: int) -> None:
        """One MLP, or the clusters of its neurons."""
        plan = self.plan
        x = self.stream + constant_before(plan.model, plan.graph, step, mlp=True)
        for place in range(n_clusters):
            # A view of its own, so that each cluster has a gradient of its own.
            read = self._tap(port + place, x.view_as(x))
            neurons = plan.graph.neurons(plan.graph.ports[port + place].node)
            self.stream = self.stream + plan.model.write_neurons(step, neurons, read)

    def _tap(self, port: int, at: Float[Tensor, "row some_pos d_model"]) -> Float[Tensor, "row some_pos d_model"]:
        self.taps.append(_Tap(ports=slice(port, port + 1), positions=self.positions, at=at))
        return at

    def _narrow(self) -> None:
        """Go on with the positions that are read alone."""
        if len(self.positions) > len(self.reads):
            self.stream = self.stream[:, self.reads - self.positions[0]]
            self.positions = self.reads


def _first_changed(plan: Experiment) -> int:
    """The first position at which something is ablated or read; a causal model is the same in both runs before it."""
    if not plan.model.config.causal:
        return 0
    changed: Bool[Tensor, " pos"] = (plan.clean != plan.ablated).flatten(2).any(2).any(0) | plan.batch.read.any(0)
    return int(changed.int().argmax())
