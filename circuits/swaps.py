"""One place, one change: what a model answers when something else is put at a single place of a run.

Where `patch_each` asks every cell the same question, a swap asks one cell any question: its activation comes from the
counterfactual, from any other prompt, or is zero, in one prompt or over many. The change of the metric is also given as
a share of the way from the run that is changed to the other run of the pair, so that it can be read beside a PatchMap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.patching import HEADROOM, Cell
from workbench.instrument.answers import Answers, top_answers
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented
from workbench.instrument.trace import FromTrace, Patch, Source, Trace, Zero
from workbench.intervals import Estimate, paired_bootstrap, ratio_bootstrap
from workbench.metrics import metric as find_metric
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch

Base = Literal["clean", "corrupt"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Swap:
    """What putting something else at one place does to a run."""

    cell: Cell
    base: Base
    """The run that was changed."""
    before: Answers
    after: Answers
    metric: str
    unit: str
    metric_before: float
    metric_after: float
    change: Estimate
    """After minus before, in the metric's unit."""
    share: Estimate | None
    """The change as a share of the way from the changed run to the other of the pair; None if they do not differ."""
    n: int
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object."""
        cell = self.cell
        return {
            "site": str(cell.site),
            "position": cell.position,
            "dest": cell.dest,
            "src": cell.src,
            "base": self.base,
            "metric": self.metric,
            "before": self.metric_before,
            "after": self.metric_after,
            **{f"change{end}": getattr(self.change, part) for part, end in ENDS.items()},
            **{f"share{end}": self.share and getattr(self.share, part) for part, end in ENDS.items()},
            "n": self.n,
        }

    def tables(self, names: Sequence[str] | None = None) -> Sequence[Table]:
        """Top answers of the first example before and after; `names` are the tokens', if they have any."""
        rows = [
            {"run": run, "answer": names[token] if names else str(token), "probability": probability}
            for run, answers in (("before", self.before), ("after", self.after))
            for token, probability in zip(answers.tokens[0].tolist(), answers.probabilities[0].tolist(), strict=True)
        ]
        return [
            Table(
                name="swap_answers",
                frame=pd.DataFrame(rows),
                kind="bar",
                axes={"x": "answer", "y": "probability", "series": "run"},
                unit="probability",
                caption=f"Top answers before and after the change at {self.cell.site}; first of n = {self.n} prompts.",
            )
        ]


ENDS = {"mean": "", "low": "_low", "high": "_high"}


def swap(
    model: Instrumented,
    batch: Batch,
    cell: Cell,
    *,
    source: Literal["counterfactual", "zero"] | Int[Tensor, "rows pos"] = "counterfactual",
    base: Base = "clean",
    metric: str = "logit_difference",
) -> Swap:
    """Put something else at one place.

    Args:
        model: any instrumented model.
        batch: pairs; the metric compares their two answers.
        cell: the place.
        source: `counterfactual` takes the activation from the other run of each pair; tokens take it from those
            prompts, one for each pair or one for all; `zero` puts zero there.
        base: the run that is changed.
        metric: name of a metric.

    Raises:
        WorkbenchError: no pairs, a place that the model lacks, or prompts that do not fit the pairs.
    """
    measure = find_metric(metric)
    prompts = {"clean": batch.tokens, "corrupt": batch.pairs()[0]}
    other = prompts["corrupt" if base == "clean" else "clean"]
    unpatched, reference = run(model, prompts[base]), run(model, other, record=[cell.site])
    filling = _source(model, batch, cell, source, reference)
    positions = None if cell.position is None else [cell.position]
    patch = Patch(site=cell.site, source=filling, positions=positions, dest=cell.dest, src=cell.src)
    patched = run(model, prompts[base], patches=[patch])
    before, after, opposite = (
        measure(trace.logits[batch.read], batch).double() for trace in (unpatched, patched, reference)
    )
    low, high = paired_bootstrap(after - before)
    return Swap(
        cell=cell,
        base=base,
        before=top_answers(unpatched.logits, batch.read),
        after=top_answers(patched.logits, batch.read),
        metric=measure.name,
        unit=measure.unit,
        metric_before=float(before.mean()),
        metric_after=float(after.mean()),
        change=Estimate(mean=float((after - before).mean()), low=float(low), high=float(high)),
        share=_share(after - before, opposite - before),
        n=len(batch),
        provenance=unpatched.provenance,
    )


def _source(model: Instrumented, batch: Batch, cell: Cell, source: str | Tensor, reference: Trace) -> Source:
    if isinstance(source, str):
        return Zero() if source == "zero" else FromTrace(reference)
    if source.shape[1:] != batch.tokens.shape[1:] or len(source) not in (1, len(batch)):
        raise WorkbenchError(
            f"Prompts of shape {tuple(source.shape)} cannot fill a batch of shape {tuple(batch.tokens.shape)}: "
            "give one for each pair, or one for all, of the same length."
        )
    rows = torch.arange(len(batch)) if len(source) > 1 else torch.zeros(len(batch), dtype=torch.long)
    return FromTrace(run(model, source, record=[cell.site]), rows)


def _share(change: Float[Tensor, " batch"], way: Float[Tensor, " batch"]) -> Estimate | None:
    if abs(float(way.mean())) < HEADROOM:
        return None
    low, high = ratio_bootstrap(change, way)
    return Estimate(mean=float(change.mean() / way.mean()), low=float(low), high=float(high))
