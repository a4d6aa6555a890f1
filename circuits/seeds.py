"""Evaluations of several seeds of one recipe: the interval that a reader of one run's numbers is missing.

An interval over examples says how sure a number is of one model; over seeds, how sure it is of the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Terms
from circuits.faithfulness import Evaluation
from workbench.intervals import paired_bootstrap
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table

MEASURES = ("size", "faithfulness", "random_95", "necessity", "accuracy", "completeness")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeedEvaluation:
    """What the circuits of several runs withstood, and the mean over runs."""

    labels: tuple[str, ...]
    values: Float[Tensor, "run measure"]
    """In the order of `MEASURES`; NaN where a run has no such number."""
    mean: Float[Tensor, " measure"]
    low: Float[Tensor, " measure"]
    high: Float[Tensor, " measure"]
    terms: Terms
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a run and measure, and the mean over runs of each measure with its interval."""
        rows = [
            {"run": label, "measure": measure, "value": float(self.values[row, column])}
            for row, label in enumerate(self.labels)
            for column, measure in enumerate(MEASURES)
        ]
        means = [
            {
                "run": "mean",
                "measure": measure,
                "value": float(self.mean[column]),
                "low": float(self.low[column]),
                "high": float(self.high[column]),
            }
            for column, measure in enumerate(MEASURES)
        ]
        return pd.DataFrame(rows + means)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        means = {
            measure: {"mean": float(self.mean[column]), "interval": [float(self.low[column]), float(self.high[column])]}
            for column, measure in enumerate(MEASURES)
        }
        return {**means, "runs": list(self.labels), "ablation": self.terms.ablation, "metric": self.terms.metric}

    def tables(self) -> Sequence[Table]:
        """All runs and the mean."""
        return [
            Table(
                name="circuit_over_seeds",
                frame=self.frame,
                kind="table",
                axes={},
                unit="share of the headroom; edges; fraction",
                caption=(
                    f"Circuits of {len(self.labels)} runs, {self.terms.metric} under {self.terms.ablation} ablation; "
                    "the interval of the mean is a 95 % bootstrap over runs."
                ),
            )
        ]


def over_seeds(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> SeedEvaluation:
    """The mean over runs of what each one's circuit withstood.

    Args:
        evaluations: one a run, of equal graphs, under the same ablation and metric.
        labels: names of the runs.

    Raises:
        WorkbenchError: fewer than two evaluations, as many labels as there are not, or evaluations that do not compare.
    """
    if len(evaluations) < 2 or len(labels) != len(evaluations):
        raise WorkbenchError(
            f"An interval over seeds needs two runs or more with a name each; got {len(evaluations)} and "
            f"{len(labels)} names."
        )
    first = evaluations[0].circuit
    for each in evaluations[1:]:
        first.graph.check_same(each.circuit.graph)
        first.terms.check_comparable(each.circuit.terms)
    values = torch.tensor([_numbers(each) for each in evaluations], dtype=torch.float64)
    low, high = paired_bootstrap(values)
    return SeedEvaluation(
        labels=tuple(labels),
        values=values,
        mean=values.mean(0),
        low=low,
        high=high,
        terms=first.terms,
        provenance=evaluations[0].provenance,
    )


def _numbers(evaluation: Evaluation) -> list[float]:
    random_95 = evaluation.random_95
    return [
        float(evaluation.circuit.size),
        evaluation.faithfulness.mean,
        float("nan") if random_95 is None else random_95,
        evaluation.necessity.mean,
        evaluation.accuracy.mean,
        evaluation.completeness,
    ]
