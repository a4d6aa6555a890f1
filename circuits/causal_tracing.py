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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace, Patch, Trace
from workbench.intervals import Estimate, columns_of, mean_of, share_of
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, Task
from workbench.tasks.facts import Perturbed

SITES = "attn_out,mlp_out,resid_post"
SHARES = {
    "strength": "Strength: share of answers not right afterwards, prompts answered wrongly before included.",
    "altered": "Altered: share of the answers right before that are not right afterwards.",
    "redirected": "Redirected: share that gives the changed prompt's answer, where both were answered rightly.",
}


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
    strength: Estimate | None
    """Share of all answers that are not right after the patch: the paper's measure. None where no prompt has such a
    change."""
    altered: Estimate | None
    """Share of the answers right before that are not right after; None where none was right before."""
    redirected: Estimate | None
    """Share that gives the changed prompt's answer, where both prompts are answered rightly; None without such."""
    lead_lost: Estimate | None
    """Mean fall of the answer's logit lead over the changed prompt's answer, over the same prompts."""
    n: int
    """Prompts that have such a change."""
    skipped: int
    """Prompts that have none."""
    n_right: int
    """Of those with a change, prompts answered rightly before: `altered` is a share of these."""
    n_both: int
    """Of those, prompts whose changed prompt has an answer and gets it: `redirected` is a share of these."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CausalMap:
    """Every cause at every site."""

    causes: tuple[Cause, ...]
    split: str
    accuracy: Estimate
    """Of the model left alone, on all prompts."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a cause and site."""
        return pd.DataFrame([_row(cause) for cause in self.causes])

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        cells = [_row(cause) for cause in self.causes]
        return {"split": self.split, **columns_of("accuracy", self.accuracy), "cells": cells}

    def tables(self) -> Sequence[Table]:
        """A heat map of each share by site and cause."""
        n = [cause.n for cause in self.causes]
        caption = (
            f"States of a changed prompt, put in at one site (split {self.split!r}, n = {min(n)} to {max(n)}; prompts "
            "without a change are left out and counted; 95 % score intervals). "
        )
        return [
            Table(
                name=f"causes_{name}_{self.split}",
                frame=self.frame,
                kind="heatmap",
                axes={"x": "cause", "y": "site", "value": name, "low": f"{name}_low", "high": f"{name}_high"},
                unit="share of answers",
                caption=caption + says,
            )
            for name, says in SHARES.items()
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
        WorkbenchError: a task whose causes cannot be changed, or no prompts.
    """
    if not isinstance(task, Traceable):
        raise WorkbenchError(
            f"Task {task.name!r} does not say how to change one cause of an answer, so there is nothing to trace. "
            "Give it `causes` and `perturbed`."
        )
    chosen = select_sites(sites, model)
    before = run(model, batch.tokens).logits[batch.read]
    found: list[Cause] = []
    for name, positions in task.causes.items():
        changed = task.perturbed(batch, name, seed=seed)
        rows, skipped = changed.kept.nonzero()[:, 0], int((~changed.kept).sum())
        if not len(rows):
            found += [_absent(name, site, skipped) for site in chosen]
            continue
        pairs = _Pairs.of(model, batch.select(rows), changed.select(rows), before[rows], record=chosen)
        found += [_cause(name, site, pairs, pairs.patched(model, site, positions), skipped) for site in chosen]
    accuracy = share_of(before.argmax(1) == batch.targets[batch.read])
    return CausalMap(causes=tuple(found), split=split, accuracy=accuracy, provenance=model.provenance)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pairs:
    """Prompts with one cause changed, and the logits of both where the answer is read."""

    batch: Batch
    answer: Int[Tensor, " batch"]
    other: Int[Tensor, " batch"]
    """What the changed prompt is answered by; valid where `both`."""
    before: Float[Tensor, "batch vocab"]
    right: Bool[Tensor, " batch"]
    both: Bool[Tensor, " batch"]
    """Both prompts are answered rightly."""
    source: Trace
    """The run of the changed prompts."""

    @classmethod
    def of(
        cls,
        model: Instrumented,
        batch: Batch,
        changed: Perturbed,
        before: Float[Tensor, "batch vocab"],
        *,
        record: Sequence[Site],
    ) -> _Pairs:
        source = run(model, changed.tokens, record=record)
        answer, other = batch.targets[batch.read], changed.answer.clamp(min=0)
        right = before.argmax(1) == answer
        other_right = changed.defined & (source.logits[batch.read].argmax(1) == other)
        return cls(
            batch=batch,
            answer=answer,
            other=other,
            before=before,
            right=right,
            both=right & other_right,
            source=source,
        )

    def patched(self, model: Instrumented, site: Site, positions: Sequence[int]) -> Float[Tensor, "batch vocab"]:
        """Logits with the changed prompts' state at some positions of a site."""
        patch = Patch(site=site, positions=list(positions), source=FromTrace(self.source))
        return run(model, self.batch.tokens, patches=[patch]).logits[self.batch.read]

    def lead(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """By how much the answer's logit leads that of the changed prompt's answer."""
        return (logits.gather(1, self.answer[:, None]) - logits.gather(1, self.other[:, None]))[:, 0]


def _cause(name: str, site: Site, pairs: _Pairs, after: Float[Tensor, "batch vocab"], skipped: int) -> Cause:
    given, right, both = after.argmax(1), pairs.right, pairs.both
    wrong = given != pairs.answer
    return Cause(
        site=site,
        name=name,
        strength=share_of(wrong),
        altered=share_of(wrong[right]) if right.any() else None,
        redirected=share_of((given == pairs.other)[both]) if both.any() else None,
        lead_lost=mean_of((pairs.lead(pairs.before) - pairs.lead(after))[both]) if both.any() else None,
        n=len(wrong),
        skipped=skipped,
        n_right=int(right.sum()),
        n_both=int(both.sum()),
    )


def _absent(name: str, site: Site, skipped: int) -> Cause:
    """A cause that no prompt has another of."""
    nothing = dict.fromkeys((*SHARES, "lead_lost"))
    return Cause(site=site, name=name, **nothing, n=0, skipped=skipped, n_right=0, n_both=0)


def _row(cause: Cause) -> dict[str, object]:
    row: dict[str, object] = {"site": str(cause.site), "layer": cause.site.layer, "cause": cause.name}
    for name in (*SHARES, "lead_lost"):
        row |= columns_of(name, getattr(cause, name))
    return row | {field: getattr(cause, field) for field in ("n", "skipped", "n_right", "n_both")}
