"""AdamW with Grokfast's filter for every parameter at once, each read and written a single time.

The tensors are arguments of one launch, which a CUDA graph can hold; a program finds the one that its blocks lie in,
and takes several where there are many, so that this is not most of its work.
A stack of models is updated as they are: its tensors are larger. Bias corrections are computed in float64, for at the
first steps they are differences of numbers that are nearly equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.reference import Group

BLOCK = 1024
"""Entries that a program updates at a time: eight a thread."""
PROGRAMS = 4096
"""About as many as there are at most: enough to fill a large card many times over."""


@triton.jit
@no_type_check
def update(
    weight, gradient, mean, square, slow, of_mean, of_square, rate, decay, inside,
    BETAS: tl.constexpr, EPS: tl.constexpr, GROKFAST: tl.constexpr,
):  # fmt: skip
    """One update of the entries pointed to, with the corrections of mean and square."""
    g = tl.load(gradient, inside)
    s = tl.load(slow, inside)
    s += (1 - GROKFAST[0]) * (g - s)
    tl.store(slow, s, inside)
    g += GROKFAST[1] * s
    m, v, w = tl.load(mean, inside), tl.load(square, inside), tl.load(weight, inside)
    m += (1 - BETAS[0]) * (g - m)
    v += (1 - BETAS[1]) * (g * g - v)
    w -= rate * decay * w
    w -= rate / of_mean * m / (tl.sqrt(v / of_square) + EPS)
    tl.store(mean, m, inside)
    tl.store(square, v, inside)
    tl.store(weight, w, inside)


@triton.jit
@no_type_check
def adamw_kernel(
    weights, gradients, means, squares, slows, steps, rates, decays,
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BETAS: tl.constexpr, LOGS: tl.constexpr, EPS: tl.constexpr,
    GROKFAST: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One update of `BLOCKS` times `BLOCK` entries of the tensor that this program lies in."""
    program = tl.program_id(0)
    weight, gradient, mean, square, slow = weights[0], gradients[0], means[0], squares[0], slows[0]
    step, rate, decay, size, first = steps[0], rates[0], decays[0], SIZES[0], FIRSTS[0]
    for i in tl.static_range(1, len(SIZES)):
        if program >= FIRSTS[i]:
            weight, gradient, mean, square, slow = weights[i], gradients[i], means[i], squares[i], slows[i]
            step, rate, decay, size, first = steps[i], rates[i], decays[i], SIZES[i], FIRSTS[i]
    t, lr = tl.load(step).to(tl.float64), tl.load(rate)
    of_mean, of_square = (1 - tl.exp(t * LOGS[0])).to(tl.float32), (1 - tl.exp(t * LOGS[1])).to(tl.float32)
    for block in range(BLOCKS):
        start = ((program - first).to(tl.int64) * BLOCKS + block) * BLOCK
        at = start + tl.arange(0, BLOCK)
        entries = (weight + at, gradient + at, mean + at, square + at, slow + at, of_mean, of_square, lr, decay)
        # Only the last block of a tensor is masked, so that every other moves four entries at a time.
        if start + BLOCK <= size:
            update(*entries, None, BETAS, EPS, GROKFAST)
        elif start < size:
            update(*entries, at < size, BETAS, EPS, GROKFAST)


def constants(
    sizes: Sequence[int], betas: tuple[float, float], eps: float, grokfast: tuple[float, float]
) -> dict[str, Any]:
    """What the kernel is compiled for: the parameters of one model, and the rule but for its rate and decay."""
    blocks = max(1, sum(sizes) // (BLOCK * PROGRAMS))
    firsts = accumulate((triton.cdiv(size, BLOCK * blocks) for size in sizes[:-1]), initial=0)
    logs = tuple(math.log(beta) if beta else -math.inf for beta in betas)
    fixed = {"SIZES": tuple(sizes), "FIRSTS": tuple(firsts), "BETAS": betas, "LOGS": logs, "EPS": eps}
    return {**fixed, "GROKFAST": grokfast, "BLOCK": BLOCK, "BLOCKS": blocks}


def adamw(groups: Sequence[Group], betas: tuple[float, float], eps: float, grokfast: tuple[float, float]) -> None:
    """As `reference.adamw` with the filter, of float32 tensors that lie in order."""

    def every(name: str) -> tuple[Tensor, ...]:
        return tuple(tensor for group in groups for tensor in getattr(group, name))

    weights, means, steps = every("weights"), every("means"), every("steps")
    gradients = tuple(gradient.contiguous() for gradient in every("gradients"))
    rates = tuple(rate for group in groups for rate in [_rate(group)] * len(group.weights))
    decays = tuple(group.decay for group in groups for _ in group.weights)
    torch._foreach_add_(steps, 1)
    fixed = constants([weight.numel() for weight in weights], betas, eps, grokfast)
    grid = (fixed["FIRSTS"][-1] + triton.cdiv(fixed["SIZES"][-1], BLOCK * fixed["BLOCKS"]),)
    adamw_kernel[grid](weights, gradients, means, every("squares"), every("slow"), steps, rates, decays, **fixed)


def _rate(group: Group) -> Tensor:
    """Its learning rate where the kernel can read it at every launch."""
    if isinstance(group.rate, Tensor):
        return group.rate
    return torch.full((), group.rate, device=group.weights[0].device)
