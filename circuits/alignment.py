"""Distributed alignment search (Geiger et al. 2024): which directions of a place carry a latent of the task?

An orthonormal basis is learnt so that exchanging only the coordinates in it, between a base and a source prompt, gives
the counterfactual answer. What can be learnt need not be what the model uses, so every subspace comes with what the
same search reaches for values that were shuffled, with random subspaces, and with the exchange of the whole place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from circuits.interchange import (
    ROWS,
    SITES,
    UNIT,
    Exchange,
    answered,
    answered_alone,
    draw_exchange,
    draw_pairs,
    latent_examples,
    place_of,
    position_cells,
    share_columns,
)
from circuits.patching import Cell
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.intervals import Estimate, share_of
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, Task

POOL = 4096
"""Most prompts that a search learns from, and pairs that it draws at a time."""
BATCH = 128
STEPS = 200
LEARNING_RATE = 0.1
RANDOM_BASES = 8
KINDS = {"accuracy": "learnt", "shuffled": "shuffled values", "random": "random", "whole": "whole activation"}
"""What is exchanged, as figures name it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subspace:
    """Directions of one place that were learnt to carry a latent, and how well they do on prompts held out."""

    cell: Cell
    latent: str
    basis: Float[Tensor, "width dimension"]
    """Orthonormal columns."""
    accuracy: Estimate
    """Estimate of held-out prompts with the counterfactual answer, when only these directions are exchanged."""
    kept: float
    """Estimate that keeps the base's answer."""
    shuffled: Estimate
    """The same for a subspace that was learnt, and is judged, with the latent's values shuffled: the control task."""
    random: float
    """Mean accuracy of random subspaces of this dimension."""
    whole: Estimate
    """Accuracy when the whole activation is exchanged."""
    ceiling: float
    """Estimate of held-out pairs of which the model, left alone, answers both prompts rightly."""
    losses: tuple[float, ...]
    """Training loss of each step; none if no exchange at this place can change an answer."""
    n: int
    dropped: int
    splits: tuple[str, str]
    """Learnt on, judged on."""
    position_labels: tuple[str, ...]
    provenance: Provenance

    @property
    def dimension(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    @property
    def learnt(self) -> bool:
        """Whether there was anything to learn: an exchange here can change an answer."""
        return bool(self.losses)

    @property
    def selectivity(self) -> float:
        """Accuracy above that of the control task (Hewitt & Liang 2019)."""
        return self.accuracy.mean - self.shuffled.mean

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object, flat."""
        plain = ("latent", "dimension", "kept", "random", "selectivity", "ceiling", "learnt", "n", "dropped", "splits")
        return {
            **place_of(self.cell, self.position_labels),
            **{field: getattr(self, field) for field in plain},
            **share_columns("accuracy", self.accuracy),
            **{"shuffled": self.shuffled.mean, "whole": self.whole.mean, "steps": len(self.losses)},
        }

    def tables(self) -> Sequence[Table]:
        """Accuracy beside its controls, and the losses of the search."""
        random = Estimate(mean=self.random, low=self.random, high=self.random)
        shares = (self.accuracy, self.shuffled, random, self.whole)
        bars = [
            {"exchanged": name, **share_columns("accuracy", share)}
            for name, share in zip(KINDS.values(), shares, strict=True)
        ]
        losses = pd.DataFrame({"step": range(len(self.losses)), "loss": self.losses})
        ends = {"x": "exchanged", "y": "accuracy", "low": "low", "high": "high"}
        curve = {"x": "step", "y": "loss"}
        where = f"{self.dimension} directions of {self.cell.site} at {self.position_labels[self.cell.start]!r}"
        text = f"Latent {self.latent!r} in {where}; {_judged(self)}"
        return [
            Table(name="das", frame=pd.DataFrame(bars), kind="bar", axes=ends, unit=UNIT, caption=text),
            Table(name="das_losses", frame=losses, kind="curve", axes=curve, unit="cross-entropy", caption=text),
        ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DasMap:
    """Subspaces learnt at many places and in several dimensions."""

    latent: str
    subspaces: tuple[Subspace, ...]
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """One row a place and dimension."""
        return pd.DataFrame([subspace.summary() for subspace in self.subspaces])

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        return {"latent": self.latent, "cells": self.frame.to_dict("records")}

    def tables(self) -> Sequence[Table]:
        """A heat map for each dimension; accuracy by dimension beside its controls, for each place."""
        frame = self.frame
        frame["panel"] = [f"{dimension} dimensions" for dimension in frame["dimension"]]
        long = frame.rename(columns=KINDS).melt(
            ["site", "at", "dimension"], list(KINDS.values()), var_name="exchanged", value_name="share"
        )
        long["place"] = long["site"] + " at " + long["at"]
        caption = f"Subspaces for latent {self.latent!r}; {_judged(self.subspaces[0])}"
        heat = {"x": "at", "y": "site", "value": "accuracy", "low": "low", "high": "high", "facet": "panel"}
        curve = {"x": "dimension", "y": "share", "series": "exchanged", "facet": "place"}
        return [
            Table(name="das_map", frame=frame, kind="heatmap", axes=heat, unit=UNIT, caption=caption),
            Table(name="das_dimensions", frame=long, kind="curve", axes=curve, unit=UNIT, caption=caption),
        ]


def das(
    model: Instrumented,
    task: Task,
    *,
    latent: str,
    site: str | Site,
    dimension: int,
    position: int | None = None,
    steps: int = STEPS,
    n: int = 512,
    train_split: str = "train",
    test_split: str = "test",
    seed: int = 0,
) -> Subspace:
    """Learn the directions of one place whose exchange gives the counterfactual answers.

    Args:
        model: any instrumented model whose forward pass can be differentiated.
        task: one that says what its answers become under another value of the latent (`Intervenable`).
        latent: name of a latent of the task.
        site: one place; of `q`, `k`, `v` and `z` one head.
        dimension: number of directions.
        position: None takes the one where the latent is first determined.
        steps: of the search, and as many for its control.
        n: pairs that it is judged on.
        train_split: where it is learnt.
        test_split: where it is judged; shares no prompt with `train_split`.
        seed: of the pairs, the bases at the start and the shuffled values.

    Raises:
        WorkbenchError: what `interchange` raises; a dimension that the place does not have; splits that share prompts;
            or no headroom: no exchange at this place can change an answer.
    """
    search = _search(
        model, task, latent=latent, steps=steps, n=n, train_split=train_split, test_split=test_split, seed=seed
    )
    place = search.pool.latents[latent].position if position is None else position
    [cell, *more] = position_cells(select_sites([site], model), [place], search.pool.tokens.shape[1])
    if more:
        raise WorkbenchError(
            f"Site {site} stands for {1 + len(more)} places, and one is searched. Name it: {cell.site}."
        )
    found = _align(search, cell, dimension)
    if not found.learnt:
        raise WorkbenchError(
            f"No headroom at {cell.site} at position {place}: no exchange there changes an answer, because it is the "
            "same in every prompt or nothing reads it. Choose another place; interchange(…) shows which count."
        )
    return found


def das_map(
    model: Instrumented,
    task: Task,
    *,
    latent: str,
    sites: str | Iterable[str | Site] = SITES,
    positions: Sequence[int] | None = None,
    dimensions: Sequence[int] = (2, 4, 8, 16),
    steps: int = STEPS,
    n: int = 512,
    train_split: str = "train",
    test_split: str = "test",
    seed: int = 0,
    progress: Callable[[int, int, Subspace], None] | None = None,
) -> DasMap:
    """`das` at every place of the sites and in every dimension.

    Places at which no exchange can change an answer are kept, not learnt: `Subspace.learnt` says so.

    Args:
        model, task, latent, steps, n, train_split, test_split, seed: as `das` takes them.
        sites: as `select_sites` takes them.
        positions: None takes all.
        dimensions: numbers of directions.
        progress: told after each search how many are done, how many there are, and what it found.
    """
    search = _search(
        model, task, latent=latent, steps=steps, n=n, train_split=train_split, test_split=test_split, seed=seed
    )
    length = search.pool.tokens.shape[1]
    cells = position_cells(select_sites(sites, model), range(length) if positions is None else positions, length)
    wanted = list(itertools.product(cells, dimensions))
    found: list[Subspace] = []
    for cell, dimension in wanted:
        found.append(_align(search, cell, dimension))
        if progress is not None:
            progress(len(found), len(wanted), found[-1])
    if not found:
        raise WorkbenchError(
            "Nothing to search: name at least one position and one dimension, such as dimensions=(2, 4)."
        )
    return DasMap(latent=latent, subspaces=tuple(found), provenance=found[0].provenance)


def exchange_coordinates(
    base: Float[Tensor, "batch width"], source: Float[Tensor, "batch width"], basis: Float[Tensor, "width dimension"]
) -> Float[Tensor, "batch width"]:
    """The base with its coordinates in an orthonormal basis set to the source's."""
    basis = basis.to(base)
    return base + (source - base) @ basis @ basis.T


def exchanged_logits(
    model: Instrumented,
    pairs: Exchange,
    cell: Cell,
    vectors: Float[Tensor, "batch width"],
    basis: Float[Tensor, "width dimension"],
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of the bases with the sources' coordinates at the cell; differentiable in the basis.

    Args:
        model: any instrumented model.
        pairs: whose bases are run.
        cell: a site at one position.
        vectors: what the sources hold there.
        basis: orthonormal columns.

    Raises:
        WorkbenchError: the pass did not meet the cell, or not once.
    """
    written = 0

    def edit(tensor: Tensor) -> Tensor:
        nonlocal written
        changed = tensor.clone()
        _at(changed, cell)[:] = exchange_coordinates(_at(tensor, cell), vectors, basis)
        written += len(changed)
        return changed

    logits = model.forward(pairs.base.tokens, {cell.site.whole: edit})
    if written != len(pairs):
        raise WorkbenchError(
            f"The exchange at {cell.site} wrote {written} rows of {len(pairs)}: the pass did not meet it once."
        )
    return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search:
    """What all searches of one call share."""

    model: Instrumented
    task: Task
    latent: str
    pool: Batch
    judged: Exchange
    control: Exchange
    shuffle: Int[Tensor, " value"]
    steps: int
    splits: tuple[str, str]
    seed: int

    @cached_property
    def ceiling(self) -> float:
        return float(answered_alone(self.model, self.judged).all(0).double().mean())


def _search(
    model: Instrumented, task: Task, *, latent: str, steps: int, n: int, train_split: str, test_split: str, seed: int
) -> _Search:
    if steps < 1:
        raise WorkbenchError(f"A search needs at least one step, got {steps}. Try {STEPS}.")
    pool, held_out = latent_examples(task, latent, train_split), latent_examples(task, latent, test_split)
    if shared := set(map(tuple, pool.tokens.tolist())) & set(map(tuple, held_out.tokens.tolist())):
        raise WorkbenchError(
            f"Splits {train_split!r} and {test_split!r} share {len(shared)} prompts. "
            "Judge a subspace on prompts that it was not learnt from."
        )
    values = torch.cat([batch.latents[latent].value for batch in (pool, held_out)]).unique()
    shuffle = torch.arange(int(values.max()) + 1)
    # One cycle through all values, so that none keeps its own.
    order = values[torch.randperm(len(values), generator=generator(seed, "shuffled values"))]
    shuffle[order] = order.roll(1)
    judged = draw_exchange(task, latent=latent, n=n, split=test_split, seed=seed)
    control, _ = draw_pairs(task, held_out, latent, generator(seed, "control", test_split), shuffle=shuffle)
    few = torch.randperm(len(pool), generator=generator(seed, "pool"))[:POOL]
    return _Search(
        model=model,
        task=task,
        latent=latent,
        pool=pool.select(few),
        judged=judged,
        control=control.select(slice(0, n)),
        shuffle=shuffle,
        steps=steps,
        splits=(train_split, test_split),
        seed=seed,
    )


def _align(search: _Search, cell: Cell, dimension: int) -> Subspace:
    """Learn and judge one subspace with its controls."""
    if cell.site.neuron is not None:
        raise WorkbenchError(f"Site {cell.site} has no directions. Search the layer's neurons: {cell.site.whole}.")
    vectors = _vectors(search.model, search.pool, cell)
    width = vectors.shape[1]
    if not 1 <= dimension <= width:
        raise WorkbenchError(f"Dimension {dimension} is not one of {cell.site}: it has 1 to {width} dimensions.")
    basis, losses = _learn(search, cell, dimension, vectors, None)
    controlled, _ = _learn(search, cell, dimension, vectors, search.shuffle)
    rng = generator(search.seed, "random subspaces", dimension)
    bases = [_orthonormal(torch.randn(width, dimension, generator=rng)) for _ in range(RANDOM_BASES)]
    random = [_judge(search, cell, each)[0].mean for each in bases]
    accuracy, kept = _judge(search, cell, basis)
    return Subspace(
        cell=cell,
        latent=search.latent,
        basis=basis,
        accuracy=accuracy,
        kept=kept,
        shuffled=_judge(search, cell, controlled, search.control)[0],
        random=sum(random) / len(random),
        whole=_judge(search, cell, torch.eye(width))[0],
        ceiling=search.ceiling,
        losses=losses,
        n=len(search.judged),
        dropped=search.judged.dropped,
        splits=search.splits,
        position_labels=tuple(search.task.position_labels),
        provenance=replace(search.model.provenance, kernel="reference"),
    )


def _learn(
    search: _Search,
    cell: Cell,
    dimension: int,
    vectors: Float[Tensor, "example width"],
    shuffle: Int[Tensor, " value"] | None,
) -> tuple[Float[Tensor, "width dimension"], tuple[float, ...]]:
    """The basis with the least cross-entropy of the counterfactual answers, by Adam along a falling rate."""
    rng = generator(search.seed, "das", "true" if shuffle is None else "shuffled", str(cell), dimension)
    raw = torch.randn(vectors.shape[1], dimension, generator=rng).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=LEARNING_RATE)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=search.steps)
    losses: list[float] = []
    for pairs in itertools.islice(_stream(search, rng, shuffle), search.steps):
        with torch.enable_grad():
            logits = exchanged_logits(search.model, pairs, cell, vectors[pairs.rows], _orthonormal(raw))
            loss = cross_entropy(logits[pairs.base.read], pairs.targets[pairs.base.read])
            [raw.grad] = torch.autograd.grad(loss, [raw])
        if not losses and not raw.grad.any():
            break
        optimizer.step()
        rate.step()
        losses.append(float(loss.detach()))
    return _orthonormal(raw.detach()), tuple(losses)


def _stream(search: _Search, rng: torch.Generator, shuffle: Int[Tensor, " value"] | None) -> Iterator[Exchange]:
    """Training pairs without end, drawn anew each time that they have been used up."""
    rounds = math.ceil(POOL / len(search.pool))
    while True:
        pairs, _ = draw_pairs(search.task, search.pool, search.latent, rng, shuffle=shuffle, rounds=rounds)
        yield from pairs.parts(BATCH)


def _judge(
    search: _Search, cell: Cell, basis: Float[Tensor, "width dimension"], pairs: Exchange | None = None
) -> tuple[Estimate, float]:
    """Estimate of counterfactual answers, and of the base's, over held-out pairs."""
    right, kept = [], []
    with torch.no_grad():
        for part in (pairs or search.judged).parts(ROWS):
            vectors = _vectors(search.model, part.source, cell)
            logits = exchanged_logits(search.model, part, cell, vectors, basis)
            right.append(answered(logits, part.targets, part.base))
            kept.append(answered(logits, part.base.targets, part.base))
    return share_of(torch.cat(right)), float(torch.cat(kept).double().mean())


def _vectors(model: Instrumented, batch: Batch, cell: Cell) -> Float[Tensor, "batch width"]:
    """What the cell holds for each prompt."""
    parts = [run(model, tokens, record=[cell.site]) for tokens in batch.tokens.split(ROWS)]
    return torch.cat([_at(part.activations[cell.site.whole], cell) for part in parts])


def _at(tensor: Tensor, cell: Cell) -> Tensor:
    """The view of a whole site's tensor at the cell."""
    here = tensor[:, cell.start]
    return here if cell.site.head is None else here[:, cell.site.head]


def _orthonormal(raw: Float[Tensor, "width dimension"]) -> Float[Tensor, "width dimension"]:
    return torch.linalg.qr(raw).Q


def _judged(found: Subspace) -> str:
    return (
        f"judged on n = {found.n} pairs of split {found.splits[1]!r}, {found.dropped} dropped because their answers do "
        f"not differ; learnt on split {found.splits[0]!r}. The model, left alone, answers both prompts rightly in "
        f"{found.ceiling:.1%} of pairs. 95 % intervals."
    )
