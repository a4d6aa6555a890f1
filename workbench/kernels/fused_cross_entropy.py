"""Unembedding and cross-entropy in one, forward and backward: no logit ever reaches memory.

A program takes a few rows and walks over blocks of the vocabulary with a running maximum (Milakov & Gimelshein 2018).
Backward computes the logits anew, once for the gradients of the rows and once for those of the matrix. They are
products in exact float32, as without the kernel; their softmax is as precise as the loss. Where rows are few, programs
share what they walk over: each writes its part, and parts are summed in a fixed order, without atomics. Members are
models side by side, each with rows and a matrix of its own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ROWS, COLUMNS, INNER = 32, 32, 16
"""Of a block of logits, and how many of the products that it sums are taken at a time."""
PROGRAMS = 264
"""As many as there should be: two for each multiprocessor of a large card."""


@triton.jit
@no_type_check
def logits_of(
    x, w, b, row, last, column, n_vocab, in_stride, out_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A block of logits; `-inf` where the vocabulary ends."""
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, INNER):
        e = first + tl.arange(0, INNER)
        own = tl.load(x + row[:, None] * WIDTH + e[None, :], (row < last)[:, None] & (e < WIDTH)[None, :], 0.0)
        place = e[:, None] * in_stride + column[None, :] * out_stride
        other = tl.load(w + place, (e < WIDTH)[:, None] & (column < n_vocab)[None, :], 0.0)
        logits = tl.dot(own, other, logits, input_precision="ieee")
    if b is not None:
        logits += tl.load(b + column, column < n_vocab, 0.0)[None, :]
    return tl.where((column < n_vocab)[None, :], logits, float("-inf"))


@triton.jit
@no_type_check
def gradient_of(logits, answer, lse, d_loss, row, last, column):
    """The loss's gradient at a block of logits: the softmax less the answer, times what comes from above."""
    own, scale = tl.load(answer + row, row < last, -1), tl.load(d_loss + row, row < last, 0.0)
    # A row past the last has an infinite denominator, and so no probability.
    denominator = tl.load(lse + row, row < last, float("inf"))
    probability = tl.exp(logits.to(denominator.dtype) - denominator[:, None])
    less = tl.where(column[None, :] == own[:, None], probability - 1, probability)
    return (less * scale[:, None]).to(tl.float32)


@triton.jit
@no_type_check
def forward_kernel(
    x, w, b, answer, lse, chosen, n_rows, n_vocab, member_stride, in_stride, out_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Of `ROWS` rows, over a part of the vocabulary: the logarithm of the denominator, and the answer's logit."""
    part, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, last = member * n_rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS), (member + 1) * n_rows
    w += member * member_stride
    b = b if b is None else b + member * n_vocab
    own = tl.load(answer + row, row < last, -1)
    most = tl.full([ROWS], float("-inf"), lse.dtype.element_ty)
    denominator, picked = tl.zeros([ROWS], most.dtype), tl.zeros([ROWS], most.dtype)
    for first in range(part * COLUMNS, n_vocab, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logits = logits_of(x, w, b, row, last, column, n_vocab, in_stride, out_stride, WIDTH, ROWS, COLUMNS, INNER)
        higher = tl.maximum(most, tl.max(logits, 1))
        denominator = denominator * tl.exp(most - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        picked += tl.sum(tl.where(column[None, :] == own[:, None], logits, 0.0), 1)
        most = higher
    place = part * tl.num_programs(2) * n_rows + row
    tl.store(lse + place, most + tl.log(denominator), row < last)
    tl.store(chosen + place, picked, row < last)


@triton.jit
@no_type_check
def rows_kernel(
    x, w, b, answer, lse, d_loss, d_x, n_rows, n_vocab, member_stride, in_stride, out_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a part of the vocabulary gives to the gradients of `ROWS` rows."""
    part, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, last = member * n_rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS), (member + 1) * n_rows
    w += member * member_stride
    b = b if b is None else b + member * n_vocab
    e = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(part * COLUMNS, n_vocab, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logits = logits_of(x, w, b, row, last, column, n_vocab, in_stride, out_stride, WIDTH, ROWS, COLUMNS, INNER)
        d_logits = gradient_of(logits, answer, lse, d_loss, row, last, column)
        place = column[:, None] * out_stride + e[None, :] * in_stride
        other = tl.load(w + place, (column < n_vocab)[:, None] & (e < WIDTH)[None, :], 0.0)
        total = tl.dot(d_logits, other, total, input_precision="ieee")
    place = (part * tl.num_programs(2) * n_rows + row)[:, None] * WIDTH + e[None, :]
    tl.store(d_x + place, total, (row < last)[:, None] & (e < WIDTH)[None, :])


@triton.jit
@no_type_check
def matrix_kernel(
    x, w, b, answer, lse, d_loss, d_w, d_b, n_rows, n_vocab, member_stride, in_stride, out_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a part of the rows gives to the gradients of `COLUMNS` columns of the matrix, and of their biases."""
    part, member = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column, last = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), (member + 1) * n_rows
    w += member * member_stride
    b = b if b is None else b + member * n_vocab
    e = tl.arange(0, BLOCK)
    total, sums = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(part * ROWS, n_rows, tl.num_programs(1) * ROWS):
        row = member * n_rows + first + tl.arange(0, ROWS)
        logits = logits_of(x, w, b, row, last, column, n_vocab, in_stride, out_stride, WIDTH, ROWS, COLUMNS, INNER)
        d_logits = gradient_of(logits, answer, lse, d_loss, row, last, column)
        place = row[None, :] * WIDTH + e[:, None]
        other = tl.load(x + place, (row < last)[None, :] & (e < WIDTH)[:, None], 0.0)
        total = tl.dot(other, d_logits, total, input_precision="ieee")
        sums += tl.sum(d_logits, 0)
    share = part * tl.num_programs(2) + member
    place = (share * WIDTH + e)[:, None] * n_vocab + column[None, :]
    tl.store(d_w + place, total, (e < WIDTH)[:, None] & (column < n_vocab)[None, :])
    if b is not None:
        tl.store(d_b + share * n_vocab + column, sums, column < n_vocab)


def constants(width: int, kernel: str) -> dict[str, int]:
    """What a kernel is compiled for: rows of this width."""
    whole = {} if kernel == "forward" else {"BLOCK": max(16, triton.next_power_of_2(width))}
    return {"WIDTH": width, "ROWS": ROWS, "COLUMNS": COLUMNS, "INNER": INNER, **whole}


def parts(n_own: int, n_other: int, members: int) -> int:
    """How many programs share the blocks that they walk over."""
    return max(1, min(n_other, PROGRAMS // (n_own * members)))


class CrossEntropy(torch.autograd.Function):
    """The three kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, b: Tensor | None, answer: Tensor, dtype: torch.dtype) -> Tensor:
        """As `reference.cross_entropy`, of one dimension of members."""
        x, answer = x.contiguous(), answer.contiguous()
        members, n_rows, width = x.shape
        n_vocab, blocks = w.shape[-1], (triton.cdiv(n_rows, ROWS), triton.cdiv(w.shape[-1], COLUMNS))
        sizes = (n_rows, n_vocab, *w.stride())
        shared = parts(*blocks, members)
        lse, chosen = x.new_empty(2, shared, members, n_rows, dtype=dtype)
        grid = (blocks[0], shared, members)
        forward_kernel[grid](x, w, b, answer, lse, chosen, *sizes, **constants(width, "forward"))
        lse = lse.logsumexp(0)
        ctx.save_for_backward(x, w, b, answer, lse)
        ctx.sizes, ctx.blocks = sizes, blocks
        return lse - chosen.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and b."""
        x, w, b, answer, lse = ctx.saved_tensors
        given = (x, w, b, answer, lse, d_loss.contiguous())
        members, fixed = len(x), constants(x.shape[-1], "rows")
        rows, columns = ctx.blocks
        shared = parts(rows, columns, members)
        d_x = x.new_empty(shared, *x.shape)
        rows_kernel[(rows, shared, members)](*given, d_x, *ctx.sizes, **fixed)
        shared = parts(columns, rows, members)
        d_w, d_b = w.new_empty(shared, *w.shape), None if b is None else b.new_empty(shared, *b.shape)
        matrix_kernel[(columns, shared, members)](*given, d_w, d_b, *ctx.sizes, **fixed)
        return d_x.sum(0), d_w.sum(0), None if d_b is None else d_b.sum(0), None, None


def cross_entropy(
    x: Float[Tensor, "*member row d_model"],
    w: Float[Tensor, "*member d_model vocab"],
    b: Float[Tensor, "*member vocab"] | None,
    answer: Int[Tensor, "*member row"],
    dtype: torch.dtype,
) -> Float[Tensor, "*member row"]:
    """As `reference.cross_entropy`, of float32 operands."""
    x_members, w_members = (each.reshape(-1, *each.shape[-2:]) for each in (x, w))
    b_members = None if b is None else b.reshape(-1, b.shape[-1])
    losses = CrossEntropy.apply(x_members, w_members, b_members, answer.reshape(-1, answer.shape[-1]), dtype)
    return losses.view(answer.shape)
