"""What rankings agree on, worked by hand on five edges, and on a model whose circuit is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits.circuit import EdgeScores, Terms
from circuits.consensus import agreement, jaccard
from circuits.discovery import score_edges
from circuits.experiment import experiment
from circuits.faithfulness import judge
from circuits.graph import CircuitGraph, circuit_graph
from workbench.figures import figure
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError
from workbench.store import Provenance

ONE_HEAD = CircuitGraph(n_heads=1, n_steps=1, d_model=2, inputs=("input",), clusters=((),))
"""input -> q, k, v and the logits, and the head -> the logits."""
TERMS = Terms(ablation="zero", metric="logit_difference", unit="logits", better="higher", n=3)


def scored(score: Sequence[float] | Tensor, **fields: object) -> EdgeScores:
    """Scores of the five edges."""
    values = torch.as_tensor(score, dtype=torch.float64)
    given = {
        "graph": ONE_HEAD,
        "terms": TERMS,
        "method": "exact",
        "score": values,
        "live": torch.ones(len(values), dtype=torch.bool),
        "scale": "logits",
        "reference": "clean run",
        "rule": "by hand",
        "seconds": 0.0,
        "provenance": Provenance(code_version="0", parents=("a",)),
    }
    return EdgeScores(**{**given, **fields})  # pyright: ignore[reportArgumentType]


RISING = scored([1, 2, 3, 4, 5])
OTHER = scored([1, 5, 3, 2, 4], provenance=Provenance(code_version="0", seed=2, parents=("b",)))


def test_the_edges_in_their_order() -> None:
    assert [edge.name for edge in ONE_HEAD.edges] == [
        "input->a0.h0<q>",
        "input->a0.h0<k>",
        "input->a0.h0<v>",
        "input->logits",
        "a0.h0->logits",
    ]


def test_two_rankings_by_hand() -> None:
    """The best three are {v, direct, out} and {k, v, out}: two of four. Squared rank differences: 0 + 9 + 0 + 4 + 1."""
    found = agreement([RISING, OTHER], edges=3)
    assert found.jaccard.tolist() == [[1, 0.5], [0.5, 1]]
    assert float(found.correlation[0, 1]) == pytest.approx(1 - 6 * 14 / (5 * 24))
    # Of ten pairs of threes, 3 share one edge of five, 6 two of four, 1 all.
    assert float(found.chance[0, 1]) == pytest.approx(0.3 / 5 + 0.6 * 2 / 4 + 0.1)
    assert found.votes.tolist() == [0, 1, 2, 1, 2]
    assert found.shared == ["input->a0.h0<v>", "a0.h0->logits"]
    assert found.frame["found_by"].tolist() == ["", "exact 2", "exact 1, exact 2", "exact 1", "exact 1, exact 2"]
    assert found.provenance.parents == ("a", "b")
    assert found.provenance.seed is None


def test_edges_of_the_consensus_are_a_circuit() -> None:
    found = agreement([RISING, OTHER], edges=3)
    assert found.circuit().edges == found.shared
    assert found.circuit(1).size == 4
    assert found.circuit().rule == "edges of at least 2 of 2 circuits of 3: exact 1, exact 2"
    for votes in (0, 3):
        with pytest.raises(WorkbenchError, match=f"Asked for {votes} votes of 2 circuits"):
            found.circuit(votes)


def test_hurting_edges_count_unless_told() -> None:
    hurting = scored([1, 2, 3, 4, -9])
    assert agreement([RISING, hurting], edges=2).shared == ["input->logits", "a0.h0->logits"]
    signed = agreement([RISING, hurting], edges=2, absolute=False)
    # Signed, the head is last: its query is kept with nowhere to go, so that only the direct edge is left.
    assert signed.shared == ["input->logits"]
    assert float(agreement([RISING, hurting], edges=2).correlation[0, 1]) == pytest.approx(1)
    assert float(signed.correlation[0, 1]) == pytest.approx(0)


def test_a_gate_far_below_zero_is_closed_not_important() -> None:
    gates = scored([-9, -8, 3, 4, 5], scale="log alpha", method="mask")
    found = agreement([RISING, gates], edges=3)
    assert float(found.jaccard[0, 1]) == 1
    assert float(found.correlation[0, 1]) == pytest.approx(1)
    assert found.labels == ("exact", "mask")


def test_edges_that_are_dead_in_one_are_not_ranked() -> None:
    live = torch.tensor([False, True, True, True, True])
    late = scored([0, 2, 3, 4, 5], live=live)
    found = agreement([scored([9, 2, 3, 4, 5]), late], edges=4)
    assert float(found.correlation[0, 1]) == pytest.approx(1)
    assert found.live_edges == 5


def test_two_empty_circuits_are_equal_and_ties_have_no_order() -> None:
    resample = replace(TERMS, ablation="resample")
    # Under resample ablation the head's edge alone has no input to pass on.
    alone = scored([0, 0, 0, 0, 1], terms=resample)
    assert agreement([alone, alone], edges=1).jaccard.tolist() == [[1, 1], [1, 1]]
    assert agreement([alone, alone], edges=1).chance.tolist() == [[1, 1], [1, 1]]
    tied = agreement([RISING, scored([2, 2, 2, 2, 2])], edges=3)
    assert math.isnan(float(tied.correlation[0, 1]))
    pairs = tied.summary()["pairs"]
    assert isinstance(pairs, list)
    assert [pair["correlation"] for pair in pairs] == [None, None]


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="between at least 2 scores, got 1"):
        agreement([RISING], edges=3)
    with pytest.raises(WorkbenchError, match="do not compare: one is logit_difference under zero ablation"):
        agreement([RISING, scored([1, 2, 3, 4, 5], terms=replace(TERMS, ablation="mean"))], edges=3)
    with pytest.raises(WorkbenchError, match="the other loss under zero ablation"):
        agreement([RISING, scored([1, 2, 3, 4, 5], terms=replace(TERMS, metric="loss"))], edges=3)
    wider = CircuitGraph(n_heads=1, n_steps=1, d_model=3, inputs=("input",), clusters=((),))
    with pytest.raises(WorkbenchError, match="another model's graph"):
        agreement([RISING, scored([1, 2, 3, 4, 5], graph=wider)], edges=3)
    for labels in (["one"], ["same", "same"]):
        with pytest.raises(WorkbenchError, match="2 scores need as many different labels, got"):
            agreement([RISING, OTHER], edges=3, labels=labels)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=2, max_size=4), st.data())
def test_matrices_are_symmetric_and_follow_the_order(rows: list[list[int]], data: st.DataObject) -> None:
    several = [scored(row) for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    edges = data.draw(st.integers(1, 5))
    found = agreement(several, edges=edges)
    again = agreement([several[place] for place in order], edges=edges)
    for name in ("jaccard", "chance", "correlation"):
        matrix: Tensor = getattr(found, name)
        torch.testing.assert_close(matrix, matrix.T, equal_nan=True)
        torch.testing.assert_close(matrix[order][:, order], getattr(again, name), equal_nan=True)
        assert matrix.diagonal().tolist() == [1.0] * len(rows) or name == "chance"
        finite = matrix[matrix.isfinite()]
        assert float(finite.abs().max()) <= 1 + 1e-12
    assert torch.equal(found.votes, again.votes)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_jaccard_is_that_of_sets(pairs: list[tuple[bool, bool]]) -> None:
    one, other = ({place for place, pair in enumerate(pairs) if pair[side]} for side in (0, 1))
    expected = len(one & other) / len(one | other) if one | other else 1.0
    masks = torch.tensor(pairs).T
    assert float(jaccard(masks[:1], masks[1])) == pytest.approx(expected)


def test_methods_agree_on_the_model_that_copies() -> None:
    known = PLANTED["copy"]()
    graph = circuit_graph(known.model, split_inputs=True)
    plan = experiment(known.model, known.pairs(32, 0), graph=graph)
    found = agreement([score_edges(plan, name) for name in ("exact", "greedy", "eap-ig")], edges=2)
    assert found.labels == ("exact", "greedy", "eap-ig")
    assert set(found.shared) == {"embed->a0.h1<v>", "a0.h1->logits"}
    assert float(found.jaccard.min()) == 1
    assert float(found.chance[0, 1]) < 0.3
    assert judge(plan, found.circuit(), controls=0).faithfulness.mean == pytest.approx(1, abs=1e-4)


def test_what_is_shown() -> None:
    found = agreement([RISING, OTHER], edges=3, labels=["seed 0", "seed 1"])
    shares, ranks, votes = found.tables()
    assert (shares.kind, ranks.kind, votes.kind) == ("heatmap", "heatmap", "bar")
    assert "n = 3 examples, 5 live edges. Random sets of live edges as large share 0.460" in shares.caption
    assert votes.frame["votes"].tolist() == [2, 2, 1, 1]
    assert len(shares.frame) == 4
    for table in found.tables():
        figure(table)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["votes"]["input->a0.h0<v>"] == 2
    assert summary["sizes"] == [3, 3]
    assert [pair["result"] for pair in summary["pairs"]] == ["seed 0", "seed 1"]
