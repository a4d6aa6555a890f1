"""Every fused operation in plain torch: the specification that the kernels are held to, and the path without a GPU."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def add_norm(
    x: Float[Tensor, "*rows d_model"],
    added: Float[Tensor, "*rows d_model"],
    w: Float[Tensor, " d_model"],
    b: Float[Tensor, " d_model"],
    eps: float,
) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows d_model"]]:
    """The residual stream with something added, and its LayerNorm (Ba et al. 2016)."""
    total = x + added
    return total, functional.layer_norm(total, w.shape, w, b, eps)


def attention(
    q: Float[Tensor, "batch dest head d_head"],
    k: Float[Tensor, "batch src head d_head"],
    v: Float[Tensor, "batch src head d_head"],
    allowed: Bool[Tensor, "#batch dest src"],
) -> Float[Tensor, "batch dest head d_head"]:
    """Softmax attention over the allowed sources; every destination must have one (Vaswani et al. 2017, eq. 1)."""
    heads_first = (each.transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(*heads_first, attn_mask=allowed[:, None]).transpose(1, 2)
