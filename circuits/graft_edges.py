"""Which edges of the base's circuit a graft changes: each edge's effect in base, graft and donor, on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch

from circuits.attribution import eap_ig
from circuits.circuit import EdgeScores
from circuits.experiment import experiment
from circuits.grafting import Graft
from circuits.stability import Significance, significant_edges
from workbench.intervals import paired_bootstrap
from workbench.models.transformer import Transformer
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.training.finetune import with_weights

SHOWN = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeChanges:
    """Effects of every edge on the logit difference, in each of the three models."""

    scores: Mapping[str, EdgeScores]
    """Of base, graft and donor."""
    change: EdgeScores
    """The graft's effects minus the base's, by example."""
    significance: Significance
    """The edges whose change is not 0."""

    @property
    def correlation(self) -> float:
        """Pearson correlation, over edges, of the graft's change with the donor's."""
        of_donor = self.scores["donor"].score - self.scores["base"].score
        return float(torch.corrcoef(torch.stack([self.change.score, of_donor]))[0, 1])

    def table(self) -> Table:
        """The edges that changed most, with intervals over examples."""
        assert self.change.examples is not None
        strongest = self.change.score.abs().argsort(descending=True, stable=True)[:SHOWN]
        low, high = paired_bootstrap(self.change.examples[:, strongest].double())
        frame = pd.DataFrame(
            {
                "edge": [self.change.graph.edges[at].name for at in strongest.tolist()],
                **{name: scores.score[strongest].tolist() for name, scores in self.scores.items()},
                "change": self.change.score[strongest].tolist(),
                "change_low": low.tolist(),
                "change_high": high.tolist(),
                "found": self.significance.found[strongest].tolist(),
            }
        )
        n_found, n_edges = int(self.significance.found.sum()), len(self.change.graph.edges)
        return Table(
            name="graft_edges",
            frame=frame,
            kind="bar",
            axes={"x": "edge", "y": "change", "low": "change_low", "high": "change_high"},
            unit="logit difference",
            caption=(
                f"The {len(frame)} edges whose effect on the logit difference the graft changes most (EAP-IG, "
                f"counterfactuals stand in for what is cut; n = {len(self.change.examples):,} pairs, 95 % bootstrap "
                f"intervals). Of {n_edges} edges {n_found} change at a false-discovery rate of 5 %; over all edges the "
                f"graft's changes and the donor's correlate at {self.correlation:.2f}."
            ),
        )


def graft_edges(base: Transformer, graft: Graft, batch: Batch) -> EdgeChanges:
    """Score every edge in base, graft and donor.

    Args:
        base: the model that was grafted onto.
        graft: of it.
        batch: prompts with counterfactuals.

    Raises:
        WorkbenchError: as `experiment` and `significant_edges` do: no headroom, or too few pairs.
    """
    models = {
        "base": base,
        "graft": with_weights(base, graft.weights()),
        "donor": with_weights(base, graft.delta.uniform(1.0)),
    }
    scores = {name: eap_ig(experiment(model, batch)) for name, model in models.items()}
    before, after = scores["base"].examples, scores["graft"].examples
    assert before is not None
    assert after is not None
    change = replace(scores["graft"], score=(after - before).mean(0), examples=after - before)
    return EdgeChanges(scores=scores, change=change, significance=significant_edges(change))
