"""Circuits of a run: what `workbench circuit`, the page and the report compute, by the same arguments.

A circuit is found on pairs of one draw and judged on those of another: what it was fitted to does not judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from apps.analyses import PAIRS, fourier_of
from circuits.clusters import ClusterShares, cluster_shares
from circuits.components import edge_readable
from circuits.curve import smallest_circuit
from circuits.discovery import METHODS, Select, check_not_empty, find, score_edges
from circuits.experiment import Experiment, experiment
from circuits.faithfulness import Evaluation, evaluate
from circuits.graph import CircuitGraph, circuit_graph
from circuits.history import through_training
from circuits.moments import CircuitHistory
from workbench.instrument.sites import Instrumented
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.tasks.base import check_choice
from workbench.training.checkpoints import Run

Granularity = Literal["component", "inputs", "positions"]
OnProgress = Callable[[float], None]
FOR_ONE_SIZE = ("acdc", "mask")
"""Methods whose scores rank edges for the size alone that they were asked for."""


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
    select: Select = "top",
    granularity: Granularity = "component",
    n: int = PAIRS,
    split: str = "test",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Find a circuit on pairs of a split, and judge it on another draw of as many.

    With neither a number of edges nor a threshold, it is the smallest that is faithful and right on the pairs that it
    is found on.

    Raises:
        WorkbenchError: so few edges are asked for that none of them lies in a circuit, or what `find` and `evaluate`
            refuse.
    """
    check_choice("method", method, list(METHODS))
    tell = on_progress or (lambda share: None)
    model = run.model(step)
    plan = experiment_of(run, model, ablation, metric, granularity, n, split, seed)
    if edges is None and threshold is None:
        if method in FOR_ONE_SIZE:
            raise WorkbenchError(f"Method {method!r} looks for a circuit of one size. Say --edges or --threshold.")
        scores = score_edges(plan, method, seed=seed, on_progress=lambda share: tell(share / 2))
        circuit = smallest_circuit(plan, scores, absolute=absolute)
    else:
        circuit = find(
            plan,
            method,
            edges=edges,
            threshold=threshold,
            absolute=absolute,
            select=select,
            seed=seed,
            on_progress=lambda share: tell(share / 2),
        )
        check_not_empty(circuit)
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


def clusters_of(
    run: Run, step: int | None = None, *, n: int = PAIRS, split: str = "test", seed: int = 0
) -> ClusterShares:
    """What the neurons of each key frequency carry, and all others together; for runs on modular arithmetic.

    Raises:
        WorkbenchError: the run learnt something else, or its model has no MLP or several.
    """
    model = edge_readable(run.model(step))
    spectrum = fourier_of(run, step)
    if spectrum.neurons is None or model.config.n_steps != 1:
        raise WorkbenchError("Neurons are clustered by frequency in models of one layer with an MLP.")
    owned = [spectrum.neurons_of(frequency) for frequency in spectrum.key_frequencies]
    others = sorted(set(range(model.config.d_mlp)) - {neuron for group in owned for neuron in group})
    named = [(f"frequency {key}", group) for key, group in zip(spectrum.key_frequencies, owned, strict=True)]
    named = [(label, group) for label, group in [*named, ("other neurons", others)] if group]
    graph = circuit_graph(model, clusters={0: [group for _, group in named]})
    plan = experiment(model, run.task.sample(n, split=split, seed=seed), graph=graph)
    return cluster_shares(plan, [label for label, _ in named])


def history_of(
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
) -> CircuitHistory:
    """The circuit of one size at every checkpoint, found on the same pairs and judged on another draw of as many.

    With neither a number of edges nor a threshold, the size is that of the last checkpoint's smallest circuit.
    """
    batch = run.task.sample(n, split=split, seed=seed)
    model = run.model(step)
    graph = graph_of(run, model, granularity, batch.tokens.shape[1])
    if edges is None and threshold is None:
        last = circuit_of(
            run,
            step,
            method=method,
            ablation=ablation,
            metric=metric,
            absolute=absolute,
            granularity=granularity,
            n=n,
            split=split,
            seed=seed,
        )
        edges = last.circuit.requested
    return through_training(
        run,
        batch,
        judged_on=run.task.sample(n, split=split, seed=seed + 1),
        method=method,
        edges=edges,
        threshold=threshold,
        ablation=ablation,
        metric=metric,
        graph=graph,
        absolute=absolute,
        seed=seed,
        on_progress=on_progress,
    )


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
