"""Scores of edges: every edge patched, or estimated from gradients.

Exact scores ablate one edge at a time. The others are first-order: what an edge carries differs by `clean - ablated`,
and the gradient of the metric at the port that reads it says what a difference is worth there (attribution patching,
Nanda 2023; EAP, Syed et al. 2023). Where the model saturates, a gradient at one run sees nothing; EAP-IG averages it
along a path from the ablated run to the clean one (Hanna et al. 2024). The points of the path are rows of one batch.

Every score is the metric of the clean run minus that with the edge ablated: positive where ablating lowers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import EdgeScores, Terms
from circuits.components import columns_of
from circuits.experiment import Experiment
from circuits.gradients import PortGradient, port_gradients
from circuits.graph import CircuitGraph
from circuits.memoised import circuit_values
from workbench.runtime import WorkbenchError

POINTS = 5
"""Points of an integration path, as Hanna et al. found enough."""
AT_ONCE = 512
"""Single edges that are ablated in one call."""
OnProgress = Callable[[float], None]
ELEMENTS = 2**25
"""Numbers that the gradients of one pass may hold."""


def terms_of(plan: Experiment) -> Terms:
    """Under what numbers of this experiment hold."""
    return Terms(
        ablation=plan.ablation,
        metric=plan.metric.name,
        unit=plan.metric.unit,
        better=plan.metric.better,
        n=len(plan.batch),
    )


def exact_scores(plan: Experiment, *, on_progress: OnProgress | None = None) -> EdgeScores:
    """Ablate every edge by itself and measure, but for those that carry the same in both runs."""
    begun = time.perf_counter()
    singles = plan.carrying.nonzero()[:, 0]
    examples = plan.full.new_zeros(len(plan.batch), len(plan.graph.edges))
    for some in singles.split(AT_ONCE):
        keep = torch.ones(len(some), len(plan.graph.edges), dtype=torch.bool)
        keep[torch.arange(len(some)), some] = False
        examples[:, some] = plan.full[:, None] - circuit_values(plan, keep).T
        if on_progress:
            on_progress(float((singles <= some[-1]).float().mean()))
    return _scores(plan, "exact", examples, begun, reference="clean run", rule="each edge patched by itself")


def eap(plan: Experiment, *, reference: Literal["clean", "ablated"] = "clean") -> EdgeScores:
    """Edge attribution patching (Syed et al. 2023, §3): one gradient at each port.

    Args:
        plan: the experiment.
        reference: run at which the gradient is taken. EAP-IG's code takes the clean one, TransformerLens the other.

    Raises:
        WorkbenchError: the metric has no gradient.
    """
    begun = time.perf_counter()
    if plan.metric.needs_reference and reference == "clean":
        raise WorkbenchError(
            f"Metric {plan.metric.name!r} is least at the clean run, where its gradient is zero for every edge. Use "
            "eap-ig, or eap(plan, reference='ablated')."
        )
    share = 1.0 if reference == "clean" else 0.0
    examples = _integrated(plan, _inputs(plan.graph), [share])
    return _scores(plan, "eap", examples, begun, reference=f"{reference} run", rule="gradient at one point")


def eap_ig(plan: Experiment, *, points: int = POINTS) -> EdgeScores:
    """EAP with gradients averaged along the straight path of the inputs (Hanna et al. 2024, eq. 3).

    The points are `ablated + k/points * (clean - ablated)`, k = 0 … points-1, as in the authors' code: a left Riemann
    sum, which does not evaluate the clean end.

    Raises:
        WorkbenchError: fewer than one point, or the metric has no gradient.
    """
    begun = time.perf_counter()
    _check_points(points)
    examples = _integrated(plan, _inputs(plan.graph), [k / points for k in range(points)])
    rule = f"left Riemann sum of {points} points on the inputs"
    return _scores(plan, "eap-ig", examples, begun, reference="path from the ablated to the clean run", rule=rule)


def eap_ig_activations(plan: Experiment, *, points: int = POINTS) -> EdgeScores:
    """EAP with gradients averaged along the straight path of each layer's own output (Hanna et al. 2024, §5).

    The inputs, the heads of a layer, or its MLP go from ablated to clean while all before them is the clean run's; the
    edges that leave them are scored along this path. The points are k/points, k = 1 … points: a right Riemann sum.

    Raises:
        WorkbenchError: fewer than one point, or the metric has no gradient.
    """
    begun = time.perf_counter()
    _check_points(points)
    shares = [k / points for k in range(1, points + 1)]
    examples = plan.full.new_zeros(len(plan.batch), len(plan.graph.edges))
    for layer in _layers(plan.graph):
        examples = examples + _integrated(plan, layer, shares, scored=layer)
    rule = f"right Riemann sum of {points} points on each layer's output"
    return _scores(
        plan, "eap-ig-activations", examples, begun, reference="paths from the ablated to the clean run", rule=rule
    )


def _check_points(points: int) -> None:
    if points < 1:
        raise WorkbenchError(f"A path needs at least 1 point, got {points}.")


def _inputs(graph: CircuitGraph) -> slice:
    return slice(0, len(graph.inputs))


def _layers(graph: CircuitGraph) -> Iterator[slice]:
    """Writers that write together: the inputs, the heads of a step, its MLP."""
    first = 0
    for place in range(1, len(graph.writers) + 1):
        here = graph.writers[first]
        if place == len(graph.writers) or (graph.writers[place].part, graph.writers[place].step) != (
            here.part,
            here.step,
        ):
            yield slice(first, place)
            first = place


def _integrated(
    plan: Experiment, mixed: slice, shares: list[float], *, scored: slice = slice(None)
) -> Float[Tensor, "batch edge"]:
    """Scores of each example with the gradient averaged over points at which some writers are mixed.

    Args:
        plan: the experiment.
        mixed: writers that go from ablated to clean; all before them are the clean run's.
        shares: of the clean run, at each point.
        scored: writers whose edges are scored; the others get 0.
    """
    points = len(shares)
    n_ports, d_model = len(plan.graph.ports), plan.graph.d_model
    per_pass = max(1, ELEMENTS // (points * plan.batch.tokens.shape[1] * n_ports * d_model))
    found = []
    for rows in torch.arange(len(plan.batch)).split(per_pass):
        share = torch.tensor(shares, dtype=plan.clean.dtype)[:, None, None, None, None]
        clean, ablated = plan.clean[rows, :, : mixed.stop], plan.ablated[rows, :, : mixed.stop]
        given = clean.expand(points, *clean.shape).clone()
        given[:, :, :, mixed] = ablated[:, :, mixed] + share * (clean - ablated)[:, :, mixed]
        found.append(_attributed(plan, rows, given, scored))
    return torch.cat(found)


def _attributed(
    plan: Experiment, rows: Tensor, given: Float[Tensor, "point row pos given d_model"], scored: slice
) -> Float[Tensor, "row edge"]:
    """Mean gradient over the points at every port behind what is given, times what each edge's ablation changes."""
    difference = torch.zeros_like(plan.clean[rows])
    difference[:, :, scored] = (plan.clean - plan.ablated)[rows][:, :, scored]
    found = difference.new_zeros(len(rows), len(plan.graph.edges))
    for at in port_gradients(plan, rows, given):
        _contract(plan.graph, at, difference[:, at.positions], found)
    return found


def _contract(
    graph: CircuitGraph, at: PortGradient, difference: Float[Tensor, "row some_pos writer d_model"], found: Tensor
) -> None:
    """Fill in the scores of the edges into some ports that read the same writers."""
    n_writers, n_ports = graph.ports[at.ports.start].n_writers, at.ports.stop - at.ports.start
    first = graph.first_edge[at.ports.start]
    columns = columns_of(graph, len(graph.column_of) or 1)[at.positions] if graph.columns else None
    by_column = []
    for column in range(graph.n_columns):
        here = slice(None) if columns is None else columns == column
        left = at.gradient[:, here].transpose(1, 2).flatten(2)
        right = difference[:, here, :n_writers].transpose(1, 2).flatten(2)
        by_column.append(left @ right.transpose(1, 2))
    found[:, first : first + n_ports * graph.n_columns * n_writers] = torch.stack(by_column, 2).flatten(1)


def _scores(
    plan: Experiment, method: str, examples: Float[Tensor, "batch edge"], begun: float, *, reference: str, rule: str
) -> EdgeScores:
    return EdgeScores(
        graph=plan.graph,
        terms=terms_of(plan),
        method=method,
        score=examples.mean(0),
        examples=examples,
        live=plan.live,
        scale=plan.metric.unit,
        reference=reference,
        rule=rule,
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )
