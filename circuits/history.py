"""The circuit through training: one extraction a checkpoint, on the same examples, in one call.

At every checkpoint a method's circuit is extracted and run with everything else ablated, on examples of another draw
where these are given: what a circuit was fitted to does not judge it. Completeness and minimality are left to
`evaluate`, for the checkpoints that turn out to matter.

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
from circuits.controls import control_size, controls_of_size
from circuits.discovery import find
from circuits.experiment import Experiment, NoHeadroom, experiment
from circuits.faithfulness import CONTROLS, faithfulness_of
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

OnProgress = Callable[[float], None]
Models = Run | Sequence[tuple[int, Instrumented]]


def through_training(
    models: Models,
    batch: Batch,
    *,
    judged_on: Batch | None = None,
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
        judged_on: further examples, on which each circuit is run; None judges it on those that it was found on.
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
            a metric that is not finite at some checkpoint, or no checkpoint at all with headroom.
    """
    begun = time.perf_counter()
    steps = _steps(models)
    search = partial(find, method=method, edges=edges, threshold=threshold, absolute=absolute, seed=seed)
    asked = _Asked(
        batch=batch,
        judged_on=judged_on,
        ablation=ablation,
        metric=find_metric(metric),
        search=search,
        controls=controls,
        seed=seed,
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
        judged_on=None if judged_on is None else len(judged_on),
        seconds=time.perf_counter() - begun,
        provenance=replace(circuits[-1].provenance, parents=tuple(parents)),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Asked:
    """What is asked of every checkpoint."""

    batch: Batch
    judged_on: Batch | None
    ablation: Ablation
    metric: Metric
    search: Callable[[Experiment], Circuit]
    controls: int
    seed: int

    def at(self, step: int, model: Instrumented, graph: CircuitGraph) -> Moment:
        """The circuit of a checkpoint and its numbers; an empty one in its place where there is no headroom."""
        try:
            plan = self.experiment(model, graph, self.batch)
            judged = plan if self.judged_on is None else self.experiment(model, graph, self.judged_on)
        except NoHeadroom as error:
            return Moment(step=step, circuit=self.nothing(model, graph, str(error)), reason=str(error))
        except WorkbenchError as error:
            raise WorkbenchError(f"At step {step}: {error}") from error
        found = self.search(plan)
        accuracies = judged.measured_by("accuracy")
        seen = Moment(
            step=step,
            circuit=found,
            headroom=plan.headroom,
            headroom_interval=self.headroom_interval(plan),
            model_accuracy=float(accuracies.full.mean()),
        )
        if reason := self.not_told(plan) or self.not_told(judged):
            return replace(
                seen, circuit=replace(self.nothing(model, graph, reason), scores=found.scores), reason=reason
            )
        size = control_size(graph, judged.live, found.keep)
        random = controls_of_size(graph, judged.live, edges=size, n=self.controls, seed=self.seed)
        values = circuit_values(judged, torch.cat([found.keep[None], random]))
        right = circuit_values(accuracies, found.keep[None])[0]
        restored = values[0] - judged.empty
        ends = ratio_bootstrap(restored, judged.full - judged.empty, seed=self.seed)
        return replace(
            seen,
            faithfulness=_share(float(restored.mean()) / judged.headroom, ends),
            accuracy=_share(float(right.mean()), paired_bootstrap(right, seed=self.seed)),
            random_95=float(faithfulness_of(judged, values[1:]).quantile(0.95)) if len(random) else None,
            controls_size=size if len(random) else None,
        )

    def experiment(self, model: Instrumented, graph: CircuitGraph, batch: Batch) -> Experiment:
        """What lies between the runs of some examples."""
        return experiment(model, batch, graph=graph, ablation=self.ablation, metric=self.metric)

    def headroom_interval(self, plan: Experiment) -> tuple[float, float]:
        """95 % paired bootstrap interval of the headroom."""
        low, high = paired_bootstrap(plan.full - plan.empty, seed=self.seed)
        return float(low), float(high)

    def not_told(self, plan: Experiment) -> str | None:
        """Why the headroom may be 0; None where it may not."""
        low, high = self.headroom_interval(plan)
        if not low <= 0 <= high:
            return None
        return (
            f"Headroom not told from 0: mean {self.metric.name} of the whole model minus that with every edge "
            f"ablated is {plan.headroom:.3g} [{low:.3g}, {high:.3g}], n = {len(plan.batch)}."
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
