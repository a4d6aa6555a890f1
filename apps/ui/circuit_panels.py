"""What the page Circuit says of a part of a circuit that was clicked, and what it gives away."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from apps.ui import charts, circuit_files, circuit_questions, state
from apps.ui.circuit_drawing import nodes_of, reader_of
from apps.ui.circuit_questions import Examined, Found, Question
from circuits.circuit import Circuit
from circuits.graph import Node
from probes.places import read_place
from workbench.figures import figure
from workbench.instrument.sites import Site
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError
from workbench.tables import Table

PLOTLY = {"displaylogo": False}
SHOWN = 12
"""Examples that are listed, those that are affected most."""
ALL_PAIRS = "all pairs"
FORMATS = {
    ".json": ("Workbench (JSON)", "Loses nothing: graph, scores, terms"),
    ".eap.json": ("EAP (JSON)", "For EAP-IG and MIB"),
    ".dot": ("Drawing (DOT)", "For Graphviz"),
    ".graphml": ("Graph (GraphML)", "For networkx, Gephi, Cytoscape"),
}


def part(question: Question, held: Found, size: int | None, name: str) -> None:
    """A node or an edge: what it is worth, in which examples, and for a head where it looks."""
    circuit = held.at(size)
    graph = circuit.graph
    st.subheader(name)
    if name in graph.index:
        _edge(question, circuit, size, name)
        edge = graph.edges[graph.index[name]]
        reader = graph.ports[edge.port].node
        _attention(question, reader if reader.part == "head" else graph.writers[edge.writer])
        return
    node = nodes_of(graph)[name]
    _node(question, circuit, size, name, node)
    _attention(question, node)


def numbers(held: Found, circuit: Circuit, size: int | None) -> None:
    """What the circuit withstands at a size."""
    summary, here = held.summary, held.measured(size)
    with st.container(horizontal=True, gap="medium"):
        st.metric("Edges", f"{circuit.size} of {summary['all_edges']}", width="content")
        st.metric("Faithfulness", f"{here['faithfulness']:.3f}", width="content")
        drawn = here["random_95"]
        st.metric("Random, 95 %", "not drawn" if drawn is None else f"{drawn:.3f}", width="content")
        st.metric("Accuracy", f"{here['accuracy']:.1%}", width="content")
    terms = circuit.terms
    dangling = (circuit.requested or circuit.size) - circuit.size
    pruned = f" {dangling} of the {circuit.requested} best edges dangle and are pruned." if dangling else ""
    st.caption(
        f"Faithfulness [{here['low']:.3f}, {here['high']:.3f}]: share of the {terms.metric.replace('_', ' ')} between "
        f"{summary['whole']:.3g} (whole model) and {summary['empty']:.3g} (every edge ablated: {terms.ablation}) that "
        f"the circuit alone restores; n = {summary['n']} pairs other than those that it was found on, 95 % paired "
        f"bootstrap. The model's accuracy is {summary['model_accuracy']:.1%}; {summary['live_edges']} edges are live."
        f"{pruned}"
    )


def withstood(held: Found) -> None:
    """What else is known of the circuit that was found."""
    summary = held.summary
    low, high = summary["necessity_interval"]
    least, most = summary["completeness_interval"]
    worst = ", ".join(f"`{name}`" for name in summary["worst_subset"])
    where = f"when {worst} is taken out of both" if worst else "with nothing taken out"
    st.markdown(
        f"The circuit as it was found ({summary['size']} edges: {summary['rule']}). Ablating it and keeping all else "
        f"loses **{summary['necessity']:.3f}** [{low:.3f}, {high:.3f}] of the headroom (necessity). Circuit and model "
        f"come apart by **{summary['completeness']:.3f}** [{least:.3f}, {most:.3f}] at the worst part that was tried "
        f"(completeness, biased upward), {where}."
    )
    if "cpr" in summary:
        st.markdown(f"CPR **{summary['cpr']:.3f}**, CMD **{summary['cmd']:.3f}** (areas of the MIB benchmark).")


def edge_by_edge(question: Question, held: Found, size: int | None) -> None:
    """Minimality: of the circuit as it was found at once, at another size once it is asked for."""
    if size in (None, held.circuit.requested):
        tables = held.minimality.tables()
    else:
        request = (question, size)
        if st.button("Take out each edge", key="minimality"):
            st.session_state["minimal"] = request
        if st.session_state.get("minimal") != request:
            st.caption("What this circuit loses without each of its edges, and which edges stand in for each other.")
            return
        tables = circuit_questions.minimal(question, size).tables()
    if not tables:
        state.missing("The circuit is empty: nothing can be taken out.")
        return
    table = tables[0]
    st.dataframe(table.frame.sort_values("cost", ascending=False), hide_index=True)
    st.caption(table.caption)
    state.download(table, key="minimality_table")


def exports(question: Question, size: int | None, stem: str) -> None:
    """The circuit in every format, and why one cannot hold it."""
    refused = []
    with st.container(horizontal=True):
        for suffix, (label, told) in FORMATS.items():
            try:
                content = circuit_files.exported(question, size, suffix)
            except WorkbenchError as error:
                refused.append(f"No {label}: {' '.join(str(error).split())}")
                continue
            st.download_button(
                label,
                content,
                f"{stem}{suffix}",
                key=f"export{suffix}",
                help=told,
                icon=":material/download:",
                on_click="ignore",
            )
    for reason in refused:
        st.caption(reason)


def _edge(question: Question, circuit: Circuit, size: int | None, name: str) -> None:
    index = circuit.graph.index[name]
    kept = "kept" if circuit.keep[index] else "not kept"
    score = "" if circuit.scores is None else f", score {float(circuit.scores.score[index]):.4g} {circuit.scores.scale}"
    st.markdown(f"An edge that is **{kept}** in this circuit{score}.")
    _shown(circuit_questions.examined_edge(question, size, name), name)


def _node(question: Question, circuit: Circuit, size: int | None, name: str, node: Node) -> None:
    graph = circuit.graph
    scores = None if circuit.scores is None else circuit.scores.score.tolist()
    rows = [
        {"edge": edge.name, "score": None if scores is None else scores[index], "kept": bool(circuit.keep[index])}
        for index, edge in enumerate(graph.edges)
        if name in (edge.source, reader_of(graph, edge))
    ]
    rows.sort(key=lambda row: (not row["kept"], -abs(row["score"] or 0)))
    st.markdown(f"**{sum(row['kept'] for row in rows)}** of its {len(rows)} edges are kept.")
    st.dataframe(rows, hide_index=True, height=min(240, 38 + 35 * len(rows)))
    if node.part == "logits":
        return
    _contribution(question, node)
    _shown(circuit_questions.examined_node(question, size, name), name)


def _contribution(question: Question, node: Node) -> None:
    site = circuit_questions.part_of(node)
    if site is None:
        return
    try:
        told = circuit_questions.direct_contribution(question, site)
    except WorkbenchError as error:
        st.caption(f"No direct contribution: {error}")
        return
    if told is not None:
        value, low, high = told
        st.markdown(
            f"Straight into the logits it adds **{value:+.3f}** [{low:+.3f}, {high:+.3f}] to the answer's lead over "
            f"the distractor; n = {question.n}."
        )


def _shown(examined: Examined, name: str) -> None:
    """Effects as bars with intervals, and the examples."""
    if examined.dead:
        st.warning(
            f"Under this ablation {name} carries the same in both runs, or reaches nothing that is read. "
            "Effects of 0 say nothing about it."
        )
    left, right = st.columns(2)
    with left:
        for row in examined.effects.frame.itertuples():
            st.markdown(f"**{row.measure}** {row.effect:+.3f} [{row.low:+.3f}, {row.high:+.3f}] – {row.what}")
        drawn = figure(examined.effects).update_layout(title_text="", margin_t=16)
        st.plotly_chart(drawn, key="part_effects", config=PLOTLY)
        st.caption(examined.effects.caption)
        state.download(examined.effects, key="part_effects_table")
    with right:
        st.markdown("Examples that it matters most for, ablated alone")
        st.dataframe(examined.examples.head(SHOWN), hide_index=True)


def _attention(question: Question, node: Node) -> None:
    """Where a head looks, over all pairs or in one, and what it writes there."""
    if node.part != "head":
        return
    batch, task = question.judged, question.task
    prompts = {task.decode(tokens): place for place, tokens in reversed(list(enumerate(batch.tokens.tolist())))}
    choice = st.selectbox("Attention over", [ALL_PAIRS, *reversed(prompts)], key="prompt_of")
    example = prompts.get(choice)
    patterns = circuit_questions.attended(question, example)
    place = next(i for i, each in enumerate(patterns.heads) if (each.layer, each.head) == (node.step, node.index))
    charts.heatmap(
        patterns.pattern[place].numpy(),
        list(patterns.positions),
        list(patterns.positions),
        key="attention",
        title=f"Attention of {node.name}: from row to column",
        unit="share",
        diverging=False,
        limit=1.0,
    )
    over = f"Mean over n = {patterns.n} clean prompts." if example is None else "In this prompt."
    st.caption(f"{over} What it writes is read from a single prompt: choose one." if example is None else over)
    table = patterns.tables()[0]
    chosen = table.frame[table.frame["head"] == f"L{node.step}.h{node.index}"].reset_index(drop=True)
    state.download(replace(table, frame=chosen), key="attention_table")
    if example is not None:
        _writes(question, node, example)


def _writes(question: Question, node: Node, example: int) -> None:
    """The tokens that a head speaks for at the first place that is read."""
    batch = question.judged.select(slice(example, example + 1))
    position = int(batch.read[0].nonzero()[0])
    model = state.model_at(state.open_run(question.reference), question.step)
    site = Site.parse(circuit_questions.part_of(node) or "")
    reading = read_place(model, batch, site, position, names=question.task.vocab)
    said = ", ".join(f"**{token}** {value:.2f}" for token, value in reading.tokens)
    st.markdown(f"Where the answer is read it writes (logits): {said}")


def score_card(ablation: Ablation) -> None:
    """How far each method can be believed: what it found where the circuit is known."""
    for table in _known_circuits(ablation):
        st.plotly_chart(figure(table), config=PLOTLY, key=f"card_{table.name}")
        st.caption(table.caption)
        state.download(table, key=f"card_table_{table.name}")
    st.caption("Measured anew by `workbench scorecard`.")


@st.cache_data
def _known_circuits(ablation: Ablation) -> list[Table]:
    """The pictures of the shipped card, of one ablation."""
    from apps.shipped_card import shipped_card

    drawn = [table for table in shipped_card().tables() if table.kind != "table"]
    return [
        replace(table, frame=table.frame[table.frame["ablation"] == ablation].reset_index(drop=True)) for table in drawn
    ]
