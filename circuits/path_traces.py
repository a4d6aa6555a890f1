"""Many inputs of a search transformer, traced: the share that path merging explains, beside its controls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
import torch

from circuits.path_ablation import Ablations, ablate_operations
from circuits.path_controls import CONTROLS, MODEL, SWEEP, trace_variants
from circuits.path_merging import PathTrace
from circuits.search_prompts import SearchPrompt
from workbench.intervals import columns_of, mean_of, share_of
from workbench.models.planted_search import path_doubling
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table

JUDGED = 2
"""Least lookahead at which a trace says something: below, the goal is a child of the start or no child is wrong."""
UNEXPLAINED = "none"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TracedInput:
    """One prompt: the model's trace and those of its controls and other thresholds, by name."""

    lookahead: int
    traces: Mapping[str, PathTrace]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PathTraces:
    """What path merging explains of a model."""

    inputs: tuple[TracedInput, ...]
    skipped: int
    """Prompts in which every vertex name occurs, so that features cannot be perturbed."""
    ablations: Ablations | None
    """Over the inputs that are judged; None without such."""
    seconds_per_input: float
    """Wall time, controls and other thresholds included."""
    provenance: Provenance

    @property
    def frame(self) -> pd.DataFrame:
        """Explained shares: one row a lookahead and variant; lookahead None is all that are judged."""
        return pd.DataFrame(list(self._shares()))

    def share(self, variant: str, lookahead: int | None = None) -> Mapping[str, object] | None:
        """The row of a variant: at one lookahead, or over all that are judged."""
        return next((row for row in self._shares() if (row["variant"], row["lookahead"]) == (variant, lookahead)), None)

    def summary(self) -> dict[str, object]:
        """The findings as one JSON object; shares by the strict merge unless the name says otherwise."""
        rows = list(self._shares())
        of_model = [row for row in rows if row["variant"] == MODEL]
        judged = {row["variant"]: row for row in rows if row["lookahead"] is None}

        def by_lookahead(name: str) -> dict[str, object]:
            return {str(row["lookahead"]): row[name] for row in of_model if row["lookahead"] is not None}

        def shares(names: Sequence[str], column: str) -> dict[str, object]:
            return {name: judged[name][column] for name in names if name in judged}

        causal = None
        if self.ablations is not None:
            causal = {"conditions": self.ablations.rows(), "chance": self.ablations.chance}
            causal |= {"operations": self.ablations.operations}
        return {
            "explained": by_lookahead("explained"),
            "explained_strict": by_lookahead("explained_strict"),
            "judged_from": JUDGED,
            "judged": judged.get(MODEL),
            "controls": shares(CONTROLS, "explained_strict"),
            "controls_published_merge": shares(CONTROLS, "explained"),
            "thresholds": shares(SWEEP, "explained_strict"),
            "thresholds_published_merge": shares(SWEEP, "explained"),
            "causal": causal,
            "rows": rows,
            "table": self._crossed(),
            "layers": self._layers(),
            "kinds": self._kinds(),
            "merges": self._merges(),
            "skipped": self.skipped,
            "seconds_per_input": self.seconds_per_input,
        }

    def tables(self) -> Sequence[Table]:
        """Explained shares, right and explained, causes, longest paths, merges, and the causal test."""
        return trace_tables(self.summary())

    def _shares(self) -> Iterator[dict[str, object]]:
        groups: dict[tuple[str, int | None], list[PathTrace]] = {}
        for each in self.inputs:
            for variant, trace in each.traces.items():
                groups.setdefault((variant, each.lookahead), []).append(trace)
                if each.lookahead >= JUDGED:
                    groups.setdefault((variant, None), []).append(trace)
        for (variant, lookahead), traces in groups.items():
            row: dict[str, object] = {"variant": variant, "lookahead": lookahead, "n": len(traces)}
            for name in ("explained", "explained_strict", "correct"):
                row |= columns_of(name, share_of(torch.tensor([getattr(trace, name) for trace in traces])))
            yield row

    def _of_model(self, lookahead: int | None = None) -> list[PathTrace]:
        return [each.traces[MODEL] for each in self.inputs if lookahead in (None, each.lookahead)]

    def _crossed(self) -> list[dict[str, object]]:
        found = Counter(
            (each.lookahead, each.traces[MODEL].correct, each.traces[MODEL].explained_strict) for each in self.inputs
        )
        return [
            {"lookahead": lookahead, "right": right, "explained_strict": explained, "inputs": n}
            for (lookahead, right, explained), n in sorted(found.items())
        ]

    def _kinds(self) -> list[dict[str, object]]:
        found = Counter(
            (operation.layer, operation.causes[0].kind if operation.causes else UNEXPLAINED)
            for trace in self._of_model()
            for operation in trace.strict.operations
        )
        return [{"layer": layer, "cause": kind, "operations": n} for (layer, kind), n in sorted(found.items())]

    def _layers(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for lookahead in sorted({each.lookahead for each in self.inputs}):
            traces = [trace for trace in self._of_model(lookahead) if trace.explained_strict]
            for layer in range(len(traces[0].strict.held) if traces else 0):
                longest = [max(map(trace.prompt.depth, trace.strict.held[layer].values())) for trace in traces]
                row = {"lookahead": lookahead, "layer": layer, "longest_median": median(longest)}
                rows.append({**row, "longest_most": max(longest), "inputs": len(longest)})
        return rows

    def _merges(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for lookahead in sorted({each.lookahead for each in self.inputs}):
            traces = self._of_model(lookahead)
            maximal = sum(trace.strict.maximal for trace in traces)
            places = maximal + sum(trace.strict.short for trace in traces)
            share = share_of(torch.arange(places) < maximal) if places else None
            row: dict[str, object] = {"lookahead": lookahead, "inputs": len(traces)}
            for name, counts in (
                ("counting", [len(trace.operations) for trace in traces]),
                ("merged", [len(trace.strict.operations) for trace in traces]),
            ):
                row |= columns_of(name, mean_of(torch.tensor(counts, dtype=torch.float)))
            rows.append(row | columns_of("maximal", share) | {"places": places})
        return rows


def trace_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary, which may have been kept."""
    by_lookahead = pd.DataFrame([row for row in summary["rows"] if row["lookahead"] is not None])
    n = sum(row["n"] for row in summary["rows"] if row["variant"] == MODEL and row["lookahead"] is not None)
    counted = f"n = {n} inputs, {summary['skipped']} skipped for want of an unused vertex name"
    shares = [
        Table(
            name=name,
            frame=by_lookahead,
            kind="curve",
            axes={"x": "lookahead", "series": "variant", "y": name, "low": f"{name}_low", "high": f"{name}_high"},
            unit="share of inputs",
            caption=f"Inputs that path merging explains, {says} merge ({counted}; 95 % score intervals).",
        )
        for name, says in (("explained", "published"), ("explained_strict", "strict"))
    ]
    others = {
        "right_and_explained": ("table", "inputs", "Inputs by whether they are answered rightly and explained by the"
        " strict merge"),
        "causes": ("kinds", "operations", "Causes that let merged operations in, by layer"),
        "longest_paths": ("layers", "edges", "Longest path of the sets that flow into the answer, by layer"),
        "merges": ("merges", "operations", "Operations of an input, and the share of maximal merges"),
    }  # fmt: skip
    tables = [
        Table(
            name=name,
            frame=pd.DataFrame(summary[kept]),
            kind="table",
            axes={},
            unit=unit,
            caption=f"{says} ({counted}).",
        )
        for name, (kept, unit, says) in others.items()
        if summary[kept]
    ]
    return [*_judged_table(summary, counted), *shares, *tables, *_causal_table(summary["causal"])]


def _judged_table(summary: Mapping[str, Any], counted: str) -> Iterator[Table]:
    """All judged inputs together, by both merges: where model and controls stand beside each other."""
    judged = [row for row in summary["rows"] if row["lookahead"] is None]
    merges = {"strict": "explained_strict", "published": "explained"}
    rows = [
        {
            **{"variant": row["variant"], "merge": merge, "n": row["n"]},
            **{f"explained{end}": row[f"{name}{end}"] for end in ("", "_low", "_high")},
        }
        for row in judged
        for merge, name in merges.items()
    ]
    if rows:
        yield Table(
            name="explained_judged",
            frame=pd.DataFrame(rows),
            kind="bar",
            axes={
                **{"x": "variant", "y": "explained", "series": "merge"},
                **{"low": "explained_low", "high": "explained_high"},
            },
            unit="share of inputs",
            caption=f"Inputs of lookahead {summary['judged_from']} or more that path merging explains, by both merges "
            f"({counted}, {rows[0]['n']} judged; 95 % score intervals).",
        )


def _causal_table(causal: Mapping[str, Any] | None) -> Iterator[Table]:
    if causal is not None:
        conditions = causal["conditions"]
        yield Table(
            name="ablated_operations",
            frame=pd.DataFrame(conditions),
            kind="bar",
            axes={
                **{"x": "condition", "y": "accuracy", "series": "ablation"},
                **{"low": "accuracy_low", "high": "accuracy_high"},
            },
            unit="accuracy",
            caption=(
                "Accuracy with attention entries at zero or at their mean over prompts: all but the explained "
                "operations (kept), the explained ones (removed), as many others into the same rows, or all. "
                f"n = {conditions[0]['n']}, {causal['operations']:.1f} explained operations each, chance "
                f"{causal['chance']:.2f}; 95 % score intervals."
            ),
        )


def trace_inputs(
    model: Transformer,
    untrained: Transformer,
    prompts: Sequence[tuple[int, SearchPrompt]],
    *,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
) -> PathTraces:
    """Trace inputs and their controls.

    Args:
        model: one head a layer, trained on graph search.
        untrained: the same before training.
        prompts: lookahead and prompt of each.
        seed: of the controls.
        on_progress: told the share that is done.

    Raises:
        WorkbenchError: no prompt can be traced, or the model cannot be.
    """
    traced, skipped, begun = [], 0, time.monotonic()
    hand_built: Transformer | None = None
    for done, (lookahead, prompt) in enumerate(prompts, 1):
        if prompt.unused is None:
            skipped += 1
            continue
        hand_built = hand_built or path_doubling(prompt.layout)
        variants = trace_variants(model, untrained, hand_built, prompt, seed=seed + done)
        traced.append(TracedInput(lookahead=lookahead, traces=variants))
        on_progress(done / len(prompts))
    if not traced:
        raise WorkbenchError(
            f"None of {len(prompts)} prompts leaves a vertex name unused to perturb features with. Trace a smaller "
            "lookahead, or train with a spare name."
        )
    judged = [each.traces[MODEL] for each in traced if each.lookahead >= JUDGED]
    return PathTraces(
        inputs=tuple(traced),
        skipped=skipped,
        ablations=ablate_operations(model, judged, seed=seed) if judged else None,
        seconds_per_input=(time.monotonic() - begun) / len(traced),
        provenance=model.provenance,
    )
