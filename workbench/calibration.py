"""Whether a model's confidence is worth what it says: reliability, calibration error, and the temperature for it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
HALVINGS = 60


def reliability(
    logits: Float[Tensor, "example label"], answers: Int[Tensor, " example"], *, bins: int = BINS
) -> pd.DataFrame:
    """Examples in bins of equal width by the confidence of the answer given.

    Returns:
        One row for each bin that is not empty: `n`, mean `confidence`, `accuracy`.
    """
    confidence, given = logits.double().softmax(1).max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    frame = pd.DataFrame(
        {"bin": place.tolist(), "confidence": confidence.tolist(), "right": (given == answers).tolist()}
    )
    grouped = frame.groupby("bin")
    return pd.DataFrame(
        {"n": grouped.size(), "confidence": grouped["confidence"].mean(), "accuracy": grouped["right"].mean()}
    ).reset_index(drop=True)


def calibration_error(bins: pd.DataFrame) -> float:
    """Expected calibration error (Naeini et al. 2015): mean distance of accuracy and confidence over the bins, by n."""
    gap = (bins["accuracy"] - bins["confidence"]).abs()
    return float(np.average(gap, weights=bins["n"]))


def debiased_calibration_error(bins: pd.DataFrame) -> float:
    """The same less what chance adds, at least 0 (Kumar et al. 2019, section 5, for the absolute distance).

    A bin's accuracy is a mean over few examples, so that even a calibrated model has an error. What that adds to a
    distance d is the mean of |d + e| - |d| for a normal e with the variance of the bin's accuracy.
    """
    error = 0.0
    for n, confidence, accuracy in bins[["n", "confidence", "accuracy"]].to_numpy():
        gap, spread = abs(accuracy - confidence), math.sqrt(accuracy * (1 - accuracy) / n)
        error += n * (2 * gap - _folded_mean(gap, spread))
    return max(0.0, error / int(np.sum(bins["n"])))


def fitted_temperature(logits: Float[Tensor, "example label"], answers: Int[Tensor, " example"]) -> float:
    """What to divide logits by so that their cross-entropy is least (Guo et al. 2017), between 0.05 and 20.

    The cross-entropy is convex in the temperature's inverse, so halving by the sign of its slope finds it.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    logits, right = logits.double(), logits.double().gather(1, answers[:, None])[:, 0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((middle * logits).softmax(1) * logits).sum(1)
        low, high = (low, middle) if float((expected - right).mean()) > 0 else (middle, high)
    return 2 / (low + high)


def _folded_mean(mean: float, spread: float) -> float:
    """Mean of |x| for a normal x."""
    if spread == 0:
        return abs(mean)
    tail = math.erf(mean / (spread * math.sqrt(2)))
    return spread * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * spread**2)) + mean * tail
