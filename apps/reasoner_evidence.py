"""What a report looks at in a run on composition or comparison, and which of the expected findings it shows.

The findings are those of Wang et al. (2024), at the thresholds of this workbench: the paper shows curves and maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apps.claims import Claim, at_least, at_most
from apps.reasoner_rows import SEED, Row, answered
from apps.reasoning import (
    LoopAccuracies,
    ReasoningMeasures,
    kept_reasoning,
    loops_of,
    reasoner_task,
    reasoning_through,
)
from apps.reasoning_tables import middle_site
from workbench.instrument.sites import Site, SiteKind
from workbench.intervals import Estimate
from workbench.runtime import WorkbenchError, generator
from workbench.tasks.base import Batch
from workbench.tasks.composition import Composition
from workbench.training.checkpoints import Run

MOST = 3000
"""Prompts of a split that its accuracy is taken over, as in training."""
TRAIN_INFERRED = 0.99
ID, OOD = 0.95, 0.05
COMPARED = 0.97
REDIRECT_MEMORISED, REDIRECT_END, CONTROL = 0.15, 0.7, 0.1
DECODED, VALUES = 0.9, 0.95
LAST = "last"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReasonerEvidence:
    """What was measured on a reasoner."""

    run: Run
    found: ReasoningMeasures
    checkpoints: Mapping[str, int]
    """The steps that are compared: that of the first landmark, by its name, where it was reached, and the last."""
    accuracies: tuple[Row, ...]
    """Of every split at these checkpoints; `checkpoint` is their name."""
    loops: LoopAccuracies | None
    """None of a model that goes round its blocks once."""

    @property
    def shared(self) -> bool:
        """Whether the model goes round its blocks more than once."""
        return self.loops is not None

    @property
    def first(self) -> str | None:
        """The name of the checkpoint of the first landmark."""
        return next((name for name in self.checkpoints if name != LAST), None)

    def accuracy(self, split: str, checkpoint: str = LAST) -> Row | None:
        """The row of a split at a checkpoint."""
        rows = (row for row in self.accuracies if (row["split"], row["checkpoint"]) == (split, checkpoint))
        return next(rows, None)

    def one(self, measure: str, checkpoint: str | None, **where: object) -> Mapping[str, Any] | None:
        """The row of a measure at a checkpoint."""
        if checkpoint is None:
            return None
        return next(iter(self.found.find(measure, step=self.checkpoints[checkpoint], **where)), None)


def gather_reasoner(run: Run) -> ReasonerEvidence:
    """What was measured after training, or else measured now, and the accuracies of all splits."""
    found = kept_reasoning(run) or reasoning_through(run)
    checkpoints = compared_checkpoints(run, found)
    return ReasonerEvidence(
        run=run,
        found=found,
        checkpoints=checkpoints,
        accuracies=tuple(row for name, step in checkpoints.items() for row in _accuracies(run, name, step)),
        loops=_loops(run),
    )


def compared_checkpoints(run: Run, found: ReasoningMeasures) -> dict[str, int]:
    """The measured checkpoint that is nearest to the first landmark, by the landmark's name, and the last."""
    last, marks = run.checkpoint().step, run.log.landmarks()
    named: dict[str, int] = {}
    if marks:
        name = min(marks, key=lambda mark: marks[mark])
        step = min(found.steps, key=lambda step: abs(step - marks[name]))
        named = {name: step} if step != last else {}
    return {**named, LAST: last}


def _accuracies(run: Run, name: str, step: int) -> Iterator[Row]:
    model = run.model(step)
    for split in run.task.splits:
        batch = _some(run.task.examples(split), split)
        share = answered(model, batch)
        ends = {"value": share.mean, "low": share.low, "high": share.high}
        yield {"checkpoint": name, "step": step, "split": split, **ends, "n": len(batch), "skipped": 0}


def _some(examples: Batch, split: str) -> Batch:
    order = torch.randperm(len(examples), generator=generator(SEED, "accuracies", split))
    return examples.select(order[:MOST])


def _loops(run: Run) -> LoopAccuracies | None:
    try:
        return loops_of(run)
    except WorkbenchError:
        # A model that goes round once has nothing to loop.
        return None


def reasoner_claims(evidence: ReasonerEvidence) -> tuple[Claim, ...]:
    """The expected findings, and the lines that are nearly free."""
    composed = isinstance(reasoner_task(evidence.run), Composition)
    rest = _composition_claims(evidence) if composed else _comparison_claims(evidence)
    trained = _bounded("accuracy on train_inferred, at the end", evidence.accuracy("train_inferred"), TRAIN_INFERRED)
    return (trained, _delay_claim(evidence.run), *rest)


def delay_of(run: Run) -> float | None:
    """Steps until it generalised, as a multiple of those until it memorised; None where either was not reached."""
    memorised, generalised = run.log.step_memorised, run.log.step_generalised
    return None if not memorised or generalised is None else generalised / memorised


def _delay_claim(run: Run) -> Claim:
    delay = delay_of(run)
    return Claim(
        statement="steps until generalised, as a multiple of those until memorised",
        wanted="> 1",
        found=delay,
        holds=delay is not None and delay > 1,
    )


def _composition_claims(evidence: ReasonerEvidence) -> Iterator[Claim]:
    found, first = evidence.found, evidence.first
    task = evidence.run.task
    assert isinstance(task, Composition)
    yield _bounded("accuracy on test (ID), at the end", evidence.accuracy("test"), ID)
    yield from _ood_claims(evidence, covered=task.role_coverage > 0)
    middle = middle_site(found)
    for split in ("train_inferred", "test"):
        row = evidence.one("redirect", first, split=split)
        statement = f"redirect rate at {middle}, {split}, when {first or 'memorised'}"
        yield _bounded(statement, row, REDIRECT_MEMORISED, most=True)
    yield _bounded(
        f"redirect rate at {middle}, test, at the end", evidence.one("redirect", LAST, split="test"), REDIRECT_END
    )
    control = evidence.one("control", LAST, split="test")
    yield _bounded(f"control at {middle}, test, at the end: same bridge, answer changed", control, CONTROL, most=True)
    yield _rise(evidence, f"second relation at r2, {middle}", "mrr_relation", middle)
    for site, free in ((middle, False), (_stream(found)[-1], True)):
        for split in ("test", "ood"):
            row = evidence.one("mrr_bridge", LAST, split=split, site=site)
            yield _bounded(f"MRR of the bridge at r1, {site}, {split}", row, DECODED, free=free)
    for split in ("test", "ood"):
        yield _bounded(f"two calls, {split}", evidence.one("two_calls", LAST, split=split), DECODED, free=True)
    row = evidence.one("mrr_relation", LAST, split="test", site="L0.resid_pre")
    yield _bounded("MRR of r2 at r2 before the first layer, test", row, DECODED, free=True)


def _ood_claims(evidence: ReasonerEvidence, *, covered: bool) -> Iterator[Claim]:
    row = evidence.accuracy("ood")
    if not evidence.shared and not covered:
        yield _bounded("accuracy on ood, at the end", row, OOD, most=True)
        return
    why = "shared blocks" if evidence.shared else "OOD facts told as a second hop"
    assert row is not None
    yield Claim(
        statement=f"accuracy on ood, at the end, with {why}: low end of its interval",
        wanted=f"> {OOD:g}",
        found=row["low"],
        holds=row["low"] > OOD,
        interval=_estimate(row),
        n=row["n"],
    )


def _comparison_claims(evidence: ReasonerEvidence) -> Iterator[Claim]:
    for split, name in (("test", "test (ID)"), ("ood", "ood"), ("hard", "hard")):
        if split in evidence.run.task.splits:
            yield _bounded(f"accuracy on {name}, at the end", evidence.accuracy(split), COMPARED)
    decoded = {"mrr_v1": "MRR of v1 at e1", "mrr_v2": "MRR of v2 at e2", "label_recall": "recall of the labels at attr"}
    for measure, says in decoded.items():
        site = _best_site(evidence, measure)
        yield _bounded(f"{says}, {site}, test", evidence.one(measure, LAST, split="test", site=site), VALUES)


def _best_site(evidence: ReasonerEvidence, measure: str) -> str:
    """Where a measure is highest at the end, chosen on what training saw; the earliest of equals."""
    step = evidence.checkpoints[LAST]
    rows = evidence.found.find(measure, split="train_inferred", step=step)
    return max(rows, key=lambda row: row["value"])["site"]


def _stream(found: ReasoningMeasures) -> list[str]:
    """The stream after each layer that was looked at, by depth."""
    sites = {Site.parse(row["site"]) for row in found.rows if row["site"] is not None}
    return [str(site) for site in sorted(sites) if site.kind is SiteKind.resid_post]


def _rise(evidence: ReasonerEvidence, what: str, measure: str, site: str | None) -> Claim:
    """That a latent is read off better at the end than at the first landmark, by more than both intervals."""
    early, late = (evidence.one(measure, name, split="test", site=site) for name in (evidence.first, LAST))
    statement = f"rise of the MRR of the {what}, test, from {evidence.first or 'memorised'} to the end"
    wanted = "> 0, intervals apart"
    if early is None or late is None:
        return Claim(statement=statement, wanted=wanted, found=None, holds=False)
    rise = Estimate(
        mean=late["value"] - early["value"], low=late["low"] - early["high"], high=late["high"] - early["low"]
    )
    return Claim(statement=statement, wanted=wanted, found=rise.mean, holds=rise.low > 0, interval=rise, n=late["n"])


def _bounded(
    statement: str, row: Mapping[str, Any] | None, bound: float, *, most: bool = False, free: bool = False
) -> Claim:
    """A claim on a measured row: that it reaches the bound, or stays below it."""
    value = None if row is None else row["value"]
    plain = (at_most if most else at_least)(statement, value, bound)
    interval = None if row is None or value is None else _estimate(row)
    n = None if row is None else row["n"]
    return Claim(
        statement=plain.statement,
        wanted=plain.wanted,
        found=plain.found,
        holds=plain.holds,
        interval=interval,
        n=n,
        free=free,
    )


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(mean=row["value"], low=row["low"], high=row["high"])
