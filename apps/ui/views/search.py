"""Page Search: a graph of one's own, the model's choice in it, and the operations that merge what its rows hold.

The page remembers one text, the graph; all else follows from it. Results are kept by the hash of weights and text.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from apps.search_evidence import lookahead_curves
from apps.ui import charts, search_panels, state
from apps.ui.search_input import choose_graph, forget_other_runs
from apps.ui.search_questions import Asked
from apps.ui.search_traces import many_inputs
from circuits.attention_ops import Operation
from workbench.figures import figure
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import Run

RUN = "gallery:search"


def page() -> None:
    """The page."""
    st.title("Search")
    run = state.choose_run(first=first_search())
    if not isinstance(run.task, GraphSearch):
        _offer_searches(run)
        return
    with st.sidebar:
        step = state.choose_step(run)
    forget_other_runs(run, run.task)
    text = choose_graph(run.task)
    asked = Asked(reference=run.reference, step=step, sha256=run.checkpoint(step).sha256, text=text)
    with state.user_errors_shown():
        state.copy_as_python(python_code(asked, search_panels.search(asked)))
    with state.user_errors_shown():
        many_inputs(run, step)
    _through_training(run, step)


def first_search() -> str | None:
    """The run that the page opens on: the gallery's, or else one's own."""
    known = _searches()
    return RUN if RUN in known else next(iter(known), None)


def python_code(asked: Asked, removed: Sequence[Operation]) -> str:
    """The code that computes what the page shows."""
    places = [(each.layer, each.dest, each.src) for each in removed]
    undone = f"[each for each in trace.operations if (each.layer, each.dest, each.src) in {places}]"
    return f"""
from circuits.operation_removal import logits_without
from circuits.path_merging import trace_paths
from circuits.search_prompts import SearchPrompt
from workbench import load

run = load({asked.reference!r})
model = run.model({asked.step})
prompt = SearchPrompt.read(run.task.prompt({asked.text!r}).tokens[0], run.task.layout)

trace = trace_paths(model, prompt)
print(trace.summary())
print(trace.sets)

undone = {undone if removed else []}
print(logits_without(model, prompt, undone).softmax(0))
"""


def _searches() -> list[str]:
    """Runs on graph search."""
    return state.references_where(lambda run: isinstance(run.task, GraphSearch))


def _offer_searches(run: Run) -> None:
    """Say that this run searches no graph, and offer those that do."""
    known = _searches()
    train = "Train one: `workbench train search`, or on the page Train."
    state.missing(
        f"Run {run.reference!r} learnt {run.task.name!r}; this page shows runs on graph search. "
        + ("Choose one of these." if known else train)
    )
    for reference in known:
        st.button(reference, key=f"open_{reference}", on_click=_open, args=(reference,))


def _open(reference: str) -> None:
    st.session_state["run"] = reference


def _through_training(run: Run, step: int) -> None:
    """Accuracy by lookahead, on which a click goes to a checkpoint."""
    st.header("Through training", divider="gray")
    table = lookahead_curves(run)
    if table is None:
        state.missing("This run was not trained here, so it has no curves.")
        return
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    drawn = figure(table).update_layout(title_text="", margin_t=16, height=340)
    drawn.add_vline(step, line={"width": 2, "color": charts.CHOSEN})

    def go_to(x: float) -> None:
        st.session_state["step"] = min(steps, key=lambda each: abs(each - x))

    charts.curves(drawn, key="lookaheads", on_click=go_to)
    st.caption(f"{table.caption} Orange: the checkpoint that is looked at. Click into the curves to go there.")
    state.download(table, key="lookaheads_table")
