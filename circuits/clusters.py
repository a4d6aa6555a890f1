"""What each cluster of an MLP's neurons carries: ablated alone, and left alone.

The graph splits MLPs into clusters (`circuit_graph(model, clusters=)`). A cluster is ablated by ablating every edge out
of it; it is left alone by ablating those of all other clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import terms_of
from circuits.circuit import Terms
from circuits.experiment import Experiment
from circuits.memoised import circuit_values
from workbench.intervals import ratio_bootstrap
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table

WAYS = ("lost without it", "restored by it alone")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterShares:
    """For each cluster the share of the headroom lost without it, and restored by it alone among the clusters."""

    names: tuple[str, ...]
    """Names in the graph."""
    labels: tuple[str, ...]
    """What a person calls them."""
    neurons: tuple[int, ...]
    share: Float[Tensor, "way cluster"]
    low: Float[Tensor, "way cluster"]
    high: Float[Tensor, "way cluster"]
    terms: Terms
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a cluster and way."""
        return pd.DataFrame(
            [
                {
                    "cluster": label,
                    "node": name,
                    "neurons": neurons,
                    "measure": way,
                    "share": float(self.share[row, column]),
                    "low": float(self.low[row, column]),
                    "high": float(self.high[row, column]),
                }
                for row, way in enumerate(WAYS)
                for column, (name, label, neurons) in enumerate(zip(self.names, self.labels, self.neurons, strict=True))
            ]
        )

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {
            "clusters": self.frame.to_dict("records"),
            "ablation": self.terms.ablation,
            "metric": self.terms.metric,
            "n": self.terms.n,
        }

    def tables(self) -> Sequence[Table]:
        """Both shares of every cluster."""
        return [
            Table(
                name="cluster_shares",
                frame=self.frame,
                kind="bar",
                axes={"x": "cluster", "y": "share", "series": "measure", "low": "low", "high": "high"},
                unit="share of the headroom",
                caption=(
                    f"What each cluster of neurons carries of the {self.terms.metric}: lost with the cluster ablated "
                    f"({self.terms.ablation}), and restored with all other clusters ablated; n = {self.terms.n} "
                    "examples, 95 % paired bootstrap intervals."
                ),
            )
        ]


def cluster_shares(plan: Experiment, labels: Sequence[str] | None = None) -> ClusterShares:
    """Ablate each cluster of neurons, and all others.

    Args:
        plan: an experiment whose graph has clusters.
        labels: what to call them, in the graph's order; None takes the graph's names.

    Raises:
        WorkbenchError: no MLP of the graph is split into clusters, or the labels are not as many as the clusters.
    """
    graph = plan.graph
    places = [place for place, node in enumerate(graph.writers) if node.part == "mlp" and graph.split(node.step)]
    names = tuple(graph.writers[place].name for place in places)
    if not places:
        raise WorkbenchError(
            "No MLP of this graph is split. Build it with circuit_graph(model, clusters={step: [...]})."
        )
    if labels is not None and len(labels) != len(places):
        raise WorkbenchError(f"{len(labels)} labels came for {len(places)} clusters: {', '.join(names)}.")
    writer = torch.tensor([edge.writer for edge in graph.edges])
    of_cluster = torch.stack([writer == place for place in places])
    without = ~of_cluster
    alone = ~(of_cluster.any(0) & ~of_cluster)
    nothing = ~of_cluster.any(0, keepdim=True)
    values = circuit_values(plan, torch.cat([without, alone, nothing]))
    lost = plan.full - values[: len(places)]
    restored = values[len(places) : -1] - values[-1]
    numerator = torch.stack([lost, restored]).permute(2, 0, 1)
    low, high = ratio_bootstrap(numerator, plan.full - plan.empty)
    return ClusterShares(
        names=names,
        labels=tuple(labels or names),
        neurons=tuple(len(graph.clusters[graph.writers[place].step][graph.writers[place].index]) for place in places),
        share=numerator.mean(0) / plan.headroom,
        low=low,
        high=high,
        terms=terms_of(plan),
        provenance=plan.provenance,
    )
