"""A circuit as a drawing, alone and over another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apps.ui import charts, circuit_drawing
from apps.ui.circuit_drawing import HELPS, HURTS, STATUS_LOOKS, draw
from apps.ui.circuit_overlay import compare, difference
from circuits.circuit import Circuit, EdgeScores, Terms
from circuits.graph import CircuitGraph
from workbench.runtime import WorkbenchError
from workbench.store import Provenance

TERMS = Terms(ablation="resample", metric="logit_difference", unit="logits", better="higher", n=8)
GRAPH = CircuitGraph(n_heads=2, n_steps=1, d_model=4, inputs=("input",), clusters=(((),),))
"""Edges: input to q, k, v of two heads, to the MLP and the logits; heads to both; MLP to the logits."""


def circuit_with(*names: str, graph: CircuitGraph = GRAPH, terms: Terms = TERMS, scores: bool = True) -> Circuit:
    """A circuit whose edges have the scores 1, -2, 3, -4, …, in the graph's order."""
    n_edges = len(graph.edges)
    score = torch.tensor([(index + 1.0) * (-1) ** index for index in range(n_edges)])
    provenance = Provenance(code_version="test")
    found = EdgeScores(
        graph=graph,
        terms=terms,
        method="exact",
        score=score,
        live=torch.ones(n_edges, dtype=torch.bool),
        scale="logits",
        reference="clean run",
        rule="by hand",
        seconds=0.0,
        provenance=provenance,
    )
    return Circuit(
        graph=graph,
        keep=graph.mask(names),
        terms=terms,
        method="exact",
        rule="by hand",
        scores=found if scores else None,
        provenance=provenance,
    )


def test_a_circuit_against_another_is_hits_misses_and_false_alarms() -> None:
    mine = circuit_with("input->a0.h0<v>", "a0.h0->logits", "m0->logits")
    truth = circuit_with("input->a0.h0<v>", "a0.h0->logits", "a0.h1->logits", "input->a0.h1<v>", "input->m0")
    found = compare(mine, truth)
    assert {status: found.count(status) for status in STATUS_LOOKS} == {"hit": 2, "miss": 3, "false alarm": 1}
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 5)
    assert found.status["m0->logits"] == "false alarm"
    assert found.status["input->m0"] == "miss"
    empty = compare(circuit_with(), circuit_with())
    assert (empty.precision, empty.recall) == (None, None)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (circuit_with("input->logits", terms=replace(TERMS, ablation="zero")), "do not compare"),
        (circuit_with("input->logits", terms=replace(TERMS, metric="loss")), "do not compare"),
        (circuit_with(graph=replace(GRAPH, n_heads=3)), "another model's graph"),
    ],
)
def test_what_does_not_compare_is_refused(other: Circuit, says: str) -> None:
    with pytest.raises(WorkbenchError, match=says):
        compare(circuit_with("input->logits"), other)


def test_nodes_stand_by_depth_and_edges_tell_sign_and_size() -> None:
    circuit = circuit_with("input->a0.h0<q>", "input->a0.h1<q>", "m0->logits")
    drawing = draw(circuit)
    assert drawing.stages == ("inputs", "heads 0", "MLP 0", "logits")
    places = {dot.name: dot.at for dot in drawing.dots}
    assert places == {
        "input": (0, 0.5),
        "a0.h0": (1, 0.0),
        "a0.h1": (1, 1.0),
        "m0": (2, 0.5),
        "logits": (3, 0.5),
    }
    lines = {line.name: line for line in drawing.lines}
    assert len(lines) == len(GRAPH.edges) == 13
    # Scores 1, -2 and 13 of 13.
    assert lines["input->a0.h0<q>"].colour == HELPS
    assert lines["input->a0.h1<q>"].colour == HURTS
    assert lines["m0->logits"].width == circuit_drawing.WIDEST
    assert lines["input->a0.h1<q>"].width == pytest.approx(1 + 5 * 2 / 13)
    assert "hurts by <b>2</b>" in lines["input->a0.h1<q>"].tip
    assert "not kept" in lines["input->m0"].tip
    assert (lines["input->m0"].colour, lines["input->m0"].opacity) == (circuit_drawing.FAINT, 0.5)
    assert {dot.name for dot in drawing.dots if dot.lit} == {"input", "a0.h0", "a0.h1", "m0", "logits"}
    # The three slots of a head lie side by side, and what passes over a stage goes around it.
    bends = [lines[f"input->a0.h0<{slot}>"].bend for slot in "qkv"]
    assert bends == [-circuit_drawing.SPREAD, 0, circuit_drawing.SPREAD]
    assert lines["a0.h0->logits"].bend == circuit_drawing.BEND
    assert [line.name for line in drawing.lines][-1] == "m0->logits"


def test_a_score_of_which_less_is_better_helps_where_it_is_negative() -> None:
    terms = replace(TERMS, metric="loss", unit="nats", better="lower")
    circuit = circuit_with("input->a0.h0<q>", terms=terms)
    assert circuit.scores is not None
    in_nats = replace(circuit, scores=replace(circuit.scores, scale="nats"))
    assert next(line for line in draw(in_nats).lines if line.name == "input->a0.h0<q>").colour == HURTS


def test_what_is_chosen_stands_out_and_what_it_does_not_touch_fades() -> None:
    circuit = circuit_with("input->a0.h0<v>", "a0.h0->logits", "m0->logits")
    of_node = {line.name: line.opacity for line in draw(circuit, chosen="a0.h0").lines}
    assert (of_node["input->a0.h0<v>"], of_node["a0.h0->logits"], of_node["m0->logits"]) == (1.0, 1.0, 0.15)
    of_edge = {line.name: line for line in draw(circuit, chosen="m0->logits").lines}
    assert (of_edge["m0->logits"].opacity, of_edge["a0.h0->logits"].opacity) == (1.0, 0.15)


def test_of_a_large_graph_only_the_circuit_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_drawing, "ALL_DRAWN", 4)
    circuit = circuit_with("input->a0.h0<v>", "a0.h0->logits")
    drawing = draw(circuit, chosen="input->m0")
    assert {line.name for line in drawing.lines} == {"input->a0.h0<v>", "a0.h0->logits"}
    assert {dot.name for dot in drawing.dots} == {"input", "a0.h0", "logits"}
    assert {dot.name for dot in draw(circuit, chosen="m0").dots} == {"input", "a0.h0", "logits", "m0"}


def test_compared_edges_have_a_colour_and_a_dash_each() -> None:
    mine, other = circuit_with("input->logits", "m0->logits"), circuit_with("m0->logits", "input->m0")
    compared = compare(mine, other)
    looks = {line.name: (line.colour, line.dash) for line in draw(mine, compared=compared).lines}
    assert looks["m0->logits"] == STATUS_LOOKS["hit"]
    assert looks["input->m0"] == STATUS_LOOKS["miss"]
    assert looks["input->logits"] == STATUS_LOOKS["false alarm"]
    assert len({colour for colour, _ in STATUS_LOOKS.values()}) == len({dash for _, dash in STATUS_LOOKS.values()}) == 3
    drawing = draw(mine, compared=compared)
    said = circuit_drawing.legend(
        drawing, compared, {"hit": "in both", "miss": "only there", "false alarm": "only <here>"}, ""
    )
    assert "in both: 1" in said
    assert "only &lt;here&gt;: 1" in said
    assert "not kept" in said
    whole = circuit_with(*GRAPH.index)
    assert "not kept" not in circuit_drawing.legend(draw(whole), None, {}, "logits")


def test_every_position_has_a_block_of_rows() -> None:
    graph = replace(GRAPH, inputs=("embed", "pos"), columns=("a", "="), column_of=(0, 1))
    places = {dot.name: dot.at for dot in draw(circuit_with("m0@=->logits@=", graph=graph)).dots}
    assert places["a0.h1@a"] == (1, 1.0)
    assert places["a0.h1@="] == (1, 3.5)
    assert len(set(places.values())) == len(places) == 2 * 6


def test_many_stages_have_short_names_and_dots() -> None:
    graph = replace(GRAPH, n_steps=4, clusters=(((),),) * 4)
    drawing = draw(circuit_with("m3->logits", graph=graph))
    assert drawing.stages == ("inputs", "a0", "m0", "a1", "m1", "a2", "m2", "a3", "m3", "logits")
    few, many = (circuit_drawing.echarts(each)["series"][0]["data"] for each in (draw(circuit_with()), drawing))
    assert {item["symbol"] for item in few} == {"roundRect"}
    assert {item["symbol"] for item in many} == {"circle"}


def test_both_drawings_show_every_part() -> None:
    drawing = draw(circuit_with("input->a0.h0<v>", "a0.h0->logits"))
    series = circuit_drawing.echarts(drawing)["series"][0]
    assert [link["id"] for link in series["links"]] == [line.name for line in drawing.lines]
    assert [item["name"] for item in series["data"]] == [dot.name for dot in drawing.dots]
    picture = circuit_drawing.plotly(drawing, "A circuit")
    content = picture.to_dict()
    assert content["layout"]["title"]["text"] == "A circuit"
    traces = content["data"]
    assert len(traces) == len(drawing.lines) + 1
    first = drawing.lines[0]
    ends = {dot.name: dot.at for dot in drawing.dots}
    assert (traces[0]["x"][0], traces[0]["y"][0]) == ends[first.source]
    assert (traces[0]["x"][-1], traces[0]["y"][-1]) == ends[first.target]


def test_the_table_of_two_circuits_has_both_scores() -> None:
    mine, other = circuit_with("m0->logits"), circuit_with("m0->logits", "input->m0", scores=False)
    table = difference(mine, other, compare(mine, other), "the truth")
    assert table.frame.to_dict("records") == [
        {"edge": "input->m0", "status": "miss", "score": 7.0},
        {"edge": "m0->logits", "status": "hit", "score": 13.0},
    ]
    assert "hit 1, miss 1, false alarm 0; precision 1.000, recall 0.500" in table.caption


@pytest.mark.parametrize(
    ("selected", "part"),
    [
        ([{"series_index": 0, "data_type": "edge", "data_indices": [4]}], ("edge", 4)),
        ([{"series_index": 0, "data_type": "node", "data_indices": [0]}], ("node", 0)),
        ([], None),
    ],
)
def test_a_click_on_a_graph_hits_a_node_or_an_edge(selected: list[dict[str, object]], part: object) -> None:
    assert charts.clicked_part({"selection": {"selected": selected, "areas": []}}) == part
