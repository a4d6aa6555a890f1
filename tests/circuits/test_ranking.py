"""Figures of rankings worked by hand, and what rankings at random reach."""

from __future__ import annotations

import pytest
import torch

from circuits.ranking import chance, judge
from workbench.runtime import generator

EVERY = torch.ones(5, dtype=torch.bool)


def marked(*true: int, of: int = 5) -> torch.Tensor:
    found = torch.zeros(of, dtype=torch.bool)
    found[list(true)] = True
    return found


def test_a_ranking_without_ties() -> None:
    # Ranked: true, false, true, false, false. Of 6 pairs the second true one loses one.
    found = judge(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), marked(0, 2), EVERY)
    assert found is not None
    assert found.auroc == pytest.approx(5 / 6)
    assert found.auprc == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert (found.precision, found.recall) == (0.5, 0.5)


def test_a_ranking_with_ties() -> None:
    # 9 | 4 4 4 | 1 with the true ones first and third: 3 pairs won, then one won and two halves.
    found = judge(torch.tensor([9.0, 4.0, 4.0, 4.0, 1.0]), marked(0, 2), EVERY)
    assert found is not None
    assert found.auroc == pytest.approx((3 + 1 + 2 / 2) / 6)
    # At 9 half is found at precision 1, at 4 the other half at precision 2/4.
    assert found.auprc == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    # One is sure, and the second is one of three, of which one is true.
    assert found.precision == pytest.approx((1 + 1 / 3) / 2)


def test_a_ranking_of_nothing_but_ties_is_chance() -> None:
    found = judge(torch.zeros(5), marked(1, 4), EVERY)
    assert found is not None
    assert found.auroc == 0.5
    assert [found.auprc, found.precision, found.recall] == pytest.approx([2 / 5, 2 / 5, 2 / 5])


def test_fewer_candidates_than_true_edges_tell_precision_from_recall() -> None:
    found = judge(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), marked(0, 1, 2), marked(0, 1))
    assert found is not None
    assert (found.precision, found.recall) == pytest.approx((1, 2 / 3))
    nothing = judge(torch.arange(5.0), marked(0), marked())
    assert nothing is not None
    assert (nothing.precision, nothing.recall) == (0, 0)


def test_the_order_of_the_edges_does_not_matter() -> None:
    draw = generator(0, "order")
    score = torch.randint(4, (30,), generator=draw).float()
    truth, candidates = torch.rand(2, 30, generator=draw) < torch.tensor([[0.3], [0.8]])
    for _ in range(20):
        order = torch.randperm(30, generator=draw)
        assert judge(score[order], truth[order], candidates[order]) == judge(score, truth, candidates)


@pytest.mark.parametrize("truth", [marked(), marked(0, 1, 2, 3, 4)])
def test_a_truth_of_all_or_nothing_judges_nothing(truth: torch.Tensor) -> None:
    assert judge(torch.arange(5.0), truth, EVERY) is None
    assert chance(truth, EVERY) is None


def test_one_true_edge_of_four_at_random() -> None:
    # It stands first to fourth alike: AUROC 1, 2/3, 1/3, 0, average precision 1, 1/2, 1/3, 1/4.
    found = chance(marked(2, of=4), EVERY[:4])
    assert found is not None
    assert found.auroc.mean == pytest.approx(0.5, abs=0.05)
    assert (found.auroc.low, found.auroc.high) == (0, 1)
    assert found.auprc.mean == pytest.approx(25 / 48, abs=0.05)
    assert (found.auprc.low, found.auprc.high) == (0.25, 1)
    assert found.precision.mean == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("candidates", [range(40), range(3, 12), range(2, 5)], ids=["all", "some", "fewer than true"])
def test_chance_is_what_judged_rankings_reach(candidates: range) -> None:
    draw = generator(1, "rankings")
    truth, among = marked(*range(6), of=40), marked(*candidates, of=40)
    judged = [judge(torch.rand(40, generator=draw), truth, among) for _ in range(200)]
    found = chance(truth, among)
    assert found is not None
    for measure in ("auroc", "auprc", "precision", "recall"):
        values = torch.tensor([getattr(quality, measure) for quality in judged])
        band = getattr(found, measure)
        assert band.mean == pytest.approx(float(values.mean()), abs=0.02)
        inside = float(((values >= band.low) & (values <= band.high)).float().mean())
        # Few true edges give few values of precision, so that its band holds more than it must.
        assert 0.91 <= inside <= (1 if measure in ("precision", "recall") else 0.99)


def test_without_candidates_nothing_is_found() -> None:
    found = chance(marked(0, 2), marked())
    assert found is not None
    assert (found.precision.high, found.recall.high) == (0, 0)


@pytest.mark.parametrize(("edges", "true"), [(13, 6), (94, 15), (2102, 57)])
def test_random_rankings_score_a_half(edges: int, true: int) -> None:
    truth, every = marked(*range(true), of=edges), torch.ones(edges, dtype=torch.bool)
    found = chance(truth, every, rankings=200)
    assert found is not None
    assert found.auroc.mean == pytest.approx(0.5, abs=0.05)
    assert found.auroc.low < 0.5 < found.auroc.high
    assert found.precision.mean == pytest.approx(true / edges, abs=0.05)
    assert chance(truth, every, rankings=200, seed=1) != found
