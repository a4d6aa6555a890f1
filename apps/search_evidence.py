"""What a report looks at in a run on graph search, and which of the expected findings it shows.

The findings are those of Saparov et al. (2025), at the thresholds of this workbench: the paper shows maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from apps.accuracies_of_runs import right_of
from apps.claims import Claim, at_least, at_most
from apps.probing import reachability_of
from apps.searching import search_task
from apps.tracing import traces_of
from circuits.path_controls import MODEL
from circuits.path_traces import JUDGED, PathTraces
from probes.reachability import Direction, ReachabilityMap
from workbench.intervals import Estimate, columns_of, share_of
from workbench.runtime import WorkbenchError
from workbench.tables import Table
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import Run

PROBED = 1600
"""Test prompts that the reachability probes draw, about three quarters of which have a choice to make."""
TRACED = 10
"""Inputs of each lookahead that are traced."""
SOLVED = 0.99
EXPLAINED, HAND_BUILT, CONTROL = 0.8, 0.98, 0.1
KEPT, NEAR_CHANCE = 0.8, 0.1
MUST_FAIL = {
    "untrained": "the model before training, with as many operations",
    "random_operations": "random operations",
    "wrong_graph": "operations judged by a wrong graph",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchEvidence:
    """What was measured on a run on graph search."""

    run: Run
    accuracies: tuple[Mapping[str, Any], ...]
    """Of every test split: split, accuracy with its interval, chance, n."""
    reached: ReachabilityMap | None
    traces: PathTraces | None
    left_out: Mapping[str, str]
    """Why an analysis is not there, by its name."""

    @property
    def task(self) -> GraphSearch:
        """The run's task."""
        return search_task(self.run)


def gather_search(run: Run) -> SearchEvidence:
    """Measure accuracies, what the stream knows of reachability, and what path merging explains."""
    left_out: dict[str, str] = {}
    reached = traces = None
    try:
        reached = reachability_of(run, n=PROBED)
    except WorkbenchError as error:
        left_out["reachability probe"] = str(error)
    try:
        traces = traces_of(run, n=min(TRACED, search_task(run).test_size))
    except WorkbenchError as error:
        left_out["path merging"] = str(error)
    return SearchEvidence(
        run=run, accuracies=tuple(_accuracies(run)), reached=reached, traces=traces, left_out=left_out
    )


def lookahead_curves(run: Run) -> Table | None:
    """Accuracy at each lookahead by step; None of a run that was not trained here."""
    splits = {f"test_{lookahead}_accuracy": str(lookahead) for lookahead in search_task(run).levels}
    frame = run.log.frame
    found = [name for name in splits if name in frame]
    if not found:
        return None
    long = frame.rename(columns=splits).melt("step", [splits[name] for name in found], "lookahead", "accuracy")
    return Table(
        name="accuracy_by_lookahead",
        frame=long,
        kind="curve",
        axes={"x": "step", "y": "accuracy", "series": "lookahead"},
        unit="fraction",
        caption=f"Accuracy on {search_task(run).test_size} balanced test graphs of each lookahead.",
    )


def search_claims(evidence: SearchEvidence) -> tuple[Claim, ...]:
    """The expected findings."""
    return (*_accuracy_claims(evidence), *_trace_claims(evidence), *_probe_claims(evidence))


def _accuracies(run: Run) -> Iterator[dict[str, Any]]:
    task, model = search_task(run), run.model()
    for split in (*(f"test_{lookahead}" for lookahead in task.levels), "test_naive", "test_star"):
        batch = task.examples(split)
        right = right_of(model, batch)
        graphs = task.graphs(batch)
        useful, children = (np.bitwise_count(sets) for sets in (graphs.useful(), graphs.first))
        chance = float((useful / children).mean())
        yield {"split": split, **columns_of("accuracy", share_of(right)), "chance": chance, "n": len(batch)}


def _accuracy_claims(evidence: SearchEvidence) -> Iterator[Claim]:
    names = {f"test_{lookahead}": f"accuracy at lookahead {lookahead}" for lookahead in evidence.task.levels}
    for row in evidence.accuracies:
        if row["split"] in names:
            yield _bounded(names[row["split"]], _estimate(row, "accuracy"), SOLVED, row["n"])


def _trace_claims(evidence: SearchEvidence) -> Iterator[Claim]:
    if evidence.traces is None:
        return
    says = f"share of inputs of lookahead {JUDGED} or more that path merging explains, strict merge"
    yield from _explained(evidence.traces, MODEL, says, EXPLAINED)
    yield from _explained(evidence.traces, "hand_built", "control, the same of a model wired to merge", HAND_BUILT)
    for name, words in MUST_FAIL.items():
        yield from _explained(evidence.traces, name, f"control, {words}", CONTROL, most=True)
    yield from _causal_claims(evidence.traces)


def _explained(
    traces: PathTraces, variant: str, statement: str, bound: float, *, most: bool = False
) -> Iterator[Claim]:
    row: Mapping[str, Any] | None = traces.share(variant)
    if row is not None:
        yield _bounded(statement, _estimate(row, "explained_strict"), bound, row["n"], most=most)


def _causal_claims(traces: PathTraces) -> Iterator[Claim]:
    found = traces.ablations
    if found is None:
        return
    chance = found.chance + NEAR_CHANCE
    for ablation in dict.fromkeys(ablation for ablation, _ in found.accuracy):
        kept, removed, others = (found.accuracy[ablation, name] for name in ("kept", "removed", "removed_random"))
        how = f"by {ablation} ablation"
        yield _bounded(f"accuracy with the explained operations alone, {how}", kept, KEPT * found.full.mean, found.n)
        yield _bounded(f"accuracy without the explained operations, {how}", removed, chance, found.n, most=True)
        yield _bounded(f"control, accuracy without as many others, {how}", others, chance, found.n)


def _probe_claims(evidence: SearchEvidence) -> Iterator[Claim]:
    """That after some layer more is known of what is two edges away than the untrained model's rows tell."""
    known = () if evidence.reached is None else evidence.reached.known
    for direction in get_args(Direction):
        leads = {
            (each.site, each.side): (_lead(each.auroc, each.untrained), each.n)
            for each in known
            if (each.direction, each.distance) == (direction, 2) and each.untrained is not None
        }
        if leads:
            site, side = max(leads, key=lambda place: leads[place][0].mean)
            lead, n = leads[site, side]
            yield Claim(
                statement=f"lead over the untrained model of the AUROC, {direction}, two edges away, at its best: "
                f"{site}, {side} rows",
                wanted="> 0, intervals apart",
                found=lead.mean,
                holds=lead.low > 0,
                interval=lead,
                n=n,
            )


def _lead(trained: Estimate, untrained: Estimate) -> Estimate:
    return Estimate(
        mean=trained.mean - untrained.mean, low=trained.low - untrained.high, high=trained.high - untrained.low
    )


def _bounded(statement: str, found: Estimate, bound: float, n: int, *, most: bool = False) -> Claim:
    """A measured claim: that it reaches the bound, or stays below it."""
    return replace((at_most if most else at_least)(statement, found.mean, bound), interval=found, n=n)


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    return Estimate(mean=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"])
