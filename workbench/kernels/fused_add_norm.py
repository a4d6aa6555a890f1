"""Residual add and LayerNorm in one pass over memory, forward and backward.

A program holds whole rows. Backward it normalises them anew from the stored sum, which is read in any case; the
gradients of scale and shift are summed within a program and then over programs, in a fixed order, without atomics.
Members are models side by side, each with rows, a scale and a shift of its own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ELEMENTS = 2048
"""Entries that a program normalises at a time: sixteen a thread."""
CHUNKS = 1056
"""Programs of the backward pass, at most: eight for each multiprocessor of a large card."""


@triton.jit
@no_type_check
def forward_kernel(
    x, added, w, b, total, normed, n_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """`total = x + added` and its LayerNorm, `ROWS` rows a program; `n_rows` are a member's."""
    member = tl.program_id(1).to(tl.int64)
    row, last = member * n_rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS), (member + 1) * n_rows
    w, b = w + member * WIDTH, b + member * WIDTH
    column = tl.arange(0, BLOCK)
    inside = (row < last)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    s = tl.load(x + place, inside, 0.0) + tl.load(added + place, inside, 0.0)
    tl.store(total + place, s, inside)
    centred = tl.where(inside, s - (tl.sum(s, 1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    scaled = tl.load(w + column, column < WIDTH, 0.0)[None, :] * centred * scale[:, None]
    tl.store(normed + place, scaled + tl.load(b + column, column < WIDTH, 0.0)[None, :], inside)


@triton.jit
@no_type_check
def backward_kernel(
    total, w, d_total, d_normed, d_x, d_w, d_b, n_rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of both summands, and this program's share of those of scale and shift."""
    program, programs, member = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    w_row = tl.load(w + member * WIDTH + column, column < WIDTH, 0.0)[None, :]
    sum_w, sum_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(program * ROWS, n_rows, programs * ROWS):
        row = member * n_rows + first + tl.arange(0, ROWS)
        inside = (row < (member + 1) * n_rows)[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        s = tl.load(total + place, inside, 0.0)
        g = tl.load(d_normed + place, inside, 0.0)
        centred = tl.where(inside, s - (tl.sum(s, 1) / WIDTH)[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
        unit = centred * scale[:, None]
        sum_w += tl.sum(g * unit, 0)
        sum_b += tl.sum(g, 0)
        g = g * w_row
        through = g - (tl.sum(g, 1) / WIDTH)[:, None] - unit * (tl.sum(g * unit, 1) / WIDTH)[:, None]
        tl.store(d_x + place, tl.load(d_total + place, inside, 0.0) + through * scale[:, None], inside)
    place = (program * tl.num_programs(1) + member) * WIDTH + column
    tl.store(d_w + place, sum_w, column < WIDTH)
    tl.store(d_b + place, sum_b, column < WIDTH)


def constants(width: int) -> dict[str, int]:
    """What a kernel is compiled for: rows of this width."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, ELEMENTS // block)}


class AddNorm(torch.autograd.Function):
    """The two kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, added: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `reference.add_norm`, on rows that lie one after the other."""
        x, added, w, b = (each.contiguous() for each in (x, added, w, b))
        total, normed = torch.empty_like(x), torch.empty_like(x)
        shape, members = constants(x.shape[-1]), w.numel() // x.shape[-1]
        rows = x.numel() // w.numel()
        grid = (triton.cdiv(rows, shape["ROWS"]), members)
        forward_kernel[grid](x, added, w, b, total, normed, rows, eps, **shape)
        ctx.save_for_backward(total, w)
        ctx.shape, ctx.eps, ctx.rows = shape, eps, rows
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, added, w and b."""
        total, w = ctx.saved_tensors
        members = w.numel() // w.shape[-1]
        programs = min(triton.cdiv(ctx.rows, ctx.shape["ROWS"]), triton.cdiv(CHUNKS, members))
        d_x, shares = torch.empty_like(total), total.new_empty(2, programs, *w.shape)
        backward_kernel[(programs, members)](
            total, w, d_total.contiguous(), d_normed.contiguous(), d_x, *shares, ctx.rows, ctx.eps, **ctx.shape
        )
        d_w, d_b = shares.sum(1)
        return d_x, d_x, d_w, d_b, None


def add_norm(
    x: Float[Tensor, "*member row d_model"],
    added: Float[Tensor, "*member row d_model"],
    w: Float[Tensor, "*member d_model"],
    b: Float[Tensor, "*member d_model"],
    eps: float,
) -> tuple[Float[Tensor, "*member row d_model"], Float[Tensor, "*member row d_model"]]:
    """As `reference.add_norm`, in float32."""
    total, normed = AddNorm.apply(x, added, w, b, eps)
    return total, normed
