"""Causal tracing of a reasoner: which states, of which token, the answer hangs on (Wang et al. 2024, section 3.3).

For each cause (a token of the prompt that can be changed) the state that a changed prompt has at the cause's positions
is put into the run of the prompt itself, at one site. *Strength* is the share of answers that are then no longer right,
as the paper defines it: it counts prompts that were answered wrongly before, so that an untrained model is full of
strong causes. Beside it stand the share *altered* of the answers that were right before, the share *redirected* to what
the changed prompt is answered by, and how much the lead over that answer falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace, Patch, Trace
from workbench.intervals import Estimate, share_of
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, Task
from workbench.tasks.facts import Perturbed

SITES = "attn_out,mlp_out,resid_post"
SHARES = ("strength", "altered", "redirected")


@runtime_checkable
class Traceable(Task, Protocol):
    """A task that can change one cause of an answer."""

    @property
    def causes(self) -> Mapping[str, Sequence[int]]:
        """What can be changed, and the positions that then hold another state."""
        ...

    def perturbed(self, batch: Batch, cause: str, *, seed: int | torch.Generator = 0) -> Perturbed:
        """The prompts with that cause changed so that the old answer is no longer right."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """What the state of one cause does at one site."""

    site: Site
    name: str
    strength: Estimate
    """Share of all answers that are not right after the patch: the paper's measure."""
    altered: Estimate | None
    """Share of the answers right before that are not right after; None where none was right before."""
    redirected: Estimate | None
    """Share that gives the changed prompt's answer, where both prompts are answered rightly; None without such."""
    lead_lost: float | None
    """Mean fall of the answer's logit lead over the changed prompt's answer, over the same prompts."""
    n: int
    """Prompts that have such a change."""
    skipped: int
    """Prompts that have none."""
    n_right: int
    n_both: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CausalMap:
    """Every cause at every site."""

    causes: tuple[Cause, ...]
    split: str
    accuracy: float
    """Of the model left alone, on the prompts looked at."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a cause and site."""
        return pd.DataFrame([_row(cause) for cause in self.causes])

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"split": self.split, "accuracy": self.accuracy, "cells": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """A heat map of the paper's strength and one of redirections, and all numbers."""
        first = self.causes[0]
        caption = (
            f"States of a changed prompt, put in at one site (split {self.split!r}, {first.n} to "
            f"{max(cause.n for cause in self.causes)} prompts, those without a change left out and counted; 95 % score "
            "intervals). "
        )
        says = {
            "strength": "Strength: share of answers not right afterwards, prompts answered wrongly before included.",
            "altered": "Altered: share of the answers right before that are not right afterwards.",
            "redirected": "Redirected: share that gives the changed prompt's answer, where both were answered rightly.",
        }
        frame = self.frame
        return [
            Table(
                name=f"causes_{name}_{self.split}",
                frame=frame,
                kind="heatmap",
                axes={"x": "cause", "y": "site", "value": name, "low": f"{name}_low", "high": f"{name}_high"},
                unit="share of answers",
                caption=caption + says[name],
            )
            for name in SHARES
        ]


def causal_tracing(
    model: Instrumented,
    task: Task,
    batch: Batch,
    *,
    split: str,
    sites: str | Iterable[str | Site] = SITES,
    seed: int = 0,
) -> CausalMap:
    """Put each cause's changed state in at each site, one at a time.

    Args:
        model: any instrumented model.
        task: one whose causes can be changed (`Traceable`).
        batch: prompts, each read at one place.
        split: where they come from, for the result.
        sites: as `select_sites` takes them; attention and MLP apart by default, beside the stream after each step.
        seed: of the changes.

    Raises:
        WorkbenchError: a task whose causes cannot be changed, or no prompt with a change.
    """
    if not isinstance(task, Traceable):
        raise WorkbenchError(
            f"Task {task.name!r} does not say how to change one cause of an answer, so there is nothing to trace. "
            "Give it `causes` and `perturbed`."
        )
    chosen = select_sites(sites, model)
    found = []
    accuracy = 0.0
    for name, positions in task.causes.items():
        changed = task.perturbed(batch, name, seed=seed)
        skipped = int((~changed.kept).sum())
        if skipped == len(batch):
            raise WorkbenchError(f"No prompt of split {split!r} has another {name!r} that changes its answer.")
        traced = _traced(model, batch.select(changed.kept), changed.select(changed.kept), chosen, list(positions))
        found += [_cause(name, site, traced, answers, skipped) for site, answers in traced.after.items()]
        accuracy = float((traced.before.argmax(1) == traced.answer).double().mean())
    return CausalMap(causes=tuple(found), split=split, accuracy=accuracy, provenance=model.provenance)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Traced:
    """Logits where the answer is read: before, of the changed prompt, and after each site's patch."""

    answer: Int[Tensor, " batch"]
    changed: Perturbed
    before: Float[Tensor, "batch vocab"]
    other: Float[Tensor, "batch vocab"]
    after: Mapping[Site, Float[Tensor, "batch vocab"]]


def _traced(
    model: Instrumented, batch: Batch, changed: Perturbed, sites: Sequence[Site], positions: list[int]
) -> _Traced:
    source = run(model, changed.tokens, record=sites)
    return _Traced(
        answer=batch.targets[batch.read],
        changed=changed,
        before=run(model, batch.tokens).logits[batch.read],
        other=source.logits[batch.read],
        after={site: _patched(model, batch, site, positions, source) for site in sites},
    )


def _patched(
    model: Instrumented, batch: Batch, site: Site, positions: list[int], source: Trace
) -> Float[Tensor, "batch vocab"]:
    patch = Patch(site=site, positions=positions, source=FromTrace(source))
    return run(model, batch.tokens, patches=[patch]).logits[batch.read]


def _cause(name: str, site: Site, traced: _Traced, after: Float[Tensor, "batch vocab"], skipped: int) -> Cause:
    answer, given = traced.answer, after.argmax(1)
    right = traced.before.argmax(1) == answer
    expected = traced.changed.answer.clamp(min=0)
    both = right & traced.changed.defined & (traced.other.argmax(1) == expected)
    lead = (_lead(traced.before, answer, expected) - _lead(after, answer, expected))[both]
    return Cause(
        site=site,
        name=name,
        strength=share_of(given != answer),
        altered=share_of((given != answer)[right]) if right.any() else None,
        redirected=share_of((given == expected)[both]) if both.any() else None,
        lead_lost=float(lead.mean()) if both.any() else None,
        n=len(answer),
        skipped=skipped,
        n_right=int(right.sum()),
        n_both=int(both.sum()),
    )


def _lead(logits: Float[Tensor, "batch vocab"], answer: Tensor, other: Tensor) -> Float[Tensor, " batch"]:
    return (logits.gather(1, answer[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def _row(cause: Cause) -> dict[str, object]:
    row: dict[str, object] = {"site": str(cause.site), "layer": cause.site.layer, "cause": cause.name}
    for name in SHARES:
        share: Estimate | None = getattr(cause, name)
        row |= {name: share and share.mean, f"{name}_low": share and share.low, f"{name}_high": share and share.high}
    fields = ("lead_lost", "n", "skipped", "n_right", "n_both")
    return row | {field: getattr(cause, field) for field in fields}
