"""The measures of a reasoner, at one checkpoint and through training (Wang et al. 2024).

What forms while a network goes over from chains that it memorised to hops that it takes: where the bridge entity and
the second relation can be read off, where they decide the answer, and which hop is missing where it fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from apps.reasoner_rows import (
    Reasoner,
    Row,
    answered,
    draw_prompts,
    find_middle,
    marginal_rows,
    rows_of,
)
from workbench.instrument.sites import Site
from workbench.intervals import Estimate, columns_of
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.training.checkpoints import MEASURES, Run, thin

PROMPTS = 300
CHECKPOINTS = 16
LOOPS = (1, 2, 3, 4)
LOOP_PROMPTS = 1000
LOOPED_SPLITS = ("test", "ood")
SAYS = {
    "accuracy": "Share of prompts that are answered rightly.",
    "mrr_bridge": "Mean reciprocal rank of the bridge entity in the logit lens at r1, among all tokens.",
    "mrr_bridge_among": "Mean reciprocal rank of the bridge entity in the logit lens at r1, among entities.",
    "mrr_relation": "Mean reciprocal rank of the second relation in the logit lens at r2, among all tokens.",
    "mrr_relation_among": "Mean reciprocal rank of the second relation in the logit lens at r2, among relations.",
    "mrr_v1": "Mean reciprocal rank of the first entity's value in the logit lens at it, among all tokens.",
    "mrr_v1_among": "Mean reciprocal rank of the first entity's value in the logit lens at it, among values.",
    "mrr_v2": "Mean reciprocal rank of the second entity's value in the logit lens at it, among all tokens.",
    "mrr_v2_among": "Mean reciprocal rank of the second entity's value in the logit lens at it, among values.",
    "label_recall": "Share of the attribute's three labels that the logit lens at the attribute ranks third or better.",
    "two_calls": "Share of chains that are right when the model is asked hop by hop.",
    "redirect": "Share of pairs, both answered rightly, whose answer becomes the other's when the state at r1 does.",
    "control": "Share of pairs with the same bridge, both answered rightly, whose answer changes with the state at r1.",
    "transplant": "Accuracy with the state at r1 of an ID fact that has the same bridge.",
    "transplant_before": "Accuracy of the same prompts left alone.",
    "efficiency": "Lead of the answer's logit over all others, divided by the norm of the weights.",
    "strength": "Share of answers that are not right with the state of a prompt whose cause is changed.",
    "altered": "Share of the answers right before that are not right with the state of a changed prompt.",
    "redirected": "Share that becomes the changed prompt's answer, where both prompts are answered rightly.",
}
CAUSAL = ("strength", "altered", "redirected")
UNITS = {
    "efficiency": "logits per unit of norm",
    **dict.fromkeys(("accuracy", "transplant", "transplant_before"), "accuracy"),
}

OnStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReasoningMeasures:
    """Every number of some checkpoints, one a row."""

    rows: Sequence[Mapping[str, Any]]
    """As `apps.reasoner_rows` has them, with the `step`; the reference lines, `marginal_*`, have the step None."""
    middle: Site | None
    """Where chains are redirected; None of a comparison."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """The rows."""
        return pd.DataFrame([dict(row) for row in self.rows])

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints that were measured."""
        return tuple(sorted({row["step"] for row in self.rows if row["step"] is not None}))

    def find(self, measure: str, **where: object) -> list[Mapping[str, Any]]:
        """The rows of a measure in which these columns have these values, by step."""
        return [
            row
            for row in self.rows
            if row["measure"] == measure and all(row[column] == value for column, value in where.items())
        ]

    def summary(self) -> dict[str, object]:
        """Middle site and rows as one JSON object."""
        middle = None if self.middle is None else str(self.middle)
        return {"middle": middle, "steps": list(self.steps), "rows": [dict(row) for row in self.rows]}

    def tables(self) -> Sequence[Table]:
        """A curve over steps of each measure, heat maps of the causes at the last step, candidates, reference lines."""
        return [*self._curves(), *self._heatmaps(), *self._bars()]

    def _curves(self) -> Iterator[Table]:
        for measure, says in SAYS.items():
            rows = [row for row in self.find(measure) if row["value"] is not None]
            if not rows or measure in CAUSAL:
                continue
            frame = pd.DataFrame(rows)
            frame["series"] = [" ".join(filter(None, (row["split"], row["site"], row["cause"]))) for row in rows]
            yield Table(
                name=f"reasoning_{measure}",
                frame=frame,
                kind="curve",
                axes={"x": "step", "y": "value", "series": "series", "low": "low", "high": "high"},
                unit="mean reciprocal rank" if measure.startswith("mrr") else UNITS.get(measure, "share"),
                caption=f"{says} {_counted(rows)} at each of {len(self.steps)} checkpoints; 95 % intervals.",
            )

    def _heatmaps(self) -> Iterator[Table]:
        for measure in CAUSAL:
            found = [row for row in self.find(measure, step=self.steps[-1]) if row["value"] is not None]
            for split in dict.fromkeys(row["split"] for row in found):
                rows = [row for row in found if row["split"] == split]
                yield Table(
                    name=f"reasoning_{measure}_{split}",
                    frame=pd.DataFrame(rows),
                    kind="heatmap",
                    axes={"x": "cause", "y": "site", "value": "value", "low": "low", "high": "high"},
                    unit="share of answers",
                    caption=f"{SAYS[measure]} Split {split!r}, step {self.steps[-1]}; {_counted(rows)}.",
                )

    def _bars(self) -> Iterator[Table]:
        bars = {
            "redirect_candidate": ("site", "share", f"{SAYS['redirect']} By site, on chains of training"),
            "marginal_accuracy": ("cause", "accuracy", "The test split answered from training's answers to prompts "
            "with the same tokens at these places alone"),
        }  # fmt: skip
        for measure, (x, unit, says) in bars.items():
            rows = [row for row in self.find(measure) if row["value"] is not None]
            if rows:
                yield Table(
                    name=f"reasoning_{measure}",
                    frame=pd.DataFrame(rows),
                    kind="bar",
                    axes={"x": x, "y": "value", "low": "low", "high": "high"},
                    unit=unit,
                    caption=f"{says}; {_counted(rows)}, 95 % intervals.",
                )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoopAccuracies:
    """What a model that goes round its blocks several times answers when it goes round more or less often."""

    accuracy: Mapping[tuple[str, int], Estimate]
    """By split and loops."""
    n: Mapping[str, int]
    trained: int
    """Loops that it was trained with."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a split and number of loops."""
        return pd.DataFrame(self._rows())

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"trained": self.trained, "rows": self._rows()}

    def tables(self) -> Sequence[Table]:
        """A curve over loops of each split."""
        n = ", ".join(f"{n} of {split}" for split, n in self.n.items())
        axes = {"x": "loops", "y": "accuracy", "series": "split", "low": "accuracy_low", "high": "accuracy_high"}
        caption = (
            f"Accuracy by how often the model goes round its blocks; it was trained with {self.trained}. "
            f"n = {n}; 95 % score intervals."
        )
        return [Table(name="loops", frame=self.frame, kind="curve", axes=axes, unit="accuracy", caption=caption)]

    def _rows(self) -> list[dict[str, object]]:
        return [
            {"split": split, "loops": loops, **columns_of("accuracy", found), "n": self.n[split]}
            for (split, loops), found in self.accuracy.items()
        ]


def reasoning_of(run: Run, step: int | None = None, *, n: int = PROMPTS) -> ReasoningMeasures:
    """Every measure of one checkpoint; the middle site is chosen at the last one.

    Raises:
        WorkbenchError: the run learnt something else than composition or comparison.
    """
    return _measured(run, [run.checkpoint(step).step], n, lambda: None)


def reasoning_through(
    run: Run, *, n: int = PROMPTS, count: int = CHECKPOINTS, on_step: OnStep = lambda: None
) -> ReasoningMeasures:
    """Every measure of about `count` checkpoints, among them the last and the moments of memorising and generalising.

    Raises:
        WorkbenchError: the run learnt something else than composition or comparison.
    """
    return _measured(run, measured_steps(run, count), n, on_step)


def reasoning_joined(run: Run, found: Sequence[Mapping[str, Any]]) -> ReasoningMeasures:
    """What was found at several checkpoints, in the order of training, as one; each a summary of `reasoning_of`."""
    rows: dict[str, Row] = {}
    # A row that stands in several, such as a reference line, is kept once.
    for each in found:
        rows |= {json.dumps(row): row for row in each["rows"]}
    middle, steps = found[-1]["middle"], {row["step"] for row in rows.values()}
    provenance = replace(run.provenance(run.checkpoint()), parents=_parents(run, {*steps, run.checkpoint().step}))
    return ReasoningMeasures(rows=list(rows.values()), middle=middle and Site.parse(middle), provenance=provenance)


def measured_steps(run: Run, count: int = CHECKPOINTS) -> tuple[int, ...]:
    """The steps at which `reasoning_through` measures."""
    return tuple(checkpoint.step for checkpoint in thin(run, count))


def kept_reasoning(run: Run) -> ReasoningMeasures | None:
    """What was measured after training; None where nothing was."""
    reasoner_task(run)
    rows = run.folder.lines(MEASURES)
    if not rows:
        return None
    middle = next((row["site"] for row in rows if row["measure"] == "redirect"), None)
    provenance = replace(run.provenance(run.checkpoint()), parents=_parents(run, {row["step"] for row in rows}))
    return ReasoningMeasures(rows=rows, middle=middle and Site.parse(middle), provenance=provenance)


def loops_of(run: Run, step: int | None = None, *, n: int = LOOP_PROMPTS) -> LoopAccuracies:
    """Accuracies of a model with shared blocks when it goes round them once and up to four times.

    Raises:
        WorkbenchError: the model goes round its blocks only once, or the run learnt something else.
    """
    prompts, model = draw_prompts(reasoner_task(run), n), run.model(step)
    once = _one_round(run, model.config.steps)
    batches = dict(prompts.of(LOOPED_SPLITS))
    looped = {loops: model.with_schedule(once * loops) for loops in LOOPS}
    return LoopAccuracies(
        accuracy={(split, k): answered(each, batch) for split, batch in batches.items() for k, each in looped.items()},
        n={split: len(batch) for split, batch in batches.items()},
        trained=len(model.config.steps) // len(once),
        provenance=model.provenance,
    )


def _one_round(run: Run, steps: tuple[int, ...]) -> tuple[int, ...]:
    """The shortest part of a schedule that it repeats."""
    for length in range(1, len(steps)):
        if steps[:length] * (len(steps) // length) == steps:
            return steps[:length]
    raise WorkbenchError(
        f"The model of {run.reference!r} goes round its blocks once, schedule {steps}: there is nothing to loop. "
        "Take a run whose blocks are shared, such as composition-shared."
    )


def reasoner_task(run: Run) -> Reasoner:
    """The run's task, where it is one that is reasoned about.

    Raises:
        WorkbenchError: the run learnt something else.
    """
    if not isinstance(run.task, Reasoner):
        raise WorkbenchError(
            f"Measures of reasoning need a run on composition or comparison; {run.reference!r} learnt "
            f"{run.task.name!r}."
        )
    return run.task


def _measured(run: Run, steps: Sequence[int], n: int, on_step: OnStep) -> ReasoningMeasures:
    task = reasoner_task(run)
    prompts = draw_prompts(task, n)
    last = run.checkpoint().step
    middle, candidates = find_middle(run.model(), prompts)
    rows: list[Row] = [{"step": None, **row} for row in marginal_rows(task)]
    for step in steps:
        found = rows_of(run.model(step), prompts, middle)
        rows += [{"step": step, **row} for row in found]
        on_step()
    rows += [{"step": last, **row} for row in candidates if last in steps]
    provenance = replace(run.provenance(run.checkpoint()), parents=_parents(run, {*steps, last}))
    return ReasoningMeasures(rows=rows, middle=middle, provenance=provenance)


def _parents(run: Run, steps: set[int | None]) -> tuple[str, ...]:
    return tuple(checkpoint.sha256 for checkpoint in run.checkpoints if checkpoint.step in steps)


def _counted(rows: Sequence[Mapping[str, Any]]) -> str:
    n = [row["n"] for row in rows]
    return f"n = {n[0]}" if min(n) == max(n) else f"n = {min(n)} to {max(n)}"
