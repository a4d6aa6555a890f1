"""What the page Search shows of a graph: the model's choice, what its vertices hold, and the operations behind it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from apps.ui import charts, circuit_drawing, search_questions, state
from apps.ui.charts import NodeOrEdge
from apps.ui.circuit_drawing import Drawing
from apps.ui.search_drawing import CAUSES, Sets, answer_set, draw_graph, draw_operations, listed, sets_after
from apps.ui.search_questions import Asked, Choice, name_of
from circuits.attention_ops import Operation
from circuits.path_merging import PathTrace
from circuits.reachable_sets import Merge
from workbench.tables import Table

MERGES = ("strict", "published")


def search(asked: Asked) -> list[Operation]:
    """Everything about one graph; the operations that are removed."""
    before = search_questions.choice(asked)
    verdict = st.container()
    trace = None
    with state.user_errors_shown():
        trace = search_questions.traced(asked)
    if trace is None:
        with verdict:
            _say_choice(asked, before, before)
        _graph(asked, {vertex: frozenset({vertex}) for vertex in asked.prompt.graph.vertices}, before.answer)
        return []
    above = st.columns([2, 1, 1], vertical_alignment="bottom")
    n_layers = len(trace.strict.held) - 1
    layers = above[0].slider("Layers that have run", 0, n_layers, n_layers, key="layers", bind="query-params")
    rule = above[1].segmented_control(
        "Merge", MERGES, default=MERGES[0], required=True, key="merge", bind="query-params", help=_MERGE_HELP
    )
    merge = trace.strict if rule == "strict" else trace.published
    removed = _removed(trace, above[2])
    after = search_questions.choice(asked, removed) if removed else before
    with verdict:
        _say_choice(asked, before, after)
    left, right = st.columns([5, 6])
    with left:
        _graph(asked, sets_after(merge, trace.prompt, layers), after.answer)
        _say_held(trace, merge, layers)
    with right:
        chosen = _operations(trace, merge, layers, removed)
    if chosen is not None:
        _operation(asked, trace, merge, chosen, removed)
    _tables(trace)
    return [each for each in trace.operations if name_of(each, trace.prompt) in removed]


def _removed(trace: PathTrace, where: st.delta_generator.DeltaGenerator) -> tuple[str, ...]:
    names = [name_of(each, trace.prompt) for each in trace.operations]
    wanted = st.session_state.get("removed", [])
    if not set(wanted) <= set(names):
        # Of another checkpoint: there the answer hangs on other operations.
        st.session_state["removed"] = [name for name in wanted if name in names]
    return tuple(where.multiselect("Removed operations", names, key="removed", bind="query-params", placeholder="none"))


def _say_choice(asked: Asked, before: Choice, after: Choice) -> None:
    """What the model goes to, and how sure it is."""
    prompt, removed = asked.prompt, after is not before
    lookahead = int(asked.task.graphs(asked.task.prompt(asked.text)).lookahead()[0])
    (st.success if after.right else st.error)(
        f"From **{prompt.start}** to **{prompt.goal}** (lookahead {lookahead}), "
        f"{'without the removed operations ' if removed else ''}the model goes to **{after.answer}**: "
        f"{'right' if after.right else 'wrong'}."
    )
    _compare(before, after, "without them")


def _compare(before: Choice, after: Choice, name: str) -> None:
    """Probabilities of the children, before and after something was removed."""
    columns = {name: before.frame[name] for name in ("child", "right", "probability")}
    if after is not before:
        columns[name] = after.frame["probability"]
    bar = st.column_config.ProgressColumn(format="%.3f", min_value=0, max_value=1)
    st.dataframe(pd.DataFrame(columns), hide_index=True, column_config={"probability": bar, name: bar})


def _graph(asked: Asked, sets: Sets, answer: str) -> None:
    st.subheader("What each vertex holds")
    vertices = sorted(sets)
    if st.session_state.get("vertex") not in vertices:
        st.session_state.pop("vertex", None)
    chosen = st.selectbox(
        "Vertex", vertices, index=None, placeholder="click one, or choose here", key="vertex", bind="query-params"
    )
    drawing = draw_graph(asked.prompt, sets, chosen=chosen, answer=answer)
    charts.graph(
        circuit_drawing.echarts(drawing),
        key="search_graph",
        height=drawing.height,
        alt=f"Graph of {len(asked.prompt.graph.edges)} edges",
        on_click=lambda kind, index: _choose_vertex(drawing, kind, index),
    )
    st.download_button(
        "Picture (HTML)",
        lambda: circuit_drawing.plotly(drawing, asked.text).to_html(include_plotlyjs=True),
        "search-graph.html",
        "text/html",
        key="graph_picture",
        icon=":material/download:",
        on_click="ignore",
    )


def _say_held(trace: PathTrace, merge: Merge, layers: int) -> None:
    when = "before the first layer" if layers == 0 else f"after layer {layers - 1}"
    said = "explains" if merge.explained else "does not explain"
    st.caption(
        f"In parentheses: what a vertex' rows hold {when}, of what flows into the answer, whose own row holds "
        f"{listed(answer_set(merge, trace.prompt, layers))}. Path merging {said} this answer. Brown: its choice."
    )


def _choose_vertex(drawing: Drawing, kind: NodeOrEdge, index: int) -> None:
    if kind == "node":
        vertex = int(drawing.dots[index].name)
        st.session_state["vertex"] = None if st.session_state.get("vertex") == vertex else vertex


def _operations(trace: PathTrace, merge: Merge, layers: int, removed: tuple[str, ...]) -> Operation | None:
    """The operations up to a layer, and which of them is looked at."""
    st.subheader("Operations that merge")
    every = st.toggle(
        f"All {len(trace.operations)} that the answer hangs on, not only the {len(merge.operations)} that merge",
        key="every",
        bind="query-params",
    )
    shown = [each for each in (trace.operations if every else merge.operations) if each.layer < layers]
    known = {name_of(each, trace.prompt): each for each in shown}
    if st.session_state.get("operation") not in known:
        st.session_state.pop("operation", None)
    chosen = st.selectbox(
        "Operation",
        list(known),
        index=None,
        placeholder="click one, or choose here",
        key="operation",
        bind="query-params",
    )
    drawing = draw_operations(trace.prompt, shown, merge, layers=layers, chosen=chosen, removed=removed)
    charts.graph(
        circuit_drawing.echarts(drawing),
        key="operations",
        height=drawing.height,
        alt=f"{len(shown)} operations",
        on_click=lambda kind, index: _choose_operation(drawing, kind, index),
    )
    st.html(_legend())
    return None if chosen is None else known[chosen]


def _choose_operation(drawing: Drawing, kind: NodeOrEdge, index: int) -> None:
    name = drawing.lines[index].name if kind == "edge" else ""
    if name and not name.startswith("stream"):
        st.session_state["operation"] = None if st.session_state.get("operation") == name else name


def _operation(asked: Asked, trace: PathTrace, merge: Merge, chosen: Operation, removed: tuple[str, ...]) -> None:
    """Why the operation is there, and what the answer is without it."""
    name = name_of(chosen, trace.prompt)
    with st.container(border=True):
        does = "the first copies from the second" if chosen.sign == 1 else "it must not: copied, it leads astray"
        st.markdown(f"**{name}**: {does}.")
        causes = "; ".join(f"{CAUSES[cause.kind][1]} ({cause})" for cause in chosen.causes)
        merged = chosen in merge.operations
        st.markdown(
            f"Cause: {causes or 'none found'}. "
            f"{'It merged a set that flows into the answer.' if merged else 'It merged nothing that counts.'} "
            f"Its largest effect is {chosen.strength:.3g} times the threshold."
        )
        alone = search_questions.choice(asked, (name,))
        before = search_questions.choice(asked)
        _compare(before, alone, "without it")
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
