"""Affine maps and MLPs of many rows on a processor: products by oneDNN, and neurons that never leave the cache.

PyTorch's own products of float32 go to another library. On an AMD EPYC (Zen 4), one thread, oneDNN's took 0.66 to 0.88
of their time from 1,500 rows on, for `x @ w` and for the gradient of x; not for that of w, which stays PyTorch's. An
MLP goes through its rows in pieces whose neurons fit into the cache next to the processor, which took 0.83 to 0.91 of
the time of all rows at once. Below a thousand rows, or where rows are narrow, a call costs more than it gains.

Operands are multiplied in a dtype of float32 or bfloat16; gradients of weights are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

FEWEST_ROWS = 1024
NARROWEST = 64
CACHED = 2**18
"""Neurons of a piece: a megabyte in float32."""


def is_available() -> bool:
    """Whether this build of PyTorch has oneDNN's products with something fused to them."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def affine(
    x: Float[Tensor, "*rows n_in"],
    w: Float[Tensor, "n_in n_out"],
    b: Float[Tensor, " n_out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*rows n_out"]:
    """As `reference.affine`, multiplied in this dtype."""
    return _Affine.apply(x.flatten(0, -2), w, b, dtype).unflatten(0, x.shape[:-1])


def mlp(
    x: Float[Tensor, "*rows d_model"],
    w_in: Float[Tensor, "d_model d_mlp"],
    b_in: Float[Tensor, " d_mlp"] | None,
    w_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"] | None,
    activation: str,
    dtype: torch.dtype,
) -> Float[Tensor, "*rows d_model"]:
    """As `reference.mlp`, multiplied in this dtype."""
    # Known before autograd's function begins, which is not told whether anybody will ask for gradients.
    keep = torch.is_grad_enabled()
    return _MLP.apply(x.flatten(0, -2), w_in, b_in, w_out, b_out, activation, dtype, keep).unflatten(0, x.shape[:-1])


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
        low_x, low_w = x.to(dtype), w.to(dtype)
        ctx.save_for_backward(low_x, low_w)
        ctx.dtype = x.dtype
        return _times(low_x, low_w, _to(b, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, for_w, for_b, _ = ctx.needs_input_grad
        return (
            _times(above, w.mT).to(ctx.dtype) if for_x else None,
            (x.mT @ above).float() if for_w else None,
            above.sum(0, dtype=torch.float32) if for_b else None,
            None,
        )


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        activation: str,
        dtype: torch.dtype,
        keep: bool,
    ) -> Tensor:
        low_x, low_in, low_out = (each.to(dtype) for each in (x, w_in, w_out))
        b_low_in, b_low_out = (_to(each, dtype) for each in (b_in, b_out))
        activate, _ = SLOPES[activation]
        out = low_x.new_empty(len(x), w_out.shape[1])
        kept = []
        for part, place in zip(_pieces(low_x, w_in), _pieces(out, w_in), strict=True):
            pre, post = activate(part, low_in, b_low_in)
            place.copy_(_times(post, low_out, b_low_out))
            kept += [pre, post] if keep else []
        ctx.save_for_backward(low_x, low_in, low_out, *kept)
        ctx.activation, ctx.dtype = activation, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, *kept = ctx.saved_tensors
        for_x, for_w_in, for_b_in, for_w_out, for_b_out, *_ = ctx.needs_input_grad
        _, slope = SLOPES[ctx.activation]
        d_x = torch.empty_like(x)
        d_in, d_out = (torch.zeros(w.shape) for w in (w_in, w_out))
        d_b_in = torch.zeros(w_in.shape[1])
        pieces = (_pieces(each, w_in) for each in (x, above, d_x))
        for part, above_part, d_part, pre, post in zip(*pieces, kept[::2], kept[1::2], strict=True):
            d_pre = slope(_times(above_part, w_out.mT), pre, post)
            if for_w_out:
                _add_product(d_out, post, above_part)
            if for_w_in:
                _add_product(d_in, part, d_pre)
            if for_b_in:
                d_b_in += d_pre.sum(0, dtype=torch.float32)
            if for_x:
                d_part.copy_(_times(d_pre, w_in.mT))
        return (
            d_x.to(ctx.dtype) if for_x else None,
            d_in if for_w_in else None,
            d_b_in if for_b_in else None,
            d_out if for_w_out else None,
            above.sum(0, dtype=torch.float32) if for_b_out else None,
            None,
            None,
            None,
        )


def _relu(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    post = _times(x, w, b, "relu")
    return post, post


def _relu_slope(above: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(above, post, 0, grad_input=above)


def _gelu(approximate: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    def activate(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        pre = _times(x, w, b)
        return pre, functional.gelu(pre, approximate=approximate)

    def slope(above: Tensor, pre: Tensor, post: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(above, pre, approximate=approximate)

    return activate, slope


SLOPES = {"relu": (_relu, _relu_slope), "gelu": _gelu("none"), "gelu_new": _gelu("tanh")}
"""Neurons before and after their nonlinearity, from what they read; and the gradient before, from that after."""


def _times(x: Tensor, w: Tensor, b: Tensor | None = None, after: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w.mT, b, after, [], "")


def _add_product(total: Tensor, rows: Tensor, above: Tensor) -> None:
    """Add the gradient of a matrix that these rows were multiplied with."""
    if total.dtype == rows.dtype:
        total.addmm_(rows.mT, above)
    else:
        total.add_(rows.mT @ above)


def _pieces(rows: Tensor, w_in: Tensor) -> tuple[Tensor, ...]:
    """The rows in parts of one size, so that the neurons of each fit into the cache."""
    n = -(-len(rows) * w_in.shape[1] // CACHED)
    return rows.split(-(-len(rows) // n))


def _to(b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if b is None else b.to(dtype)
