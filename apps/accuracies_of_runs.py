"""How often several runs are right on the very same examples, and by how much each differs from the first.

Runs of one world meet the same tests whatever they were trained on: a search transformer trained on naive graphs and
one trained on balanced ones, say. What is compared is what every run's own task calls by one name and fills with the
same examples, so that no run is asked what another task would have let it see in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.intervals import columns_of, mean_of, share_of
from workbench.metrics import is_right, mean_over_reads
from workbench.models.kinds import Model, logits_at, plan_reads
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.training.checkpoints import Run
from workbench.training.recipe import differing_settings

LONGEST = 40
"""Characters of a setting that an error shows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparedAccuracies:
    """Accuracies of several runs on the same examples."""

    rows: tuple[Mapping[str, Any], ...]
    """One a split and run: accuracy with its 95 % score interval, the difference from the first run with its paired
    bootstrap interval (empty for the first itself), n."""
    left_out: Mapping[str, str]
    """Why a split of the first run is not compared, by its name."""
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"rows": list(self.rows), "left_out": dict(self.left_out)}

    def tables(self) -> Sequence[Table]:
        """Accuracies and differences by split, a series a run."""
        frame = pd.DataFrame(self.rows)
        axes = {"x": "split", "series": "run"}
        first = frame["run"].iloc[0]
        return [
            Table(
                name="accuracy_of_runs",
                frame=frame.drop(columns=["difference", "difference_low", "difference_high"]),
                kind="bar",
                axes={**axes, "y": "accuracy", "low": "accuracy_low", "high": "accuracy_high"},
                unit="accuracy",
                caption="Accuracy of several runs on the same examples; 95 % score intervals over n examples.",
            ),
            Table(
                name="accuracy_less_the_first",
                frame=frame.loc[frame["run"] != first, ["split", "run", *columns_of("difference", None), "n"]],
                kind="bar",
                axes={**axes, "y": "difference", "low": "difference_low", "high": "difference_high"},
                unit="accuracy",
                caption=f"Accuracy less that of {first} on the same examples; 95 % paired bootstrap intervals.",
            ),
        ]


def accuracies_of(runs: Sequence[Run], step: int | None = None) -> ComparedAccuracies:
    """Ask several runs the same.

    Args:
        runs: two or more; the others are compared with the first.
        step: checkpoint of each; None is the last.

    Raises:
        WorkbenchError: fewer than two different runs, or no split with the same examples in all.
    """
    _check_different(runs)
    same, left_out = _same_splits(runs)
    if not same:
        raise WorkbenchError(
            f"{', '.join(run.reference for run in runs)} have no split with the same examples. The task of "
            f"{runs[0].reference!r} differs in {', '.join(_differences(runs))}. Train with the same "
            "world: `workbench train RECIPE --seed N`."
        )
    models = {run.reference: run.instrumented(step) for run in runs}
    return ComparedAccuracies(
        rows=tuple(row for split, batch in same.items() for row in _rows(split, batch, models)),
        left_out=left_out,
        provenance=Provenance(code_version=code_version(), parents=tuple(run.checkpoint(step).sha256 for run in runs)),
    )


def right_of(model: Model, batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether a model answers all that is asked of each example rightly."""
    with torch.no_grad():
        logits = logits_at(model, plan_reads(model.config, batch.tokens, batch.read))
    return mean_over_reads(is_right(logits.argmax(1), batch).double(), batch.read) == 1


def _check_different(runs: Sequence[Run]) -> None:
    folders = {run.folder.path.resolve() for run in runs}
    if len(runs) < 2 or len(folders) < len(runs):
        raise WorkbenchError(
            f"A comparison needs two different runs or more, got {', '.join(run.reference for run in runs)}. Name "
            "others; `workbench runs` lists them."
        )


def _same_splits(runs: Sequence[Run]) -> tuple[dict[str, Batch], dict[str, str]]:
    """The splits of the first run that all fill with the same examples, and why the others are none of these."""
    same: dict[str, Batch] = {}
    left_out: dict[str, str] = {}
    first = runs[0].task
    for split in first.splits:
        batch = first.examples(split)
        other = next((run for run in runs[1:] if not _asks_the_same(run, split, batch)), None)
        if other is None:
            same[split] = batch
        else:
            left_out[split] = f"Split {split!r} holds other examples in {other.reference!r}, or is not there."
    return same, left_out


def _asks_the_same(run: Run, split: str, batch: Batch) -> bool:
    if split not in run.task.splits:
        return False
    other = run.task.examples(split)
    return all(
        torch.equal(theirs, ours)
        for theirs, ours in ((other.tokens, batch.tokens), (other.targets, batch.targets), (other.read, batch.read))
    )


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs[1:]:
        differing = differing_settings(runs[0].recipe, run.recipe)
        tasks = {key: values for key, values in differing.items() if key.startswith("task.")}
        for key, (one, two) in tasks.items():
            # An imported run's settings hold all of its pairs.
            ours, theirs = (shorten(str(value), LONGEST) for value in (one, two))
            yield f"{key} ({ours}, in {run.reference!r} {theirs})"


def _rows(split: str, batch: Batch, models: Mapping[str, Model]) -> Iterator[dict[str, Any]]:
    first: Tensor | None = None
    for reference, model in models.items():
        right = right_of(model, batch)
        difference = None if first is None else mean_of(right.double() - first.double())
        first = right if first is None else first
        yield {
            "split": split,
            "run": reference,
            **columns_of("accuracy", share_of(right)),
            **columns_of("difference", difference),
            "n": len(batch),
        }
