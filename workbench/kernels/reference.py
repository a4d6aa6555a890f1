"""Every fused operation in plain torch: the specification that the kernels are held to, and the path without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw as torch_adamw

ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    # The tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016).
    "gelu_new": partial(functional.gelu, approximate="tanh"),
}


def affine(
    x: Float[Tensor, "*rows n_in"], w: Float[Tensor, "n_in n_out"], b: Float[Tensor, " n_out"] | None
) -> Float[Tensor, "*rows n_out"]:
    """Rows times a matrix, plus a bias."""
    return x @ w if b is None else x @ w + b


def mlp(
    x: Float[Tensor, "*rows d_model"],
    w_in: Float[Tensor, "d_model d_mlp"],
    b_in: Float[Tensor, " d_mlp"] | None,
    w_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"] | None,
    activation: str,
) -> Float[Tensor, "*rows d_model"]:
    """An affine map, the activation of that name, and another affine map."""
    return affine(ACTIVATIONS[activation](affine(x, w_in, b_in)), w_out, b_out)


def add_norm(
    x: Float[Tensor, "*member row d_model"],
    added: Float[Tensor, "*member row d_model"],
    w: Float[Tensor, "*member d_model"],
    b: Float[Tensor, "*member d_model"],
    eps: float,
) -> tuple[Float[Tensor, "*member row d_model"], Float[Tensor, "*member row d_model"]]:
    """The residual stream with something added, and its LayerNorm (Ba et al. 2016)."""
    total = x + added
    if w.ndim == 1:
        return total, functional.layer_norm(total, w.shape, w, b, eps)
    return total, functional.layer_norm(total, w.shape[-1:], eps=eps) * w[..., None, :] + b[..., None, :]


def attention(
    q: Float[Tensor, "batch dest head d_head"],
    k: Float[Tensor, "batch src head d_head"],
    v: Float[Tensor, "batch src head d_head"],
    allowed: Bool[Tensor, "#batch dest src"],
) -> Float[Tensor, "batch dest head d_head"]:
    """Softmax attention over the allowed sources; every destination must have one (Vaswani et al. 2017, eq. 1).

    On a processor never in bfloat16, for there PyTorch's attention was measured to take twice the time of float32.
    """
    operands = (
        (q, k, v) if q.is_cuda else (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (q, k, v))
    )
    heads_first = (each.transpose(1, 2) for each in operands)
    with torch.autocast("cpu", enabled=False):
        return functional.scaled_dot_product_attention(*heads_first, attn_mask=allowed[:, None]).transpose(1, 2)


def cross_entropy(
    x: Float[Tensor, "*member row d_model"],
    w: Float[Tensor, "*member d_model vocab"],
    b: Float[Tensor, "*member vocab"] | None,
    answer: Int[Tensor, "*member row"],
    dtype: torch.dtype,
) -> Float[Tensor, "*member row"]:
    """Negative log-probability of each row's answer, from logits in x's dtype by a softmax in this one."""
    return answer_losses(x @ w if b is None else x @ w + b[..., None, :], answer, dtype)


def answer_losses(
    logits: Float[Tensor, "*member row vocab"], answer: Int[Tensor, "*member row"], dtype: torch.dtype
) -> Float[Tensor, "*member row"]:
    """Negative log-probability of each row's answer, by a softmax in this dtype."""
    losses = functional.cross_entropy(logits.to(dtype).flatten(0, -2), answer.flatten(), reduction="none")
    return losses.view(answer.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """Parameters that AdamW updates at one rate, with what it remembers of each."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    """Running means of gradients and of their squares."""
    steps: Sequence[Tensor]
    """Updates so far, a number each, on the device."""
    slow: Sequence[Tensor]
    """Grokfast's running means of the gradients; none without it."""
    rate: float | Float[Tensor, ""]
    """A tensor where it is not known before the update runs: in float32, on the device."""
    decay: float


def filtered(group: Group, grokfast: tuple[float, float] | None) -> list[Tensor]:
    """The gradients after Grokfast's filter (Lee et al. 2024): a running mean of a decay is added, some times over."""
    if grokfast is None:
        return list(group.gradients)
    decay, factor = grokfast
    pairs = zip(group.gradients, group.slow, strict=True)
    return [gradient + factor * slow.lerp_(gradient, 1 - decay) for gradient, slow in pairs]


def adamw(
    groups: Sequence[Group], betas: tuple[float, float], eps: float, grokfast: tuple[float, float] | None
) -> None:
    """One update of the parameters and of what is remembered (Loshchilov & Hutter 2019), in place."""
    for group in groups:
        torch_adamw(
            list(group.weights), filtered(group, grokfast), list(group.means), list(group.squares), [],
            list(group.steps), fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=group.rate,
            weight_decay=group.decay, eps=eps, maximize=False,
        )  # fmt: skip
