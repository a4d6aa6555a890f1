"""How a graph is given to the page Search: typed, edited in a table, or drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd
import streamlit as st

from apps.ui import search_questions, state
from workbench.tasks.graph_distributions import Distribution
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import Run

ROW = 36
"""Pixels of a row of the table of edges."""


def forget_other_runs(run: Run, task: GraphSearch) -> None:
    """Begin anew where another run was looked at before: its vertices may not be in this one's vocabulary."""
    known = "graph" in st.session_state or "graph" in st.query_params
    if not known or st.session_state.get("searched", run.reference) != run.reference:
        _show(search_questions.example(task, "balanced", task.levels[-1], 0))
    st.session_state["searched"] = run.reference


def choose_graph(task: GraphSearch) -> str:
    """The graph as a text, which a table of edges and two selectors change too."""
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    text = left.text_input(
        "Graph",
        key="graph",
        bind="query-params",
        help=f"Edges, then Q, start and goal. Up to {task.layout.n_edges} edges; vertices 1 to {task.layout.n_names}.",
    )
    with right.popover("Draw one at random", width="stretch"):
        _offer_random(task)
    text = (text or "").strip()
    edges, ends = search_questions.read_text(text)
    if ends is not None:
        with st.expander("Edit edges, start and goal"):
            _editor(text, edges, ends)
    return text


def _offer_random(task: GraphSearch) -> None:
    distribution: Distribution = st.selectbox("Distribution", get_args(Distribution), key="drawn_from")
    lookahead = st.selectbox("Lookahead", task.levels, index=len(task.levels) - 1, key="drawn_lookahead")

    def draw() -> None:
        count = st.session_state.get("draws", 0) + 1
        st.session_state["draws"] = count
        with state.user_errors_shown():
            _show(search_questions.example(task, distribution, lookahead, count))

    st.button("Draw", on_click=draw, width="stretch", type="primary", key="draw_graph")
    st.caption("One of the test graphs, which training never sees.")


def _editor(text: str, edges: list[tuple[int, int]], ends: tuple[int, int]) -> None:
    wide, narrow = st.columns([2, 1])
    key = f"edges of {text}"

    def edit() -> None:
        edited = edited_edges(edges, st.session_state[key])
        if edited is not None:
            _show(search_questions.write_text(edited, *ends))

    frame = pd.DataFrame(edges, columns=["source", "target"])
    with wide:
        st.data_editor(
            frame, key=key, num_rows="dynamic", hide_index=True, on_change=edit, height=ROW * (len(edges) + 2)
        )
    vertices = sorted({vertex for edge in edges for vertex in edge} | set(ends))

    def move(end: int) -> None:
        moved = list(ends)
        moved[end] = st.session_state[f"end of {text} {end}"]
        _show(search_questions.write_text(edges, *moved))

    for end, name in enumerate(("Start", "Goal")):
        narrow.selectbox(
            name,
            vertices,
            index=vertices.index(ends[end]),
            key=f"end of {text} {end}",
            on_change=move,
            args=(end,),
        )


def edited_edges(edges: list[tuple[int, int]], edits: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """The edges after what was done in the table; None while a new row is not filled in."""
    rows = [{"source": source, "target": target} for source, target in edges]
    for index, changed in edits["edited_rows"].items():
        rows[int(index)].update(changed)
    kept = [row for index, row in enumerate(rows) if index not in edits["deleted_rows"]]
    added = [{"source": row.get("source"), "target": row.get("target")} for row in edits["added_rows"]]
    whole = [*kept, *added]
    if any(value is None for row in whole for value in row.values()):
        return None
    return [(int(row["source"]), int(row["target"])) for row in whole]


def _show(text: str) -> None:
    """Another graph: nothing of it is looked at yet."""
    st.session_state.update(graph=text, vertex=None, operation=None, removed=[])
