"""How good a circuit is: run it with everything else ablated, and try to refute it.

Faithfulness is the share of the metric's headroom that the circuit alone restores; 1 is the whole model, 0 the empty
circuit. Beside it stand what makes the number mean something: what random connected circuits of the same size restore,
whether edges are missing (completeness) or superfluous (minimality), and what is lost when the circuit is what is taken
out (necessity) (Wang et al. 2023, §4; Mueller et al. 2025).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.controls import controls_of_size
from circuits.curve import FaithfulnessCurve, faithfulness_curve
from circuits.experiment import Experiment, experiment
from circuits.memoised import circuit_values
from circuits.minimality import Minimality, minimality
from circuits.own_files import to_json
from workbench.instrument.sites import Instrumented
from workbench.intervals import Estimate, paired_bootstrap, ratio_bootstrap
from workbench.metrics import Metric
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

CONTROLS = 100
"""Random circuits to compare with."""
SUBSETS = 20
"""Random parts of a circuit that are taken out of it and of the model to find what is missing."""
GREEDY_STEPS = 8
"""Edges of the part that is built greedily to the same end."""
OnProgress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What a circuit withstood."""

    circuit: Circuit
    n: int
    """Examples."""
    whole: float
    """Mean metric of the whole model."""
    empty: float
    """Mean metric with every edge ablated."""
    faithfulness: Estimate
    """Share of the headroom with all other edges ablated: the circuit is sufficient where this is 1."""
    necessity: Estimate
    """Share of the headroom that is lost with the circuit ablated and all other edges kept."""
    accuracy: Estimate
    """Share of answers that the circuit gets right, over the whole vocabulary."""
    model_accuracy: float
    completeness: float
    """Largest |F(C without K) - F(M without K)| over parts K of the circuit; 0 is complete."""
    worst_subset: tuple[str, ...]
    """The K where it was found."""
    minimality: Minimality
    controls: Float[Tensor, " control"]
    """Faithfulness of random connected circuits of the same size."""
    curve: FaithfulnessCurve | None
    """Faithfulness over sizes, where the circuit comes from scores."""
    live_edges: int
    seconds: float
    provenance: Provenance

    @property
    def random_95(self) -> float | None:
        """95th percentile of the random circuits' faithfulness; None without any, as where none has this size."""
        return float(self.controls.quantile(0.95)) if len(self.controls) else None

    def __str__(self) -> str:
        random_95 = "none" if self.random_95 is None else f"{self.random_95:.3f}"
        return (
            f"{self.circuit.size} of {len(self.circuit.graph.edges)} edges ({self.live_edges} live): faithfulness "
            f"{self.faithfulness.mean:.3f} [{self.faithfulness.low:.3f}, {self.faithfulness.high:.3f}], random 95 % "
            f"{random_95}, accuracy {self.accuracy.mean:.3f}, completeness {self.completeness:.3f} "
            f"({self.circuit.terms.metric}, {self.circuit.terms.ablation} ablation, n = {self.n})"
        )

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        curve = {} if self.curve is None else self.curve.summary()
        return {
            **self.circuit.summary(),
            "live_edges": self.live_edges,
            "faithfulness": self.faithfulness.mean,
            "faithfulness_interval": [self.faithfulness.low, self.faithfulness.high],
            "random_95": self.random_95,
            "controls": len(self.controls),
            "necessity": self.necessity.mean,
            "necessity_interval": [self.necessity.low, self.necessity.high],
            "accuracy": self.accuracy.mean,
            "accuracy_interval": [self.accuracy.low, self.accuracy.high],
            "model_accuracy": self.model_accuracy,
            "completeness": self.completeness,
            "worst_subset": list(self.worst_subset),
            "minimality": self.minimality.rows(),
            "whole": self.whole,
            "empty": self.empty,
            **curve,
            "n": self.n,
            "seconds": self.seconds,
        }

    def files(self) -> Mapping[str, bytes]:
        """The circuit with all scores, as `circuits.exchange.load_circuit` reads it."""
        return {"circuit.json": to_json(self.circuit)}

    def tables(self) -> Sequence[Table]:
        """The numbers, minimality edge by edge, and the curve."""
        terms = self.circuit.terms
        rows = [
            ("faithfulness", self.faithfulness, self.random_95),
            ("necessity", self.necessity, None),
            ("accuracy", self.accuracy, None),
        ]
        frame = pd.DataFrame(
            [
                {"measure": name, "value": share.mean, "low": share.low, "high": share.high, "random_95": control}
                for name, share, control in rows
            ]
        )
        caption = (
            f"Circuit of {self.circuit.size} edges found by {self.circuit.method} ({self.circuit.rule}), judged by "
            f"{terms.metric} under {terms.ablation} ablation on n = {self.n} examples, 95 % paired bootstrap "
            f"intervals; random: 95th percentile of {len(self.controls)} random connected circuits of this size."
        )
        numbers = Table(
            name="circuit_evaluation", frame=frame, kind="table", axes={}, unit="share of the headroom", caption=caption
        )
        curve = [] if self.curve is None else self.curve.tables()
        return [numbers, *self.circuit.tables(), *self.minimality.tables(), *curve]


def evaluate(
    model: Instrumented,
    circuit: Circuit,
    batch: Batch,
    *,
    metric: Metric | None = None,
    controls: int = CONTROLS,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Judge a circuit on examples, which may be others than those that it was found on.

    Args:
        model: the model.
        circuit: of this model's graph; its ablation and metric are those that it was found under.
        batch: examples.
        metric: the circuit's metric, where it is one of your own.
        controls: how many random circuits of the same size to compare with; 0 is none.
        seed: of the controls, the subsets and the bootstrap.
        on_progress: told the share of the work that is done.

    Raises:
        WorkbenchError: another model's circuit, a metric other than the circuit's, or no headroom.
    """
    found = metric or circuit.terms.metric
    if metric is not None and metric.name != circuit.terms.metric:
        raise WorkbenchError(f"This circuit was found under {circuit.terms.metric!r}, not {metric.name!r}.")
    plan = experiment(model, batch, graph=circuit.graph, ablation=circuit.terms.ablation, metric=found)
    return judge(plan, circuit, controls=controls, seed=seed, on_progress=on_progress)


def judge(
    plan: Experiment,
    circuit: Circuit,
    *,
    controls: int = CONTROLS,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Judge a circuit in an experiment; as `evaluate`."""
    begun = time.perf_counter()
    tell = on_progress or (lambda share: None)
    plan.graph.check_same(circuit.graph)
    plan_terms = (plan.ablation, plan.metric.name)
    if plan_terms != (circuit.terms.ablation, circuit.terms.metric):
        raise WorkbenchError(
            f"The circuit was found by {circuit.terms.metric} under {circuit.terms.ablation} ablation; this experiment "
            f"measures {plan.metric.name} under {plan.ablation} ablation. Make both the same."
        )
    _check_told_from_none(plan, seed)
    keep = circuit.keep
    size = min(circuit.size, int(plan.graph.connected(plan.live).sum()))
    random = controls_of_size(plan.graph, plan.live, edges=size, n=controls, seed=seed)
    values = circuit_values(plan, torch.cat([torch.stack([keep, ~keep]), random]))
    tell(0.2)
    accuracies = plan.measured_by("accuracy")
    right = circuit_values(accuracies, keep[None])[0]
    gap, worst = completeness(plan, keep, seed=seed)
    tell(0.4)
    minimal = minimality(plan, keep, seed=seed)
    tell(0.6)
    curve = None
    if circuit.scores is not None and circuit.absolute is not None:
        curve = faithfulness_curve(plan, circuit.scores, absolute=circuit.absolute, controls=controls, seed=seed)
    tell(1.0)
    low, high = paired_bootstrap(right, seed=seed)
    return Evaluation(
        circuit=circuit,
        n=len(plan.batch),
        whole=float(plan.full.mean()),
        empty=float(plan.empty.mean()),
        faithfulness=_share(plan, values[0] - plan.empty, seed),
        necessity=_share(plan, plan.full - values[1], seed),
        accuracy=Estimate(mean=float(right.mean()), low=float(low), high=float(high)),
        model_accuracy=float(accuracies.full.mean()),
        completeness=gap,
        worst_subset=worst,
        minimality=minimal,
        controls=faithfulness_of(plan, values[2:]),
        curve=curve,
        live_edges=int(plan.live.sum()),
        seconds=time.perf_counter() - begun,
        provenance=plan.provenance,
    )


def completeness(plan: Experiment, keep: Bool[Tensor, " edge"], *, seed: int = 0) -> tuple[float, tuple[str, ...]]:
    """How far circuit and model come apart when the same part K of the circuit is taken out of both (Wang et al. 2023).

    K is nothing, all of the circuit, drawn at random with each edge in it with probability one half, and built
    greedily, edge by edge, from those that drive the two apart most.

    Returns:
        The largest |F(C without K) - F(M without K)|, and the K where it was found; 0 and none for an empty circuit.
    """
    edges = keep.nonzero()[:, 0]
    if not len(edges):
        return 0.0, ()
    rng = generator(seed, "completeness")
    random = torch.rand(SUBSETS, len(keep), generator=rng) < 0.5
    parts = torch.cat([torch.zeros(1, len(keep), dtype=torch.bool), keep[None], random & keep])
    gaps = _gaps(plan, keep, parts)
    worst, gap = parts[gaps.argmax()], float(gaps.max())
    part = torch.zeros_like(keep)
    for _ in range(min(GREEDY_STEPS, len(edges))):
        left = edges[~part[edges]]
        tries = part.repeat(len(left), 1)
        tries[torch.arange(len(left)), left] = True
        gaps = _gaps(plan, keep, tries)
        part = tries[gaps.argmax()]
        if float(gaps.max()) > gap:
            worst, gap = part, float(gaps.max())
    return gap, tuple(plan.graph.names(worst))


def faithfulness_of(plan: Experiment, values: Float[Tensor, "circuit batch"]) -> Float[Tensor, " circuit"]:
    """Share of the headroom that each circuit restores, from its metric."""
    return (values - plan.empty).mean(1) / plan.headroom


def _check_told_from_none(plan: Experiment, seed: int) -> None:
    """Raise a WorkbenchError where the headroom may be 0, of which no share means anything."""
    low, high = (float(end) for end in paired_bootstrap(plan.full - plan.empty, seed=seed))
    if low <= 0 <= high:
        raise WorkbenchError(
            f"Headroom is not told from 0: mean {plan.metric.name} of the whole model minus that with every edge "
            f"ablated is {plan.headroom:.3g} [{low:.3g}, {high:.3g}], n = {len(plan.batch)}. Take more pairs, a "
            "checkpoint that tells them apart, or another metric."
        )


def _gaps(plan: Experiment, keep: Bool[Tensor, " edge"], parts: Bool[Tensor, "part edge"]) -> Float[Tensor, " part"]:
    """|F(C without K) - F(M without K)| for each K."""
    values = circuit_values(plan, torch.cat([keep & ~parts, ~parts]))
    of_circuit, of_model = faithfulness_of(plan, values).chunk(2)
    return (of_circuit - of_model).abs()


def _share(plan: Experiment, numerator: Float[Tensor, " batch"], seed: int) -> Estimate:
    low, high = ratio_bootstrap(numerator, plan.full - plan.empty, seed=seed)
    return Estimate(mean=float(numerator.mean()) / plan.headroom, low=float(low), high=float(high))
