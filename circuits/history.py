"""The circuit through training: one extraction a checkpoint, on the same examples, in one call.

At every checkpoint a method's circuit is extracted and run with everything else ablated. Completeness and minimality
are left to `evaluate`, for the checkpoints that turn out to matter.

Before a model has learnt anything, the whole model and the empty circuit answer alike, and a share of the difference
between them is a share of noise. Such a checkpoint has scores, where there are any, but no circuit, and says why.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from circuits.circuit import Circuit, Terms
from circuits.components import edge_readable
from circuits.controls import random_circuits
from circuits.discovery import find
from circuits.experiment import Experiment, experiment
from circuits.faithfulness import faithfulness_of
from circuits.graph import CircuitGraph, circuit_graph
from circuits.memoised import circuit_values
from circuits.moments import CircuitHistory, Moment
from workbench.instrument.sites import Instrumented
from workbench.intervals import Estimate, paired_bootstrap, ratio_bootstrap
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.tasks.base import Batch
from workbench.training.checkpoints import Run

CONTROLS = 20
"""Random circuits to compare with at each checkpoint."""
OnProgress = Callable[[float], None]
Models = Run | Sequence[tuple[int, Instrumented]]


def through_training(
    models: Models,
    batch: Batch,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    ablation: Ablation = "resample",
    metric: str | Metric = "logit_difference",
    graph: CircuitGraph | None = None,
    absolute: bool = True,
    controls: int = CONTROLS,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> CircuitHistory:
    """The circuit that a method finds at each checkpoint, on the same examples.

    Args:
        models: a run, of which every checkpoint is looked at, one in memory at a time; or steps with their models.
        batch: examples, with counterfactuals where the ablation or the metric needs them.
        method: one of `circuits.discovery.METHODS`.
        edges: how many to keep at most.
        threshold: instead, the least score to keep.
        ablation: what an ablated edge carries.
        metric: by name, or one of your own.
        graph: of all the models; None is the component graph.
        absolute: whether an edge that hurts counts as much as one that helps.
        controls: how many random circuits of the same size to compare each circuit with; 0 is none.
        seed: of all that is drawn at random.
        on_progress: told the share of checkpoints that are done.

    Raises:
        WorkbenchError: no checkpoints, steps out of order, models of different graphs, a mistake in what is asked for,
            or no checkpoint at all with headroom.
    """
    begun = time.perf_counter()
    steps = _steps(models)
    search = partial(find, method=method, edges=edges, threshold=threshold, absolute=absolute, seed=seed)
    asked = _Asked(
        batch=batch, ablation=ablation, metric=find_metric(metric), search=search, controls=controls, seed=seed
    )
    moments: list[Moment] = []
    first: CircuitGraph | None = None
    for step, model in _in_turn(models):
        own = circuit_graph(edge_readable(model))
        first = first or own
        first.check_same(own)
        moments.append(asked.at(step, model, graph or own))
        if on_progress:
            on_progress(len(moments) / len(steps))
    if all(moment.headroom is None for moment in moments):
        raise WorkbenchError(f"None of the {len(steps)} checkpoints can be looked into. {moments[0].reason}")
    circuits = [moment.circuit for moment in moments]
    parents = dict.fromkeys(parent for circuit in circuits for parent in circuit.provenance.parents)
    return CircuitHistory(
        moments=tuple(moments),
        graph=circuits[0].graph,
        terms=circuits[0].terms,
        method=method,
        controls=controls,
        seconds=time.perf_counter() - begun,
        provenance=replace(circuits[-1].provenance, parents=tuple(parents)),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Asked:
    """What is asked of every checkpoint."""

    batch: Batch
    ablation: Ablation
    metric: Metric
    search: Callable[[Experiment], Circuit]
    controls: int
    seed: int

    def at(self, step: int, model: Instrumented, graph: CircuitGraph) -> Moment:
        """The circuit of a checkpoint and its numbers; an empty one in its place where there is no headroom."""
        try:
            plan = experiment(model, self.batch, graph=graph, ablation=self.ablation, metric=self.metric)
        except WorkbenchError as error:
            # A mistake in the question fails at every checkpoint; what fails at some is the lack of headroom.
            return Moment(step=step, circuit=self.nothing(model, graph, str(error)), reason=str(error))
        found = self.search(plan)
        low, high = (float(end) for end in paired_bootstrap(plan.full - plan.empty, seed=self.seed))
        accuracies = plan.measured_by("accuracy")
        seen = Moment(
            step=step,
            circuit=found,
            headroom=plan.headroom,
            headroom_interval=(low, high),
            model_accuracy=float(accuracies.full.mean()),
        )
        if low <= 0 <= high:
            reason = (
                f"Headroom not told from 0: mean {self.metric.name} of the whole model minus that with every edge "
                f"ablated is {plan.headroom:.3g} [{low:.3g}, {high:.3g}], n = {len(self.batch)}."
            )
            return replace(
                seen, circuit=replace(self.nothing(model, graph, reason), scores=found.scores), reason=reason
            )
        values, right = (circuit_values(each, found.keep[None])[0] for each in (plan, accuracies))
        restored = values - plan.empty
        ends = ratio_bootstrap(restored, plan.full - plan.empty, seed=self.seed)
        return replace(
            seen,
            faithfulness=_share(float(restored.mean()) / plan.headroom, ends),
            accuracy=_share(float(right.mean()), paired_bootstrap(right, seed=self.seed)),
            random_95=self.random_95(plan, found),
        )

    def nothing(self, model: Instrumented, graph: CircuitGraph, reason: str) -> Circuit:
        """No edges, and why."""
        metric = self.metric
        return Circuit(
            graph=graph,
            keep=torch.zeros(len(graph.edges), dtype=torch.bool),
            terms=Terms(
                ablation=self.ablation, metric=metric.name, unit=metric.unit, better=metric.better, n=len(self.batch)
            ),
            method="none",
            rule=reason,
            provenance=model.provenance,
        )

    def random_95(self, plan: Experiment, circuit: Circuit) -> float | None:
        """95th percentile of random circuits' faithfulness."""
        size = min(circuit.size, int(plan.graph.connected(plan.live).sum()))
        if not self.controls or not size:
            return None
        try:
            random = random_circuits(plan.graph, plan.live, edges=size, n=self.controls, seed=self.seed)
        except WorkbenchError:
            # In a large graph, few draws or none may be as small as a circuit is: that is no reason to stop.
            return None
        return float(faithfulness_of(plan, circuit_values(plan, random)).quantile(0.95))


def _share(value: float, ends: tuple[Tensor, Tensor]) -> Estimate:
    return Estimate(mean=value, low=float(ends[0]), high=float(ends[1]))


def _steps(models: Models) -> list[int]:
    """The steps of the checkpoints, which must come in order."""
    steps = [each.step for each in models.checkpoints] if isinstance(models, Run) else [step for step, _ in models]
    if not steps:
        raise WorkbenchError("A history needs at least one checkpoint, and there is none. Train the run first.")
    for before, after in itertools.pairwise(steps):
        if after <= before:
            raise WorkbenchError(
                f"Checkpoints come in the order of training, each once; step {after} came after step {before}."
            )
    return steps


def _in_turn(models: Models) -> Iterator[tuple[int, Instrumented]]:
    if isinstance(models, Run):
        return ((checkpoint.step, models.model(checkpoint.step)) for checkpoint in models.checkpoints)
    return iter(models)
