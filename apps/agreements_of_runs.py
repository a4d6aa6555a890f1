"""What circuits have in common: those of several runs of a recipe, and those of several finders on one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apps.analyses import PAIRS
from apps.circuits_of_runs import Granularity, OnProgress, circuit_of, experiment_of, graph_of
from circuits.circuit import EdgeScores
from circuits.consensus import Agreement, agreement
from circuits.discovery import score_edges
from circuits.faithfulness import Evaluation
from circuits.seeds import MEASURES as MEASURES
from circuits.seeds import SeedEvaluation, over_seeds
from circuits.stability import Significance, Stability, significant_edges, stability
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.training.checkpoints import Run

FINDERS = {"exact": 400, "eap": None, "eap-ig": None, "greedy": 120}
"""Finders that a report compares, with the most live edges for which one is quick enough; None is any number.
Exact patching takes a circuit for each edge, greedy elimination about twenty (2 layers, d_model 128, 64 pairs of 8
tokens: 9 s for 110 edges on one core)."""
REPORTED = "eap-ig"
"""Finder of the circuit that a report shows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeedCircuits:
    """The same circuit looked for in several runs."""

    evaluations: tuple[Evaluation, ...]
    """One a run."""
    over: SeedEvaluation
    """What each withstood, and the mean over runs."""
    agreement: Agreement
    """What the scores have in common."""

    @property
    def provenance(self) -> Provenance:
        """Of all runs."""
        return self.agreement.provenance

    def tables(self) -> Sequence[Table]:
        """The measures run by run with their means, and what the circuits share."""
        return [*self.over.tables(), *self.agreement.tables()]

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        first = self.evaluations[0]
        circuits = [
            {
                "run": label,
                **dict(zip(MEASURES, values, strict=True)),
                "size": each.circuit.size,
                "edges": each.circuit.edges,
            }
            for label, values, each in zip(self.over.labels, self.over.values.tolist(), self.evaluations, strict=True)
        ]
        return {
            "method": first.circuit.method,
            "requested": self.agreement.edges,
            "ablation": self.over.terms.ablation,
            "metric": self.over.terms.metric,
            "n": first.n,
            "circuits": circuits,
            "over_seeds": self.over.summary(),
            "agreement": self.agreement.summary(),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinderCircuits:
    """What several finders' circuits on one run have in common, and what of one of them chance explains."""

    agreement: Agreement
    """Of all finders, on the same pairs."""
    stability: Stability
    """Of the reported finder's circuit, the pairs drawn anew."""
    significance: Significance
    """Of exact effects; of the reported finder's estimates where exact patching is left out."""
    left_out: tuple[str, ...]
    """Finders that take too long on this graph."""

    @property
    def provenance(self) -> Provenance:
        """Where the scores come from."""
        return self.agreement.provenance

    def tables(self) -> Sequence[Table]:
        """Both matrices, the edges by votes, by how often they are found again, and those with an effect."""
        return [*self.agreement.tables(), *self.stability.tables(), *self.significance.tables()]

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "agreement": self.agreement.summary(),
            "stability": self.stability.summary(),
            "significance": self.significance.summary(),
            "left_out": list(self.left_out),
        }


def over_seeds_of(
    runs: Sequence[Run],
    step: int | None = None,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    ablation: Ablation = "resample",
    metric: str = "logit_difference",
    absolute: bool = True,
    granularity: Granularity = "component",
    n: int = PAIRS,
    split: str = "test",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> SeedCircuits:
    """Find and judge the same circuit in each of several runs, and compare them.

    Without a number of edges, the size is that of the first run's smallest circuit.

    Raises:
        WorkbenchError: fewer than two runs, one of them twice, or runs whose graphs differ.
    """
    _check_runs(runs, step, granularity, split)
    tell = on_progress or (lambda share: None)
    found: list[Evaluation] = []
    for place, run in enumerate(runs):
        evaluation = circuit_of(
            run,
            step,
            method=method,
            edges=edges,
            ablation=ablation,
            metric=metric,
            absolute=absolute,
            granularity=granularity,
            n=n,
            split=split,
            seed=seed,
            on_progress=lambda share, place=place: tell((place + share) / len(runs)),
        )
        found.append(evaluation)
        edges = evaluation.circuit.requested
    assert edges is not None
    labels = [run.reference for run in runs]
    # What ACDC keeps are the edges that cost most; those that hurt go.
    agreed = agreement(
        [_scores(each) for each in found], edges=edges, labels=labels, absolute=absolute and method != "acdc"
    )
    return SeedCircuits(evaluations=tuple(found), over=over_seeds(found, labels), agreement=agreed)


def finders_of(
    run: Run, step: int | None = None, *, edges: int, n: int = PAIRS, split: str = "test", seed: int = 0
) -> FinderCircuits:
    """Compare circuits of one size by several finders, on the pairs that `circuit_of` finds its own on.

    Raises:
        WorkbenchError: the model has no edges, the metric tells nothing apart, or there are too few pairs.
    """
    plan = experiment_of(run, run.model(step), "resample", "logit_difference", "component", n, split, seed)
    n_live = int(plan.live.sum())
    methods = [method for method, most in FINDERS.items() if most is None or n_live <= most]
    scores = {method: score_edges(plan, method, seed=seed) for method in methods}
    return FinderCircuits(
        agreement=agreement(list(scores.values()), edges=edges),
        stability=stability(scores[REPORTED], edges=edges, seed=seed),
        significance=significant_edges(scores.get("exact", scores[REPORTED]), seed=seed),
        left_out=tuple(method for method in FINDERS if method not in methods),
    )


def _scores(evaluation: Evaluation) -> EdgeScores:
    scores = evaluation.circuit.scores
    assert scores is not None
    return scores


def _check_runs(runs: Sequence[Run], step: int | None, granularity: Granularity, split: str) -> None:
    """Raise a WorkbenchError unless these are several runs whose circuits are of the same edges."""
    folders = {run.folder.path.resolve() for run in runs}
    if len(runs) < 2 or len(folders) < len(runs):
        raise WorkbenchError(
            f"Circuits over seeds need two different runs or more, got {', '.join(run.reference for run in runs)}. "
            "Train the recipe again with another --seed and --run."
        )
    graphs = [
        graph_of(run, run.model(step), granularity, run.task.sample(1, split=split).tokens.shape[1]) for run in runs
    ]
    for run, graph in zip(runs, graphs, strict=True):
        if graph.key != graphs[0].key:
            raise WorkbenchError(
                f"The graphs of {runs[0].reference!r} and {run.reference!r} differ ({len(graphs[0].edges)} and "
                f"{len(graph.edges)} edges), so that their circuits do not compare. Name runs of one recipe."
            )
