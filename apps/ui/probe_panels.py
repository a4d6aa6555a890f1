"""What each place tells of a latent, at a checkpoint and before training: read where it was kept, or made by a job."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd
import streamlit as st

from apps.analyses import key_of
from apps.probing import (
    MEASURES,
    PROBE_SITES,
    PROMPTS,
    REACHABILITY,
    UNTRAINED,
    hidden_latents,
    probing_tables,
)
from apps.ui import charts, job_panels, jobs, state
from apps.ui.jobs import Job
from probes.reachability import Direction, reachability_tables
from workbench.figures import figure
from workbench.store import load_summary
from workbench.training.checkpoints import Checkpoint, Run

DIVERGING = ("selectivity", "amnesic")
SHOWN = ("accuracy", "amnesic")
"""Measures that come with an interval."""


def latent_maps(run: Run, shown: Sequence[Checkpoint]) -> None:
    """A latent by site and position at each checkpoint, and in the untrained model, on one scale."""
    split = state.unseen_split(run)
    examples = run.task.examples(split)
    if not examples.latents:
        return
    st.subheader("Probes of the latents")
    left, right = st.columns(2)
    latent = left.segmented_control(
        "Latent",
        list(examples.latents),
        default=hidden_latents(examples)[0],
        required=True,
        key="latent",
        bind="query-params",
    )
    measure = right.segmented_control(
        "Measure of the latent", list(MEASURES), default="accuracy", required=True, key="probe", bind="query-params"
    )
    found = {checkpoint.step: _kept(run, checkpoint, split) for checkpoint in shown}
    for checkpoint in shown:
        if found[checkpoint.step] is None:
            _obtain(run, checkpoint, split)
            return
    summaries = {step: summary for step, summary in found.items() if summary is not None}
    last = summaries[shown[-1].step]
    if latent in last["left_out"]:
        state.missing(last["left_out"][latent])
    else:
        _maps(summaries, latent, measure)
        _downloads(run, shown[-1], last, latent, measure)
    if REACHABILITY in last["left_out"]:
        state.missing(last["left_out"][REACHABILITY])
    elif REACHABILITY in last:
        _reachability(summaries)


def latent_grid(summary: Mapping[str, Any], latent: str, column: str) -> pd.DataFrame:
    """A column of a latent's cells: a row a site, by depth, and a column a position."""
    cells = pd.DataFrame(summary["cells"])
    cells = cells[cells["latent"] == latent]
    return cells.pivot(index="site", columns="at", values=column).loc[cells["site"].unique(), cells["at"].unique()]


def _maps(summaries: Mapping[int, Mapping[str, Any]], latent: str, measure: str) -> None:
    unit, says = MEASURES[measure]
    last = list(summaries.values())[-1]
    maps = {
        **{f"step {step}": (summary, "") for step, summary in summaries.items()},
        "untrained": (last, f"_{UNTRAINED}"),
    }
    grids = {name: latent_grid(summary, latent, f"{measure}{suffix}") for name, (summary, suffix) in maps.items()}
    limit = math.ceil(max(1.0, *(float(grid.max().max()) for grid in grids.values())))
    rows: list[dict[str, object]] = []
    for column, (name, grid) in zip(st.columns(len(grids)), grids.items(), strict=True):
        place = charts.read_place(st.query_params.get("probed"), grid.shape) or _best(grids[f"step {max(summaries)}"])
        rows.append({"model": name, **_numbers(*maps[name], latent, grid, place)})
        with column:
            charts.heatmap(
                grid.to_numpy(dtype=float),
                list(grid.index),
                list(grid.columns),
                key=f"probes_{name}",
                title=f"{latent}: {measure}, {name}",
                unit=unit,
                limit=limit,
                diverging=measure in DIVERGING,
                choice="probed",
                default=place,
            )
    sizes = next(row for row in last["latents"] if row["latent"] == latent)
    st.caption(
        f"{says} Split `{last['split']}`: {sizes['n_train']} prompts to fit, n = {sizes['n_test']} of other groups to "
        f"judge; {sizes['n_classes']} classes, the most common of which gets {sizes['majority']:.3g}. One colour scale "
        "for all. Click a cell."
    )
    st.dataframe(rows, hide_index=True)


def _best(grid: pd.DataFrame) -> tuple[int, int]:
    """Where most is told."""
    row, column = divmod(int(grid.to_numpy(dtype=float).argmax()), len(grid.columns))
    return row, column


def _numbers(
    summary: Mapping[str, Any], suffix: str, latent: str, grid: pd.DataFrame, place: tuple[int, int]
) -> dict[str, object]:
    """What was measured in a cell, with the intervals."""
    site, at = grid.index[place[0]], grid.columns[place[1]]
    cell = next(row for row in summary["cells"] if (row["latent"], row["site"], row["at"]) == (latent, site, at))
    written = {
        name: f"{cell[f'{name}{suffix}']:.3f} [{cell[f'{name}_low{suffix}']:.3f}, {cell[f'{name}_high{suffix}']:.3f}]"
        for name in SHOWN
    }
    plain = {name: f"{cell[f'{name}{suffix}']:.3f}" for name in ("control", "selectivity", "compression")}
    return {"site": site, "at": at, "accuracy": written["accuracy"], **plain, "amnesic": written["amnesic"]}


def _reachability(summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """What a search's stream knows of reachability at each checkpoint: curves over layers, and all numbers."""
    st.subheader("Reachability")
    direction = st.segmented_control(
        "Direction of the paths",
        get_args(Direction),
        default=get_args(Direction)[0],
        required=True,
        key="reach",
        bind="query-params",
        help="Forward: which vertices can be reached from the row's vertex. Backward: which reach it.",
    )
    for step, summary in summaries.items():
        tables = {table.name: table for table in reachability_tables(summary[REACHABILITY])}
        curves = tables[f"reachability_{direction}"]
        st.plotly_chart(figure(curves).update_layout(title_text=f"Step {step}", height=380), key=f"reachability_{step}")
        with st.expander(f"Numbers of step {step}, with the control task"):
            st.dataframe(tables["reachability"].frame, hide_index=True)
        state.download(curves, key=f"reachability_table_{step}")
    st.caption(curves.caption)


def _downloads(run: Run, checkpoint: Checkpoint, summary: Mapping[str, Any], latent: str, measure: str) -> None:
    table = next(each for each in probing_tables(summary) if each.name == f"probes_{latent}_{measure}")
    state.download(table, key="probes")
    state.copy_as_python(
        "import pandas as pd\n\nfrom workbench import load\nfrom apps.probing import probes_of\n\n"
        f"run = load({run.reference!r})\n"
        f"found = probes_of(run, {checkpoint.step}, latent={latent!r}, split={summary['split']!r})\n"
        "print(pd.DataFrame(found.cells))\nprint(pd.DataFrame(found.forgotten))"
    )


def _kept(run: Run, checkpoint: Checkpoint, split: str) -> dict[str, Any] | None:
    """What `workbench probe` keeps of a checkpoint with its own defaults."""
    arguments = {"latent": None, "sites": PROBE_SITES, "n": PROMPTS, "split": split, "positions": None}
    return load_summary(run.folder, key_of(run, "probe", checkpoint.step, arguments))


def _obtain(run: Run, checkpoint: Checkpoint, split: str) -> None:
    """The job that probes a checkpoint: how it stands, or a button that starts it."""
    command = ("probe", run.reference, "--checkpoint", str(checkpoint.step), "--split", split, "--json")
    job = next((each for each in jobs.list_jobs(kind="probe") if each.arguments == command), None)
    if job is None:
        st.caption("Probing every latent at every place takes a minute or so, in the background.")
    else:
        job_panels.follow(job, f"Probing step {checkpoint.step}", key="probes")
    if job is None or not job.running:
        st.button(f"Probe step {checkpoint.step}", key="probes_start", on_click=_start, args=(command, run.reference))


def _start(command: tuple[str, ...], reference: str) -> Job:
    return jobs.start(command, subject=reference)
