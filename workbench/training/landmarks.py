"""What a sweep found: when its runs memorised and generalised, by setting, with every run shown.

Runs that did not get there are part of the finding: rates are shares of all runs of a setting, and medians are over
those that got there, with their number beside them. An interval over seeds is Student's, as for circuits of several
runs; of a share it is Wilson's.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from workbench.intervals import columns_of, share_of, student_of
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance
from workbench.tables import Table
from workbench.training.checkpoints import Run

SEEDS = ("task.seed", "train.init_seed", "train.batch_seed")
LANDMARKS = ("memorised", "generalised")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SweepResult:
    """Landmarks and last accuracies of several runs, and what those of one setting have in common."""

    runs: pd.DataFrame
    """One row a run: setting, seed, how it ended, steps, landmarks, seconds until it generalised, last accuracies."""
    settings: pd.DataFrame
    """One row a setting: rates, medians and ranges, means with their intervals."""
    provenance: Provenance

    def tables(self) -> Sequence[Table]:
        """The settings, the runs, and every run's landmarks as points."""
        n = f"{len(self.runs)} runs, {len(self.settings)} settings"
        return [
            Table(
                name="sweep_settings",
                frame=self.settings,
                kind="table",
                axes={},
                unit="steps; seconds; fraction",
                caption=(
                    f"Landmarks by setting ({n}). A rate is the share of all runs, with Wilson's 95 % interval; "
                    "steps and seconds are the median and the range of the runs that got there; last accuracies are "
                    "means of the runs that ended, with Student's 95 % interval over them."
                ),
            ),
            Table(
                name="sweep_runs",
                frame=self.runs,
                kind="table",
                axes={},
                unit="steps; seconds; fraction",
                caption=f"Every run of the sweep ({n}). Empty: not reached in the steps that the run took.",
            ),
            Table(
                name="sweep_landmarks",
                frame=self._points(),
                kind="points",
                axes={"x": "setting", "y": "step", "series": "landmark"},
                unit="step",
                caption=(
                    f"Landmarks of every run, by setting ({n}). A landmark that was never reached stands at the "
                    "run's last step."
                ),
                log_y=True,
            ),
        ]

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"settings": _records(self.settings), "runs": _records(self.runs)}

    def _points(self) -> pd.DataFrame:
        """A row for every run and landmark, those that were reached first."""
        rows = [
            {
                "setting": row["setting"],
                "run": row["run"],
                "landmark": landmark if reached else f"never {landmark}",
                "step": row[f"step_{landmark}"] if reached else row["steps"],
            }
            for wanted in (True, False)
            for landmark in LANDMARKS
            for row in _records(self.runs)
            if (reached := row[f"step_{landmark}"] is not None) is wanted
        ]
        return pd.DataFrame(rows, columns=["setting", "run", "landmark", "step"])


def sweep_result(runs: Sequence[Run], settings: Sequence[str] | None = None) -> SweepResult:
    """The landmarks of runs, by setting.

    Args:
        runs: finished, broken off or never begun.
        settings: of each run; by default what tells the recipes apart, seeds aside.

    Raises:
        WorkbenchError: there is no run, or one was imported.
    """
    if not runs:
        raise WorkbenchError("A table of landmarks needs at least one run; got none.")
    for run in runs:
        if run.recipe.train is None:
            raise WorkbenchError(f"Run {run.reference!r} was imported: without a training it has no landmarks.")
    settings = settings_of(runs) if settings is None else settings
    rows = [_run_row(run, setting) for run, setting in zip(runs, settings, strict=True)]
    splits = list(dict.fromkeys(split for run in runs for split in run.task.measured))
    by_setting = {setting: [row for row in rows if row["setting"] == setting] for setting in settings}
    return SweepResult(
        # As objects steps stay whole numbers where others are missing.
        runs=pd.DataFrame(rows, dtype=object),
        settings=pd.DataFrame([_setting_row(name, each, splits) for name, each in by_setting.items()], dtype=object),
        provenance=Provenance(
            code_version=code_version(),
            recipe=", ".join(dict.fromkeys(run.recipe.name for run in runs)),
            parents=tuple(run.checkpoint().sha256 for run in runs if run.checkpoints),
        ),
    )


def settings_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """What tells each run's recipe from the others of its name, seeds aside; the recipe's name before it if several."""
    several = len({run.recipe.name for run in runs}) > 1
    flat = [{key: value for key, value in run.recipe.settings().items() if key not in SEEDS} for run in runs]
    labels = []
    for run, own in zip(runs, flat, strict=True):
        family = [other for each, other in zip(runs, flat, strict=True) if each.recipe.name == run.recipe.name]
        varying = [key for key in own if any(other.get(key) != own[key] for other in family)]
        parts = [f"{key.rpartition('.')[2]}={_as_text(own[key])}" for key in varying]
        labels.append(" ".join([run.recipe.name, *parts] if several else parts) or run.recipe.name)
    return tuple(labels)


def _as_text(value: Any) -> str:
    """A setting's value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def _run_row(run: Run, setting: str) -> dict[str, Any]:
    assert run.recipe.train is not None
    generalised = run.log.step_generalised
    seconds = next((row["seconds"] for row in run.log.rows if row["step"] == generalised), None)
    return {
        "setting": setting,
        "run": run.reference,
        "seed": run.recipe.train.init_seed,
        "ended": bool(run.status["finished"]),
        "reason": run.status["reason"],
        "steps": run.log.rows[-1]["step"] if run.log.rows else 0,
        "step_memorised": run.log.step_memorised,
        "step_generalised": generalised,
        "seconds_generalised": seconds,
        **{f"{split}_accuracy": run.last.get(f"{split}_accuracy") for split in run.task.measured},
    }


def _setting_row(setting: str, rows: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"setting": setting, "n": len(rows), "ended": sum(row["ended"] for row in rows)}
    for landmark in LANDMARKS:
        reached = torch.tensor([row[f"step_{landmark}"] is not None for row in rows])
        found |= {landmark: int(reached.sum()), **columns_of(f"{landmark}_rate", share_of(reached))}
    for column in ("step_memorised", "step_generalised", "seconds_generalised"):
        found |= _median_and_range(column, [row[column] for row in rows if row[column] is not None])
    for split in splits:
        values = [row.get(f"{split}_accuracy") for row in rows if row["ended"]]
        known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        found |= columns_of(f"{split}_accuracy", student_of(known) if len(known) else None)
    return found


def _median_and_range(name: str, values: Sequence[int | float]) -> dict[str, int | float | None]:
    middle = statistics.median(values) if values else None
    # Steps stay whole.
    middle = int(middle) if middle is not None and float(middle).is_integer() else middle
    return {name: middle, f"{name}_least": min(values, default=None), f"{name}_most": max(values, default=None)}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with None where a column has no value."""
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
