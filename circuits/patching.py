"""Activation patching over a grid of cells (Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024).

A cell is one site at one position (or one entry of an attention pattern). *Denoising* puts the clean activation of a
cell into the corrupted run: does it restore the answer? *Noising* puts the corrupted one into the clean run: does it
break it? Both effects are shares of the difference between the two runs: 0 is no effect, 1 is all of it. They need not
agree: what suffices is not always what is needed, and the result says where they differ.

All cells are computed together. Where the model allows it (`Resumable`), rows of the batch are cells, and each row
begins at the layer and the position of its patch: what lies before is the cached run that is being patched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.passes import Fired, check_tokens, patch_edits, run
from workbench.instrument.sites import Edit, Instrumented, Site, SiteKind, select_sites
from workbench.instrument.trace import FromTrace, Patch, Trace
from workbench.intervals import discoveries, ratio_bootstrap, sign_flip_pvalue
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.models.transformer import Past
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

Direction = Literal["denoise", "noise"]
ROWS = 4096
"""Rows of one forward pass: enough to keep the cores busy, few enough to stay in the cache of a laptop."""
HEADROOM = 1e-6
FALSE_DISCOVERY_RATE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One thing to patch."""

    site: Site
    position: int | None = None
    dest: int | None = None
    src: int | None = None

    def patch(self, source: FromTrace, rows: Int[Tensor, " rows"]) -> Patch:
        """The patch of this cell in these rows."""
        positions = None if self.position is None else [self.position]
        return Patch(site=self.site, source=source, rows=rows, positions=positions, dest=self.dest, src=self.src)

    @property
    def start(self) -> int:
        """First position that the patch touches."""
        position = self.position if self.dest is None else self.dest
        assert position is not None
        return position


@runtime_checkable
class Resumable(Protocol):
    """A model that can go on from a cached residual stream, step by step."""

    def advance(
        self,
        step: int,
        x: Float[Tensor, "batch pos d_model"],
        tokens: Int[Tensor, "batch full"],
        edits: Mapping[Site, Edit],
        past: Past | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One step, on the last positions; the earlier ones are in `past`."""
        ...

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the rows given."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PatchMap:
    """Effect of patching each cell, one at a time."""

    cells: tuple[Cell, ...]
    directions: tuple[Direction, ...]
    effect: Float[Tensor, "direction cell"]
    """Share of the difference between clean and corrupt: 0 = no effect, 1 = all of it."""
    low: Float[Tensor, "direction cell"]
    high: Float[Tensor, "direction cell"]
    patched: Float[Tensor, "direction cell"]
    """Mean metric after the patch."""
    significant: Bool[Tensor, "direction cell"]
    """Whether the mean change differs from 0, at a false-discovery rate of 5 % over the cells."""
    n: int
    dropped: int
    """Pairs that were left out because their change does not change the answer."""
    metric: str
    unit: str
    higher: str
    """What a higher value of the metric means."""
    clean: float
    corrupt: float
    position_labels: tuple[str, ...]
    provenance: Provenance

    @property
    def disagree(self) -> Bool[Tensor, " cell"]:
        """Cells whose denoising and noising intervals do not overlap."""
        if len(self.directions) < 2:
            return torch.zeros(len(self.cells), dtype=torch.bool)
        return (self.low[0] > self.high[1]) | (self.low[1] > self.high[0])

    @property
    def frame(self) -> pd.DataFrame:
        """One row a cell and direction."""
        return pd.DataFrame(list(self._rows()))

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        fields = ("site", "layer", "head", "position", "dest", "src", "direction", "effect", "low", "high", "disagree")
        return {
            "n": self.n,
            "dropped": self.dropped,
            "metric": self.metric,
            "direction": list(self.directions),
            "higher": self.higher,
            "clean": self.clean,
            "corrupt": self.corrupt,
            "disagreements": int(self.disagree.sum()),
            "cells": [{field: row[field] for field in fields} for row in self._rows()],
        }

    def tables(self) -> Sequence[Table]:
        """Heat maps: of the residual stream and its parts, of heads, of patterns entry by entry, of neurons."""
        frame = self.frame
        groups = {
            "patch_stream": frame[frame["head"].isna() & frame["neuron"].isna() & frame["dest"].isna()],
            "patch_heads": frame[frame["head"].notna() & frame["dest"].isna()],
            "patch_pattern": frame[frame["dest"].notna()],
            "patch_neurons": frame[frame["neuron"].notna()],
        }
        return [self._table(name, pd.DataFrame(group)) for name, group in groups.items() if len(group)]

    def figure(self, table: int = 0) -> object:
        """A plotly figure of one of the tables."""
        from workbench.figures import figure

        return figure(self.tables()[table])

    def _table(self, name: str, frame: pd.DataFrame) -> Table:
        axes = {"x": "at", "y": "site", "value": "effect", "low": "low", "high": "high", "facet": "direction"}
        if name == "patch_pattern":
            axes = {**axes, "x": "src_label", "y": "dest_label", "facet": "panel"}
        return Table(
            name=name,
            frame=frame.reset_index(drop=True),
            kind="heatmap",
            axes=axes,
            unit="share of clean − corrupt",
            caption=(
                f"Effect of patching on {self.metric} as a share of the difference between clean ({self.clean:.3g}) "
                f"and corrupt ({self.corrupt:.3g}); n = {self.n} pairs, 95 % paired bootstrap intervals. "
                "Denoise: the clean activation in the corrupt run; noise: the corrupt one in the clean run."
            ),
        )

    def _rows(self) -> Iterator[dict[str, object]]:
        disagree = self.disagree
        for row, direction in enumerate(self.directions):
            for column, cell in enumerate(self.cells):
                yield {
                    "site": str(cell.site),
                    "layer": cell.site.layer,
                    "head": cell.site.head,
                    "neuron": cell.site.neuron,
                    "position": cell.position,
                    "dest": cell.dest,
                    "src": cell.src,
                    "at": self._label(cell.position),
                    "dest_label": self._label(cell.dest),
                    "src_label": self._label(cell.src),
                    "panel": f"{cell.site} {direction}",
                    "direction": direction,
                    "effect": float(self.effect[row, column]),
                    "low": float(self.low[row, column]),
                    "high": float(self.high[row, column]),
                    "patched": float(self.patched[row, column]),
                    "significant": bool(self.significant[row, column]),
                    "disagree": bool(disagree[column]),
                }

    def _label(self, position: int | None) -> str:
        return "" if position is None else f"{position}: {self.position_labels[position]}"


def patch_each(
    model: Instrumented,
    batch: Batch,
    *,
    sites: str | Iterable[str | Site],
    metric: str = "logit_difference",
    direction: Literal["denoise", "noise", "both"] = "both",
    position_labels: Sequence[str] | None = None,
    seed: int = 0,
) -> PatchMap:
    """Patch every cell of the sites, one at a time, over the pairs of a batch.

    Cells are all positions of each site, and for `pattern` and `attn_scores` each (dest, src) that attention may use.
    One patched entry of a pattern leaves its row summing to something else than 1. `L0.post.n*` stands for all neurons.

    Args:
        model: any instrumented model.
        batch: pairs, as `task.sample` draws them.
        sites: as `select_sites` takes them.
        metric: name of a metric; its direction is kept in the result.
        direction: denoise, noise, or both from one call.
        position_labels: names of the positions, for axes.
        seed: of the bootstrap and the permutation test.

    Raises:
        WorkbenchError: no pairs, an unknown site or metric, or no headroom: the metric is the same on both runs.
    """
    corrupt_tokens, _ = batch.pairs()
    measure = find_metric(metric)
    if len(batch) == 0:
        raise WorkbenchError("Patching needs at least one pair; the batch is empty.")
    cells = _cells(select_sites(sites, model), model, batch)
    wanted = {cell.site.whole for cell in cells} | set(_cache_sites(model))
    traces = {
        name: run(model, tokens, record=wanted)
        for name, tokens in (("clean", batch.tokens), ("corrupt", corrupt_tokens))
    }
    values = {name: measure(trace.logits[batch.read], batch).double() for name, trace in traces.items()}
    difference = values["clean"] - values["corrupt"]
    if difference.mean().abs() < HEADROOM:
        raise WorkbenchError(
            f"No headroom: mean {metric} is {values['clean'].mean():.4g} on the clean run and "
            f"{values['corrupt'].mean():.4g} on the corrupt one (n = {len(batch)}). "
            "Choose pairs that the model tells apart."
        )
    directions: tuple[Direction, ...] = ("denoise", "noise") if direction == "both" else (direction,)
    patched, changes = [], []
    for way in directions:
        base, other = ("corrupt", "clean") if way == "denoise" else ("clean", "corrupt")
        after = _patched_metric(model, batch, cells, traces[base], traces[other], values[base], measure)
        patched.append(after.mean(0))
        # Both directions count what the patch carried over, as a share of the same difference.
        changes.append(after - values[base][:, None] if way == "denoise" else values[base][:, None] - after)
    low, high = zip(*(ratio_bootstrap(change, difference, seed=seed) for change in changes), strict=True)
    pvalues = torch.stack([sign_flip_pvalue(change, seed=seed) for change in changes])
    return PatchMap(
        cells=cells,
        directions=directions,
        effect=torch.stack([change.mean(0) / difference.mean() for change in changes]),
        low=torch.stack(low),
        high=torch.stack(high),
        patched=torch.stack(patched),
        significant=torch.stack([discoveries(row, rate=FALSE_DISCOVERY_RATE) for row in pvalues]),
        n=len(batch),
        dropped=batch.dropped,
        metric=measure.name,
        unit=measure.unit,
        higher=measure.higher,
        clean=float(values["clean"].mean()),
        corrupt=float(values["corrupt"].mean()),
        position_labels=tuple(position_labels or map(str, range(batch.tokens.shape[1]))),
        provenance=replace(model.provenance, kernel="reference"),
    )


def _cells(sites: Sequence[Site], model: Instrumented, batch: Batch) -> tuple[Cell, ...]:
    n = batch.tokens.shape[1]
    causal = model.config.causal
    cells: list[Cell] = []
    for site in sites:
        if "dest" in site.kind.dims:
            pairs = [(dest, src) for dest in range(n) for src in range(dest + 1 if causal else n)]
            cells += [Cell(site=site, dest=dest, src=src) for dest, src in pairs]
        else:
            cells += [Cell(site=site, position=position) for position in range(n)]
    return tuple(cells)


def _cache_sites(model: Instrumented) -> list[Site]:
    """What resuming needs of the run that is patched: every step's input, keys and values."""
    if not isinstance(model, Resumable):
        return []
    kinds = (SiteKind.resid_pre, SiteKind.k, SiteKind.v)
    last = Site(kind=SiteKind.resid_post, layer=model.config.n_steps - 1)
    return [last, *(Site(kind=kind, layer=layer) for layer in range(model.config.n_steps) for kind in kinds)]


def _patched_metric(
    model: Instrumented,
    batch: Batch,
    cells: Sequence[Cell],
    base: Trace,
    other: Trace,
    unpatched: Float[Tensor, " batch"],
    metric: Metric,
) -> Float[Tensor, "batch cell"]:
    """The metric of each example after each cell's patch."""
    check_tokens(base.tokens, model)
    result = unpatched[:, None].repeat(1, len(cells))
    per_pass = max(1, ROWS // len(batch))
    for chosen in _groups(cells, model, per_pass):
        group = [cells[index] for index in chosen]
        logits = _stacked_logits(model, batch, group, base, other)
        for index, of_cell in zip(chosen, logits, strict=True):
            result[:, index] = metric(of_cell, batch).double()
    return result


def _groups(cells: Sequence[Cell], model: Instrumented, per_pass: int) -> Iterator[list[int]]:
    """Cells that share a pass: at most `per_pass` of them, and, where the model resumes, with one first position."""
    by_start: dict[int, list[int]] = {}
    for index, cell in enumerate(cells):
        by_start.setdefault(_start(cell, model), []).append(index)
    for members in by_start.values():
        for first in range(0, len(members), per_pass):
            yield members[first : first + per_pass]


def _start(cell: Cell, model: Instrumented) -> int:
    return cell.start if isinstance(model, Resumable) and model.config.causal else 0


def _stacked_logits(
    model: Instrumented, batch: Batch, cells: Sequence[Cell], base: Trace, other: Trace
) -> Iterator[Float[Tensor, "reads vocab"]]:
    """Logits at the reads after each cell's patch, the cells stacked as rows."""
    if isinstance(model, Resumable):
        yield from _resumed_logits(model, batch, cells, base, other)
        return
    n = len(batch)
    every = torch.arange(n)
    patches = [cell.patch(FromTrace(other, every), every + row * n) for row, cell in enumerate(cells)]
    trace = run(model, base.tokens.repeat(len(cells), 1), patches=patches)
    yield from trace.logits[batch.read.repeat(len(cells), 1)].chunk(len(cells))


def _resumed_logits(
    model: Resumable, batch: Batch, cells: Sequence[Cell], base: Trace, other: Trace
) -> Iterator[Float[Tensor, "reads vocab"]]:
    """As `_stacked_logits`, computing only layers and positions from each patch on."""
    assert isinstance(model, Instrumented)
    start, last = _start(cells[0], model), model.config.n_steps - 1
    joins = [_joining_step(cell, last) for cell in cells]
    order = sorted(range(len(cells)), key=lambda index: joins[index])
    n = len(batch)
    patches = [
        cells[index].patch(FromTrace(other, torch.arange(n)), torch.arange(n) + row * n)
        for row, index in enumerate(order)
    ]
    fired = Fired(patches)
    x = base.logits.new_zeros(0, base.tokens.shape[1] - start, base["L0.resid_pre"].shape[-1])
    with torch.no_grad():
        for step in range(last + 1):
            joining = [patch for patch, index in zip(patches, order, strict=True) if joins[index] == step]
            fresh = base[Site(kind=SiteKind.resid_pre, layer=step)][:, start:].repeat(len(joining), 1, 1)
            # A patch of the embedding is one of the stream that it is added to.
            fresh = _patch_embeddings(fresh, joining, base, other, start, fired, offset=len(x))
            x = torch.cat([x, fresh])
            if len(x):
                x = _advance(model, step, x, base, joining, start, fired)
        logits = _finish(model, x, batch, patches, base, start, fired)
    fired.confirm()
    by_row = dict(zip(order, logits, strict=True))
    yield from (by_row[index] for index in range(len(cells)))


def _joining_step(cell: Cell, last: int) -> int:
    """Step at which a cell's rows begin."""
    if cell.site.layer is not None:
        return cell.site.layer
    return 0 if cell.site.kind in (SiteKind.embed, SiteKind.pos_embed) else last


def _patch_embeddings(
    fresh: Float[Tensor, "rows pos d_model"],
    joining: Sequence[Patch],
    base: Trace,
    other: Trace,
    start: int,
    fired: Fired,
    *,
    offset: int,
) -> Float[Tensor, "rows pos d_model"]:
    for patch in joining:
        if patch.site.kind in (SiteKind.embed, SiteKind.pos_embed):
            assert patch.rows is not None
            assert patch.positions is not None
            change = other[patch.site] - base[patch.site]
            for position in patch.positions:
                fresh[patch.rows - offset, position - start] += change[:, position]
            fired.note(patch, len(patch.rows) * fresh.shape[-1])
    return fresh


def _advance(
    model: Resumable,
    step: int,
    x: Float[Tensor, "rows pos d_model"],
    base: Trace,
    joining: Sequence[Patch],
    start: int,
    fired: Fired,
) -> Float[Tensor, "rows pos d_model"]:
    copies = len(x) // len(base.tokens)
    of_step = [patch for patch in joining if patch.site.layer == step]
    edits = patch_edits(of_step, batch=len(x), fired=fired, offsets={"pos": start, "dest": start})
    past = None
    if start:
        k, v = (base[Site(kind=kind, layer=step)][:, :start] for kind in (SiteKind.k, SiteKind.v))
        past = Past(k=k.repeat(copies, 1, 1, 1), v=v.repeat(copies, 1, 1, 1))
    return model.advance(step, x, base.tokens.repeat(copies, 1), edits, past)


def _finish(
    model: Resumable,
    x: Float[Tensor, "rows pos d_model"],
    batch: Batch,
    patches: Sequence[Patch],
    base: Trace,
    start: int,
    fired: Fired,
) -> Sequence[Float[Tensor, "reads vocab"]]:
    """Logits at the reads; those before the patched position are the base run's."""
    n, read = len(batch), batch.read
    final = [patch for patch in patches if patch.site.kind.name.startswith("ln_final")]
    edits = patch_edits(final, batch=len(x), fired=fired, offsets={"pos": start})
    unpatched = base.logits[read]
    affected = read.nonzero()[:, 1] >= start
    if final:
        logits = model.finish(x, edits).unflatten(0, (-1, n))[:, read[:, start:]]
    else:
        logits = model.finish(x.unflatten(0, (-1, n))[:, read[:, start:]], {})
    whole = unpatched.repeat(len(logits), 1, 1)
    whole[:, affected] = logits
    return list(whole)
