"""Page Runs: all runs, one in full, two beside each other, many by setting, and the way in for one's own model."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from apps.commands import list_runs
from apps.sweeping import setting_rows
from apps.ui import state
from apps.ui.links import link_to
from apps.ui.views.importing import NEXT_RUN, importing
from workbench.figures import figure
from workbench.runtime import WorkbenchError
from workbench.store import read_json
from workbench.tables import Table
from workbench.training.checkpoints import Run
from workbench.training.landmarks import sweep_result
from workbench.training.recipe import differing_settings, flat
from workbench.training.text_donors import donor_names

NOBODY = "nobody"
STATUS_COLOURS = {"training": "blue", "not finished": "orange"}
COLUMNS = {
    "run": st.column_config.TextColumn("run"),
    "status": st.column_config.TextColumn("status"),
    "test_accuracy": st.column_config.NumberColumn("test accuracy", format="percent"),
    "steps": st.column_config.NumberColumn("steps", format="localized"),
    "step_memorised": st.column_config.NumberColumn("memorised at", format="localized"),
    "step_generalised": st.column_config.NumberColumn("generalised at", format="localized"),
    "recipe": st.column_config.TextColumn("recipe"),
}
PLOTLY = {"displaylogo": False}
LONGEST_TEXT = 160
FINAL_NUMBERS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "sum_squared_weights")


def page() -> None:
    """The page."""
    st.title("Runs")
    overview, entrance = st.tabs(["Runs", "Import"], key="tab", bind="query-params")
    if NEXT_RUN in st.session_state:
        st.session_state["run"] = st.session_state.pop(NEXT_RUN)
    # The sidebar's choice is drawn under either tab: a widget that is left out forgets what was chosen.
    run = state.choose_run() if state.references() else None
    if entrance.open:
        with entrance:
            importing()
        return
    with overview:
        if run is None:
            state.missing("There are no runs yet. Train one on the page Train, or bring your own under Import.")
            return
        _all_runs(run)
        _one_run(run)
        _two_runs(run)
        _many_runs()


def _all_runs(run: Run) -> None:
    rows = list_runs()
    known = state.references()
    rows.sort(key=lambda row: known.index(row["run"]) if row["run"] in known else len(known))
    frame = pd.DataFrame(rows)[list(COLUMNS)]
    # The key changes with the run, so that the mark in the table follows the choice in the sidebar.
    key = f"runs_table:{run.reference}"
    chosen = frame.index[frame["run"] == run.reference].tolist()

    def choose() -> None:
        selected = st.session_state[key].selection.rows
        if selected and (name := str(frame.loc[selected[0], "run"])) in known:
            st.session_state["run"] = name

    st.dataframe(
        frame,
        hide_index=True,
        column_config=COLUMNS,
        key=key,
        on_select=choose,
        selection_mode="single-row",
        selection_default={"selection": {"rows": chosen}},
    )
    if donor_names():
        st.caption("Donors of real models have no checkpoints to look into; page Graft shows what they learnt.")


def _one_run(run: Run) -> None:
    status = "training" if run.folder.busy else str(run.status["reason"])
    st.header(run.reference, divider="gray")
    st.markdown(f":{STATUS_COLOURS.get(status, 'green')}-badge[{status}] recipe `{run.recipe.name}`")
    st.markdown(run.recipe.shows)
    with st.container(horizontal=True):
        for path in ("dynamics", "explore", "report"):
            link_to(path, path.capitalize(), run.reference, icon=":material/arrow_forward:")
    _numbers(run)
    panels = {
        "Settings": _settings,
        "Checkpoints": _checkpoints,
        "Provenance": _provenance,
        "Kept results": _results,
    }
    for tab, draw in zip(st.tabs(list(panels), key="panel", bind="query-params"), panels.values(), strict=True):
        if tab.open:
            with tab:
                draw(run)
    state.copy_as_python(f"import workbench\n\nrun = workbench.load({run.reference!r})\nmodel = run.model()")


def _numbers(run: Run) -> None:
    if not run.log.rows:
        return
    last, steps = run.last, run.log.rows[-1]["step"]
    best = {} if last["step"] == steps else {"Best at": step_text(last["step"])}
    shown = {
        "Steps": f"{steps:,}",
        **best,
        "Test accuracy": f"{last['test_accuracy']:.1%}",
        "Train loss": f"{last['train_loss']:.1e}",
        "Test loss": f"{last['test_loss']:.1e}",
        "Memorised at": step_text(run.log.step_memorised),
        "Generalised at": step_text(run.log.step_generalised),
    }
    # A row that wraps: in columns a narrow window would cut the numbers off.
    with st.container(horizontal=True, gap="medium"):
        for name, value in shown.items():
            st.metric(name, value, width="content")


def _settings(run: Run) -> None:
    rows = [{"setting": key, "value": text_of(value)} for key, value in flat(run.recipe.to_json()).items()]
    st.dataframe(pd.DataFrame(rows), hide_index=True)


def _checkpoints(run: Run) -> None:
    if not run.checkpoints:
        state.missing("This run has no checkpoints yet.")
        return
    rows = [
        {"step": each.step, "why it was kept": ", ".join(each.reasons), "precision": each.dtype, "SHA-256": each.sha256}
        for each in run.checkpoints
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, height=320)


def _provenance(run: Run) -> None:
    content: dict[str, Any] = {"folder": str(run.folder.path), **run.status}
    if run.checkpoints:
        content |= run.provenance(run.checkpoint()).to_json()
    rows = [{"what": key, "value": text_of(value)} for key, value in content.items()]
    st.dataframe(pd.DataFrame(rows), hide_index=True)


def _results(run: Run) -> None:
    kept = kept_results(run)
    if not kept:
        state.missing(
            f"Nothing was computed on this run yet. Look at it in Explore, or run `workbench patch {run.reference}`."
        )
        return
    st.dataframe(pd.DataFrame(kept), hide_index=True)
    key = st.selectbox("Look into", [row["key"] for row in kept], key="result", bind="query-params")
    if key in [row["key"] for row in kept]:
        st.json(read_json(run.folder.results / key / "summary.json"), expanded=1)


def _two_runs(run: Run) -> None:
    st.header("Compare", divider="gray")
    others = [reference for reference in state.references() if reference != run.reference]
    chosen = st.selectbox("Compare with", [NOBODY, *others], key="with", bind="query-params")
    if chosen == NOBODY or chosen not in others:
        return
    try:
        other = state.open_run(chosen)
    except WorkbenchError as error:
        st.error(str(error))
        return
    if run.log.rows and other.log.rows:
        table = both_losses(run, other)
        st.plotly_chart(figure(table), key="both_losses", config=PLOTLY)
        state.download(table, key="both_losses")
    st.markdown("**Landmarks and final numbers**")
    st.dataframe(side_by_side(run, other), hide_index=True, height="content")
    differing = differing_settings(run.recipe, other.recipe)
    if not differing:
        st.markdown("**Differing settings:** none, the two runs were made from the same recipe.")
        return
    st.markdown("**Differing settings**")
    rows = [
        {"setting": key, run.reference: text_of(one), other.reference: text_of(two)}
        for key, (one, two) in differing.items()
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, height="content")


def _many_runs() -> None:
    st.header("Landmarks by setting", divider="gray")
    chosen = st.multiselect(
        "Runs of a sweep",
        state.references(),
        key="sweep",
        bind="query-params",
        placeholder="Type to filter, then choose",
        help="What tells their recipes apart is their setting; runs that differ by their seed alone share one.",
    )
    if not chosen:
        return
    try:
        found = sweep_result([state.open_run(reference) for reference in chosen])
    except WorkbenchError as error:
        st.error(str(error))
        return
    settings, runs, landmarks = found.tables()
    st.dataframe(pd.DataFrame(setting_rows(found)), hide_index=True, height="content")
    st.caption(settings.caption)
    st.plotly_chart(figure(landmarks), key="landmarks", config=PLOTLY)
    state.download(landmarks, key="landmarks")
    st.dataframe(runs.frame, hide_index=True, height="content")
    names = ", ".join(f"workbench.load({reference!r})" for reference in chosen)
    state.copy_as_python(
        "import workbench\nfrom workbench.figures import figure\n"
        "from workbench.training.landmarks import sweep_result\n\n"
        f"found = sweep_result([{names}])\nfigure(found.tables()[-1]).show()\nfound.settings"
    )


def both_losses(run: Run, other: Run) -> Table:
    """Losses of both splits of two runs, on one axis."""
    frames = [
        each.log.tables()[0].frame.assign(run=lambda frame, each=each: each.reference + " · " + frame["split"])
        for each in (run, other)
    ]
    return Table(
        name="losses_of_two_runs",
        frame=pd.concat(frames, ignore_index=True),
        kind="curve",
        axes={"x": "step", "y": "loss", "series": "run"},
        unit="nats",
        caption="Loss on both splits, by step.",
        log_y=True,
    )


def side_by_side(run: Run, other: Run) -> pd.DataFrame:
    """Landmarks of two runs and the evaluation that each ended with, a row each."""
    columns = {}
    for each in (run, other):
        last = each.last
        columns[each.reference] = [
            step_text(each.log.step_memorised),
            step_text(each.log.step_generalised),
            step_text(last.get("step")),
            *(text_of(last.get(name)) for name in FINAL_NUMBERS),
        ]
    names = ["memorised at", "generalised at", "steps", *(name.replace("_", " ") for name in FINAL_NUMBERS)]
    return pd.DataFrame({"what": names, **columns})


def kept_results(run: Run) -> list[dict[str, Any]]:
    """What analyses found on a run and kept, a row each, newest first."""
    cards = sorted(run.folder.results.glob("*/result.json"), key=lambda card: card.stat().st_mtime, reverse=True)
    rows = []
    for card in cards:
        content = read_json(card)
        tables = sorted(name.removesuffix(".csv") for name in content["sha256"] if name.endswith(".csv"))
        rows.append(
            {
                "tables": ", ".join(tables),
                "code": content["provenance"]["code_version"],
                "kernel": content["provenance"]["kernel"],
                "key": card.parent.name,
            }
        )
    return rows


def step_text(step: int | None) -> str:
    """A step as a person reads it."""
    return "–" if step is None else f"{step:,}"


def text_of(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    # An imported run's settings hold all of its pairs.
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
