"""Page Program: what a Transformer Program computes of a sequence of one's own, and the program itself."""

from __future__ import annotations

import streamlit as st

from apps.program_sections import sizes
from apps.ui import state
from apps.ui.program_questions import Opened, answers, is_program, module_of, open_program, variables
from circuits.decompile.forms import Form
from workbench.figures import figure
from workbench.training.checkpoints import Run

BUDGETS = (0.0, 0.001, 0.01, 0.05)
FORMS: dict[str, tuple[Form, str, str | None]] = {
    "Python": ("python", ".py", "python"),
    "Fast Python": ("fast", "_fast.py", "python"),
    "RASP": ("rasp", ".rasp", None),
    "Graph": ("graph", ".dot", None),
}
"""What each is called, how its file ends, and whose syntax it has."""


def page() -> None:
    """The page."""
    st.title("Program")
    run = state.choose_run(first=next(iter(state.references_where(is_program)), None))
    if not is_program(run):
        _offer_programs(run)
        return
    with st.sidebar:
        step = state.choose_step(run)
    with state.user_errors_shown():
        opened = open_program(run, step)
        _stepper(opened)
        _module(run, step)
        state.copy_as_python(
            f"from circuits.decompile.decompiled import decompile\nfrom workbench import load\n\n"
            f"run = load({run.reference!r})\nprint(decompile(run.program({step}), run.task).text)"
        )


def _stepper(opened: Opened) -> None:
    """Every variable at every position of the typed sequence, one of which may be changed."""
    task = opened.task
    if st.session_state.get("program_run") != opened.run.reference and "sequence" not in st.query_params:
        st.session_state["sequence"] = task.decode(task.examples("test").tokens[0].tolist())
    st.session_state["program_run"] = opened.run.reference
    help_text = f"Up to {task.longest} letters of {' '.join(task.inputs[: task.letters])}"
    text = st.text_input("Sequence", key="sequence", bind="query-params", help=help_text) or ""
    shown = variables(opened, text)
    change = _choose_change(opened, len(shown.columns))
    st.dataframe(answers(opened, text, change), width="stretch")
    st.caption("What the program says at each letter, beside what is right.")
    st.subheader("Variables", divider="gray")
    st.dataframe(shown, width="stretch")
    st.caption("A row is a variable in the order in which they are computed, a column a position; sums come last.")


def _choose_change(opened: Opened, length: int) -> tuple[int, int, int] | None:
    """A variable, a position and a value to put there."""
    with st.expander("Change a variable"):
        names = opened.names.categorical
        left, middle, right = st.columns(3)
        variable = left.selectbox("Variable", range(len(names)), format_func=names.__getitem__, key="variable")
        position = middle.selectbox("Position", range(length), key="position", index=min(1, length - 1))
        values = sorted(opened.ranges.values[variable])
        value = right.selectbox(
            "Value", [None, *values], key="value",
            format_func=lambda each: "as it is" if each is None else opened.names.value(variable, each),
        )  # fmt: skip
    return None if value is None else (variable, position, value)


def _module(run: Run, step: int) -> None:
    """The program's text in the form chosen, by the accuracy that may be lost to it."""
    st.subheader("As text", divider="gray")
    budget = st.select_slider(
        "Accuracy that may be lost to a shorter program", BUDGETS, format_func="{:.1%}".format, key="budget"
    )
    found = module_of(run.reference, step, run.checkpoint(step).sha256, budget)
    left, middle, right, last = st.columns(4)
    left.metric("Lines", found.lines, found.lines - found.lines_unsimplified, delta_color="inverse")
    estimate = found.accuracy
    middle.metric("Test accuracy", f"{estimate.mean:.4f}", help=f"95 %: {estimate.low:.4f} to {estimate.high:.4f}")
    right.metric("Whole sequences right", f"{found.sequence_accuracy.mean:.4f}", help=f"n = {found.n:,}")
    last.metric("Answers as the model's", f"{found.agreement:.4f}", help=f"On {found.checked:,} sequences")
    everything = "every sequence there is" if found.exhaustive else f"{found.checked:,} sequences"
    st.caption(f"Both modules were run on {everything} and say what the program says on each; lines: the readable one.")
    form = st.segmented_control("Form", list(FORMS), default="Python", required=True, key="form", bind="query-params")
    written, suffix, language = FORMS[form]
    name = run.recipe.name.replace("-", "_")
    st.download_button("Download", found.forms[written], file_name=f"{name}{suffix}", key="module")
    st.code(found.forms[written], language=language, height=520)
    if st.toggle("How short against how right", key="frontier", bind="query-params"):
        _frontier(run, step)
    st.subheader("What is made of what", divider="gray")
    with st.container(height=640):
        st.graphviz_chart(found.forms["graph"], width="stretch")
    st.caption("Boxes are heads, ovals tables; a dashed line is a query or a key.")


def _frontier(run: Run, step: int) -> None:
    """Length and accuracy of the module by the accuracy that may be lost."""
    sha256, modules = run.checkpoint(step).sha256, {}
    with st.empty():
        for done, budget in enumerate(BUDGETS):
            st.progress(done / len(BUDGETS), f"{done} of {len(BUDGETS)} modules are written and checked")
            modules[budget] = module_of(run.reference, step, sha256, budget)
        st.empty()
    table = sizes(modules)
    st.plotly_chart(figure(table), width="stretch", key="sizes")
    st.dataframe(table.frame, width="stretch", hide_index=True)
    st.caption(table.caption)


def _offer_programs(run: Run) -> None:
    """Say that this run is no program, and offer those that are."""
    known = state.references_where(is_program)
    state.missing(
        f"Run {run.reference!r} learnt no Transformer Program; this page shows those that did. "
        + ("Choose one in the sidebar." if known else "Train one: `workbench train program-smoke`, or on page Train.")
    )
