"""Ways to make a model grok sooner, each a loss or a change of a step's gradients.

Grokfast (Lee et al. 2024) amplifies what changes slowly in the gradients: it adds their running mean, some times over.

Prieto et al. 2025 trace the delay to logits that keep growing once the training split is learnt. StableMax takes the
exponential out of the softmax, so that nothing is rounded away; an orthogonal gradient cannot grow the weights as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

TINY = 1e-30

Loss = Callable[[Float[Tensor, "reads vocab"], Int[Tensor, " reads"]], Float[Tensor, " reads"]]
"""Logits and answers to the loss of each."""


def cross_entropy(logits: Float[Tensor, "reads vocab"], answers: Int[Tensor, " reads"]) -> Float[Tensor, " reads"]:
    """Negative log-probability of each answer under the softmax."""
    return functional.cross_entropy(logits, answers, reduction="none")


def stablemax(logits: Float[Tensor, "reads vocab"], answers: Int[Tensor, " reads"]) -> Float[Tensor, " reads"]:
    """Negative log-probability of each answer under StableMax.

    p = s / sum of s, where s(x) = x + 1 for x >= 0 and 1 / (1 - x) below, in place of the softmax's exponential.
    """
    # Clamped, for the branch not taken would divide by 0 at x = 1 and make the gradient NaN.
    scores = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    return scores.sum(-1).log() - scores.gather(-1, answers[:, None])[:, 0].log()


LOSSES: Mapping[str, Loss] = {"cross_entropy": cross_entropy, "stablemax": stablemax}


def amplify_slow(
    gradient: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"] | None, decay: float, factor: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Grokfast-EMA: the gradient with `factor` times its running mean added, and that mean, now with this gradient.

    The mean becomes decay * mean + (1 - decay) * gradient; None, at the first step, stands for the gradient itself.
    """
    mean = gradient.clone() if mean is None else mean.lerp(gradient, 1 - decay)
    return gradient + factor * mean, mean


def orthogonal_to(weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What of the gradient is orthogonal to the weight, both taken as vectors, at the gradient's own norm."""
    along = (weight * gradient).sum() / ((weight * weight).sum() + TINY)
    rest = gradient - along * weight
    return rest * (gradient.norm() / (rest.norm() + TINY))
