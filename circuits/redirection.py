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

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace, Patch
from workbench.intervals import Estimate, share_of
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

SITES = "resid_post"


@dataclass(frozen=True, kw_only=True, slots=True)
class Redirected:
    """What the other prompt's state does at one place."""

    site: Site
    position: int
    redirected: Estimate
    """Share that gives the other prompt's answer."""
    changed: Estimate
    """Share whose answer is not the one before."""
    right: Estimate
    """Share that is answered rightly."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Redirection:
    """Every place of one kind of pair."""

    places: tuple[Redirected, ...]
    split: str
    contrast: str
    """In what the two prompts of a pair differ."""
    n: int
    """Pairs that count."""
    skipped_wrong: int
    """Pairs left out because the model, left alone, answers one of the two wrongly; 0 if that was not asked for."""
    skipped_missing: int
    """Prompts without such a counterpart."""
    right_before: Estimate
    """Share answered rightly before the swap."""
    provenance: Provenance

    @property
    def best(self) -> Redirected:
        """The place that redirects most; the earliest of equals."""
        return max(self.places, key=lambda place: place.redirected.mean)

    def at(self, site: Site, position: int) -> Redirected:
        """One place.

        Raises:
            WorkbenchError: it is not among them.
        """
        for place in self.places:
            if (place.site, place.position) == (site, position):
                return place
        known = ", ".join(f"{place.site} at {place.position}" for place in self.places)
        raise WorkbenchError(f"{site} at {position} was not looked at; these were: {known}.")

    @property
    def frame(self) -> pd.DataFrame:
        """One row a place."""
        return pd.DataFrame(
            [
                {
                    "site": str(place.site),
                    "position": place.position,
                    **_columns("redirected", place.redirected),
                    **_columns("changed", place.changed),
                    **_columns("right", place.right),
                }
                for place in self.places
            ]
        )

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        counts = ("split", "contrast", "n", "skipped_wrong", "skipped_missing")
        before = _columns("right_before", self.right_before)
        return {**{name: getattr(self, name) for name in counts}, **before, "cells": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """All shares by place."""
        caption = (
            f"The other prompt's state at one place; pairs of split {self.split!r} that differ in {self.contrast}. "
            f"n = {self.n}; left out: {self.skipped_wrong} pairs with a wrong answer, {self.skipped_missing} prompts "
            f"without a counterpart. Right before: {self.right_before.mean:.3f}. 95 % score intervals."
        )
        name = f"redirection_{self.contrast}_{self.split}"
        return [Table(name=name, frame=self.frame, kind="table", axes={}, unit="share", caption=caption)]


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
        WorkbenchError: no pairs, or none that counts.
    """
    corrupt, distractor = batch.pairs()
    if not len(batch):
        raise WorkbenchError(f"No prompt of split {split!r} has a counterpart of kind {contrast!r}.")
    answer, other = batch.targets[batch.read], distractor[batch.read]
    chosen = select_sites(sites, model)
    source = run(model, corrupt, record=chosen)
    before = run(model, batch.tokens).logits[batch.read].argmax(1)
    counts = torch.ones_like(before, dtype=torch.bool)
    if both_right:
        counts = (before == answer) & (source.logits[batch.read].argmax(1) == other)
    if not counts.any():
        raise WorkbenchError(
            f"The model answers both prompts rightly in none of {len(batch)} pairs of split {split!r} "
            f"({contrast!r} changed): there is nothing to redirect. Take a later checkpoint."
        )

    def swapped(site: Site) -> Redirected:
        patch = Patch(site=site, positions=[position], source=FromTrace(source))
        after = run(model, batch.tokens, patches=[patch]).logits[batch.read].argmax(1)
        return Redirected(
            site=site,
            position=position,
            redirected=share_of((after == other)[counts]),
            changed=share_of((after != before)[counts]),
            right=share_of((after == answer)[counts]),
        )

    return Redirection(
        places=tuple(swapped(site) for site in chosen),
        split=split,
        contrast=contrast,
        n=int(counts.sum()),
        skipped_wrong=int((~counts).sum()),
        skipped_missing=batch.dropped,
        right_before=share_of((before == answer)[counts]),
        provenance=model.provenance,
    )


def _columns(name: str, share: Estimate) -> dict[str, float]:
    return {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}
