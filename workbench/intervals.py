"""Intervals and tests for paired measurements: bootstrap, sign-flip permutation, false-discovery rate.

All take values of which each row is one example measured twice (clean and patched, say), so that resampling examples
keeps the pairs together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.runtime import WorkbenchError, generator

RESAMPLES = 1000
LEVEL = 0.95
NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def columns_of(name: str, found: Estimate | None) -> dict[str, float | None]:
    """A mean and its interval as columns `name`, `name_low` and `name_high`: empty where there is none."""
    mean, low, high = (None, None, None) if found is None else (found.mean, found.low, found.high)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def share_of(true: Bool[Tensor, " example"]) -> Estimate:
    """The share that is true, with its 95 % score interval, which stays honest at 0 and 1 (Wilson 1927).

    Raises:
        WorkbenchError: there is no example.
    """
    if not len(true):
        raise WorkbenchError("A share needs at least one example; got none.")
    n, mean = len(true), float(true.double().mean())
    square = NORMAL_95**2
    middle = (mean + square / (2 * n)) / (1 + square / n)
    half = NORMAL_95 / (1 + square / n) * (mean * (1 - mean) / n + square / (4 * n * n)) ** 0.5
    # Rounding may put an end a hair beyond the mean at 0 and 1.
    return Estimate(mean=mean, low=min(mean, max(0.0, middle - half)), high=max(mean, min(1.0, middle + half)))


def mean_of(values: Float[Tensor, " example"], *, seed: int = 0) -> Estimate:
    """The mean over examples with its bootstrap interval.

    Raises:
        WorkbenchError: there is no example.
    """
    low, high = paired_bootstrap(values, seed=seed)
    return Estimate(mean=float(values.double().mean()), low=float(low), high=float(high))


def paired_bootstrap(
    values: Float[Tensor, " example *cells"], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """Percentile interval of the mean over examples (Efron 1979), the same resamples for every cell.

    Returns:
        Lower and upper end. With one example the interval is the value itself.

    Raises:
        WorkbenchError: there is no example.
    """
    weights = _resample_weights(len(values), seed=seed, resamples=resamples)
    means = (weights @ values.double().reshape(len(values), -1)).reshape(resamples, *values.shape[1:])
    return _ends(means, level, values.dtype)


def ratio_bootstrap(
    numerator: Float[Tensor, " example *cells"],
    denominator: Float[Tensor, " example"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """Percentile interval of mean(numerator) / mean(denominator), both resampled by the same examples."""
    weights = _resample_weights(len(numerator), seed=seed, resamples=resamples)
    above = weights @ numerator.double().reshape(len(numerator), -1)
    below = weights @ denominator.double()
    # A resample of examples without any difference has no ratio.
    below = torch.where(below == 0, torch.nan, below)
    ratios = (above / below[:, None]).reshape(resamples, *numerator.shape[1:])
    return _ends(ratios, level, numerator.dtype)


def t_interval(values: Float[Tensor, " unit *cells"]) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """95 % interval of the mean over few units, such as runs: Student's, where a bootstrap of them would be too narrow.

    Returns:
        Lower and upper end; NaN with fewer than two units, which say nothing of how units differ.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        nothing = values.new_full(values.shape[1:], torch.nan)
        return nothing, nothing
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * values.std(0) / n**0.5
    return values.mean(0) - half, values.mean(0) + half


def student_of(values: Float[Tensor, " unit"]) -> Estimate:
    """The mean over few units, such as runs, with Student's interval: NaN at its ends with fewer than two.

    Raises:
        WorkbenchError: there is no unit.
    """
    if not len(values):
        raise WorkbenchError("A mean needs at least one unit; got none.")
    low, high = t_interval(values)
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


def answer_scores(right: Bool[Tensor, "example pos"], read: Bool[Tensor, "example pos"]) -> tuple[Estimate, Estimate]:
    """Share of the answers that are right, and of the examples with no wrong one.

    Answers of one example are right or wrong together, so that the first interval is a bootstrap over examples; the
    second is Wilson's.

    Args:
        right: whether an answer is right, where it is read.
        read: where answers are.
    """
    numerator, denominator = ((right & read).sum(1).double(), read.sum(1).double())
    low, high = ratio_bootstrap(numerator, denominator)
    share = Estimate(mean=float(numerator.sum() / denominator.sum()), low=float(low), high=float(high))
    return share, share_of((right | ~read).all(1))


def sign_flip_pvalue(
    differences: Float[Tensor, " example *cells"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Float[Tensor, " *cells"]:
    """Two-sided p-value that the mean paired difference is 0, by flipping signs of examples at random.

    The observed assignment counts as one of the resamples, so that the p-value is never 0 (Phipson & Smyth 2010).
    """
    flat = differences.double().reshape(len(differences), -1)
    signs = torch.randint(0, 2, (resamples, len(flat)), generator=generator(seed, "sign flip")).double() * 2 - 1
    null = (signs @ flat).abs() / len(flat)
    observed = flat.mean(0).abs()
    tolerance = 1e-12 * flat.abs().amax().clamp(min=1e-300)
    exceed = (null >= observed - tolerance).sum(0)
    return ((exceed + 1).double() / (resamples + 1)).reshape(differences.shape[1:]).to(differences.dtype)


def discoveries(pvalues: Float[Tensor, " *cells"], *, rate: float = 0.05) -> Bool[Tensor, " *cells"]:
    """Cells kept at a false-discovery rate of `rate` (Benjamini & Hochberg 1995)."""
    flat = pvalues.flatten()
    ordered, order = flat.sort()
    passing = ordered <= rate * torch.arange(1, len(flat) + 1) / len(flat)
    kept = int(passing.nonzero().max()) + 1 if passing.any() else 0
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[:kept]] = True
    return chosen.reshape(pvalues.shape)


def _resample_weights(n: int, *, seed: int, resamples: int) -> Float[Tensor, "resample example"]:
    if n == 0:
        raise WorkbenchError("An interval needs at least one example; got none.")
    draws = torch.randint(0, n, (resamples, n), generator=generator(seed, "bootstrap"))
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64)) / n


def _ends(samples: Tensor, level: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not samples.numel():
        # No cells: quantile refuses what is empty.
        return samples.new_zeros(samples.shape[1:], dtype=dtype), samples.new_zeros(samples.shape[1:], dtype=dtype)
    tail = (1 - level) / 2
    low, high = torch.nanquantile(samples, torch.tensor([tail, 1 - tail], dtype=samples.dtype), dim=0)
    return low.to(dtype), high.to(dtype)
