"""Several transformers of one shape as one: their weights stacked, their rows one model after another.

What the fast path asks of a model's weights, by the same names. Every product is one of a batch, a member's rows with
its own matrix; each member has as many rows as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.kernels.reference import ACTIVATIONS
from workbench.models.config import ModelConfig
from workbench.models.transformer import EPS, allowed

Weights = Mapping[str, Float[Tensor, "member ..."]]
"""By the names that they have in a transformer's state."""


class StackedNorm:
    """The LayerNorms of several models."""

    def __init__(self, weights: Weights) -> None:
        self.w, self.b = weights["w"], weights["b"]

    def __call__(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Normalised, scaled and shifted."""
        normalised = functional.layer_norm(x, x.shape[-1:], eps=EPS)
        return torch.addcmul(self.b[:, None], _by_member(normalised, self.w), self.w[:, None]).flatten(0, 1)


class StackedAttention:
    """The attention layers of several models."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def project(self, x: Float[Tensor, "rows d_model"], name: Literal["Q", "K", "V"]) -> Float[Tensor, "rows head d"]:
        """Queries, keys or values of each head."""
        weight, bias = self.weights[f"W_{name}"], self.weights.get(f"b_{name}")
        projected = _affine(x, weight.transpose(1, 2).flatten(2), None if bias is None else bias.flatten(1))
        return projected.unflatten(-1, (weight.shape[1], weight.shape[3]))

    def merge(self, z: Float[Tensor, "rows head d"]) -> Float[Tensor, "rows d_model"]:
        """The heads' outputs, added up in the residual stream's basis."""
        return _affine(z.flatten(1), self.weights["W_O"].flatten(1, 2), self.weights.get("b_O"))


class StackedMLP:
    """The MLPs of several models."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.weights = weights
        self.activation = ACTIVATIONS[config.activation]

    def read(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_mlp"]:
        """Neurons before their nonlinearity."""
        return _affine(x, self.weights["W_in"], self.weights.get("b_in"))

    def write(self, post: Float[Tensor, "rows d_mlp"]) -> Float[Tensor, "rows d_model"]:
        """What active neurons add to the residual stream."""
        return _affine(post, self.weights["W_out"], self.weights.get("b_out"))

    def __call__(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """What they add to the residual stream."""
        return self.write(self.activation(self.read(x)))


class StackedBlock:
    """One block of several models."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.ln1 = _norm(weights, "ln1.")
        self.attn = StackedAttention(_under(weights, "attn."))
        self.ln2 = _norm(weights, "ln2.")
        self.mlp = StackedMLP(_under(weights, "mlp."), config) if config.d_mlp else None


class StackedTransformer:
    """Several transformers of one shape, whose logits `fast.read_logits` computes as if they were one."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.final_norm = _norm(weights, "final_norm.")
        self.blocks = [StackedBlock(_under(weights, f"weights.{at}."), config) for at in range(config.n_layers)]

    def block(self, step: int) -> StackedBlock:
        """Weights of the block that runs at a step."""
        return self.blocks[self.config.steps[step]]

    def embedded(self, tokens: Int[Tensor, " row"], position: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """The residual stream before the first step, row by row."""
        return _looked_up(tokens, self.weights["embed.W_E"]) + _looked_up(position, self.weights["pos_embed.W_pos"])

    def allowed(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "#batch dest src"]:
        """Which position may attend to which."""
        return allowed(self.config, tokens)

    def finish(self, x: Float[Tensor, "rows d_model"], edits: Mapping[object, object]) -> Float[Tensor, "rows vocab"]:
        """Logits of the rows given; nothing can be edited on the way."""
        assert not edits
        normed = x if self.final_norm is None else self.final_norm(x)
        matrix = self.weights["embed.W_E"].mT if self.config.tied else self.weights["unembed.W_U"]
        return _affine(normed, matrix, self.weights.get("unembed.b_U"))


def _affine(x: Float[Tensor, "rows n_in"], matrix: Float[Tensor, "member n_in n_out"], bias: Tensor | None) -> Tensor:
    rows = _by_member(x, matrix)
    product = torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias[:, None], rows, matrix)
    return product.flatten(0, 1)


def _looked_up(index: Int[Tensor, " row"], table: Float[Tensor, "member entry d"]) -> Float[Tensor, "row d"]:
    first = torch.arange(len(table), device=index.device)[:, None] * table.shape[1]
    return functional.embedding((_by_member(index, table) + first).flatten(), table.flatten(0, 1))


def _by_member(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.unflatten(0, (len(weights), -1))


def _norm(weights: Weights, prefix: str) -> StackedNorm | None:
    own = _under(weights, prefix)
    return StackedNorm(own) if own else None


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
