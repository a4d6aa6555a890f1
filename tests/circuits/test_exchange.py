"""Files of circuits and scores: round trips, a file written by hand, the format's own formulas, and what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import eap_files
from circuits.circuit import Circuit, EdgeScores, Terms
from circuits.exchange import MIB_SIZES, Foreign, load_circuit, load_mib, load_scores, save_circuit, save_mib
from circuits.graph import CircuitGraph
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance

TERMS = Terms(ablation="resample", metric="logit_difference", unit="logits", better="higher", n=5)
LOSS = replace(TERMS, metric="loss", unit="nats", better="lower")
FOREIGN = Foreign(terms=TERMS, change_of="metric", method="eap")


def graph_of(layers: int, heads: int, *, mlp: bool = True, **more: Any) -> CircuitGraph:
    clusters = (((),) if mlp else (),) * layers
    return CircuitGraph(
        **{"n_heads": heads, "n_steps": layers, "d_model": 8, "inputs": ("input",), "clusters": clusters, **more}
    )


def scores_of(graph: CircuitGraph, score: Tensor | None = None, **more: Any) -> EdgeScores:
    n = len(graph.edges)
    fallback = torch.randn(n, generator=generator(0, "scores"))
    given: dict[str, Any] = {
        "graph": graph,
        "terms": TERMS,
        "method": "eap",
        "score": fallback if score is None else score,
        "live": torch.arange(n) % 3 > 0,
        "scale": "logits",
        "reference": "clean run",
        "rule": "gradient",
        "seconds": 1.5,
        "provenance": Provenance(code_version="1", recipe="toy", seed=3, parents=("a", "b")),
        **more,
    }
    return EdgeScores(**given)


def circuit_of(graph: CircuitGraph, keep: Tensor | None = None, **more: Any) -> Circuit:
    scores = scores_of(graph)
    given: dict[str, Any] = {
        "graph": graph,
        "keep": torch.ones(len(graph.edges), dtype=torch.bool) if keep is None else keep,
        "terms": TERMS,
        "method": "eap",
        "rule": "top 3",
        "requested": 3,
        "absolute": True,
        "scores": scores,
        "provenance": scores.provenance,
        **more,
    }
    return Circuit(**given)


def assert_same(mine: Circuit | EdgeScores | None, theirs: Circuit | EdgeScores | None) -> None:
    if mine is None or theirs is None:
        assert mine is theirs
        return
    for field in fields(mine):
        left, right = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        elif isinstance(left, EdgeScores):
            assert_same(left, right)
        elif isinstance(left, CircuitGraph):
            assert left.key == right.key
        else:
            assert left == right, field.name


SPLITS = {
    "plain": {},
    "inputs": {"inputs": ("embed", "pos")},
    "columns": {"columns": ("a", 'b"\\ <q>', "="), "column_of": (0, 1, 1, 2)},
    "clusters": {"clusters": (((0, 2), (1, 3)),) * 2},
    "schedule": {"schedule": (0, 0)},
    "attention only": {"clusters": ((), ())},
}
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), split=st.sampled_from(sorted(SPLITS)), heads=st.integers(1, 3), double=st.booleans())
def test_own_files_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, split: str, heads: int, double: bool
) -> None:
    graph = graph_of(2, heads, **SPLITS[split])
    n = len(graph.edges)
    dtype = torch.float64 if double else torch.float32
    small = st.floats(-3e38, 3e38, allow_subnormal=False)
    values = data.draw(st.lists(numbers if double else small, min_size=n, max_size=n))
    score = torch.tensor(values, dtype=dtype)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    scores = scores_of(graph, score, examples=torch.stack([score, -score]) if double else None, terms=LOSS)
    circuit = circuit_of(graph, keep, scores=data.draw(st.sampled_from([scores, None])), requested=None, absolute=None)
    path = tmp_path_factory.mktemp("own") / "it.json"
    save_circuit(path, circuit)
    assert_same(circuit, load_circuit(path, graph))
    assert load_circuit(str(path)).graph.edges == graph.edges
    save_circuit(path, scores)
    assert_same(scores, load_scores(path, graph))


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    mlp=st.booleans(),
    heads=st.integers(1, 3),
    suffix=st.sampled_from([".eap.json", ".pt"]),
    change_of=st.sampled_from(["metric", "loss"]),
    terms=st.sampled_from([TERMS, LOSS]),
)
def test_eap_files_keep_scores_and_what_does_not_dangle(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    mlp: bool,
    heads: int,
    suffix: str,
    change_of: Literal["metric", "loss"],
    terms: Terms,
) -> None:
    graph = graph_of(2, heads, mlp=mlp)
    n = len(graph.edges)
    score = torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    scores = scores_of(graph, score, terms=terms, scale=terms.unit)
    path = tmp_path_factory.mktemp("eap") / f"it{suffix}"
    save_circuit(path, circuit_of(graph, keep, scores=scores), change_of=change_of)
    foreign = Foreign(terms=terms, change_of=change_of)
    found = load_circuit(path, graph, foreign=foreign)
    assert torch.equal(found.keep, graph.connected(keep))
    assert found.requested == int(keep.sum())
    if score.any():
        assert torch.equal(load_scores(path, graph, foreign=foreign).score, score)


BY_HAND = {
    "input->a0.h0<q>": (0.5, False),
    "input->a0.h0<k>": (-0.25, True),
    "input->a0.h0<v>": (-2.0, True),
    "input->m0": (0.125, True),
    "a0.h0->m0": (4.0, False),
    "input->logits": (0.0, False),
    "a0.h0->logits": (-1.0, True),
    "m0->logits": (3.0, False),
}


def by_hand() -> dict[str, Any]:
    """One layer, one head; `input->m0` is kept and dangles."""
    return {
        "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {name: {"in_graph": name != "m0"} for name in ("input", "a0.h0", "m0", "logits")},
        "edges": {name: {"score": score, "in_graph": kept} for name, (score, kept) in BY_HAND.items()},
    }


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_file_written_by_hand_number_by_number(tmp_path: Path) -> None:
    graph, path = graph_of(1, 1), written(tmp_path / "by_hand.json", by_hand())
    found = load_circuit(path, graph, foreign=FOREIGN)
    assert found.edges == ["input->a0.h0<k>", "input->a0.h0<v>", "a0.h0->logits"]
    assert (found.requested, found.size) == (4, 3)
    assert found.scores is not None
    assert found.scores.score.tolist() == [-0.5, 0.25, 2.0, -0.125, -4.0, 0.0, 1.0, -3.0]
    assert "change of the metric when an edge is corrupted, sign turned" in found.scores.rule
    assert math.isnan(found.scores.seconds)
    kept_sign = load_scores(path, graph, foreign=replace(FOREIGN, change_of="loss"))
    assert kept_sign.score.tolist() == [0.5, -0.25, -2.0, 0.125, 4.0, 0.0, -1.0, 3.0]
    assert "change of the loss when an edge is corrupted, sign kept" in kept_sign.rule
    ranked = load_scores(path, graph, foreign=replace(FOREIGN, change_of=None, method="ifr"))
    assert torch.equal(ranked.score, kept_sign.score)
    assert ranked.scale == "score of ifr"
    lower = load_scores(path, graph, foreign=Foreign(terms=LOSS, change_of="loss"))
    assert torch.equal(lower.importance, kept_sign.score)


def test_written_files_are_those_written_by_hand(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    score = torch.tensor([-0.5, 0.25, 2.0, -0.125, -4.0, 0.0, 1.0, -3.0])
    keep = graph.mask(name for name, (_, kept) in BY_HAND.items() if kept)
    save_circuit(tmp_path / "it.eap.json", circuit_of(graph, keep, scores=scores_of(graph, score)))
    found = json.loads((tmp_path / "it.eap.json").read_text())
    assert found == by_hand()
    assert "-0.0" not in (tmp_path / "it.eap.json").read_text()
    save_circuit(tmp_path / "it.pt", circuit_of(graph, keep, scores=scores_of(graph, score)))
    content = torch.load(tmp_path / "it.pt", weights_only=True)
    assert content["cfg"] == by_hand()["cfg"]
    assert content["src_nodes"] == ["input", "a0.h0", "m0"]
    assert content["dst_nodes"] == ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    assert content["edges_scores"].tolist() == [[0.5, -0.25, -2, 0.125, 0], [0, 0, 0, 4, -1], [0, 0, 0, 0, 3]]
    assert content["edges_in_graph"].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert content["nodes_in_graph"].tolist() == [True, True, False]


def test_a_node_is_in_the_graph_with_edges_on_either_side(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    save_circuit(tmp_path / "it.pt", circuit_of(graph, graph.mask(["a0.h0->m0", "m0->logits"])))
    assert torch.load(tmp_path / "it.pt", weights_only=True)["nodes_in_graph"].tolist() == [False, False, True]


def test_what_dangles_depends_on_the_ablation(tmp_path: Path) -> None:
    """A node that reads nothing kept still writes a constant, unless it writes what it writes in the other run."""
    graph = graph_of(1, 1)
    save_circuit(tmp_path / "it.pt", circuit_of(graph, graph.mask(["a0.h0->logits", "input->m0"])))
    assert load_circuit(tmp_path / "it.pt", graph, foreign=FOREIGN).edges == []
    zero = Foreign(terms=replace(TERMS, ablation="zero"), change_of="metric")
    assert load_circuit(tmp_path / "it.pt", graph, foreign=zero).edges == ["a0.h0->logits"]


def test_scores_of_their_own_scale_keep_their_sign(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    masks = scores_of(graph, torch.arange(8.0), scale="log odds")
    save_circuit(tmp_path / "it.pt", masks)
    found = load_scores(tmp_path / "it.pt", graph, foreign=replace(FOREIGN, change_of=None))
    assert found.score.tolist() == list(range(8))
    assert found.ranking(absolute=False).tolist() == masks.ranking(absolute=False).tolist()


def test_places_in_the_matrices_are_the_guides_formulas(tmp_path: Path) -> None:
    layers, heads = 3, 2
    graph = graph_of(layers, heads)
    score = torch.arange(1.0, len(graph.edges) + 1)
    save_circuit(tmp_path / "it.pt", scores_of(graph, score))
    matrix = torch.load(tmp_path / "it.pt", weights_only=True)["edges_scores"]
    assert list(matrix.shape) == [1 + layers * (heads + 1), layers * (3 * heads + 1) + 1]

    def place(name: str, head: Callable[[int, int], int], mlp: Callable[[int], int]) -> int:
        layer, _, rest = name[1:].partition(".h")
        return head(int(layer), int(rest[0])) if rest else mlp(int(layer))

    for edge, expected in zip(graph.edges, score.tolist(), strict=True):
        parent, child = edge.name.split("->")
        forward = 0
        if parent != "input":
            forward = place(
                parent,
                lambda layer, head: 1 + layer * (heads + 1) + head,
                lambda layer: 1 + layer * (heads + 1) + heads,
            )
        backward = -1
        if child != "logits":
            slot = "qkv".find(child[-2])
            backward = place(
                child,
                lambda layer, head, slot=slot: layer * (3 * heads + 1) + slot * heads + head,
                lambda layer: layer * (3 * heads + 1) + 3 * heads,
            )
        assert matrix[forward, backward] == -expected, edge.name


@pytest.mark.parametrize(("layers", "heads", "edges"), [(12, 12, 32_491), (4, 4, 479), (2, 4, 110), (1, 4, 23)])
def test_as_many_edges_as_the_format_has_and_in_seconds(tmp_path: Path, layers: int, heads: int, edges: int) -> None:
    graph = graph_of(layers, heads)
    start = time.process_time()
    for name in ("it.eap.json", "it.pt", "it.json"):
        save_circuit(tmp_path / name, circuit_of(graph))
        found = load_circuit(tmp_path / name, graph, foreign=FOREIGN)
        assert found.size == edges
        assert found.scores is not None
        assert torch.equal(found.scores.score.float(), scores_of(graph).score)
    assert time.process_time() - start < 20
    content = json.loads((tmp_path / "it.eap.json").read_text())
    assert (len(content["edges"]), len(content["nodes"])) == (edges, 2 + layers * (heads + 1))
    assert f"m{layers - 1}->logits" in content["edges"]


def test_a_model_without_mlps_has_them_in_the_file_with_score_zero(tmp_path: Path) -> None:
    graph = graph_of(2, 2, mlp=False)
    save_circuit(tmp_path / "it.eap.json", circuit_of(graph))
    content = json.loads((tmp_path / "it.eap.json").read_text())
    added = {name: mark for name, mark in content["edges"].items() if "m" in name}
    assert len(content["edges"]) - len(added) == len(graph.edges)
    assert len(content["edges"]) == len(graph_of(2, 2).edges)
    assert {(mark["score"], mark["in_graph"]) for mark in added.values()} == {(0.0, False)}
    assert not content["nodes"]["m1"]["in_graph"]
    content["edges"]["a0.h0->m1"]["in_graph"] = True
    with pytest.raises(WorkbenchError, match="1 edges of MLPs, such as a0.h0->m1"):
        load_circuit(written(tmp_path / "it.json", content), graph, foreign=FOREIGN)


REASONS = {
    "inputs": "input is split into embed and pos",
    "columns": "tells apart 3 columns",
    "clusters": "splits MLPs into clusters",
    "schedule": r"blocks run as \(0, 0\)",
}


@pytest.mark.parametrize("split", REASONS)
@pytest.mark.parametrize("name", ["it.pt", "it.eap.json"])
def test_what_the_eap_format_cannot_hold_is_refused_with_the_reason(tmp_path: Path, split: str, name: str) -> None:
    graph = graph_of(2, 2, **SPLITS[split])
    with pytest.raises(WorkbenchError, match=REASONS[split]):
        save_circuit(tmp_path / name, scores_of(graph))
    with pytest.raises(WorkbenchError, match=REASONS[split]):
        save_mib(tmp_path / "toy_model", scores_of(graph))
    save_circuit(tmp_path / name, scores_of(graph_of(2, 2)))
    with pytest.raises(WorkbenchError, match=REASONS[split]):
        load_circuit(tmp_path / name, graph, foreign=FOREIGN)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = by_hand()
    change(content)
    return content


BAD_JSON = {
    "unknown edge": (lambda c: c["edges"].update({"m0->m1": {"score": 1.0, "in_graph": True}}), "'m0->m1' is not in"),
    "missing edge": (lambda c: c["edges"].pop("input->m0"), "lacks 1 of 8 edges, such as input->m0"),
    "unknown node": (lambda c: c["nodes"].update({"m7": {"in_graph": True}}), "names node 'm7'"),
    "no cfg": (lambda c: c.pop("cfg"), "lacks 'cfg'"),
    "no nodes": (lambda c: c.pop("nodes"), "lacks 'nodes'"),
    "no edges": (lambda c: c.pop("edges"), "lacks 'src_nodes'"),
    "no mark": (lambda c: c["edges"]["input->m0"].pop("in_graph"), "lacks 'in_graph'"),
    "a score of some": (lambda c: c["edges"]["input->m0"].pop("score"), "lacks 'score'"),
    "no number": (lambda c: c["edges"]["input->m0"].update(score=None), "is damaged"),
    "no mark but a number": (lambda c: c["edges"]["input->m0"].update(in_graph=0.3), "in_graph must be true or false"),
    "NaN": (lambda c: c["edges"]["input->m0"].update(score=math.nan), "1 scores that are not finite.* input->m0"),
    "infinite": (lambda c: c["edges"]["input->m0"].update(score=math.inf), "not finite"),
    "another model": (lambda c: c["cfg"].update(d_model=768), "belongs to another model's graph.*'d_model': 768"),
    "parallel": (lambda c: c["cfg"].update(parallel_attn_mlp=True), "in parallel"),
    "neurons": (lambda c: c["nodes"]["m0"].update(neurons=[True] * 8), "scores nodes or neurons"),
    "node scores": (lambda c: c["nodes"]["m0"].update(score=1.0), "scores nodes or neurons"),
}


@pytest.mark.parametrize("bad", BAD_JSON)
def test_bad_eap_json_gets_one_clear_error(tmp_path: Path, bad: str) -> None:
    change, message = BAD_JSON[bad]
    path = written(tmp_path / "theirs.json", changed(change))
    with pytest.raises(WorkbenchError, match=rf"theirs\.json.*{message}"):
        load_circuit(path, graph_of(1, 1), foreign=FOREIGN)


BAD_PT = {
    "edges_scores": (lambda c: c.update(edges_scores=torch.zeros(3, 4)), r"edges_scores of shape \[3, 4\].*\[3, 5\]"),
    "edges_in_graph": (lambda c: c.update(edges_in_graph=c["edges_in_graph"].T), r"edges_in_graph of shape \[5, 3\]"),
    "nodes_in_graph": (lambda c: c.update(nodes_in_graph=torch.ones(4)), r"nodes_in_graph of shape \[4\].*\[3\]"),
    "order": (lambda c: c["dst_nodes"].reverse(), "orders its dst_nodes in another way"),
    "missing": (lambda c: c.pop("edges_in_graph"), "lacks 'edges_in_graph'"),
    "NaN": (lambda c: c["edges_scores"].fill_(math.nan), "8 scores that are not finite.*input->a0.h0<q>"),
    "no tensor": (lambda c: c.update(edges_scores=[1.0]), "is damaged"),
    "neurons": (lambda c: c.update(neurons_in_graph=torch.ones(3, 8)), "scores nodes or neurons"),
}


@pytest.mark.parametrize("bad", BAD_PT)
def test_bad_pt_gets_one_clear_error(tmp_path: Path, bad: str) -> None:
    change, message = BAD_PT[bad]
    path, graph = tmp_path / "theirs.pt", graph_of(1, 1)
    save_circuit(path, circuit_of(graph))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(WorkbenchError, match=rf"theirs\.pt.*{message}"):
        load_circuit(path, graph, foreign=FOREIGN)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    for name in ("it.json", "it.eap.json", "it.pt"):
        save_circuit(tmp_path / name, circuit_of(graph))
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(WorkbenchError, match=f"Cannot read .*{name}"):
            load_circuit(tmp_path / name, graph, foreign=FOREIGN)
    with pytest.raises(WorkbenchError, match="Cannot read .*nowhere.pt"):
        load_circuit(tmp_path / "nowhere.pt", graph, foreign=FOREIGN)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(WorkbenchError, match="holds a list, not a graph"):
        load_circuit(tmp_path / "list.pt", graph, foreign=FOREIGN)


def test_a_pt_that_would_run_code_does_not(tmp_path: Path) -> None:
    torch.save({"cfg": Path("/")}, tmp_path / "evil.pt")
    with pytest.raises(WorkbenchError, match="Cannot read .*evil.pt"):
        load_circuit(tmp_path / "evil.pt", graph_of(1, 1), foreign=FOREIGN)


BAD_OWN = {
    "version": (lambda c: c.update(version=99), "of version 99.*reads 'interp-workbench circuit' of version 1"),
    "format": (lambda c: c.update(format="other"), "is 'other' of version 1"),
    "graph": (lambda c: c["graph"].update(d_model=9), "is damaged: its graph is"),
    "no graph": (lambda c: c.pop("graph"), "lacks 'graph'"),
    "edge": (lambda c: c["circuit"]["keep"].append("m9->logits"), "'m9->logits' is not in this graph"),
    "score": (lambda c: c["scores"]["score"]["values"].pop("m0->logits"), "lacks 1 of 8 edges, such as m0->logits"),
    "NaN": (lambda c: c["scores"]["score"]["values"].update({"input->m0": math.nan}), "1 scores that are not finite"),
    "text": (lambda c: c["scores"]["score"]["values"].update({"input->m0": "1"}), "is damaged"),
    "dtype": (lambda c: c["scores"]["score"].update(dtype="int8"), "lacks 'int8'"),
    "no mask": (lambda c: c["circuit"].pop("keep"), "is damaged.*'keep'"),
    "ablation": (lambda c: c["circuit"]["terms"].update(ablation="meen"), "Unknown ablation 'meen'"),
    "direction": (lambda c: c["scores"]["terms"].update(better="up"), "Unknown direction 'up'"),
    "nothing": (lambda c: c.update(scores=None, circuit=None), "neither a circuit nor scores"),
}


@pytest.mark.parametrize("bad", BAD_OWN)
def test_bad_own_json_gets_one_clear_error(tmp_path: Path, bad: str) -> None:
    change, message = BAD_OWN[bad]
    save_circuit(tmp_path / "ours.json", circuit_of(graph_of(1, 1)))
    content = json.loads((tmp_path / "ours.json").read_text())
    change(content)
    with pytest.raises(WorkbenchError, match=rf"ours\.json.*{message}"):
        load_circuit(written(tmp_path / "ours.json", content))


def test_what_belongs_to_another_model_is_refused(tmp_path: Path) -> None:
    graph, other = graph_of(2, 1), graph_of(2, 1, mlp=False)
    save_circuit(tmp_path / "it.json", circuit_of(graph))
    with pytest.raises(WorkbenchError, match="it.json: This belongs to another model's graph"):
        load_circuit(tmp_path / "it.json", other)
    with pytest.raises(WorkbenchError, match="another model's graph"):
        save_circuit(tmp_path / "mixed.json", circuit_of(graph, scores=scores_of(other)))
    save_circuit(tmp_path / "it.eap.json", circuit_of(graph))
    with pytest.raises(WorkbenchError, match="edges of MLPs"):
        load_circuit(tmp_path / "it.eap.json", other, foreign=FOREIGN)


def test_what_a_file_does_not_hold_or_say_is_asked_for(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    save_circuit(tmp_path / "scores.json", scores_of(graph))
    with pytest.raises(WorkbenchError, match="holds scores and no circuit"):
        load_circuit(tmp_path / "scores.json")
    for name in ("circuit.json", "circuit.pt", "circuit.eap.json"):
        save_circuit(tmp_path / name, circuit_of(graph, scores=None))
        assert load_circuit(tmp_path / name, graph, foreign=FOREIGN).scores is None
        with pytest.raises(WorkbenchError, match="a circuit without scores"):
            load_scores(tmp_path / name, graph, foreign=FOREIGN)
    for name in ("circuit.pt", "circuit.eap.json"):
        with pytest.raises(WorkbenchError, match="Give graph= and foreign="):
            load_circuit(tmp_path / name, graph)
        with pytest.raises(WorkbenchError, match="Give graph= and foreign="):
            load_circuit(tmp_path / name, foreign=FOREIGN)
    bare = by_hand()
    for mark in bare["edges"].values():
        mark.pop("score")
    found = load_circuit(written(tmp_path / "bare.json", bare), graph, foreign=FOREIGN)
    assert found.size == 3
    assert found.scores is None
    spoilt = scores_of(graph, examples=torch.full((2, 8), math.nan))
    with pytest.raises(WorkbenchError, match="scores of some examples are not finite"):
        save_circuit(tmp_path / "spoilt.json", spoilt)
    assert not (tmp_path / "spoilt.json").exists()


def test_an_imported_circuit_is_kept_in_an_own_file(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    found = load_circuit(written(tmp_path / "theirs.json", by_hand()), graph, foreign=FOREIGN)
    save_circuit(tmp_path / "ours.json", found)
    again = load_circuit(tmp_path / "ours.json", graph)
    assert again.scores is not None
    assert math.isnan(again.scores.seconds)
    assert again.edges == found.edges
    assert again.provenance == found.provenance


@pytest.mark.parametrize("name", ["it.yaml", "it", "it.PT"])
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(WorkbenchError, match=f"No format for '{name}'.*eap.json"):
        save_circuit(tmp_path / name, circuit_of(graph_of(1, 1)))
    with pytest.raises(WorkbenchError, match="No format for"):
        load_circuit(tmp_path / name)


def mib_circuits(graph: CircuitGraph) -> dict[float, Circuit]:
    allowed = {size: int(size * len(graph.edges)) // 100 for size in MIB_SIZES}
    order = scores_of(graph).ranking(absolute=True)
    found = {}
    for size, n in allowed.items():
        keep = torch.zeros(len(graph.edges), dtype=torch.bool)
        keep[order[:n]] = True
        found[size] = circuit_of(graph, graph.connected(keep), requested=n)
    return found


def test_mib_sets_come_back_by_size_whatever_their_files_are_called(tmp_path: Path) -> None:
    graph = graph_of(4, 4)
    circuits = mib_circuits(graph)
    save_mib(tmp_path / "toy_model", circuits)
    written(tmp_path / "toy_model" / ".hidden.json", {})
    found = load_mib(tmp_path / "toy_model", graph, foreign=replace(FOREIGN, change_of="loss"))
    assert tuple(found) == MIB_SIZES
    assert [found[size].edges for size in MIB_SIZES] == [circuits[size].edges for size in MIB_SIZES]
    assert found[50].size > found[5].size
    (tmp_path / "toy_model" / ".hidden.json").unlink()
    for number, file in enumerate(sorted((tmp_path / "toy_model").iterdir())):
        file.rename(tmp_path / "toy_model" / f"circuit{number}.json")
    again = load_mib(tmp_path / "toy_model", graph, foreign=FOREIGN)
    assert [again[size].edges for size in MIB_SIZES] == [circuits[size].edges for size in MIB_SIZES]
    save_mib(tmp_path / "again", circuits)
    save_mib(tmp_path / "again", circuits)


def test_mib_scores_are_the_change_of_the_loss(tmp_path: Path) -> None:
    graph = graph_of(4, 4)
    scores = scores_of(graph)
    save_mib(tmp_path / "toy_model", scores)
    content = json.loads((tmp_path / "toy_model" / "importances.json").read_text())
    best = graph.edges[int(scores.importance.argmax())].name
    assert max(content["edges"], key=lambda name: content["edges"][name]["score"]) == best
    found = load_scores(tmp_path / "toy_model", graph, foreign=replace(FOREIGN, change_of="loss"))
    assert torch.equal(found.score.float(), scores.score)


def test_bad_mib_sets_are_refused(tmp_path: Path) -> None:
    graph = graph_of(4, 4)
    circuits = mib_circuits(graph)
    with pytest.raises(WorkbenchError, match=r"each of 0.1, 0.2, .*, got \[0.1\]"):
        save_mib(tmp_path / "few", {0.1: circuits[0.1]})
    with pytest.raises(WorkbenchError, match="keeps 479 edges; 2 % of 479 are 9"):
        save_mib(tmp_path / "large", {**circuits, 2: circuit_of(graph)})
    save_mib(tmp_path / "toy_model", circuits)
    with pytest.raises(WorkbenchError, match="holds other circuits, such as .*0.1.json"):
        save_mib(tmp_path / "toy_model", scores_of(graph))
    with pytest.raises(WorkbenchError, match="holds 9 files; scores are one"):
        load_scores(tmp_path / "toy_model", graph, foreign=FOREIGN)
    (tmp_path / "toy_model" / "50.json").unlink()
    with pytest.raises(WorkbenchError, match="holds 8 circuits; MIB wants one for each of 0.1"):
        load_mib(tmp_path / "toy_model", graph, foreign=FOREIGN)
    save_circuit(tmp_path / "toy_model" / "whole.eap.json", circuit_of(graph))
    with pytest.raises(WorkbenchError, match="whole.eap.json keeps 479 edges; 50 % of 479 are 239"):
        load_mib(tmp_path / "toy_model", graph, foreign=FOREIGN)


@pytest.mark.parametrize("split", SPLITS)
def test_graphml_has_every_node_and_edge(tmp_path: Path, split: str) -> None:
    graph = graph_of(2, 2, **SPLITS[split])
    keep = torch.arange(len(graph.edges)) % 2 == 0
    circuit = circuit_of(graph, keep)
    save_circuit(tmp_path / "it.graphml", circuit)
    drawn = nx.read_graphml(tmp_path / "it.graphml", force_multigraph=True)
    assert drawn.number_of_nodes() == (len(graph.writers) + 1) * graph.n_columns
    found = {said["name"]: said for _, _, said in drawn.edges(data=True)}
    assert {name: (said["score"], said["kept"]) for name, said in found.items()} == {
        edge.name: (score, kept)
        for edge, score, kept in zip(graph.edges, scores_of(graph).score.tolist(), keep.tolist(), strict=True)
    }
    save_circuit(tmp_path / "scores.graphml", scores_of(graph))
    assert "kept" not in (tmp_path / "scores.graphml").read_text()
    save_circuit(tmp_path / "bare.graphml", circuit_of(graph, scores=None))
    assert 'attr.name="score"' not in (tmp_path / "bare.graphml").read_text()


def test_graphml_edges_of_one_head_stay_apart(tmp_path: Path) -> None:
    save_circuit(tmp_path / "it.graphml", circuit_of(graph_of(1, 1)))
    drawn = nx.read_graphml(tmp_path / "it.graphml", force_multigraph=True)
    slots = sorted(said["slot"] for said in drawn.get_edge_data("input", "a0.h0").values())
    assert slots == ["k", "q", "v"]
    assert drawn.nodes["logits"]["step"] == 1


def test_dot_draws_what_is_kept(tmp_path: Path) -> None:
    graph = graph_of(1, 1)
    score = torch.tensor([-0.5, 0.25, 2.0, -0.125, -4.0, 0.0, 1.0, -3.0])
    keep = graph.mask(["input->a0.h0<v>", "a0.h0->m0", "m0->logits"])
    save_circuit(tmp_path / "it.dot", circuit_of(graph, keep, scores=scores_of(graph, score)))
    text = (tmp_path / "it.dot").read_text()
    assert text.count(" -> ") == 3
    assert '"input" -> "a0.h0" [label="v", color="#0072B2", penwidth="2.25", tooltip="input->a0.h0<v>: 2"];' in text
    assert '"a0.h0" -> "m0" [label="", color="#D55E00", penwidth="4", tooltip="a0.h0->m0: -4"];' in text
    assert 'label="3 of 8 edges, eap: logit_difference, resample ablation"' in text
    save_circuit(tmp_path / "all.dot", scores_of(graph, score))
    assert (tmp_path / "all.dot").read_text().count(" -> ") == 8
    save_circuit(tmp_path / "bare.dot", circuit_of(graph, keep, scores=None))
    assert "tooltip" not in (tmp_path / "bare.dot").read_text()


def test_dot_escapes_names(tmp_path: Path) -> None:
    graph = graph_of(2, 1, **SPLITS["columns"])
    save_circuit(tmp_path / "it.dot", circuit_of(graph, graph.mask([graph.edges[7].name])))
    text = (tmp_path / "it.dot").read_text()
    assert r'"input@b\"\\ <q>"' in text
    assert all(line.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 0 for line in text.splitlines())


@pytest.mark.parametrize("name", ["it.graphml", "it.dot"])
def test_drawings_are_not_read(tmp_path: Path, name: str) -> None:
    save_circuit(tmp_path / name, circuit_of(graph_of(1, 1)))
    with pytest.raises(WorkbenchError, match="is for drawing"):
        load_circuit(tmp_path / name)


def test_places_of_a_pt_without_an_edge_are_not_read(tmp_path: Path) -> None:
    """Circuits that EAP-IG chooses by node mark whole rows, edges that do not exist included."""
    graph = graph_of(1, 1)
    whole = eap_files.encode(graph, torch.arange(8.0), torch.ones(8, dtype=torch.bool))
    (tmp_path / "it.pt").write_bytes(whole.pt())
    content = torch.load(tmp_path / "it.pt", weights_only=True)
    content["edges_in_graph"].fill_(True)
    torch.save(content, tmp_path / "it.pt")
    assert load_circuit(tmp_path / "it.pt", graph, foreign=FOREIGN).size == 8
