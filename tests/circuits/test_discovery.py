"""From scores to circuits: rules worked by hand, and every method by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.acdc import acdc
from circuits.circuit import EdgeScores, Terms
from circuits.discovery import METHODS, SCORES, above, extract, find, grow, score_edges, top_n
from circuits.graph import CircuitGraph, circuit_graph
from tests.circuits.test_graph import transformer
from tests.circuits.test_memoised import KINDS, planned
from workbench.models.known import Ablation
from workbench.models.planted import PLANTED
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance

GRAPHS = {kind: planned(kind).graph for kind in KINDS}


def scored(
    graph: CircuitGraph,
    score: torch.Tensor,
    *,
    better: Literal["higher", "lower"] = "higher",
    ablation: Ablation = "resample",
    scale: str = "logits",
    live: torch.Tensor | None = None,
) -> EdgeScores:
    return EdgeScores(
        graph=graph,
        terms=Terms(ablation=ablation, metric="some metric", unit="logits", better=better, n=4),
        method="by hand",
        score=score,
        live=torch.ones(len(score), dtype=torch.bool) if live is None else live,
        scale=scale,
        reference="nothing",
        rule="by hand",
        seconds=0.0,
        provenance=Provenance(code_version="test"),
    )


def by_hand(**values: object) -> EdgeScores:
    """input->q 1, ->k 2, ->v -6, ->m0 3, a0.h0->m0 0, input->logits 4, a0.h0->logits -5, m0->logits 7."""
    graph = circuit_graph(transformer(1, 1))
    return scored(graph, torch.tensor([1.0, 2.0, -6.0, 3.0, 0.0, 4.0, -5.0, 7.0]), **values)  # pyright: ignore[reportArgumentType]


def test_the_sign_counts_or_does_not() -> None:
    scores = by_hand()
    assert top_n(scores, 4, absolute=False).edges == ["input->m0", "input->logits", "m0->logits"]
    assert top_n(scores, 4, absolute=True).edges == ["input->a0.h0<v>", "input->logits", "a0.h0->logits"]
    assert top_n(scores, 3).absolute is True
    assert "3 largest absolute scores" in top_n(scores, 3).rule
    assert "3 largest signed scores" in top_n(scores, 3, absolute=False).rule


def test_where_lower_is_better_what_raises_the_metric_hurts() -> None:
    scores = by_hand(better="lower")
    assert top_n(scores, 2, absolute=False).edges == ["input->a0.h0<v>", "a0.h0->logits"]
    assert scores.importance.tolist() == [-1, -2, 6, -3, 0, -4, 5, -7]


def test_on_a_scale_of_its_own_a_low_score_is_never_important() -> None:
    for better in ("higher", "lower"):
        scores = by_hand(scale="log alpha", better=better)
        for absolute in (True, False):
            assert scores.ranking(absolute=absolute).tolist() == [7, 5, 3, 1, 0, 4, 6, 2]
            assert top_n(scores, 2, absolute=absolute).edges == ["input->logits"]
            assert above(scores, 4.0, absolute=absolute).edges == ["input->logits"]
            assert grow(scores, 2, absolute=absolute).edges == ["input->logits"]


def test_what_dangles_is_pruned_and_both_sizes_are_kept() -> None:
    scores = by_hand()
    circuit = top_n(scores, 5)
    assert (circuit.requested, circuit.size) == (5, 5)
    circuit = top_n(scores, 3)
    assert circuit.edges == ["input->a0.h0<v>", "a0.h0->logits"]
    assert (circuit.requested, circuit.size) == (3, 2)
    # Under zero ablation an MLP that reads nothing still writes.
    kept = top_n(by_hand(ablation="zero"), 3)
    assert kept.edges == ["input->a0.h0<v>", "a0.h0->logits", "m0->logits"]


def test_a_circuit_of_which_nothing_is_left_is_refused() -> None:
    """By single patches no input of an OR gate matters, so that the one edge that does dangles."""
    gate = PLANTED["or_gate"]()
    with pytest.raises(WorkbenchError, match="nothing is left of the 1 largest absolute scores by 'exact'"):
        extract(gate.model, gate.pairs(8, 0), method="exact", edges=1)
    high = extract(gate.model, gate.pairs(8, 0), method="exact", threshold=1e6)
    assert high.size == 0


def test_edges_that_are_not_live_are_not_taken() -> None:
    live = torch.ones(8, dtype=torch.bool)
    live[7] = False
    assert top_n(by_hand(live=live), 1).size == 0
    assert top_n(by_hand(live=live), 3).edges == ["input->a0.h0<v>", "input->logits", "a0.h0->logits"]
    assert above(by_hand(live=live), 5.0).edges == ["input->a0.h0<v>", "a0.h0->logits"]
    assert grow(by_hand(live=live), 8).size == 5


def test_a_threshold_is_met_from_it_on() -> None:
    scores = by_hand()
    assert above(scores, 5.0).edges == ["input->a0.h0<v>", "a0.h0->logits"]
    assert above(scores, 3.0, absolute=False).edges == ["input->m0", "input->logits", "m0->logits"]
    circuit = above(scores, 5.0)
    assert circuit.requested is None
    assert circuit.rule == "absolute scores from 5 on"


def test_growth_starts_at_the_logits() -> None:
    # m0->logits opens input->m0 (3) and a0.h0->m0 (0); then a0.h0->logits (5) opens the head's own edges.
    assert grow(by_hand(), 1).size == 0
    assert grow(by_hand(), 3).edges == ["input->a0.h0<v>", "a0.h0->logits"]
    assert grow(by_hand(), 5).edges == [
        "input->a0.h0<v>",
        "input->m0",
        "input->logits",
        "a0.h0->logits",
        "m0->logits",
    ]
    signed = grow(by_hand(), 4, absolute=False)
    assert signed.edges == ["input->m0", "input->logits", "m0->logits"]
    assert signed.rule == "grown from the logits to 4 by signed scores"


@given(
    kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10**6), edges=st.integers(1, 29), share=st.floats(0.2, 1)
)
@settings(max_examples=30)
def test_what_grows_reaches_the_logits(kind: str, seed: int, edges: int, share: float) -> None:
    graph = GRAPHS[kind]
    draw = generator(seed, "grow")
    score, live = torch.randn(len(graph.edges), generator=draw), torch.rand(len(graph.edges), generator=draw) < share
    # Under zero ablation only what does not reach the logits is pruned: nothing is.
    circuit = grow(scored(graph, score, ablation="zero", live=live), edges)
    usable = graph.reaching(live)
    assert circuit.size == min(edges, int(usable.sum()))
    assert not bool((circuit.keep & ~live).any())
    # The largest edge into the logits comes first.
    ends = usable.nonzero()[:, 0]
    ends = ends[ends >= graph.first_edge[-1]]
    if len(ends):
        assert bool(circuit.keep[ends[score[ends].abs().argmax()]])


def test_equal_scores_go_by_the_graphs_order() -> None:
    graph = circuit_graph(transformer(1, 1))
    scores = scored(graph, torch.ones(8))
    assert scores.ranking(absolute=True).tolist() == list(range(8))
    assert grow(scores, 1).edges == ["input->logits"]


@pytest.mark.parametrize(
    ("method", "ablation"),
    [*((method, "resample") for method in METHODS), ("eap-ig", "zero"), ("greedy", "mean"), ("acdc", "zero")],
)
def test_every_method_keeps_no_more_than_asked_for(method: str, ablation: Ablation) -> None:
    plan = planned("attention only", ablation)
    circuit = find(plan, method, edges=10)
    assert 0 < circuit.size <= 10
    assert circuit.requested == 10
    assert circuit.method == method
    assert circuit.terms.ablation == ablation
    assert circuit.scores is not None
    assert circuit.scores.method == method
    assert torch.equal(plan.graph.pruned(circuit.keep, ablation), circuit.keep)
    assert not bool((circuit.keep & ~plan.live).any())


@pytest.mark.parametrize("method", ["exact", "eap-ig", "ifr"])
def test_a_threshold_in_place_of_a_size(method: str) -> None:
    plan = planned("plain")
    scores = score_edges(plan, method)
    threshold = float(scores.score.abs().quantile(0.7))
    circuit = find(plan, method, threshold=threshold)
    assert circuit.requested is None
    assert torch.equal(circuit.keep, plan.graph.pruned(plan.live & (scores.score.abs() >= threshold), "resample"))
    assert 0 < circuit.size < len(plan.graph.edges)


def test_acdc_takes_a_threshold_too() -> None:
    plan = planned("plain")
    circuit = find(plan, "acdc", threshold=0.25 * abs(plan.headroom))
    assert torch.equal(circuit.keep, plan.graph.pruned(acdc(plan, 0.25 * abs(plan.headroom)).keep, "resample"))
    assert (circuit.requested, circuit.absolute) == (None, None)
    assert circuit.rule.startswith("ACDC at threshold 0.")


def test_extract_makes_the_experiment_itself() -> None:
    known = PLANTED["copy"]()
    batch, graph = known.pairs(8, 0), circuit_graph(known.model, split_inputs=True)
    told: list[float] = []
    circuit = extract(known.model, batch, method="greedy", edges=2, graph=graph, on_progress=told.append)
    assert circuit.edges == ["embed->a0.h1<v>", "a0.h1->logits"]
    assert told[-1] == 1
    by_loss = extract(known.model, batch, method="exact", edges=2, graph=graph, ablation="mean", metric="loss")
    assert by_loss.edges == circuit.edges
    assert (by_loss.terms.metric, by_loss.terms.ablation, by_loss.terms.better) == ("loss", "mean", "lower")
    # A mask without a size has half of the live edges for its budget.
    masked = extract(known.model, batch.select(slice(0, 1)), method="mask", threshold=0.0, graph=graph, seed=7)
    assert masked.scores is not None
    assert masked.scores.rule.endswith(f"budget {int(masked.scores.live.sum()) // 2}, seed 7")


def test_wishes_that_cannot_be_met_are_refused() -> None:
    plan = planned("plain")
    with pytest.raises(WorkbenchError, match=r"Unknown method 'eapig'. Did you mean 'eap-ig'\?"):
        find(plan, "eapig", edges=3)
    with pytest.raises(WorkbenchError, match="Unknown method 'magic'. Known: exact, eap"):
        extract(plan.model, plan.batch, method="magic", edges=3)
    for wish in ({}, {"edges": 3, "threshold": 1.0}):
        with pytest.raises(WorkbenchError, match="one of the two"):
            find(plan, "eap", **wish)  # pyright: ignore[reportArgumentType]
    for edges in (0, -1, 47):
        with pytest.raises(WorkbenchError, match=f"Asked for {edges} edges; this model has 46"):
            find(plan, "acdc", edges=edges)
        for rule in (top_n, grow):
            with pytest.raises(WorkbenchError, match=f"Asked for {edges} edges"):
                rule(score_edges(plan, "eap"), edges)
    with pytest.raises(WorkbenchError, match="'acdc' gives no scores. Known: exact"):
        score_edges(plan, "acdc")
    with pytest.raises(WorkbenchError, match="threshold is not a number"):
        find(plan, "eap", threshold=float("nan"))


def test_names_are_the_same_everywhere() -> None:
    assert set(METHODS) == {*SCORES, "acdc"}


def test_scores_and_circuits_check_themselves() -> None:
    scores = by_hand()
    with pytest.raises(WorkbenchError, match=r"shape \[3\] came for a graph of 8 edges"):
        replace(scores, score=torch.ones(3), live=torch.ones(3, dtype=torch.bool))
    with pytest.raises(
        WorkbenchError, match="1 scores of method 'by hand' are not finite, such as that of input->a0.h0<k>"
    ):
        replace(scores, score=torch.tensor([0.0, float("nan"), 0, 0, 0, 0, 0, 0]))
    with pytest.raises(WorkbenchError, match=r"mask of shape \[2\] came for a graph of 8 edges"):
        replace(top_n(scores, 3), keep=torch.ones(2, dtype=torch.bool))
    other = replace(scores.terms, ablation="zero")
    with pytest.raises(WorkbenchError, match="some metric under resample ablation, the other some metric under zero"):
        scores.terms.check_comparable(other)
    scores.terms.check_comparable(replace(scores.terms, n=7))


def test_tables_and_summary_hold_the_scores() -> None:
    plan = planned("attention only")
    scores = score_edges(plan, "eap")
    table = scores.tables()[0]
    assert table.frame["score"].abs().is_monotonic_decreasing
    assert bool((table.frame["low"] <= table.frame["high"]).all())
    assert "lost by resample ablation of the edge. n = 5 examples, 95 %" in table.caption
    assert [row["from"] + "->" + row["to"] for row in scores.summary()["edges"]] == list(plan.graph.index)  # pyright: ignore
    circuit = top_n(scores, 5)
    assert circuit.tables()[0].frame["score"].tolist() == scores.score[circuit.keep].tolist()
    assert len(circuit.summary()["edges"]) == circuit.size  # pyright: ignore[reportArgumentType]
    assert "low" not in by_hand().frame
