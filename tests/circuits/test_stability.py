"""What of a circuit is chance: worked by hand, on noise without any effect, and with an effect put into it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from circuits import stability as room
from circuits.attribution import eap, exact_scores
from circuits.circuit import EdgeScores
from circuits.masks import learned_mask
from circuits.stability import significant_edges, stability
from tests.circuits.test_attribution import silent_mlp
from tests.circuits.test_consensus import TERMS, scored
from tests.circuits.test_memoised import planned
from workbench.figures import figure
from workbench.intervals import sign_flip_pvalue
from workbench.runtime import WorkbenchError, generator

GRAPH = planned("plain").graph


def by_example(examples: Tensor, **fields: object) -> EdgeScores:
    """Scores that are means over these examples."""
    terms = replace(TERMS, n=len(examples))
    return scored(examples.mean(0), **{"examples": examples, "terms": terms, **fields})


TWO = by_example(torch.tensor([[0.0, 0, 0, 1, 0], [0.0, 0, 0, 0, 3]], dtype=torch.float64))
"""The first example speaks for the direct edge, the second, more loudly, for the head's."""


def noise(seed: int, *, n: int = 32, edges: int = 40) -> Tensor:
    return torch.randn(n, edges, generator=generator(seed, "noise"), dtype=torch.float64)


def on_plain(examples: Tensor, **fields: object) -> EdgeScores:
    """Examples for the 46 edges of a small model."""
    return by_example(examples, graph=GRAPH, **fields)


def test_a_quarter_of_two_draws_misses_the_louder_example() -> None:
    found = stability(TWO, edges=1, resamples=1000)
    assert found.circuit.edges == ["a0.h0->logits"]
    assert float(found.frequency[4]) == pytest.approx(3 / 4, abs=0.05)
    assert float(found.frequency[3]) == pytest.approx(1 / 4, abs=0.05)
    assert found.mean_jaccard == pytest.approx(float(found.frequency[4]))
    assert sorted(set(found.jaccard.tolist())) == [0, 1]


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = (stability(TWO, edges=1, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.jaccard, again.jaccard)
    assert not torch.equal(first.jaccard, other.jaccard)


def test_equal_examples_are_stable() -> None:
    same = by_example(torch.tensor([[1.0, 2, 3, 4, 5]]).double().expand(6, 5))
    found = stability(same, edges=3, resamples=20)
    assert found.frequency.tolist() == found.circuit.keep.double().tolist()
    assert found.mean_jaccard == 1


def test_hurting_edges_are_left_out_when_told() -> None:
    hurting = by_example(torch.tensor([[0.0, 0, 0, 1, -3]]).double().expand(4, 5))
    assert stability(hurting, edges=1, resamples=3).circuit.edges == ["a0.h0->logits"]
    assert stability(hurting, edges=1, resamples=3, absolute=False).circuit.edges == ["input->logits"]


def test_stability_of_a_model_and_what_is_shown() -> None:
    found = stability(exact_scores(planned("plain")), edges=10, resamples=30)
    assert 0 < found.mean_jaccard < 1
    (table,) = found.tables()
    assert "over 30 resamples of n = 5 examples" in table.caption
    assert table.frame["frequency"].is_monotonic_decreasing
    figure(table)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["resamples"] == 30
    assert summary["least_jaccard"] == float(found.jaccard.min())
    assert found.provenance == found.circuit.provenance


def test_what_cannot_be_resampled_is_refused() -> None:
    mask = learned_mask(planned("plain"), 5, steps=1)
    with pytest.raises(WorkbenchError, match="Method 'mask' gives no score for each example"):
        stability(mask, edges=3)
    with pytest.raises(WorkbenchError, match="Method 'mask' gives no score for each example"):
        significant_edges(mask)
    with pytest.raises(WorkbenchError, match="at least 2 examples and 1 resample; got 1 and 200"):
        stability(by_example(torch.ones(1, 5)), edges=3)
    with pytest.raises(WorkbenchError, match="got 2 and 0"):
        stability(TWO, edges=3, resamples=0)


def test_noise_is_no_effect() -> None:
    """Where no edge does anything, a rate of 0.05 finds something in one of twenty experiments: about 2 of 40."""
    hits = sum(bool(significant_edges(on_plain(noise(seed, edges=46))).edges) for seed in range(40))
    assert hits <= 7


def test_an_effect_in_the_noise_is_found() -> None:
    wrong, found = 0, 0
    for seed in range(20):
        examples = noise(seed, edges=46)
        examples[:, [3, 20, 40]] += 1.5
        chosen = significant_edges(on_plain(examples)).found
        assert chosen[[3, 20, 40]].all()
        found += int(chosen.sum())
        wrong += int(chosen.sum()) - 3
    assert wrong / found <= 0.1


def test_a_stricter_rate_finds_less() -> None:
    examples = noise(0, edges=46) + torch.linspace(0, 0.6, 46)
    loose, strict = (significant_edges(on_plain(examples), rate=rate) for rate in (0.2, 0.01))
    assert set(strict.edges) < set(loose.edges)


def test_edges_without_any_effect_are_not_tested() -> None:
    """Thirty edges that do nothing on average would hide one whose p-value is 0.02; those that do nothing must not."""
    examples = noise(1, edges=46) + torch.where(torch.arange(46) == 5, 0.45, 0.0)
    alone = torch.arange(46) == 5
    assert significant_edges(on_plain(examples)).edges == []
    found = significant_edges(on_plain(torch.where(alone, examples, 1e-9 * examples)))
    assert len(found.edges) == 1
    assert torch.equal(found.tested, alone)
    assert found.pvalue[~alone].tolist() == [1.0] * 45
    assert found.flips == 1000
    nothing = significant_edges(on_plain(torch.zeros(32, 46)))
    assert (nothing.edges, nothing.summary()["tested"]) == ([], 0)


def test_an_edge_that_is_not_live_can_have_an_effect() -> None:
    scores = exact_scores(silent_mlp())
    assert scores.examples is not None
    found = significant_edges(replace(scores, examples=scores.examples.repeat(4, 1)))
    assert found.edges == ["input->m0", "input->logits"]
    assert scores.graph.names(scores.live) == ["input->logits"]


def test_pvalues_are_those_of_the_sign_flip_test_in_any_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = on_plain(noise(2, edges=46))
    whole = significant_edges(scores)
    assert scores.examples is not None
    torch.testing.assert_close(whole.pvalue, sign_flip_pvalue(scores.examples, resamples=1000))
    monkeypatch.setattr(room, "ELEMENTS", 7 * 1000)
    torch.testing.assert_close(significant_edges(scores).pvalue, whole.pvalue)


def test_there_are_enough_assignments_for_one_edge_to_pass() -> None:
    """Among 46 edges at a rate of 0.01 one alone needs a p-value below 0.00022."""
    examples = noise(3, edges=46)
    examples[:, 7] += 5
    found = significant_edges(on_plain(examples), rate=0.01)
    assert found.flips == 4600
    assert found.fewest == 1
    assert found.found.nonzero().tolist() == [[7]]


def test_where_one_edge_alone_cannot_pass_it_is_said_how_many_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 46 edges at a rate of 0.05 with 199 assignments, p = 1/200 is enough for 46 / 200 / 0.05 = 4.6 together."""
    monkeypatch.setattr(room, "MOST_FLIPS", 199)
    for strong, count in ((4, 0), (5, 5)):
        examples = torch.tensor([[1.0], [-1.0]]).double().repeat(16, 46)
        examples[:, :strong] += 5
        found = significant_edges(on_plain(examples))
        assert (found.flips, found.fewest, len(found.edges)) == (199, 5, count)
    assert found.summary()["fewest"] == 5
    assert "at least 5 must stand out" in found.tables()[0].caption
    # Of six examples two of 64 assignments are as far out: 46 / 32 / 0.05.
    assert significant_edges(on_plain(noise(0, n=6, edges=46))).fewest == 29


def test_what_cannot_be_tested_is_refused() -> None:
    few = on_plain(noise(0, n=5, edges=46))
    with pytest.raises(WorkbenchError, match=r"With 5 examples no p-value is below 0.0625.*at least 6 examples"):
        significant_edges(few)
    with pytest.raises(WorkbenchError, match="With 20000 sign assignments no p-value is below 5e-05.*higher rate"):
        significant_edges(on_plain(noise(0, edges=46)), rate=1e-5)
    with pytest.raises(WorkbenchError, match="in share of the flow, not in logits"):
        significant_edges(on_plain(noise(0, edges=46), scale="share of the flow"))
    for rate in (0.0, 1.0):
        with pytest.raises(WorkbenchError, match="lies between 0 and 1"):
            significant_edges(on_plain(noise(0, edges=46)), rate=rate)


def test_what_is_shown_of_significant_edges() -> None:
    examples = noise(4, edges=46)
    examples[:, [1, 2]] -= torch.tensor([2.0, 4.0], dtype=torch.float64)
    found = significant_edges(on_plain(examples))
    (table,) = found.tables()
    assert table.frame["edge"].tolist() == found.edges[::-1]
    assert "2 of 46 edges with an effect" in table.caption
    figure(table)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert [row["to"] for row in summary["edges"]] == table.frame["to"].tolist()[::-1]
    assert summary["tested"] == 46
    assert found.provenance == found.scores.provenance


def test_estimated_effects_may_be_tested_too() -> None:
    plan = planned("plain")
    scores = eap(plan)
    assert scores.examples is not None
    six = replace(scores, examples=torch.cat([scores.examples, scores.examples]))
    assert significant_edges(six).scores.method == "eap"
