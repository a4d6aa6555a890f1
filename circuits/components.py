"""A model's forward pass in parts: every writer's output apart, every port's input its own sum of them.

This is the plain, differentiable form. `memoised.py` computes the same for many circuits with nothing computed twice;
the tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import SLOTS, CircuitGraph
from workbench.instrument.adapters import BridgeModel
from workbench.instrument.sites import EdgeReadable, Instrumented
from workbench.models.bridges import transformer_of
from workbench.runtime import WorkbenchError

Mix = Callable[[slice, Float[Tensor, "row pos writer d_model"]], Float[Tensor, "row pos #port d_model"]]
"""What some ports read of the outputs of all writers before them; one for all of them where they read the same."""


def edge_readable(model: Instrumented) -> EdgeReadable:
    """The model, if its parts can be run one by one; of a GPT-2-shaped bridge, the same weights in our layout.

    Raises:
        WorkbenchError: neither; nodes can be scored on it, edges cannot.
    """
    if isinstance(model, EdgeReadable):
        return model
    if isinstance(model, BridgeModel):
        return transformer_of(model.bridge)
    raise WorkbenchError(
        f"A {type(model).__name__} does not run its heads one by one with q, k and v apart, so it has no edges to "
        "intervene on. Score its nodes (score_nodes, patch_each), or bring it as a Transformer."
    )


def inputs_of(
    model: EdgeReadable, graph: CircuitGraph, tokens: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos input d_model"]:
    """What the graph's inputs write."""
    parts = model.write_inputs(tokens)
    return torch.stack(parts if len(graph.inputs) == len(parts) else [parts[0] + parts[1]], 2)


def run_parts(
    model: EdgeReadable,
    graph: CircuitGraph,
    tokens: Int[Tensor, "row pos"],
    inputs: Float[Tensor, "row pos input d_model"],
    mix: Mix,
) -> tuple[Float[Tensor, "row pos writer d_model"], Float[Tensor, "row pos d_model"]]:
    """Every writer's output, and the residual stream that the logits are read from."""
    allowed, positions = model.allowed(tokens), torch.arange(tokens.shape[1])
    outputs, port = inputs, 0
    every = slice(None)
    for step in range(graph.n_steps):
        heads = len(SLOTS) * graph.n_heads
        x = mix(slice(port, port + heads), outputs) + constant_before(model, graph, step)
        port += heads
        each = x.split(graph.n_heads, 2) if x.shape[2] > 1 else (x, x, x)
        q, k, v = (model.read_heads(step, slot, every, read) for slot, read in zip(SLOTS, each, strict=True))
        z = attend(model, step, q, k, v, allowed, positions)
        outputs = torch.cat([outputs, model.write_heads(step, every, z)], 2)
        clusters = [node for node in graph.writers if node.part == "mlp" and node.step == step]
        if clusters:
            x = mix(slice(port, port + len(clusters)), outputs) + constant_before(model, graph, step, mlp=True)
            port += len(clusters)
            each = x.expand(-1, -1, len(clusters), -1).unbind(2)
            written = [
                model.write_neurons(step, graph.neurons(node), read) for node, read in zip(clusters, each, strict=True)
            ]
            outputs = torch.cat([outputs, torch.stack(written, 2)], 2)
    return outputs, (mix(slice(port, port + 1), outputs) + constant_before(model, graph, graph.n_steps))[:, :, 0]


def attend(
    model: EdgeReadable,
    step: int,
    q: Float[Tensor, "row dest head d_head"],
    k: Float[Tensor, "row src head d_head"],
    v: Float[Tensor, "row src head d_head"],
    allowed: Bool[Tensor, "#row dest src"],
    dest: Int[Tensor, " dest"],
) -> Float[Tensor, "row dest head d_head"]:
    """The attention of every head of a step, from the positions `dest`."""
    scores = torch.einsum("rdhe,rshe->rhds", q, k) / q.shape[-1] ** 0.5
    pattern = model.patterns(step, slice(None), scores, allowed[:, None], dest)
    return torch.einsum("rhds,rshe->rdhe", pattern, v)


def everything(ports: slice, outputs: Float[Tensor, "row pos writer d_model"]) -> Float[Tensor, "row pos one d_model"]:
    """The mix of the whole model: every port reads every writer before it."""
    return outputs.sum(2, keepdim=True)


def weighted(
    graph: CircuitGraph,
    keep: Float[Tensor, "#row edge"],
    ablated: Float[Tensor, "row pos writer d_model"],
) -> Mix:
    """The mix of a circuit: of each edge `keep` of the current output and the rest of the ablated one."""

    def mix(ports: slice, outputs: Tensor) -> Tensor:
        n_writers, n_positions = outputs.shape[2], outputs.shape[1]
        first = graph.first_edge[ports.start]
        per_port = graph.n_columns * n_writers
        shares = keep[:, first : first + (ports.stop - ports.start) * per_port]
        shares = shares.unflatten(1, (ports.stop - ports.start, graph.n_columns, n_writers))
        at_positions = shares[:, :, columns_of(graph, n_positions)]
        base = ablated[:, :, :n_writers]
        mixed = torch.einsum("rxpw,rpwd->rpxd", at_positions.expand(len(outputs), -1, -1, -1), outputs - base)
        return mixed + base.sum(2, keepdim=True)

    return mix


def constant_before(
    model: EdgeReadable, graph: CircuitGraph, step: int, *, mlp: bool = False
) -> Float[Tensor, " d_model"]:
    """The part of the residual stream that no node writes, before a step's attention or its MLP: output biases."""
    found = torch.zeros_like(model.constant(0, "attn"))
    for earlier in range(step + mlp):
        found = found + model.constant(earlier, "attn")
    for earlier in range(step):
        found = found + model.constant(earlier, "mlp") if graph.split(earlier) else found
    return found


def columns_of(graph: CircuitGraph, n_positions: int) -> Int[Tensor, " pos"]:
    """Column of each position of a prompt.

    Raises:
        WorkbenchError: the graph's columns are for prompts of another length.
    """
    if not graph.columns:
        return torch.zeros(n_positions, dtype=torch.long)
    if len(graph.column_of) != n_positions:
        raise WorkbenchError(
            f"This graph tells apart the positions of prompts of {len(graph.column_of)} tokens, not {n_positions}."
        )
    return torch.tensor(graph.column_of)
