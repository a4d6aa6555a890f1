"""Attention for short prompts, forward and backward, in exact float32: no score ever leaves the chip.

At a few dozen positions the matrix units have little to do, and their float32 is not exact. So a program takes a few
rows, of whatever prompt and head, and walks over what they attend to, one position at a time, with a running maximum
(Milakov & Gimelshein 2018). Backward there is one walk for the destinations' gradients and one for the sources', each
writing every element once, without atomics. Nothing here has weights: models side by side are more examples.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ELEMENTS = 1024
"""Entries of a program's rows: eight a thread."""
LOWEST = tl.constexpr(-1e30)
"""Where a running maximum begins: finite, so that a source that may not be attended to leaves it as it is."""


@triton.jit
@no_type_check
def places(n_rows, n_heads, n_own, n_other, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, each a position of a head of an example, and where they lie; where the other side begins."""
    row, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    example, head, own = row // (n_own * n_heads), row // n_own % n_heads, row % n_own
    inside = (row < n_rows)[:, None] & (e < WIDTH)[None, :]
    at_own = (((example * n_own + own) * n_heads + head) * WIDTH)[:, None] + e[None, :]
    at_other = ((example * n_other * n_heads + head) * WIDTH)[:, None] + e[None, :]
    return row, example, head, own, inside, at_own, at_other


@triton.jit
@no_type_check
def score_of(query, key, may, scale):
    """Scores of one source for each row, or of one destination; `-inf` where it may not be attended to."""
    return tl.where(may != 0, tl.sum(query * key, 1) * scale, float("-inf"))


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, allowed, z, lse, n_rows, n_heads, n_dest, n_src, mask_stride, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Outputs of `ROWS` destinations, and the logarithm of each softmax's denominator."""
    row, example, _, dest, inside, at_dest, at_src = places(n_rows, n_heads, n_dest, n_src, WIDTH, BLOCK, ROWS)
    at_mask = allowed + example * mask_stride + dest * n_src
    query = tl.load(q + at_dest, inside, 0.0)
    most, denominator = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for src in range(n_src):
        place = at_src + src * n_heads * WIDTH
        may = tl.load(at_mask + src, row < n_rows, 1)
        score = score_of(query, tl.load(k + place, inside, 0.0), may, scale)
        higher = tl.maximum(most, score)
        kept, weight = tl.exp(most - higher), tl.exp(score - higher)
        denominator = denominator * kept + weight
        total = total * kept[:, None] + weight[:, None] * tl.load(v + place, inside, 0.0)
        most = higher
    tl.store(z + at_dest, total / denominator[:, None], inside)
    tl.store(lse + row, most + tl.log(denominator), row < n_rows)


@triton.jit
@no_type_check
def dest_kernel(
    q, k, v, allowed, z, lse, d_z, d_q, shared, n_rows, n_heads, n_dest, n_src, mask_stride, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of `ROWS` queries; `shared` is what softmax's gradient takes from each of a row's scores."""
    row, example, _, dest, inside, at_dest, at_src = places(n_rows, n_heads, n_dest, n_src, WIDTH, BLOCK, ROWS)
    at_mask = allowed + example * mask_stride + dest * n_src
    query, upstream = tl.load(q + at_dest, inside, 0.0), tl.load(d_z + at_dest, inside, 0.0)
    common = tl.sum(upstream * tl.load(z + at_dest, inside, 0.0), 1)
    tl.store(shared + row, common, row < n_rows)
    denominator = tl.load(lse + row, row < n_rows, 0.0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for src in range(n_src):
        place = at_src + src * n_heads * WIDTH
        key = tl.load(k + place, inside, 0.0)
        may = tl.load(at_mask + src, row < n_rows, 1)
        weight = tl.exp(score_of(query, key, may, scale) - denominator)
        d_weight = tl.sum(upstream * tl.load(v + place, inside, 0.0), 1)
        total += (weight * (d_weight - common) * scale)[:, None] * key
    tl.store(d_q + at_dest, total, inside)


@triton.jit
@no_type_check
def src_kernel(
    q, k, v, allowed, lse, d_z, shared, d_k, d_v, n_rows, n_heads, n_dest, n_src, mask_stride, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of `ROWS` keys and values."""
    row, example, head, src, inside, at_src, at_dest = places(n_rows, n_heads, n_src, n_dest, WIDTH, BLOCK, ROWS)
    at_row, at_mask = (example * n_heads + head) * n_dest, allowed + example * mask_stride + src
    key, value = tl.load(k + at_src, inside, 0.0), tl.load(v + at_src, inside, 0.0)
    total_k, total_v = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for dest in range(n_dest):
        place = at_dest + dest * n_heads * WIDTH
        query, upstream = tl.load(q + place, inside, 0.0), tl.load(d_z + place, inside, 0.0)
        may = tl.load(at_mask + dest * n_src, row < n_rows, 1)
        weight = tl.exp(score_of(query, key, may, scale) - tl.load(lse + at_row + dest, row < n_rows, 0.0))
        total_v += weight[:, None] * upstream
        d_weight = tl.sum(upstream * value, 1) - tl.load(shared + at_row + dest, row < n_rows, 0.0)
        total_k += (weight * d_weight * scale)[:, None] * query
    tl.store(d_k + at_src, total_k, inside)
    tl.store(d_v + at_src, total_v, inside)


def constants(width: int) -> dict[str, int]:
    """What a kernel is compiled for: heads of this width."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, ELEMENTS // block)}


class Attention(torch.autograd.Function):
    """The three kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """As `reference.attention`, on tensors that lie in order."""
        q, k, v, mask = (each.contiguous() for each in (q, k, v, allowed.view(torch.uint8)))
        (batch, n_dest, heads, width), n_src = q.shape, k.shape[1]
        z, lse, fixed = torch.empty_like(q), q.new_empty(batch * heads * n_dest), constants(width)
        sizes = (heads, n_dest, n_src, 0 if len(mask) == 1 else n_dest * n_src, width**-0.5)
        grid = (triton.cdiv(len(lse), fixed["ROWS"]),)
        forward_kernel[grid](q, k, v, mask, z, lse, len(lse), *sizes, **fixed)
        ctx.save_for_backward(q, k, v, mask, z, lse)
        ctx.sizes = sizes
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_z: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, mask, z, lse = ctx.saved_tensors
        d_q, d_k, d_v, shared = (torch.empty_like(each) for each in (q, k, v, lse))
        fixed, d_z = constants(q.shape[-1]), d_z.contiguous()
        dests, srcs = len(lse), len(k) * k.shape[1] * k.shape[2]
        grids = [(triton.cdiv(rows, fixed["ROWS"]),) for rows in (dests, srcs)]
        dest_kernel[grids[0]](q, k, v, mask, z, lse, d_z, d_q, shared, dests, *ctx.sizes, **fixed)
        src_kernel[grids[1]](q, k, v, mask, lse, d_z, shared, d_k, d_v, srcs, *ctx.sizes, **fixed)
        return d_q, d_k, d_v, None


def attention(
    q: Float[Tensor, "batch dest head d_head"],
    k: Float[Tensor, "batch src head d_head"],
    v: Float[Tensor, "batch src head d_head"],
    allowed: Bool[Tensor, "#batch dest src"],
) -> Float[Tensor, "batch dest head d_head"]:
    """As `reference.attention`, in float32."""
    return Attention.apply(q, k, v, allowed)
