"""Redirection: does the state at one place decide the answer, and only by what it is said to hold (Wang et al. 2024)?

A pair of prompts that differ in one latent (the bridge entity, say) swap the state at one site and position. If the
place holds the latent and the rest of the model reads it there, the answer becomes the other prompt's: the *redirect
rate*, over pairs of which the model answers both prompts rightly. The control is a pair that differs in everything but
the latent: its swap must leave the answer alone. With prompts that the model answers wrongly the same swap says which
hop is missing: a state from a prompt with the same latent that the model does know either mends the answer or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace, Patch, Trace
from workbench.intervals import Estimate, columns_of, share_of
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

SITES = "resid_post"
SHARES = ("redirected", "changed", "right")


@dataclass(frozen=True, kw_only=True, slots=True)
class Redirected:
    """What the other prompt's state does at one site; None where no pair counts."""

    site: Site
    redirected: Estimate | None
    """Share that gives the other prompt's answer."""
    changed: Estimate | None
    """Share whose answer is not the one before."""
    right: Estimate | None
    """Share that is answered rightly."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Redirection:
    """Every site, for pairs of one kind."""

    places: tuple[Redirected, ...]
    position: int
    """Where the state was swapped."""
    split: str
    contrast: str
    """In what the two prompts of a pair differ."""
    n: int
    """Pairs that count."""
    skipped_wrong: int
    """Pairs left out because the model, left alone, answers one of the two wrongly; 0 if that was not asked for."""
    skipped_missing: int
    """Prompts without such a counterpart."""
    right_before: Estimate | None
    """Share answered rightly before the swap; None where no pair counts."""
    provenance: Provenance

    @property
    def best(self) -> Redirected | None:
        """The site that redirects most, the earliest of equals; None where no pair counts."""
        return max(self.places, key=lambda place: place.redirected.mean if place.redirected else 0) if self.n else None

    @property
    def frame(self) -> pd.DataFrame:
        """One row a site."""
        return pd.DataFrame(self._rows())

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        fields = ("split", "contrast", "position", "n", "skipped_wrong", "skipped_missing")
        counts = {field: getattr(self, field) for field in fields}
        return {**counts, **columns_of("right_before", self.right_before), "cells": self._rows()}

    def tables(self) -> Sequence[Table]:
        """All shares by site."""
        before = "no pair counts" if self.right_before is None else f"right before: {self.right_before.mean:.3f}"
        caption = (
            f"The other prompt's state at one site, position {self.position}; pairs of split {self.split!r} that "
            f"differ in {self.contrast}. n = {self.n}, {before}; left out: {self.skipped_wrong} pairs with a wrong "
            f"answer, {self.skipped_missing} prompts without a counterpart. 95 % score intervals."
        )
        name = f"redirection_{self.contrast}_{self.split}"
        return [Table(name=name, frame=self.frame, kind="table", axes={}, unit="share", caption=caption)]

    def _rows(self) -> list[dict[str, object]]:
        rows = []
        for place in self.places:
            row: dict[str, object] = {"site": str(place.site)}
            for name in SHARES:
                row |= columns_of(name, getattr(place, name))
            rows.append(row)
        return rows


def redirection(
    model: Instrumented,
    batch: Batch,
    *,
    split: str,
    contrast: str,
    position: int,
    sites: str | Iterable[str | Site] = SITES,
    both_right: bool = True,
) -> Redirection:
    """Put the state of each prompt's counterpart in, one site at a time.

    Args:
        model: any instrumented model.
        batch: pairs, each read at one place, as `task.contrast(examples, contrast)` draws them.
        split: where they come from, for the result.
        contrast: in what they differ, for the result.
        position: where the state is swapped.
        sites: as `select_sites` takes them.
        both_right: count only pairs of which the model, left alone, answers both prompts rightly.

    Raises:
        WorkbenchError: no pairs were drawn, or prompts that are read at several places.
    """
    corrupt, distractor = batch.pairs()
    if not (batch.read.sum(1) == 1).all():
        raise WorkbenchError("Redirection compares one answer with another: give prompts that are read at one place.")
    chosen = select_sites(sites, model)
    rows, source = torch.arange(len(batch)), None
    if len(batch):
        source = run(model, corrupt, record=chosen)
        rows = _counted(model, batch, source, distractor[batch.read]) if both_right else rows
    places = [Redirected(site=site, redirected=None, changed=None, right=None) for site in chosen]
    before = None
    if source is not None and len(rows):
        pairs = batch.select(rows)
        before = run(model, pairs.tokens).logits[pairs.read].argmax(1)
        places = [_swapped(model, pairs, before, site, position, FromTrace(source, rows)) for site in chosen]
    return Redirection(
        places=tuple(places),
        position=position,
        split=split,
        contrast=contrast,
        n=len(rows),
        skipped_wrong=len(batch) - len(rows),
        skipped_missing=batch.dropped,
        right_before=None if before is None else share_of(before == batch.targets[batch.read][rows]),
        provenance=model.provenance,
    )


def _counted(model: Instrumented, batch: Batch, source: Trace, other: Int[Tensor, " batch"]) -> Int[Tensor, " row"]:
    """The pairs of which both prompts are answered rightly."""
    right = run(model, batch.tokens).logits[batch.read].argmax(1) == batch.targets[batch.read]
    return (right & (source.logits[batch.read].argmax(1) == other)).nonzero()[:, 0]


def _swapped(
    model: Instrumented, pairs: Batch, before: Int[Tensor, " batch"], site: Site, position: int, source: FromTrace
) -> Redirected:
    """What is answered with the counterparts' state at one place."""
    patch = Patch(site=site, positions=[position], source=source)
    after = run(model, pairs.tokens, patches=[patch]).logits[pairs.read].argmax(1)
    return Redirected(
        site=site,
        redirected=share_of(after == pairs.pairs()[1][pairs.read]),
        changed=share_of(after != before),
        right=share_of(after == pairs.targets[pairs.read]),
    )
