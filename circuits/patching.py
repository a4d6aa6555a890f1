"""Activation patching over a grid of cells (Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024).

A cell is one site at one position (or one entry of an attention pattern). *Denoising* puts the clean activation of a
cell into the corrupted run: does it restore the answer? *Noising* puts the corrupted one into the clean run: does it
break it? Both effects are shares of the difference between the two runs: 0 is no effect, 1 is all of it. They need not
agree: what suffices is not always what is needed, and the result says where they differ.

All cells are computed together. In the workbench's own transformer only what a patch can change is computed
(`circuits.cone`); of any other model whole runs are, the cells stacked as rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.cone import Cell as Cell
from circuits.cone import Cone, Rows, cached_sites, in_cone, record_run, some_logits
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, select_sites
from workbench.instrument.trace import FromTrace, Trace
from workbench.intervals import discoveries, ratio_bootstrap, sign_flip_pvalue
from workbench.metrics import Metric
from workbench.metrics import metric as find_metric
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

Direction = Literal["denoise", "noise"]
ROWS = 4096
"""Rows of one whole forward pass: enough to keep the cores busy, few enough to stay in the cache of a laptop."""
LOGITS = 2**25
"""Logits held at a time while a metric looks at them."""
HEADROOM = 1e-6
FALSE_DISCOVERY_RATE = 0.05


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judge:
    """A metric at work on one batch."""

    measure: Metric
    batch: Batch
    reference: Float[Tensor, "reads vocab"]
    """Logits of the clean run at the reads."""

    def of_run(self, trace: Trace) -> Float[Tensor, " batch"]:
        """The metric of a run."""
        return self.of(trace.logits[self.batch.read][None])[0]

    def of(self, logits: Float[Tensor, "cell reads vocab"]) -> Float[Tensor, "cell batch"]:
        """The metric from the logits at the reads."""
        return torch.stack([self.measure(each, self.batch, self.reference).double() for each in logits])

    @property
    def picked(self) -> Int[Tensor, "reads 2"] | None:
        """The tokens whose logits the metric looks at, if they are only those of the answer and the distractor."""
        if not self.measure.picks or self.batch.distractor is None:
            return None
        return torch.stack([self.batch.targets, self.batch.distractor], -1)[self.batch.read]

    def of_picked(self, logits: Float[Tensor, "cell reads 2"]) -> Float[Tensor, "cell batch"]:
        """The metric from the logits of the picked tokens alone."""
        read = self.batch.read.repeat(len(logits), 1)
        answer = torch.zeros_like(read, dtype=torch.long)
        stacked = Batch(tokens=answer, targets=answer, read=read, corrupt=answer, distractor=answer + 1)
        return self.measure(logits.flatten(0, 1), stacked).double().unflatten(0, (len(logits), -1))


def patch_each(
    model: Instrumented,
    batch: Batch,
    *,
    sites: str | Iterable[str | Site],
    metric: str | Metric = "logit_difference",
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
        metric: a metric or its name; its direction is kept in the result.
        direction: denoise, noise, or both from one call.
        position_labels: names of the positions, for axes.
        seed: of the bootstrap and the permutation test.

    Raises:
        WorkbenchError: no pairs, an unknown site or metric, or no headroom: the metric is the same on both runs.
    """
    measure = find_metric(metric)
    cells = _cells(select_sites(sites, model), model, batch)
    runs = _both_runs(model, batch, cells)
    judge = Judge(measure=measure, batch=batch, reference=runs["clean"].logits[batch.read])
    values = {name: judge.of_run(trace) for name, trace in runs.items()}
    difference = _headroom(values, measure)
    directions: tuple[Direction, ...] = ("denoise", "noise") if direction == "both" else (direction,)
    patched, changes = [], []
    for way in directions:
        base, other = ("corrupt", "clean") if way == "denoise" else ("clean", "corrupt")
        after = _patched_metric(model, cells, runs[base], runs[other], values[base], judge)
        patched.append(after.mean(0))
        # Both directions count what the patch carried over, as a share of the same difference.
        changes.append((after - values[base][:, None]) * (1 if way == "denoise" else -1))
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
        provenance=replace(model.provenance, kernel="cone" if isinstance(model, Transformer) else "reference"),
    )


def _both_runs(model: Instrumented, batch: Batch, cells: Sequence[Cell]) -> dict[str, Trace]:
    """The clean and the corrupt run, with what patching between them needs."""
    corrupt_tokens, _ = batch.pairs()
    if len(batch) == 0:
        raise WorkbenchError("Patching needs at least one pair; the batch is empty.")
    wanted = {cell.site.whole for cell in cells}
    tokens = torch.cat([batch.tokens, corrupt_tokens])
    if isinstance(model, Transformer):
        both = record_run(model, tokens, wanted | set(cached_sites(model)), batch.read.repeat(2, 1))
    else:
        both = run(model, tokens, record=wanted)
    return {"clean": _part(both, slice(None, len(batch))), "corrupt": _part(both, slice(len(batch), None))}


def _part(trace: Trace, rows: slice) -> Trace:
    """Some rows of a trace."""
    return replace(
        trace,
        tokens=trace.tokens[rows],
        logits=trace.logits[rows],
        activations={site: tensor[rows] for site, tensor in trace.activations.items()},
    )


def _headroom(values: Mapping[str, Float[Tensor, " batch"]], measure: Metric) -> Float[Tensor, " batch"]:
    """How far apart the metric holds the two runs of each pair.

    Raises:
        WorkbenchError: on average it does not.
    """
    difference = values["clean"] - values["corrupt"]
    if difference.mean().abs() < HEADROOM:
        raise WorkbenchError(
            f"No headroom: mean {measure.name} is {values['clean'].mean():.4g} on the clean run and "
            f"{values['corrupt'].mean():.4g} on the corrupt one (n = {len(difference)}). "
            "Choose pairs that the model tells apart."
        )
    return difference


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


def _patched_metric(
    model: Instrumented,
    cells: Sequence[Cell],
    base: Trace,
    other: Trace,
    unpatched: Float[Tensor, " batch"],
    judge: Judge,
) -> Float[Tensor, "batch cell"]:
    """The metric of each example after each cell's patch."""
    result = unpatched.repeat(len(cells), 1)
    coned = [index for index, cell in enumerate(cells) if isinstance(model, Transformer) and in_cone(cell)]
    if isinstance(model, Transformer) and coned:
        for reached in Cone.of(model, base, other, judge.batch.read).reach([cells[index] for index in coned]):
            for changed, values in _judge_reached(model, base, reached, judge):
                result[torch.tensor(coned)[changed]] = values
    plain = sorted(set(range(len(cells))) - set(coned))
    per_pass = max(1, ROWS // len(judge.batch))
    for first in range(0, len(plain), per_pass):
        chosen = plain[first : first + per_pass]
        result[chosen] = judge.of(_stacked_logits(model, [cells[index] for index in chosen], base, other, judge.batch))
    return result.T


def _judge_reached(
    model: Transformer, base: Trace, reached: Rows, judge: Judge
) -> Iterator[tuple[Int[Tensor, " cell"], Float[Tensor, "cell batch"]]]:
    """Cells that reached a read, with the metric of each example; reads that were not reached are the base run's."""
    read, picked = judge.batch.read, judge.picked
    unpatched = base.logits[read] if picked is None else base.logits[read].gather(1, picked)
    number = read.flatten().cumsum(0).reshape(read.shape) - 1
    at = number[reached.example[reached.row], reached.position]
    changed, cell = reached.cell[reached.row].unique(return_inverse=True)
    per_pass = max(1, LOGITS // unpatched.numel())
    for first in range(0, len(changed), per_pass):
        rows = ((cell >= first) & (cell < first + per_pass)).nonzero()[:, 0]
        x = reached.x[rows]
        logits = unpatched.repeat(len(changed[first : first + per_pass]), 1, 1)
        logits[cell[rows] - first, at[rows]] = (
            model.finish(x, {}) if picked is None else some_logits(model, x, picked, at[rows])
        )
        yield changed[first : first + per_pass], judge.of(logits) if picked is None else judge.of_picked(logits)


def _stacked_logits(
    model: Instrumented, cells: Sequence[Cell], base: Trace, other: Trace, batch: Batch
) -> Float[Tensor, "cell reads vocab"]:
    """Logits at the reads after each cell's patch: whole runs, the cells stacked as rows."""
    n = len(batch)
    every = torch.arange(n)
    patches = [cell.patch(FromTrace(other, every), every + row * n) for row, cell in enumerate(cells)]
    trace = run(model, base.tokens.repeat(len(cells), 1), patches=patches)
    return trace.logits[batch.read.repeat(len(cells), 1)].unflatten(0, (len(cells), -1))
