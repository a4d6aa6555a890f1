"""Where each head looks: attention patterns, averaged over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionPatterns:
    """How much each position attends to each other, by head."""

    heads: tuple[Site, ...]
    pattern: Float[Tensor, "head dest src"]
    """Mean over the prompts; rows sum to 1."""
    positions: tuple[str, ...]
    n: int
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """Flat cells, one for each head, destination and source."""
        return {"cells": list(self._cells()), "n": self.n}

    def tables(self) -> Sequence[Table]:
        """A heat map of destination and source for each head."""
        return [
            Table(
                name="attention",
                frame=pd.DataFrame(self._cells()),
                kind="heatmap",
                axes={"x": "src", "y": "dest", "value": "attention", "facet": "head"},
                unit="share of attention",
                caption=f"Attention of each head from destination (row) to source (column); mean over n = {self.n} "
                "prompts.",
            )
        ]

    def _cells(self) -> list[dict[str, object]]:
        return [
            {"head": f"L{head.layer}.h{head.head}", "dest": dest, "src": src, "attention": float(self.pattern[i, j, k])}
            for i, head in enumerate(self.heads)
            for j, dest in enumerate(self.positions)
            for k, src in enumerate(self.positions)
        ]


def attention_patterns(
    model: Instrumented, batch: Batch, *, position_labels: Sequence[str] | None = None
) -> AttentionPatterns:
    """Attention patterns of every head.

    Raises:
        WorkbenchError: the model does not show its patterns.
    """
    sites = [site for site in model.sites if site.kind is SiteKind.pattern]
    if not sites:
        raise WorkbenchError("This model does not show its attention patterns: it has no site of kind 'pattern'.")
    trace = run(model, batch.tokens, record=sites)
    heads = [
        Site(kind=SiteKind.pattern, layer=site.layer, head=head)
        for site in sites
        for head in range(model.config.heads_of(SiteKind.pattern))
    ]
    n_positions = batch.tokens.shape[1]
    labels = map(str, range(n_positions)) if position_labels is None else position_labels
    return AttentionPatterns(
        heads=tuple(heads),
        pattern=torch.stack([trace[head].mean(0) for head in heads]),
        positions=tuple(labels),
        n=len(batch),
        provenance=trace.provenance,
    )
