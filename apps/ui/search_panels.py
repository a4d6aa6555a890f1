"""What the page Search shows of a graph: the model's choice, what its vertices hold, and the operations behind it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from apps.ui import charts, circuit_drawing, search_questions, state
from apps.ui.charts import NodeOrEdge
from apps.ui.circuit_drawing import Drawing
from apps.ui.search_drawing import CAUSES, answer_set, draw_graph, draw_operations, sets_after
from apps.ui.search_questions import Asked, name_of, words_for
from circuits.attention_ops import Operation
from circuits.path_merging import PathTrace
from circuits.reachable_sets import Merge
from workbench.tables import Table

MERGES = ("strict", "published")


def search(asked: Asked) -> None:
    """Everything about one graph."""
    before = search_questions.chosen_child(asked)
    verdict = st.container()
    trace = None
    with state.user_errors_shown():
        trace = search_questions.traced(asked)
    if trace is None:
        return
    above = st.columns([2, 1, 1], vertical_alignment="bottom")
    n_layers = len(trace.strict.held) - 1
    layers = above[0].slider("Layers that have run", 0, n_layers, n_layers, key="layers", bind="query-params")
    rule = above[1].segmented_control(
        "Merge", MERGES, default=MERGES[0], required=True, key="merge", bind="query-params", help=_MERGE_HELP
    )
    merge = trace.strict if rule == "strict" else trace.published
    removed = _removed(trace, above[2])
    after = search_questions.chosen_child(asked, removed)
    with verdict:
        _say_choice(asked, before, after if removed else None)
    left, right = st.columns([5, 6])
    with left:
        _graph(asked, merge, after, layers)
    with right:
        chosen = _operations(trace, merge, layers, removed)
    if chosen is not None:
        _operation(asked, trace, merge, chosen, removed)
    _tables(trace)


def _removed(trace: PathTrace, where: st.delta_generator.DeltaGenerator) -> tuple[str, ...]:
    names = [name_of(each) for each in trace.operations]
    wanted = st.session_state.get("removed", [])
    if not set(wanted) <= set(names):
        # Of another checkpoint: there the answer hangs on other operations.
        st.session_state["removed"] = [name for name in wanted if name in names]
    labels = {name_of(each): words_for(each, trace.prompt) for each in trace.operations}
    return tuple(
        where.multiselect(
            "Removed operations",
            names,
            format_func=labels.__getitem__,
            key="removed",
            bind="query-params",
            placeholder="none",
        )
    )


def _say_choice(asked: Asked, before: pd.DataFrame, after: pd.DataFrame | None) -> None:
    """What the model goes to, and how sure it is."""
    prompt, shown = asked.prompt, before if after is None else after
    best = shown.loc[shown["probability"].idxmax()]
    lookahead = int(asked.task.graphs(asked.task.prompt(asked.text)).lookahead()[0])
    said = (
        f"From **{prompt.start}** to **{prompt.goal}** (lookahead {lookahead}), "
        f"{'with operations removed ' if after is not None else ''}the model goes to **{best['child']}**: "
        f"{'right' if best['right'] else 'wrong'}."
    )
    (st.success if best["right"] else st.error)(said)
    columns = {"child": before["child"], "right": before["right"], "probability": before["probability"]}
    if after is not None:
        columns["with operations removed"] = after["probability"]
    bar = st.column_config.ProgressColumn(format="%.3f", min_value=0, max_value=1)
    st.dataframe(
        pd.DataFrame(columns), hide_index=True, column_config={"probability": bar, "with operations removed": bar}
    )


def _graph(asked: Asked, merge: Merge, choice: pd.DataFrame, layers: int) -> None:
    prompt = asked.prompt
    sets = sets_after(merge, prompt, layers)
    vertices = sorted(prompt.graph.vertices)
    if st.session_state.get("vertex") not in vertices:
        st.session_state.pop("vertex", None)
    st.subheader("What each vertex holds")
    chosen = st.selectbox(
        "Vertex", vertices, index=None, placeholder="click one, or choose here", key="vertex", bind="query-params"
    )
    best = choice.loc[choice["probability"].idxmax(), "child"]
    answered = int(best) if best.isdecimal() else -1
    drawing = draw_graph(prompt, sets, chosen=chosen, answered=answered)
    charts.graph(
        circuit_drawing.echarts(drawing),
        key="search_graph",
        height=drawing.height,
        alt=f"Graph of {len(prompt.graph.edges)} edges",
        on_click=lambda kind, index: _choose_vertex(drawing, kind, index),
    )
    held = answer_set(merge, prompt, layers)
    st.caption(
        f"In braces: the vertices that a vertex' rows hold {_when(layers)}. The row of the answer holds "
        f"{{{' '.join(map(str, sorted(held)))}}}. Brown: the model's choice."
    )


def _when(layers: int) -> str:
    return "before the first layer" if layers == 0 else f"after layer {layers - 1}"


def _choose_vertex(drawing: Drawing, kind: NodeOrEdge, index: int) -> None:
    if kind == "node":
        vertex = int(drawing.dots[index].name)
        st.session_state["vertex"] = None if st.session_state.get("vertex") == vertex else vertex


def _operations(trace: PathTrace, merge: Merge, layers: int, removed: tuple[str, ...]) -> Operation | None:
    """The operations up to a layer, and which of them is looked at."""
    st.subheader("Operations that merge")
    shown = [each for each in trace.operations if each.layer < layers]
    labels = {name_of(each): words_for(each, trace.prompt) for each in shown}
    if st.session_state.get("operation") not in labels:
        st.session_state.pop("operation", None)
    chosen = st.selectbox(
        "Operation",
        list(labels),
        index=None,
        format_func=labels.__getitem__,
        placeholder="click one, or choose here",
        key="operation",
        bind="query-params",
    )
    drawing = draw_operations(trace.prompt, trace.operations, merge, layers=layers, chosen=chosen, removed=removed)
    charts.graph(
        circuit_drawing.echarts(drawing),
        key="operations",
        height=drawing.height,
        alt=f"{len(shown)} operations",
        on_click=lambda kind, index: _choose_operation(drawing, kind, index),
    )
    st.html(_legend())
    return next((each for each in shown if name_of(each) == chosen), None)


def _choose_operation(drawing: Drawing, kind: NodeOrEdge, index: int) -> None:
    name = drawing.lines[index].name if kind == "edge" else ""
    if name and not name.startswith("stream"):
        st.session_state["operation"] = None if st.session_state.get("operation") == name else name


def _operation(asked: Asked, trace: PathTrace, merge: Merge, chosen: Operation, removed: tuple[str, ...]) -> None:
    """Why the operation is there, and what the answer is without it."""
    name, prompt = name_of(chosen), trace.prompt
    with st.container(border=True):
        st.markdown(f"**{words_for(chosen, prompt).capitalize()}**")
        causes = "; ".join(f"{CAUSES[cause.kind][1]} ({cause})" for cause in chosen.causes)
        merged = any(name_of(each) == name for each in merge.operations)
        st.markdown(
            f"Cause: {causes or 'none found'}. "
            f"{'It merged a set that flows into the answer.' if merged else 'It merged nothing that counts.'} "
            f"Its largest effect is {chosen.strength:.3g} times the threshold."
        )
        alone = search_questions.chosen_child(asked, (name,))
        before = search_questions.chosen_child(asked)
        st.dataframe(
            pd.DataFrame(
                {"child": before["child"], "probability": before["probability"], "without it": alone["probability"]}
            ),
            hide_index=True,
        )
        there = name in removed
        st.button("Put it back" if there else "Remove it", on_click=_toggle, args=(name,), key="toggle", type="primary")


def _toggle(name: str) -> None:
    removed = list(st.session_state.get("removed", []))
    st.session_state["removed"] = [each for each in removed if each != name] if name in removed else [*removed, name]


def _legend() -> str:
    """What colours and dashes mean, as a line of HTML."""
    words: dict[str, str] = {}
    for colour, says in CAUSES.values():
        words[colour] = f"{words[colour]} or {says}" if colour in words else says
    keys = [(colour, "solid", says) for colour, says in words.items()]
    keys += [(circuit_drawing.FAINT, "solid", "no cause found"), (charts.INK, "dashed", "merged nothing")]
    keys += [(charts.INK, "dotted", "removed")]
    return " ".join(circuit_drawing.legend_key(*key) for key in keys)


def _tables(trace: PathTrace) -> None:
    """Operations and sets as tables, to keep."""
    titles = {"operations": "All operations", "reachable_sets": "All sets"}
    tables: Sequence[Table] = trace.tables()
    for tab, table in zip(st.tabs([titles[table.name] for table in tables]), tables, strict=True):
        with tab:
            st.dataframe(table.frame, hide_index=True)
            st.caption(table.caption)
            state.download(table, key=table.name)


_MERGE_HELP = (
    "Strict: every operation needs a cause to merge a set. Published: as in the paper, only what first arrives at a "
    "place does."
)
