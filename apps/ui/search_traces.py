"""Many inputs traced on page Search: shown where they were kept, else made by a job that is watched and cancelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from apps.analyses import key_of
from apps.searching import search_task
from apps.tracing import COLUMNS, INPUTS, printed_rows
from apps.ui import job_panels, jobs, state
from apps.ui.jobs import Job
from circuits.path_traces import trace_tables
from workbench.figures import figure
from workbench.store import load_summary
from workbench.training.checkpoints import Run

SEED = 0
DRAWN = {
    "explained_judged": "Explained, and its controls",
    "explained_strict": "By lookahead, strict merge",
    "explained": "By lookahead, published merge",
    "ablated_operations": "With and without the operations",
}
"""Tables that are drawn, and how their tabs are called."""


def many_inputs(run: Run, step: int) -> None:
    """What path merging explains of test inputs at a checkpoint, beside its controls, and the causal test."""
    st.header("Many inputs", divider="gray")
    n, lookahead = _choose(run)
    summary = kept_traces(run, step, n, lookahead)
    if summary is None:
        _obtain(run, step, n, lookahead)
        return
    _show(summary)
    state.copy_as_python(
        "from apps.tracing import traces_of\nfrom workbench import load\n\n"
        f"found = traces_of(load({run.reference!r}), {step}, n={n}, lookahead={lookahead})\n"
        "print(found.frame)\nprint(found.summary()['causal'])"
    )


def kept_traces(run: Run, step: int, n: int, lookahead: int | None) -> dict[str, Any] | None:
    """What `workbench trace` keeps of a checkpoint."""
    arguments = {"n": n, "lookahead": lookahead, "seed": SEED}
    return load_summary(run.folder, key_of(run, "path_traces", step, arguments))


def _choose(run: Run) -> tuple[int, int | None]:
    task = search_task(run)
    left, right = st.columns(2)
    n = left.number_input(
        "Test inputs of each lookahead",
        1,
        task.test_size,
        min(INPUTS, task.test_size),
        key="traced",
        bind="query-params",
    )
    lookahead = right.selectbox(
        "Their lookahead", task.levels, index=None, placeholder="each", key="traced_lookahead", bind="query-params"
    )
    return n, lookahead


def _obtain(run: Run, step: int, n: int, lookahead: int | None) -> None:
    """The job that traces them: how it stands, or a button that starts it."""
    one = () if lookahead is None else ("--lookahead", str(lookahead))
    command = ("trace", run.reference, "--checkpoint", str(step), "--n", str(n), *one, "--json")
    job = next((each for each in jobs.list_jobs(kind="trace") if each.arguments == command), None)
    count = n * (1 if lookahead is not None else len(search_task(run).levels))
    inputs = f"{count} input{'s' if count > 1 else ''}"
    if job is None:
        st.caption(f"Tracing {inputs} with controls takes a second or more for each, in the background.")
    else:
        job_panels.follow(job, f"Tracing {inputs} at step {step}", key="traces")
    if job is None or not job.running:
        label = f"Trace {inputs}" if job is None else f"Trace {inputs} again"
        st.button(label, key="traces_start", type="primary", on_click=_start, args=(command, run.reference))


def _start(command: tuple[str, ...], reference: str) -> Job:
    return jobs.start(command, subject=reference)


def _show(summary: Mapping[str, Any]) -> None:
    tables = {table.name: table for table in trace_tables(summary)}
    st.dataframe(pd.DataFrame(printed_rows(summary))[list(COLUMNS)], hide_index=True)
    st.caption(
        "Shares of inputs with 95 % score intervals. "
        f"Judged are lookaheads from {summary['judged_from']} on. `model` is the trained one; `hand_built` must be "
        "explained, the other controls must not; `one_hop` is the rival; last come other thresholds."
    )
    drawn = [name for name in DRAWN if name in tables]
    for name, tab in zip(drawn, st.tabs([DRAWN[name] for name in drawn]), strict=True):
        with tab:
            st.plotly_chart(figure(tables[name]).update_layout(title_text="", margin_t=16), key=name)
            st.caption(tables[name].caption)
            state.download(tables[name], key=f"{name}_table")
    with st.expander("Causes, longest paths, merges"):
        for name in (name for name in tables if name not in drawn):
            st.dataframe(tables[name].frame, hide_index=True)
            st.caption(tables[name].caption)
