"""Circuits of a run: what `workbench circuit`, the page and the report compute, by the same arguments.

A circuit is found on pairs of one draw and judged on those of another: what it was fitted to does not judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from circuits.components import edge_readable
from circuits.curve import smallest_circuit
from circuits.discovery import METHODS, SCORES, find, score_edges
from circuits.experiment import Experiment, experiment
from circuits.faithfulness import Evaluation, evaluate
from circuits.graph import CircuitGraph, circuit_graph
from workbench.instrument.sites import Instrumented
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.tasks.base import check_choice
from workbench.training.checkpoints import Run

Granularity = Literal["component", "inputs", "positions"]
OnProgress = Callable[[float], None]
PAIRS = 64


def circuit_of(
    run: Run,
    step: int | None = None,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    ablation: Ablation = "resample",
    metric: str = "logit_difference",
    absolute: bool = True,
    granularity: Granularity = "component",
    n: int = PAIRS,
    split: str = "test",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Find a circuit on pairs of a split, and judge it on another draw of as many.

    With neither a number of edges nor a threshold, it is the smallest that is faithful and right on the pairs that it
    is found on.
    """
    check_choice("method", method, list(METHODS))
    tell = on_progress or (lambda share: None)
    model = run.model(step)
    plan = experiment_of(run, model, ablation, metric, granularity, n, split, seed)
    if edges is None and threshold is None:
        if method not in SCORES:
            raise WorkbenchError(f"Method {method!r} does not rank edges. Say --edges or --threshold.")
        scores = score_edges(plan, method, seed=seed, on_progress=lambda share: tell(share / 2))
        circuit = smallest_circuit(plan, scores, absolute=absolute)
    else:
        circuit = find(
            plan,
            method,
            edges=edges,
            threshold=threshold,
            absolute=absolute,
            seed=seed,
            on_progress=lambda share: tell(share / 2),
        )
    judged_on = run.task.sample(n, split=split, seed=seed + 1)
    return evaluate(model, circuit, judged_on, seed=seed, on_progress=lambda share: tell(0.5 + share / 2))


def experiment_of(
    run: Run,
    model: Instrumented,
    ablation: Ablation,
    metric: str,
    granularity: Granularity,
    n: int,
    split: str,
    seed: int,
) -> Experiment:
    """What a circuit of a run is found in."""
    batch = run.task.sample(n, split=split, seed=seed)
    graph = graph_of(run, model, granularity, batch.tokens.shape[1])
    return experiment(model, batch, graph=graph, ablation=ablation, metric=metric)


def graph_of(run: Run, model: Instrumented, granularity: Granularity, n_positions: int) -> CircuitGraph:
    """The graph at a granularity; columns are named after the task's positions."""
    check_choice("granularity", granularity, ["component", "inputs", "positions"])
    readable = edge_readable(model)
    if granularity == "component":
        return circuit_graph(readable)
    if granularity == "inputs":
        return circuit_graph(readable, split_inputs=True)
    labels = [*run.task.position_labels, *map(str, range(len(run.task.position_labels), n_positions))][:n_positions]
    names = labels if len(set(labels)) == len(labels) else [f"{place}:{label}" for place, label in enumerate(labels)]
    return circuit_graph(readable, split_inputs=True, columns=names)
