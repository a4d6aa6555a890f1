"""Interchange interventions: does a place carry a latent of the task (Geiger et al. 2021)?

A base prompt takes the activation that a source prompt has at one place. If the place carries a latent, and nothing
else, then the model must answer as the task would if that latent alone had the source's value. The share of prompts
that get this counterfactual answer is the interchange-intervention accuracy. Bases and sources are drawn at random, so
that all latents differ at once: a place that carries more than the latent in question gives another answer.
`circuits.alignment` asks the same of directions within a place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.patching import Cell
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace
from workbench.intervals import Estimate, share_of
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, Task, check_choice

SITES = "resid_pre,resid_mid,resid_post"
ROWS = 512
"""Prompts of one evaluating pass: bounds what is held of a model with a large vocabulary."""
UNIT = "interchange accuracy"


@runtime_checkable
class Intervenable(Task, Protocol):
    """A task that says what its answers become when one latent is given another value."""

    def with_latent(self, batch: Batch, latent: str, values: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """The targets of each prompt if the latent had this value, and all else that it depends on were as it is."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exchange:
    """Base prompts, the prompts that they take a latent's value from, and what they must then answer."""

    base: Batch
    source: Batch
    rows: Int[Tensor, " batch"]
    """Where the sources stand among the examples that were drawn from."""
    targets: Int[Tensor, "batch pos"]
    """The counterfactual answers, valid where the base is read."""
    others: Int[Tensor, "batch pos"]
    """The answers if the value came from the source of another pair: right for these by chance alone."""
    decided: bool
    """The latent decides the answer alone, so that the counterfactual answer is the source's."""
    dropped: int = 0
    """Pairs left out because the answers of base, source and counterfactual do not differ."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.base)

    def select(self, rows: Tensor | slice) -> Exchange:
        """The exchange of these pairs."""
        tensors = {name: getattr(self, name)[rows] for name in ("rows", "targets", "others")}
        return replace(self, base=self.base.select(rows), source=self.source.select(rows), **tensors)

    def parts(self, size: int) -> Iterator[Exchange]:
        """The exchange in pieces of at most `size` pairs."""
        for first in range(0, len(self), size):
            yield self.select(slice(first, first + size))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InterchangeMap:
    """What the model answers when each cell takes its activation from the source prompt, one cell at a time."""

    cells: tuple[Cell, ...]
    latent: str
    accuracy: tuple[Estimate, ...]
    """Share of prompts with the counterfactual answer, of each cell: interchange-intervention accuracy."""
    kept: tuple[float, ...]
    """Share that keeps the base's answer."""
    source: tuple[float, ...]
    """Share that gives the source's answer: that of the counterfactual where the latent decides the answer alone."""
    chance: tuple[float, ...]
    """Share with the counterfactual answer of another pair's source, where it is neither the base's nor the pair's own:
    the control."""
    decided: bool
    n: int
    dropped: int
    """Pairs left out because the answers of base, source and counterfactual do not differ."""
    base_accuracy: float
    source_accuracy: float
    ceiling: float
    """Share of pairs of which the model, left alone, answers both prompts rightly."""
    split: str
    position_labels: tuple[str, ...]
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a cell."""
        shares = pd.DataFrame({"kept": self.kept, "source": self.source, "chance": self.chance})
        places = [place_of(cell, self.position_labels) for cell in self.cells]
        accuracy = [share_columns("accuracy", share) for share in self.accuracy]
        return pd.concat([pd.DataFrame(places), pd.DataFrame(accuracy), shares], axis=1)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        fields = ("latent", "n", "dropped", "split", "base_accuracy", "source_accuracy", "ceiling", "decided")
        return {**{field: getattr(self, field) for field in fields}, "cells": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """The heat map of accuracies, and what else the prompts answered."""
        caption = (
            f"Latent {self.latent!r}: answers after each place took its activation from a source prompt; "
            f"n = {self.n} pairs of split {self.split!r}, {self.dropped} dropped because their answers do not differ. "
            f"The model, left alone, answers both prompts rightly in {self.ceiling:.1%} of pairs. 95 % intervals."
        )
        frame = self.frame
        axes = {"x": "at", "y": "site", "value": "accuracy", "low": "low", "high": "high"}
        return [
            Table(name="interchange", frame=frame, kind="heatmap", axes=axes, unit=UNIT, caption=caption),
            Table(name="interchange_answers", frame=frame, kind="table", axes={}, unit="share", caption=caption),
        ]


def interchange(
    model: Instrumented,
    task: Task,
    *,
    latent: str,
    sites: str | Iterable[str | Site] = SITES,
    n: int = 512,
    split: str = "test",
    seed: int = 0,
) -> InterchangeMap:
    """Exchange the whole activation of every place, one at a time, and count the counterfactual answers.

    Args:
        model: any instrumented model.
        task: one that says what its answers become under another value of the latent (`Intervenable`).
        latent: name of a latent of the task.
        sites: as `select_sites` takes them; every position of each.
        n: pairs of a base and a source prompt.
        split: where both are drawn from.
        seed: of the drawing.

    Raises:
        WorkbenchError: an unknown latent or site, a task that is not `Intervenable`, too few pairs, or no headroom:
            no pair whose answers differ.
    """
    pairs = draw_exchange(task, latent=latent, n=n, split=split, seed=seed)
    length = pairs.base.tokens.shape[1]
    cells = position_cells(select_sites(sites, model), range(length), length)
    alone = answered_alone(model, pairs)
    found = [_answers(model, part, cells) for part in pairs.parts(ROWS)]
    outcomes = {name: torch.cat([part[name] for part in found], 1) for name in found[0]}
    telling = ~_same(pairs.others, pairs.base.targets, pairs.base) & ~_same(pairs.others, pairs.targets, pairs.base)
    outcomes["others"] = outcomes["others"][:, telling]
    shares = {name: tuple(right.double().mean(1).tolist()) for name, right in outcomes.items()}
    return InterchangeMap(
        cells=cells,
        latent=latent,
        accuracy=tuple(map(share_of, outcomes["counterfactual"])),
        kept=shares["base"],
        source=shares["source"],
        chance=shares["others"],
        decided=pairs.decided,
        n=len(pairs),
        dropped=pairs.dropped,
        base_accuracy=float(alone[0].double().mean()),
        source_accuracy=float(alone[1].double().mean()),
        ceiling=float(alone.all(0).double().mean()),
        split=split,
        position_labels=tuple(task.position_labels),
        provenance=replace(model.provenance, kernel="reference"),
    )


def draw_exchange(task: Task, *, latent: str, n: int, split: str, seed: int | torch.Generator = 0) -> Exchange:
    """`n` pairs of a split whose base, source and counterfactual answers differ.

    Where the latent decides the answer alone, the counterfactual answer is the source's, and only the base's differs.

    Raises:
        WorkbenchError: an unknown latent, a task that is not `Intervenable`, or fewer than `n` such pairs.
    """
    pool = latent_examples(task, latent, split)
    pairs, drawn = draw_pairs(task, pool, latent, generator(seed, "interchange", split))
    if not 1 <= n <= len(pairs):
        raise WorkbenchError(
            f"Asked for {n} pairs of split {split!r}; {len(pairs)} of the {len(pool)} drawn have headroom: answers of "
            f"base, source and counterfactual that differ. Ask for 1 to {len(pairs)}."
        )
    # Only what was looked at for these n counts as dropped.
    return replace(pairs.select(slice(0, n)), dropped=int(drawn[n - 1]) + 1 - n)


def latent_examples(task: Task, latent: str, split: str) -> Batch:
    """Every example of a split, of a task that can be asked about this latent."""
    if not isinstance(task, Intervenable):
        raise WorkbenchError(
            f"Task {task.name!r} does not say what its answers become when a latent changes, so there is nothing to "
            "count. Give it a method with_latent(batch, latent, values) that returns the targets."
        )
    pool = task.examples(split)
    check_choice("latent", latent, tuple(pool.latents))
    return pool


def draw_pairs(
    task: Task,
    pool: Batch,
    latent: str,
    rng: torch.Generator,
    *,
    shuffle: Int[Tensor, " value"] | None = None,
    rounds: int = 1,
) -> tuple[Exchange, Int[Tensor, " batch"]]:
    """Every example as a base, once a round, with a source drawn for it; the pairs whose answers differ, and which."""
    assert isinstance(task, Intervenable)
    bases, rows = (torch.cat([torch.randperm(len(pool), generator=rng) for _ in range(rounds)]) for _ in range(2))
    base, source = pool.select(bases), pool.select(rows)
    values = source.latents[latent].value
    given = values if shuffle is None else shuffle[values]
    truth, targets, others = (task.with_latent(base, latent, each) for each in (values, given, given.roll(1)))
    aligned = (base.read == source.read).all(1)
    decided = bool((_same(truth, source.targets, base) | ~aligned).all())
    differ = aligned & ~_same(targets, base.targets, base) & ~_same(source.targets, base.targets, base)
    if not decided:
        differ &= ~_same(targets, source.targets, base)
    drawn = differ.nonzero()[:, 0]
    if not len(drawn):
        raise WorkbenchError(
            f"No headroom: none of {len(rows)} pairs has answers of base, source and counterfactual that differ. "
            f"Choose another latent than {latent!r}, or a split with more prompts."
        )
    pairs = Exchange(base=base, source=source, rows=rows, targets=targets, others=others, decided=decided)
    return pairs.select(drawn), drawn


def _answers(model: Instrumented, pairs: Exchange, cells: Sequence[Cell]) -> Mapping[str, Bool[Tensor, "cell batch"]]:
    """Which prompts give which answer after each cell's exchange."""
    source = run(model, pairs.source.tokens, record=[cell.site for cell in cells])
    every = torch.arange(len(pairs))
    answers = {
        "counterfactual": pairs.targets,
        "base": pairs.base.targets,
        "source": pairs.source.targets,
        "others": pairs.others,
    }
    found: dict[str, list[Tensor]] = {name: [] for name in answers}
    for cell in cells:
        logits = run(model, pairs.base.tokens, patches=[cell.patch(FromTrace(source), every)]).logits
        for name, targets in answers.items():
            found[name].append(answered(logits, targets, pairs.base))
    return {name: torch.stack(rows) for name, rows in found.items()}


def answered_alone(model: Instrumented, pairs: Exchange) -> Bool[Tensor, "two batch"]:
    """Whether the model, left alone, answers each base and each source rightly."""
    found = [
        torch.stack(
            [answered(run(model, batch.tokens).logits, batch.targets, batch) for batch in (part.base, part.source)]
        )
        for part in pairs.parts(ROWS)
    ]
    return torch.cat(found, 1)


def answered(
    logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch pos"], batch: Batch
) -> Bool[Tensor, " batch"]:
    """Which prompts get these answers, wherever they are read."""
    return _same(logits.argmax(-1), targets, batch)


def _same(left: Int[Tensor, "batch pos"], right: Int[Tensor, "batch pos"], batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether two answers are one, wherever the prompt is read."""
    return ((left == right) | ~batch.read).all(1)


def position_cells(sites: Sequence[Site], positions: Iterable[int], length: int) -> tuple[Cell, ...]:
    """One cell for each site and position, in prompts of this length."""
    positions = list(positions)
    for site in sites:
        if "pos" not in site.kind.dims:
            raise WorkbenchError(f"Site {site} has no position to exchange. Choose one like resid_pre, z or mlp_out.")
    for position in positions:
        if not 0 <= position < length:
            raise WorkbenchError(f"Position {position} is outside the prompts: they have 0 to {length - 1}.")
    return tuple(Cell(site=site, position=position) for site in sites for position in positions)


def place_of(cell: Cell, labels: Sequence[str]) -> dict[str, object]:
    """Where a cell is, as columns."""
    position = cell.start
    return {"site": str(cell.site), "position": position, "at": f"{position}: {labels[position]}"}


def share_columns(name: str, share: Estimate) -> dict[str, float]:
    """A share and its interval, as columns."""
    return {name: share.mean, "low": share.low, "high": share.high}
