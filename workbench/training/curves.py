"""The training log, and when a run memorised and generalised.

A landmark is the first evaluation from which the task's threshold holds for ten evaluations in a row: a first crossing
alone is optimistic, since accuracies bounce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbench.tables import Table
from workbench.tasks.base import Task

HOLD = 10
SETTLED_CHANGE = 0.01
SETTLED_STEPS = 500


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainLog:
    """Evaluations of a run: step, losses and accuracies by split, sum of squared weights, seconds."""

    rows: Sequence[Mapping[str, Any]]
    memorised_accuracy: float
    """The task's threshold on the training split."""
    solved_accuracy: float
    """The task's threshold on the test split."""

    @classmethod
    def of(cls, task: Task, rows: Sequence[Mapping[str, Any]]) -> TrainLog:
        """The log of a run on this task."""
        return cls(rows=rows, memorised_accuracy=task.memorised_accuracy, solved_accuracy=task.solved_accuracy)

    @property
    def frame(self) -> pd.DataFrame:
        """One row an evaluation."""
        return pd.DataFrame(list(self.rows))

    @property
    def step_memorised(self) -> int | None:
        """When the training split was learnt for good."""
        return self._first_held("train_accuracy", self.memorised_accuracy)

    @property
    def step_generalised(self) -> int | None:
        """When the test split was learnt for good."""
        return self.step_solved("test")

    def step_solved(self, split: str) -> int | None:
        """When the accuracy on a split that is measured reached the task's threshold for tests, for good."""
        return self._first_held(f"{split}_accuracy", self.solved_accuracy)

    @property
    def step_best(self) -> int:
        """The evaluation with the highest accuracy on the split `val`, of several that with the lowest loss there."""
        return max(self.rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))["step"]

    @property
    def cleaned_up(self) -> bool:
        """Whether it has generalised and its weights changed by less than 1 % over the last 500 steps."""
        if self.step_generalised is None:
            return False
        last = self.rows[-1]
        earlier = [row for row in self.rows if row["step"] <= last["step"] - SETTLED_STEPS]
        if not earlier:
            return False
        before, now = earlier[-1]["sum_squared_weights"], last["sum_squared_weights"]
        return abs(now - before) < SETTLED_CHANGE * before

    def landmarks(self) -> dict[str, int]:
        """The landmarks that were reached, by name."""
        found = {"memorised": self.step_memorised, "generalised": self.step_generalised}
        return {name: step for name, step in found.items() if step is not None}

    def tables(self) -> Sequence[Table]:
        """Loss and accuracy by step; none of a run that was not trained here."""
        if not self.rows:
            return []
        return [self._curves("loss", "nats", log_y=True), self._curves("accuracy", "fraction", log_y=False)]

    def _first_held(self, column: str, threshold: float) -> int | None:
        held: list[int] = []
        for row in self.rows:
            held = [*held, row["step"]] if row[column] >= threshold else []
            if len(held) == HOLD:
                return held[0]
        return None

    def _curves(self, measure: str, unit: str, *, log_y: bool) -> Table:
        splits = [name.removesuffix(f"_{measure}") for name in self.frame if name.endswith(f"_{measure}")]
        wide = self.frame.rename(columns={f"{split}_{measure}": split for split in splits})
        frame = wide.melt(id_vars="step", value_vars=splits, var_name="split", value_name=measure)
        return Table(
            name=f"training_{measure}",
            frame=frame,
            kind="curve",
            axes={"x": "step", "y": measure, "series": "split"},
            unit=unit,
            caption=f"{measure.capitalize()} of {_listed(splits)} at each evaluation.",
            log_y=log_y,
        )


def _listed(splits: Sequence[str]) -> str:
    *first, last = splits
    return f"the splits {', '.join(first)} and {last}" if first else f"the split {last}"
