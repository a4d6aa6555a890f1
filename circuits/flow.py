"""Information flow routes (Ferrando & Voita 2024): how much of what is read comes along each edge, in the clean run.

A part's share in a sum is how much nearer to the sum one is with it, by the L1 norm (§2.2, eq. 5). From the logits
backwards, a node's importance at a position is what flows out of it to nodes that matter, and it hands this on to what
it reads in these shares. Nothing is ablated and no metric is asked: the scores say where information flows, not what it
is used for. A head hands its importance at a position to the keys and values of others by the share of each in its
output, and to its own queries whole: through a head the flow goes out three times. It ends where nothing brings one
nearer to the sum. The variant in EAP-IG's code scores each edge by its share alone and hands no importance on.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import terms_of
from circuits.circuit import EdgeScores
from circuits.components import columns_of, constant_before
from circuits.experiment import Experiment
from circuits.graph import Port

ROWS = 2**22
"""Numbers that the parts of one head's output may hold for some examples."""


def information_flow(plan: Experiment) -> EdgeScores:
    """The importance that flows along each edge, mean over examples, summed over positions; 1 leaves each answer."""
    begun = time.perf_counter()
    examples = plan.full.new_zeros(len(plan.batch), len(plan.graph.edges))
    with torch.no_grad():
        per_pass = max(1, ROWS // (plan.batch.tokens.shape[1] ** 2 * plan.graph.d_model))
        for rows in torch.arange(len(plan.batch)).split(per_pass):
            examples[rows] = _flow(plan, rows)
    return EdgeScores(
        graph=plan.graph,
        terms=terms_of(plan),
        method="ifr",
        score=examples.mean(0),
        examples=examples,
        live=plan.live,
        scale="share of the flow",
        reference="clean run",
        rule="L1 proximity, from the logits backwards",
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )


def _flow(plan: Experiment, rows: Tensor) -> Float[Tensor, "row edge"]:
    """The flow along each edge for some examples."""
    graph, clean = plan.graph, plan.clean[rows]
    read = plan.batch.read[rows].to(clean.dtype)
    n_rows, n_positions = read.shape
    writing = clean.new_zeros(n_rows, n_positions, len(graph.writers))
    found = clean.new_zeros(n_rows, len(graph.edges))
    columns = columns_of(graph, n_positions)
    place_of = {node.name: place for place, node in enumerate(graph.writers)}
    shares = clean.new_zeros(n_rows, n_positions, 0)
    for place in reversed(range(len(graph.ports))):
        port = graph.ports[place]
        if port.n_writers != shares.shape[2]:
            constant = constant_before(plan.model, graph, port.node.step, mlp=port.node.part == "mlp")
            shares = _shares(clean[:, :, : port.n_writers], constant)
        if port.node.part == "logits":
            arriving = read / read.sum(1, keepdim=True).clamp(min=1)
        else:
            arriving = writing[:, :, place_of[port.node.name]]
            if port.slot in ("k", "v"):
                arriving = torch.einsum("rds,rd->rs", _attended(plan, rows, port), arriving)
        along = shares * arriving[:, :, None]
        writing[:, :, : port.n_writers] += along
        by_column = [along[:, columns == column].sum(1) for column in range(graph.n_columns)]
        found[:, graph.of_port(place)] = torch.stack(by_column, 1).flatten(1)
    return found


def _shares(
    parts: Float[Tensor, "*rows part d_model"], constant: Float[Tensor, " d_model"]
) -> Float[Tensor, "*rows part"]:
    """Each part's share in the sum of all parts and a constant."""
    whole = parts.sum(-2, keepdim=True) + constant
    proximity = (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=0)
    return proximity / proximity.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)


def _attended(plan: Experiment, rows: Tensor, port: Port) -> Float[Tensor, "row dest src"]:
    """The share of each source position in what a head writes to each destination."""
    model, step, head = plan.model, port.node.step, slice(port.node.index, port.node.index + 1)
    stream = plan.clean[rows][:, :, : port.n_writers].sum(2) + constant_before(model, plan.graph, step)
    q, k, v = (model.read_heads(step, slot, head, stream[:, :, None]) for slot in ("q", "k", "v"))
    scores = torch.einsum("rdhe,rshe->rhds", q, k) / q.shape[-1] ** 0.5
    allowed, positions = model.allowed(plan.batch.tokens[rows])[:, None], torch.arange(q.shape[1])
    pattern = model.patterns(step, head, scores, allowed, positions)[:, 0]
    written = model.write_heads(step, head, v)[:, :, 0]
    return _shares(pattern[..., None] * written[:, None], torch.zeros_like(written[0, 0]))
