"""The logit lens: what a model would answer if it stopped here (nostalgebraist 2020).

The residual stream at a site goes straight through the final norm and the unembedding. Read at every site and position
it shows where the answer appears, how sure the model is of it, and where quantities on the way to it (the latents of
the task, as tokens) surface. At the last layer's `resid_post` the lens is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Edit, Instrumented, Site, SiteKind, select_sites
from workbench.instrument.trace import Trace
from workbench.intervals import paired_bootstrap
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

SITES = "L0.resid_pre,resid_mid,resid_post"
STREAM = (SiteKind.resid_pre, SiteKind.resid_mid, SiteKind.resid_post)
TOP = 5
"""Most probable tokens that are kept for each example and cell."""
UNITS = {
    "answer_probability": "probability",
    "answer_rank": "rank (0 = top)",
    "answer_reciprocal_rank": "1 / (rank + 1)",
    "entropy": "nats",
}


@runtime_checkable
class Finishing(Protocol):
    """A model that can turn a residual stream of any depth into logits."""

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the rows given."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """One measure at every site and position: mean over examples, with its bootstrap interval."""

    unit: str
    mean: Float[Tensor, "site pos"]
    low: Float[Tensor, "site pos"]
    high: Float[Tensor, "site pos"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trajectory:
    """A model's predictions on their way through the layers."""

    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    """What stands at each position."""
    measures: Mapping[str, Measured]
    """`answer_probability`, `answer_rank`, `answer_reciprocal_rank`, `entropy`, and for each latent of the batch
    `reciprocal_rank_<latent>`."""
    top_tokens: Int[Tensor, "batch site pos top"]
    """The most probable tokens of each example, best first."""
    top_probabilities: Float[Tensor, "batch site pos top"]
    n: int
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """Flat cells, one for each site, position and measure."""
        return {"cells": [cell for name in self.measures for cell in self._cells(name)], "n": self.n}

    def tables(self) -> Sequence[Table]:
        """A heat map of site and position for each measure."""
        return [self._heatmap(name, measured) for name, measured in self.measures.items()]

    def _cells(self, name: str) -> list[dict[str, object]]:
        measured = self.measures[name]
        return [
            {
                "site": str(site),
                "layer": site.layer,
                "position": position,
                "measure": name,
                "mean": float(measured.mean[i, j]),
                "low": float(measured.low[i, j]),
                "high": float(measured.high[i, j]),
            }
            for i, site in enumerate(self.sites)
            for j, position in enumerate(self.positions)
        ]

    def _heatmap(self, name: str, measured: Measured) -> Table:
        frame = pd.DataFrame(self._cells(name)).drop(columns=["layer", "measure"]).rename(columns={"mean": name})
        words = name.replace("_", " ")
        return Table(
            name=f"lens_{name}",
            frame=frame,
            kind="heatmap",
            axes={"x": "position", "y": "site", "value": name, "low": "low", "high": "high"},
            unit=measured.unit,
            caption=f"Logit lens: mean {words} at each site and position; n = {self.n} prompts. "
            "Columns low and high hold the 95 % bootstrap interval.",
        )


def logit_lens(
    model: Instrumented,
    batch: Batch,
    *,
    sites: str | Iterable[str | Site] = SITES,
    position_labels: Sequence[str] | None = None,
) -> Trajectory:
    """What the residual stream already predicts at every site and position.

    The answer at a position is the target of the next place that is read, and after the last one, of that. Latents that
    are no tokens of the output vocabulary are left out.

    Args:
        model: a model that can finish from any residual stream.
        batch: prompts with their answers and latents.
        sites: places of the residual stream.
        position_labels: what stands at each position, such as the task's; None numbers them.

    Raises:
        WorkbenchError: the model cannot finish, or a site is not of the residual stream.
    """
    chosen = select_sites(sites, model)
    if other := [str(site) for site in chosen if site.kind not in STREAM]:
        raise WorkbenchError(f"The logit lens reads the residual stream; {', '.join(other)} is not it. Use {SITES}.")
    n_positions = batch.tokens.shape[1]
    labels = tuple(map(str, range(n_positions))) if position_labels is None else tuple(position_labels)
    if len(labels) != n_positions:
        raise WorkbenchError(f"{len(labels)} position labels for prompts of {n_positions} positions. Give as many.")
    trace = run(model, batch.tokens, record=chosen)
    logits = lens_logits(model, trace, chosen)
    probabilities, tokens = logits.softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
    return Trajectory(
        sites=chosen,
        positions=labels,
        measures={name: _average(name, values) for name, values in _measures(logits, batch).items()},
        top_tokens=tokens,
        top_probabilities=probabilities,
        n=len(batch),
        provenance=trace.provenance,
    )


@torch.no_grad()
def lens_logits(model: Instrumented, trace: Trace, sites: Sequence[Site]) -> Float[Tensor, "batch site pos vocab"]:
    """Logits of the residual stream recorded at these sites.

    Raises:
        WorkbenchError: the model cannot finish from a residual stream.
    """
    if not isinstance(model, Finishing):
        raise WorkbenchError(
            "The logit lens needs a model with `finish` (final norm and unembedding of a residual stream), and "
            f"{type(model).__name__} has none. Import the model as one of the workbench's own."
        )
    return torch.stack([model.finish(trace[site], {}) for site in sites], 1)


def next_answer(targets: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """At each position the target of the next read position; after the last one, of that.

    Raises:
        WorkbenchError: a prompt is read nowhere.
    """
    if not read.any(1).all():
        raise WorkbenchError(
            "The lens needs an answer for every prompt, and some prompt of this batch is read nowhere."
        )
    position = torch.arange(read.shape[1])
    last = torch.where(read, position, -1).amax(1, keepdim=True)
    following = torch.where(read, position, read.shape[1]).flip(1).cummin(1).values.flip(1)
    return targets.gather(1, torch.minimum(following, last))


def _measures(
    logits: Float[Tensor, "batch site pos vocab"], batch: Batch
) -> dict[str, Float[Tensor, "batch site pos"]]:
    answer = next_answer(batch.targets, batch.read)
    log_probabilities = logits.log_softmax(-1)
    picked = log_probabilities.gather(-1, answer[:, None, :, None].expand(*logits.shape[:3], 1))[..., 0]
    rank = _rank(logits, answer)
    found = {
        "answer_probability": picked.exp(),
        "answer_rank": rank,
        "answer_reciprocal_rank": 1 / (rank + 1),
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1),
    }
    for name, latent in batch.latents.items():
        if int(latent.value.max()) < logits.shape[-1]:
            value = latent.value[:, None].expand(-1, logits.shape[2])
            found[f"reciprocal_rank_{name}"] = 1 / (_rank(logits, value) + 1)
    return found


def _rank(
    logits: Float[Tensor, "batch site pos vocab"], token: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch site pos"]:
    """How many tokens beat this one; ties count for it."""
    own = logits.gather(-1, token[:, None, :, None].expand(*logits.shape[:3], 1))
    return (logits > own).sum(-1).to(logits.dtype)


def _average(name: str, values: Float[Tensor, "batch site pos"]) -> Measured:
    low, high = paired_bootstrap(values)
    return Measured(unit=UNITS.get(name, UNITS["answer_reciprocal_rank"]), mean=values.mean(0), low=low, high=high)
