"""Page Circuit: the edges through which a model does its task, at every size, and what each of them is worth.

A circuit is looked for by a job and kept; all else on the page is asked of the kept one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import streamlit as st

from apps.circuits_of_runs import FOR_ONE_SIZE, PAIRS, Granularity
from apps.ui import charts, circuit_drawing, circuit_files, circuit_panels, circuit_questions, state
from apps.ui.charts import NodeOrEdge
from apps.ui.circuit_drawing import Drawing
from apps.ui.circuit_jobs import obtain
from apps.ui.circuit_overlay import Comparison, Status, compare, counts, difference
from apps.ui.circuit_questions import Found, Question
from circuits.circuit import Circuit
from circuits.discovery import METHODS
from workbench.figures import figure
from workbench.metrics import METRICS
from workbench.models.known import ABLATIONS
from workbench.tables import Table
from workbench.training.checkpoints import Run

FEWEST, MOST = 16, 256
"""Pairs that a circuit is found on, and judged on."""
NOTHING, STEP, METHOD, FILE = "nothing", "another checkpoint", "another method", "a file"
CURVE_AXES = {"x": "edges", "y": "faithfulness", "series": "series", "low": "low", "high": "high"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Other:
    """A circuit to compare with."""

    circuit: Circuit
    name: str
    meanings: Mapping[Status, str]
    """What the three kinds of edges are, in words."""


def page() -> None:
    """The page."""
    st.title("Circuit")
    run = state.choose_run()
    with st.sidebar:
        question = _ask(run, state.choose_step(run))
    if question.method in FOR_ONE_SIZE and question.edges is None:
        state.missing(f"{question.method} looks for a circuit of one size: say in the sidebar how many edges to keep.")
        return
    held = obtain(question, key="circuit")
    if held is None:
        return
    above = st.container()
    wide, narrow = st.columns([3, 2], gap="medium")
    with narrow:
        size = _choose_size(held)
        _curve(held, size)
    circuit = held.at(size)
    with above:
        circuit_panels.numbers(held, circuit, size)
    with wide:
        other = None
        with state.user_errors_shown():
            other = _other(run, question, held, size)
        chosen = _graph(circuit, other)
    if chosen is not None:
        with state.user_errors_shown():
            circuit_panels.part(question, held, size, chosen)
    _more(question, held, size, circuit, other)
    state.copy_as_python(python_code(question, held, size, chosen))


def python_code(question: Question, held: Found, size: int | None, chosen: str | None) -> str:
    """The code that computes what the page shows."""
    told = {name: value for name, value in question.arguments.items() if value is not None}
    options = "\n".join(f"    {name}={value!r}," for name, value in told.items())
    ranked = held.sizes != []
    pruned = f"top_n(found.circuit.scores, {size}, absolute={question.absolute})" if ranked else "found.circuit"
    lines = [
        "import torch",
        "",
        "from apps.circuits_of_runs import circuit_of",
        *(["from circuits.discovery import top_n"] if ranked else []),
        "from circuits.experiment import experiment",
        "from circuits.memoised import circuit_values",
        "from workbench import load",
        "",
        f"run = load({question.reference!r})",
        f"found = circuit_of(\n    run,\n    {question.step},\n{options}\n)",
        "print(found)",
        "",
        f"circuit = {pruned}",
        f"pairs = run.task.sample({question.n}, split={question.split!r}, seed={question.seed + 1})",
        "plan = experiment(",
        f"    run.model({question.step}), pairs, graph=circuit.graph,",
        f"    ablation={question.ablation!r}, metric={question.metric!r},",
        ")",
        "alone = circuit_values(plan, circuit.keep[None])[0]",
        'print("faithfulness", float((alone - plan.empty).mean()) / plan.headroom)',
        "print(circuit.frame)",
    ]
    if chosen is not None:
        lines += [
            "",
            "graph = circuit.graph",
            f"part = torch.tensor([{chosen!r} in (edge.name, edge.source) for edge in graph.edges])",
            "lost = plan.full - circuit_values(plan, ~part[None])[0]",
            f'print({chosen!r}, "ablated alone", float(lost.mean()) / plan.headroom)',
        ]
    else:
        lines.remove("import torch")
        lines.remove("")
    return "\n".join(lines)


def curve_table(held: Found) -> Table:
    """Faithfulness over sizes, as it was kept."""
    assert held.curve is not None
    summary = held.summary
    caption = (
        f"Faithfulness and accuracy of the best edges by {summary['method']}; {summary['metric']} under "
        f"{summary['ablation']} ablation, n = {summary['n']} examples, 95 % paired bootstrap intervals; "
        f"{summary['controls']} random connected circuits a size. CPR {summary['cpr']:.3f}, CMD {summary['cmd']:.3f}."
    )
    return Table(
        name="circuit_curve",
        frame=held.curve.sort_values("series", key=lambda names: names != "circuit", kind="stable"),
        kind="curve",
        axes=CURVE_AXES,
        unit="share of the headroom; accuracy as a fraction",
        caption=caption,
    )


def _ask(run: Run, step: int) -> Question:
    """What is looked for, as the sidebar says."""
    method = st.selectbox("Method", list(METHODS), index=2, key="method", bind="query-params", help=_methods())
    ablation = st.selectbox("Ablation", ABLATIONS, key="ablation", bind="query-params", help=_ABLATION_HELP)
    metric = st.selectbox("Metric", list(METRICS), key="metric", bind="query-params")
    granularity = st.selectbox(
        "Granularity", get_args(Granularity), key="granularity", bind="query-params", help=_GRANULARITY_HELP
    )
    rank = st.segmented_control(
        "Rank by",
        ["absolute", "signed"],
        default="absolute",
        required=True,
        key="rank",
        bind="query-params",
        help="Absolute scores: edges that hurt count, too. Signed: only edges that help come first.",
    )
    edges = st.number_input(
        "Edges",
        min_value=1,
        value=None,
        placeholder="fewest that do it",
        key="edges",
        bind="query-params",
        help="How many to keep. Left empty: the fewest with faithfulness and accuracy from 0.9 on.",
    )
    splits = list(run.task.splits)
    split = st.selectbox("Split", splits, index=splits.index(state.unseen_split(run)), key="split", bind="query-params")
    checkpoint = run.checkpoint(step)
    most = min(MOST, circuit_questions.pair_count(run.reference, checkpoint.sha256, split))
    n = most
    if most > FEWEST:
        n = st.slider("Pairs", FEWEST, most, min(PAIRS, most), key="n", bind="query-params")
    return Question(
        reference=run.reference,
        step=step,
        sha256=checkpoint.sha256,
        method=method,
        edges=edges,
        ablation=ablation,
        metric=metric,
        granularity=granularity,
        absolute=rank == "absolute",
        n=n,
        split=split,
    )


def _choose_size(held: Found) -> int | None:
    """The size that the circuit is pruned to; None where nothing was ranked."""
    sizes = held.sizes
    if len(sizes) < 2:
        state.missing(f"By {held.circuit.method} edges have no ranking: the circuit is as it was found.")
        return None
    wanted = st.session_state.get("size", st.query_params.get("size", ""))
    if not str(wanted).isdecimal() or int(wanted) not in sizes:
        # Of another circuit, or of a link that is out of date.
        st.session_state.pop("size", None)
    return st.select_slider(
        "Size: the best edges that are kept", sizes, value=held.circuit.requested, key="size", bind="query-params"
    )


def _curve(held: Found, size: int | None) -> None:
    if held.curve is None or size is None:
        return
    table = curve_table(held)
    at = {held.at(each).size: each for each in held.sizes}
    drawn = figure(table).update_layout(title_text="", margin_t=16, height=340)
    drawn.update_yaxes(title_text="share")
    drawn.add_vline(held.at(size).size, line={"width": 2, "color": charts.CHOSEN})

    def go_to(edges: float) -> None:
        st.session_state["size"] = at[min(at, key=lambda here: abs(here - edges))]

    charts.curves(drawn, key="curve", on_click=go_to)
    st.caption("Orange: the circuit that is drawn. Click into the curves to prune to there.")
    state.download(table, key="curve_table")


def _graph(circuit: Circuit, other: Other | None) -> str | None:
    """The circuit, and what is chosen of it."""
    compared = None
    if other is not None:
        compared = compare(circuit, other.circuit)
        st.caption(f"Against {other.name} ({other.circuit.size} edges): {counts(compared)}.")
    chosen = _look(circuit, compared)
    drawing = circuit_drawing.draw(circuit, chosen=chosen, compared=compared)
    title = f"Circuit of {circuit.size} edges by {circuit.method}"
    charts.graph(
        circuit_drawing.echarts(drawing),
        key="circuit",
        height=drawing.height,
        alt=title,
        on_click=lambda kind, index: _choose(drawing, kind, index),
    )
    scale = "score" if circuit.scores is None else circuit.scores.scale
    st.html(circuit_drawing.legend(drawing, compared, {} if other is None else other.meanings, scale))
    st.caption("From left to right: inputs, heads with what they read by q, k and v, MLPs, logits. Wider counts more.")
    return chosen


def _look(circuit: Circuit, compared: Comparison | None) -> str | None:
    """The node or edge that is looked at: the one in the URL, which clicks and this list set."""
    graph = circuit.graph
    known = [*circuit_drawing.nodes_of(graph), *(circuit.edges if compared is None else compared.status)]
    wanted = st.session_state.get("look", st.query_params.get("look"))
    if wanted in graph.index and wanted not in known:
        known.append(wanted)
    elif wanted is not None and wanted not in known:
        # Of another circuit.
        st.session_state.pop("look", None)
    return st.selectbox(
        "Node or edge", known, index=None, placeholder="click one, or choose here", key="look", bind="query-params"
    )


def _choose(drawing: Drawing, kind: NodeOrEdge, index: int) -> None:
    """Look at what was clicked; clicked again, at nothing."""
    name = (drawing.dots if kind == "node" else drawing.lines)[index].name
    st.session_state["look"] = None if st.session_state.get("look") == name else name


def _other(run: Run, question: Question, held: Found, size: int | None) -> Other | None:
    """The circuit to compare with, once it is there."""
    offered = [NOTHING, *([STEP] if len(run.checkpoints) > 1 else []), METHOD, FILE]
    left, right = st.columns(2)
    choice = left.selectbox("Compare with", offered, key="against", bind="query-params")
    if choice == FILE:
        return _from_file(question, held)
    same = replace(question, edges=question.edges or held.circuit.requested)
    if choice == STEP:
        steps = [each.step for each in run.checkpoints if each.step != question.step]
        step = right.selectbox(
            "Checkpoint to compare", steps, index=len(steps) - 1, key="other_step", bind="query-params"
        )
        wanted, name = replace(same, step=step, sha256=run.checkpoint(step).sha256), f"step {step}"
    elif choice == METHOD:
        methods = [method for method in METHODS if method != question.method]
        method = right.selectbox("Method to compare", methods, key="other_method", bind="query-params")
        wanted, name = replace(same, method=method), f"method {method}"
    else:
        return None
    other = obtain(wanted, key="other")
    if other is None:
        return None
    meanings: dict[Status, str] = {"hit": "in both", "miss": f"only in {name}", "false alarm": "only in this one"}
    return Other(circuit=other.at(size), name=name, meanings=meanings)


def _from_file(question: Question, held: Found) -> Other | None:
    brought = st.file_uploader("Circuit's file", type=["json", "pt"], key="truth", help="The workbench's own, or EAP's")
    if brought is None:
        state.missing("Bring the circuit that counts as the truth: a file of the workbench, or of the EAP format.")
        return None
    content, terms = brought.getvalue(), None
    if not circuit_files.names_its_terms(brought.name, content):
        left, right = st.columns(2)
        ablation = left.selectbox("Its ablation", ABLATIONS, index=None, key="truth_ablation")
        metric = right.selectbox("Its metric", list(METRICS), index=None, key="truth_metric")
        if ablation is None or metric is None:
            state.missing("This file does not say under which ablation and metric it holds: say it here.")
            return None
        terms = (ablation, metric)
    circuit = circuit_files.uploaded(question, brought.name, content, terms)
    held.circuit.terms.check_comparable(circuit.terms)
    meanings: dict[Status, str] = {"hit": "hit", "miss": "miss", "false alarm": "false alarm"}
    return Other(circuit=circuit, name=brought.name, meanings=meanings)


def _more(question: Question, held: Found, size: int | None, circuit: Circuit, other: Other | None) -> None:
    """Tables, what else the circuit withstood, and files."""
    titles = ["Edges", "Edge by edge", "Withstood", "Score card", "Export"]
    edges, minimal, withstood, card, export = st.tabs(titles)
    with edges:
        table = circuit.tables()[0]
        if other is not None:
            compared = compare(circuit, other.circuit)
            table = difference(circuit, other.circuit, compared, other.name)
        st.dataframe(table.frame, hide_index=True)
        st.caption(table.caption)
        state.download(table, key="edges_table")
    with minimal, state.user_errors_shown():
        circuit_panels.edge_by_edge(question, held, size)
    with withstood:
        circuit_panels.withstood(held)
    with card, state.user_errors_shown():
        circuit_panels.score_card(question.ablation)
    with export:
        stem = f"circuit-{question.reference.replace(':', '-')}-{question.step}"
        circuit_panels.exports(question, size, stem)
        drawing = circuit_drawing.draw(circuit, compared=None if other is None else compared)
        st.download_button(
            "Picture (HTML)",
            lambda: circuit_drawing.plotly(drawing, circuit.tables()[0].caption).to_html(include_plotlyjs=True),
            f"{stem}.html",
            "text/html",
            key="export_picture",
            icon=":material/download:",
            on_click="ignore",
        )


def _methods() -> str:
    return "\n".join(f"- **{name}**: {about}" for name, about in METHODS.items())


_ABLATION_HELP = (
    "What an edge carries that is not kept: its value in the counterfactual run (resample), its mean over the pairs, "
    "or zero."
)
_GRANULARITY_HELP = (
    "Component: heads and MLPs, all positions together. Inputs: token and position apart. Positions: every edge at "
    "every position, too."
)
