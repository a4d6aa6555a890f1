"""Intervals that cover what they promise, and tests that are as rare by chance as they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from workbench.intervals import (
    Estimate,
    answer_scores,
    columns_of,
    discoveries,
    mean_of,
    paired_bootstrap,
    ratio_bootstrap,
    share_of,
    sign_flip_pvalue,
    student_of,
    t_interval,
)
from workbench.runtime import WorkbenchError

values_of = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12)


def test_bootstrap_of_two_examples() -> None:
    """Means of two draws from {0, 4} are 0, 2 and 4, with chances 1/4, 1/2, 1/4."""
    values = torch.tensor([0.0, 4.0])
    low, high = paired_bootstrap(values, level=0.95)
    assert (float(low), float(high)) == (0.0, 4.0)
    # The middle two fifths of the resampled means are all 2.
    low, high = paired_bootstrap(values, level=0.4)
    assert (float(low), float(high)) == (2.0, 2.0)


def test_one_example_is_its_own_interval() -> None:
    low, high = paired_bootstrap(torch.tensor([[3.0, -1.0]]))
    assert low.tolist() == high.tolist() == [3.0, -1.0]


def test_no_example() -> None:
    with pytest.raises(WorkbenchError, match="needs at least one example; got none"):
        paired_bootstrap(torch.zeros(0, 3))


def test_cells_share_their_resamples() -> None:
    """A cell that is another one plus 10 has its interval, plus 10."""
    one = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = paired_bootstrap(torch.stack([one, one + 10], 1))
    torch.testing.assert_close(low[1], low[0] + 10)
    torch.testing.assert_close(high[1], high[0] + 10)


def test_shape_and_dtype_are_kept() -> None:
    low, high = paired_bootstrap(torch.zeros(5, 2, 3))
    assert low.shape == high.shape == (2, 3)
    assert low.dtype == torch.float32


def test_seed_level_and_resamples() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(1))
    assert paired_bootstrap(values) == paired_bootstrap(values)
    assert paired_bootstrap(values) != paired_bootstrap(values, seed=1)
    narrow, wide = (paired_bootstrap(values, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    # One resample has nothing to spread over.
    low, high = paired_bootstrap(values, resamples=1)
    assert low == high


@given(values_of)
def test_the_interval_lies_within_the_values(values: list[float]) -> None:
    low, high = paired_bootstrap(torch.tensor(values, dtype=torch.float64), resamples=50)
    slack = 1e-9 * max(1.0, max(map(abs, values)))
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_coverage() -> None:
    """Of 400 samples of 40 from a skewed law, about 95 % have the true mean in their interval."""
    samples = torch.empty(40, 400, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(2))
    low, high = paired_bootstrap(samples)
    covered = float(((low <= 1) & (high >= 1)).double().mean())
    # The percentile interval is a little short for skewed means.
    assert 0.88 < covered < 0.98
    # The check can fail: an interval of half the level covers far less.
    low, high = paired_bootstrap(samples, level=0.5)
    assert float(((low <= 1) & (high >= 1)).double().mean()) < 0.6


def test_ratio_of_two_means() -> None:
    """Where every example has the same ratio, so has every resample."""
    below = torch.tensor([1.0, 2.0, 5.0])
    low, high = ratio_bootstrap(torch.stack([3 * below, -below], 1), below)
    torch.testing.assert_close(low, torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(high, torch.tensor([3.0, -1.0]))


def test_ratio_is_not_the_mean_of_ratios() -> None:
    """Two examples, ratios 1/1 and 30/10: the ratio of means is 31/11, and its ends are 1 and 3."""
    above, below = torch.tensor([1.0, 30.0]), torch.tensor([1.0, 10.0])
    low, high = ratio_bootstrap(above, below, level=0.4)
    torch.testing.assert_close(low, torch.tensor(31 / 11))
    low, high = ratio_bootstrap(above, below)
    assert (float(low), float(high)) == (1.0, 3.0)


def test_numerator_and_denominator_are_resampled_together() -> None:
    """Were they not, a constant ratio would spread."""
    below = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    low, high = ratio_bootstrap(2 * below, below)
    assert float(high - low) < 1e-12
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    low, high = ratio_bootstrap(2 * below[order], below)
    assert float(high - low) > 0.1


def test_sign_flips_of_three_equal_differences() -> None:
    """Of 8 assignments of signs, 2 leave the mean as far from 0: p is about 1/4."""
    p = sign_flip_pvalue(torch.tensor([1.0, 1.0, 1.0]), resamples=20_000)
    assert abs(float(p) - 0.25) < 0.015


def test_a_pvalue_is_never_zero() -> None:
    """However clear the difference: the observed assignment is one of them (Phipson & Smyth 2010)."""
    p = sign_flip_pvalue(torch.full((60,), 5.0), resamples=999)
    assert float(p) == pytest.approx(1 / 1000)


def test_no_difference_has_pvalue_one() -> None:
    assert sign_flip_pvalue(torch.zeros(10, 2)).tolist() == [1.0, 1.0]


@given(values_of)
def test_pvalues_are_probabilities(values: list[float]) -> None:
    differences = torch.tensor(values, dtype=torch.float64)
    p = float(sign_flip_pvalue(differences, resamples=30))
    assert 1 / 31 - 1e-12 <= p <= 1
    # The test is two-sided.
    assert p == float(sign_flip_pvalue(-differences, resamples=30))


def test_pvalues_under_the_null_are_uniform() -> None:
    noise = torch.randn(25, 600, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p = sign_flip_pvalue(noise)
    for level in (0.05, 0.2, 0.5):
        assert abs(float((p <= level).double().mean()) - level) < 3 * math.sqrt(level * (1 - level) / 600)


def test_discoveries_by_hand() -> None:
    """Benjamini and Hochberg's steps for five tests at 5 %: 0.01, 0.02, 0.03, 0.04, 0.05.

    0.032 lies above its step of 0.03, but 0.039 lies under 0.04 and brings all smaller ones with it; 0.2 stays out.
    """
    pvalues = torch.tensor([0.2, 0.032, 0.005, 0.039, 0.019])
    assert discoveries(pvalues).tolist() == [False, True, True, True, True]
    # Cutting each at its own step would have lost 0.032.
    assert discoveries(torch.tensor([0.2, 0.032, 0.005, 0.041, 0.019])).tolist() == [False, False, True, False, True]


def test_discoveries_at_a_rate_and_in_a_shape() -> None:
    pvalues = torch.tensor([[0.01, 0.2], [0.5, 0.03]])
    assert discoveries(pvalues, rate=0.05).tolist() == [[True, False], [False, False]]
    assert discoveries(pvalues, rate=0.1).tolist() == [[True, False], [False, True]]
    assert not discoveries(torch.ones(4)).any()


def test_false_discoveries_are_rare() -> None:
    """40 true effects among 200: of what is found, about one in twenty at most is none."""
    rng = torch.Generator().manual_seed(6)
    found, false = 0, 0
    for _ in range(20):
        noise = torch.randn(30, 200, generator=rng, dtype=torch.float64)
        noise[:, :40] += 1
        kept = discoveries(sign_flip_pvalue(noise))
        found, false = found + int(kept.sum()), false + int(kept[40:].sum())
    assert found > 20 * 30
    assert false / found < 0.07


def test_resamples_without_any_difference_do_not_spoil_the_interval_of_a_ratio() -> None:
    below = torch.tensor([2.0, 0.0, 0.0, 0.0])
    low, high = ratio_bootstrap(below, below)
    assert (float(low), float(high)) == (1, 1)


def test_no_cells_have_no_intervals() -> None:
    low, high = ratio_bootstrap(torch.zeros(3, 0), torch.ones(3))
    assert low.shape == high.shape == (0,)


def test_t_interval_by_hand() -> None:
    # Of 1, 2, 6 the mean is 3 and the variance 7; t at 97.5 % with 2 degrees of freedom is 4.302653.
    low, high = t_interval(torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], dtype=torch.float64))
    half = 4.302653 * (7 / 3) ** 0.5
    assert low.tolist() == pytest.approx([3 - half, 5])
    assert high.tolist() == pytest.approx([3 + half, 5])


def test_t_interval_of_few_covers_what_it_promises_and_a_bootstrap_does_not() -> None:
    for n in (2, 3, 5):
        drawn = torch.randn(n, 4000, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        low, high = t_interval(drawn)
        assert float(((low <= 0) & (high >= 0)).double().mean()) == pytest.approx(0.95, abs=0.015)
    low, high = paired_bootstrap(drawn[:3])
    assert float(((low <= 0) & (high >= 0)).double().mean()) < 0.8


def test_one_unit_has_no_t_interval() -> None:
    low, high = t_interval(torch.ones(1, 2))
    assert bool(low.isnan().all())
    assert bool(high.isnan().all())


def test_a_mean_over_few_units_by_hand() -> None:
    found = student_of(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert [found.mean, found.low] == pytest.approx([3, 3 - 4.302653 * (7 / 3) ** 0.5])
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    alone = student_of(torch.tensor([0.5]))
    assert (alone.mean, math.isnan(alone.low), math.isnan(alone.high)) == (0.5, True, True)
    with pytest.raises(WorkbenchError, match="at least one unit; got none"):
        student_of(torch.zeros(0))


def test_score_interval_is_scipys() -> None:
    for right, n in ((0, 5), (5, 5), (3, 11), (499, 512)):
        found = share_of(torch.arange(n) < right)
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        assert (found.mean, found.low, found.high) == pytest.approx((right / n, theirs.low, theirs.high))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="at least one example; got none"):
        share_of(torch.zeros(0, dtype=torch.bool))


def test_a_mean_brings_its_bootstrap_interval() -> None:
    values = torch.tensor([0.5, 2.0, 4.0])
    low, high = paired_bootstrap(values, seed=3)
    assert mean_of(values, seed=3) == Estimate(mean=6.5 / 3, low=float(low), high=float(high))
    with pytest.raises(WorkbenchError, match="needs at least one example"):
        mean_of(values[:0])


def test_columns_of_an_estimate_and_of_none() -> None:
    found = columns_of("x", Estimate(mean=0.5, low=0.25, high=1.0))
    assert found == {"x": 0.5, "x_low": 0.25, "x_high": 1.0}
    assert columns_of("x", None) == dict.fromkeys(found)


def test_answers_are_counted_where_they_are_read() -> None:
    """Of three examples one has no wrong answer among those read, and three of five answers are right."""
    right = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    read = torch.tensor([[True, False, False], [True, True, True], [False, True, False]])
    answers, examples = answer_scores(right, read)
    assert answers.mean == pytest.approx(3 / 5)
    assert examples.mean == pytest.approx(1 / 3)
    interval = binomtest(1, 3).proportion_ci(method="wilson")
    assert (examples.low, examples.high) == pytest.approx((interval.low, interval.high))
    assert answers.low <= answers.mean <= answers.high
