"""The measures of a reasoner as pages and report show them: curves with readable names, causes by site, shares as bars.

`ReasoningMeasures.tables` holds every series; here are the few that a person compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from apps.reasoning import SAYS, ReasoningMeasures
from workbench.instrument.sites import Site
from workbench.tables import Table

Rows = Sequence[Mapping[str, Any]]
UNSEEN = ("test", "ood", "hard")
"""Splits of inferred facts that training does not see."""
COLUMNS = ("step", "split", "site", "cause", "value", "low", "high", "n", "skipped")


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Some measures on one axis."""

    title: str
    measures: Mapping[str, str]
    """Measures, and how their series are called."""
    unit: str = "fraction"
    splits: tuple[str, ...] = ()
    """The splits that are shown; none: all that were measured."""
    at_middle: bool = False
    """Whether only the middle site is shown, of measures that have a site."""


MRR = "mean reciprocal rank"
PANELS = {
    "reasoning_bridge": Panel(title="bridge at r1", measures={"mrr_bridge": ""}, unit=MRR, splits=UNSEEN),
    "reasoning_relation": Panel(title="second relation at r2", measures={"mrr_relation": ""}, unit=MRR, splits=UNSEEN),
    "reasoning_v1": Panel(title="value at e1", measures={"mrr_v1": ""}, unit=MRR, splits=UNSEEN),
    "reasoning_v2": Panel(title="value at e2", measures={"mrr_v2": ""}, unit=MRR, splits=UNSEEN),
    "reasoning_labels": Panel(title="labels at attr", measures={"label_recall": ""}, splits=UNSEEN),
    "reasoning_strength": Panel(title="causal strength", measures={"strength": ""}, splits=UNSEEN, at_middle=True),
    "reasoning_redirect": Panel(
        title="redirect rate", measures={"redirect": "another bridge", "control": "same bridge"}, at_middle=True
    ),
    "reasoning_transplant": Panel(
        title="which hop is missing",
        measures={"transplant_before": "left alone", "transplant": "ID state"},
        at_middle=True,
    ),
    "reasoning_two_calls": Panel(title="two calls", measures={"two_calls": ""}),
    "reasoning_efficiency": Panel(title="efficiency", measures={"efficiency": ""}, unit="logits per unit of norm"),
}
"""What can be shown through training, by the name of its table."""


def curve_tables(found: ReasoningMeasures) -> dict[str, Table]:
    """A table of curves for every panel of which anything was measured."""
    tables = {name: _curves(name, panel, found) for name, panel in PANELS.items()}
    return {name: table for name, table in tables.items() if not table.frame.empty}


def middle_site(found: ReasoningMeasures) -> str | None:
    """Where chains are redirected; of a comparison the stream after the middle layer. None of a model of one layer."""
    if found.middle is not None:
        return str(found.middle)
    between = sorted({Site.parse(row["site"]) for row in found.rows if _is_after_layer(row["site"])})[:-1]
    return str(between[len(between) // 2]) if between else None


def causal_table(found: ReasoningMeasures, measure: str, steps: Mapping[str, int]) -> Table:
    """A measure of causal tracing by cause and site, a panel for each checkpoint and split.

    Args:
        found: the measures.
        measure: `strength`, `altered` or `redirected`.
        steps: the checkpoints, by how they are called.
    """
    wanted = [
        {**row, "panel": f"{row['split']}, {name}"}
        for split in _splits_of(found.find(measure))
        for name, step in steps.items()
        for row in found.find(measure, split=split, step=step)
    ]
    named = " and ".join(f"{name} (step {step})" for name, step in steps.items())
    return Table(
        name=f"reasoning_causes_{measure}",
        frame=_frame(wanted, "panel"),
        kind="heatmap",
        axes={"x": "cause", "y": "site", "value": "value", "low": "low", "high": "high", "facet": "panel"},
        unit="share of answers",
        caption=f"{SAYS[measure]} Checkpoints: {named}. {counted(wanted)}; prompts that do not count are in the "
        "column “skipped”. 95 % score intervals.",
    )


def bar_table(name: str, rows: Rows, *, x: str, series: Mapping[str, str] | None = None, caption: str) -> Table:
    """Shares as bars with their intervals; `series` names those of each measure."""
    measured = [row for row in rows if row["value"] is not None]
    labelled = [{**row, **({} if series is None else {"series": series[row["measure"]]})} for row in measured]
    axes = {"x": x, "y": "value", "low": "low", "high": "high", **({} if series is None else {"series": "series"})}
    return Table(
        name=name,
        frame=_frame(labelled, *([] if series is None else ["series"])),
        kind="bar",
        axes=axes,
        unit="fraction",
        caption=f"{caption} {counted(measured)}; 95 % score intervals.",
    )


def all_rows(found: ReasoningMeasures) -> Table:
    """Every number, with its interval, n and what was skipped."""
    rows = [{**row} for row in found.rows]
    frame = pd.DataFrame(rows, columns=["measure", *COLUMNS], dtype=object)
    frame = frame.astype({"value": float, "low": float, "high": float, "n": int, "skipped": int})
    return Table(
        name="reasoning_measures",
        # The step of a reference line stays None: as a number it would make decimals of the others.
        frame=frame,
        kind="table",
        axes={},
        unit="",
        caption="All measures of all checkpoints: 95 % intervals, prompts that count (n) and that do not (skipped). A "
        "reference line has no step, a measure for which no prompt counts has no value.",
    )


def counted(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many prompts stand behind these rows."""
    n = {row["n"] for row in rows}
    if not n:
        return "No prompt counts"
    return f"n = {min(n)}" if len(n) == 1 else f"n = {min(n)} to {max(n)}"


def _curves(name: str, panel: Panel, found: ReasoningMeasures) -> Table:
    middle = middle_site(found) if panel.at_middle else None
    rows = [
        {**row, "series": _series(row, start, shows_site=not panel.at_middle)}
        for measure, start in panel.measures.items()
        for row in found.find(measure)
        if row["value"] is not None and _is_shown(row, panel, middle)
    ]
    # By series first: the order in which the legend names them.
    order = {series: place for place, series in enumerate(sorted({row["series"] for row in rows}, key=_by_split))}
    rows.sort(key=lambda row: (order[row["series"]], row["step"]))
    said = " ".join(SAYS[measure] for measure in panel.measures)
    where = f" At {middle}." if middle is not None else ""
    return Table(
        name=name,
        frame=_frame(rows, "series"),
        kind="curve",
        axes={"x": "step", "y": "value", "series": "series", "low": "low", "high": "high"},
        unit=panel.unit,
        caption=f"{said}{where} {counted(rows)} at each of {len(found.steps)} checkpoints; 95 % intervals.",
    )


def _is_shown(row: Mapping[str, Any], panel: Panel, middle: str | None) -> bool:
    if panel.splits and row["split"] not in panel.splits:
        return False
    if row["site"] is None:
        return True
    return row["site"] == middle if panel.at_middle else _is_after_layer(row["site"])


def _series(row: Mapping[str, Any], start: str, *, shows_site: bool) -> str:
    site = row["site"] if shows_site else None
    return ", ".join(part for part in (row["split"], start, row["cause"], site) if part)


def _by_split(series: str) -> tuple[int, str]:
    split = series.split(",")[0]
    return (UNSEEN.index(split) if split in UNSEEN else -1, series)


def _is_after_layer(site: str | None) -> bool:
    return site is not None and site.endswith(".resid_post")


def _splits_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["split"] for row in rows))


def _frame(rows: Rows, *more: str) -> pd.DataFrame:
    return pd.DataFrame([dict(row) for row in rows], columns=[*COLUMNS, *more]).astype(
        {"value": float, "low": float, "high": float}
    )
