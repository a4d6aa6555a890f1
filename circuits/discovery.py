"""From scores, or by search, to a circuit: top-n, threshold, growth from the logits, ACDC.

Methods that score edges leave the choice to a rule, signed or absolute, which the circuit records: published results
changed by a factor of two with this alone (Mueller et al. 2025). What dangles after the choice is pruned, so that a
circuit may be smaller than what was asked for; both sizes are kept.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.acdc import acdc, acdc_of_size
from circuits.attribution import eap, eap_ig, eap_ig_activations, exact_scores, terms_of
from circuits.circuit import Circuit, EdgeScores
from circuits.elimination import greedy_elimination
from circuits.experiment import Experiment, experiment
from circuits.flow import information_flow
from circuits.graph import CircuitGraph
from circuits.masks import learned_mask
from workbench.instrument.sites import Instrumented
from workbench.metrics import Metric
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError, nearest
from workbench.tasks.base import Batch

OnProgress = Callable[[float], None]
Select = Literal["top", "grow"]
"""How so many edges are chosen by their scores: the largest, or grown from the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a method may need besides the experiment."""

    edges: int
    seed: int
    on_progress: OnProgress | None


SCORES: Mapping[str, Callable[[Experiment, Budget], EdgeScores]] = {
    "exact": lambda plan, budget: exact_scores(plan, on_progress=budget.on_progress),
    "eap": lambda plan, budget: eap(plan),
    "eap-ig": lambda plan, budget: eap_ig(plan),
    "eap-ig-activations": lambda plan, budget: eap_ig_activations(plan),
    "greedy": lambda plan, budget: greedy_elimination(plan, on_progress=budget.on_progress),
    "mask": lambda plan, budget: learned_mask(plan, budget.edges, seed=budget.seed, on_progress=budget.on_progress),
    "ifr": lambda plan, budget: information_flow(plan),
}
METHODS: Mapping[str, str] = {
    "exact": "every edge patched by itself",
    "eap": "edge attribution patching: one gradient (Syed et al. 2023)",
    "eap-ig": "EAP with gradients along the path of the inputs (Hanna et al. 2024)",
    "eap-ig-activations": "EAP with gradients along the path of each layer's output (Hanna et al. 2024)",
    "acdc": "from the logits backwards, drop what costs less than a threshold (Conmy et al. 2023)",
    "greedy": "take out, again and again, the edges that cost least",
    "mask": "a learned mask of hard-concrete gates at a budget (Louizos et al. 2018; Bhaskar et al. 2024)",
    "ifr": "information flow routes of the clean run, without ablation (Ferrando & Voita 2024)",
}
"""Every method by name, with what it is."""


def extract(
    model: Instrumented,
    batch: Batch,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    ablation: Ablation = "resample",
    metric: str | Metric = "logit_difference",
    graph: CircuitGraph | None = None,
    absolute: bool = True,
    select: Select = "top",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Circuit:
    """The circuit that a method finds.

    Args:
        model: one that runs in parts, or a GPT-2-shaped bridge.
        batch: examples, with counterfactuals where the ablation or the metric needs them.
        method: one of `METHODS`.
        edges: how many to keep at most.
        threshold: instead, the least score to keep: in the unit of the method's scores, for ACDC the metric's.
        ablation: what an ablated edge carries.
        metric: by name, or one of your own.
        graph: of this model; None is the component graph.
        absolute: whether an edge that hurts counts as much as one that helps; ACDC looks only for what helps.
        select: how so many edges are chosen by their scores.
        seed: of what is drawn at random.
        on_progress: told the share of the work that is done, by methods that take long.

    Raises:
        WorkbenchError: an unknown method, not one of size and threshold, more edges than there are, so few that
            nothing is left of them once what dangles is pruned, or what `experiment` refuses.
    """
    _check_method(method)
    plan = experiment(model, batch, graph=graph, ablation=ablation, metric=metric)
    found = find(
        plan,
        method,
        edges=edges,
        threshold=threshold,
        absolute=absolute,
        select=select,
        seed=seed,
        on_progress=on_progress,
    )
    check_not_empty(found)
    return found


def find(
    plan: Experiment,
    method: str,
    *,
    edges: int | None = None,
    threshold: float | None = None,
    absolute: bool = True,
    select: Select = "top",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Circuit:
    """The circuit that a method finds in an experiment; as `extract`, but one of no edges is returned, too."""
    _check_method(method)
    _check_wanted(plan.graph, edges, threshold)
    if method == "acdc":
        return _searched(plan, edges, threshold, on_progress)
    scores = score_edges(plan, method, edges=edges, seed=seed, on_progress=on_progress)
    if edges is not None:
        return (grow if select == "grow" else top_n)(scores, edges, absolute=absolute)
    assert threshold is not None
    return above(scores, threshold, absolute=absolute)


def score_edges(
    plan: Experiment,
    method: str,
    *,
    edges: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> EdgeScores:
    """The scores that a method gives every edge.

    Args:
        plan: the experiment.
        method: one of `SCORES`.
        edges: budget of a learned mask; half of the live edges unless given.
        seed: of what is drawn at random.
        on_progress: told the share of the work that is done, by methods that take long.

    Raises:
        WorkbenchError: an unknown method, or ACDC, which decides on edges and does not score them.
    """
    if method not in SCORES:
        raise WorkbenchError(f"Method {method!r} gives no scores. {nearest(method, SCORES)}")
    budget = edges if edges is not None else max(1, int(plan.live.sum()) // 2)
    return SCORES[method](plan, Budget(edges=budget, seed=seed, on_progress=on_progress))


def top_n(scores: EdgeScores, edges: int, *, absolute: bool = True) -> Circuit:
    """The live edges with the largest scores, less what then dangles.

    Raises:
        WorkbenchError: more edges are asked for than there are, or fewer than one.
    """
    _check_wanted(scores.graph, edges, None)
    ranked = scores.ranking(absolute=absolute)
    keep = torch.zeros(len(ranked), dtype=torch.bool)
    keep[ranked[scores.live[ranked]][:edges]] = True
    return _circuit(scores, keep, f"the {edges} largest {_kind(absolute)} scores", edges, absolute)


def above(scores: EdgeScores, threshold: float, *, absolute: bool = True) -> Circuit:
    """The live edges with a score from a threshold on, less what then dangles."""
    importance = scores.strength(absolute=absolute)
    keep = scores.live & (importance >= threshold)
    return _circuit(scores, keep, f"{_kind(absolute)} scores from {threshold:g} on", None, absolute)


def grow(scores: EdgeScores, edges: int, *, absolute: bool = True) -> Circuit:
    """Grow from the logits: add, again and again, the largest score among edges into what is there (Hanna et al. 2024).

    Nothing that is kept fails to reach the logits, so that less is pruned than by `top_n`.

    Raises:
        WorkbenchError: more edges are asked for than there are, or fewer than one.
    """
    _check_wanted(scores.graph, edges, None)
    importance = scores.strength(absolute=absolute)
    keep = torch.zeros(len(scores.graph.edges), dtype=torch.bool)
    queue: list[tuple[float, int]] = []
    queued: set[int] = set()

    def listen(edges_in: Iterable[int]) -> None:
        fresh = {edge for edge in edges_in if scores.live[edge]} - queued
        queued.update(fresh)
        for edge in fresh:
            heapq.heappush(queue, (-float(importance[edge]), edge))

    listen(range(len(keep))[scores.graph.of_port(len(scores.graph.ports) - 1)])
    for _ in range(edges):
        if not queue:
            break
        chosen = heapq.heappop(queue)[1]
        keep[chosen] = True
        edge = scores.graph.edges[chosen]
        for port in scores.graph.ports_of[edge.writer]:
            listen(scores.graph.heard(port, edge.column))
    return _circuit(scores, keep, f"grown from the logits to {edges} by {_kind(absolute)} scores", edges, absolute)


def check_not_empty(circuit: Circuit) -> None:
    """Raise a WorkbenchError where edges were asked for, and none of those chosen lies in a circuit."""
    if circuit.size or circuit.requested is None:
        return
    grown = (
        ", or say select='grow' (--select grow), which adds only edges into what reaches the logits"
        if circuit.rule.startswith("the ")
        else ""
    )
    raise WorkbenchError(
        f"No circuit: nothing is left of {circuit.rule} by {circuit.method!r} once what dangles is pruned "
        f"({circuit.terms.ablation} ablation). Ask for more edges{grown}."
    )


def _searched(plan: Experiment, edges: int | None, threshold: float | None, on_progress: OnProgress | None) -> Circuit:
    """ACDC's circuit, with what each kept edge cost when it was tried as its score."""
    begun = time.perf_counter()
    if edges is not None:
        run = acdc_of_size(plan, edges, on_progress=on_progress)
    else:
        assert threshold is not None
        run = acdc(plan, threshold, on_progress=on_progress)
    rule = f"ACDC at threshold {run.threshold:.4g} {plan.metric.unit}"
    scores = EdgeScores(
        graph=plan.graph,
        terms=terms_of(plan),
        method="acdc",
        score=run.lost,
        live=plan.live,
        scale=plan.metric.unit,
        reference="circuits of the edges that are left",
        rule=rule,
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )
    return _circuit(scores, run.keep, rule, edges, None)


def _circuit(
    scores: EdgeScores, keep: Bool[Tensor, " edge"], rule: str, requested: int | None, absolute: bool | None
) -> Circuit:
    return Circuit(
        graph=scores.graph,
        keep=scores.graph.pruned(keep, scores.terms.ablation),
        terms=scores.terms,
        method=scores.method,
        rule=rule,
        requested=requested,
        absolute=absolute,
        scores=scores,
        provenance=scores.provenance,
    )


def _kind(absolute: bool) -> str:
    return "absolute" if absolute else "signed"


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise WorkbenchError(f"Unknown method {method!r}. {nearest(method, METHODS)}")


def _check_wanted(graph: CircuitGraph, edges: int | None, threshold: float | None) -> None:
    if (edges is None) == (threshold is None):
        raise WorkbenchError("Say how many edges to keep, or the threshold of their scores: one of the two.")
    if threshold is not None and math.isnan(threshold):
        raise WorkbenchError("The threshold is not a number; give the least score to keep.")
    if edges is not None and not 1 <= edges <= len(graph.edges):
        raise WorkbenchError(f"Asked for {edges} edges; this model has {len(graph.edges)}, and a circuit at least 1.")
