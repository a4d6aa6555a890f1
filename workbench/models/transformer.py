"""The transformer: pre-LN or no LN, attention with or without MLP, run along a depth schedule.

Two kinds of module. The *weights* (`embed`, `weights.{block}`, `unembed`, …) compute and carry parameters under
TransformerLens' names. The *places* (`blocks.{step}.hook_resid_pre`, …) are parameter-free identities that every
activation flows through. Places belong to the steps of the depth schedule: where a block runs twice, its weights are
saved once and its two passes have places of their own.

This forward is the specification: plain torch, every activation in the open. `models/fast.py` computes the same logits
with less work where nothing is looked at.

Shapes: batch, pos (dest and src in attention), head, d_model, d_head, d_mlp, vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workbench.instrument.sites import Edit, Site, Slot, model_sites
from workbench.kernels.dispatch import kernels_for
from workbench.kernels.reference import ACTIVATIONS
from workbench.models.config import ModelConfig
from workbench.runtime import code_version
from workbench.store import Provenance

MASKED = -1e5
GPT2_STD = 0.02
EPS = 1e-5


class Place(nn.Module):
    """A named identity: what flows through it can be read or replaced."""

    def forward(self, activation: Tensor) -> Tensor:
        """The activation, unchanged."""
        return activation


Edits = Mapping[nn.Module, Edit]
"""Edits by the place that they act on."""


def visit(place: nn.Module, activation: Tensor, edits: Edits) -> Tensor:
    """Send an activation through its place, and through the edit that was asked for there."""
    activation = place(activation)
    edit = edits.get(place)
    return activation if edit is None else edit(activation)


class LayerNorm(nn.Module):
    """Scale and shift of a LayerNorm (Ba et al. 2016)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Normalised, scaled and shifted."""
        return functional.layer_norm(x, self.w.shape, self.w, self.b, EPS)


class Attention(nn.Module):
    """Weights of an attention layer, one matrix a head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(heads, d_model, d_head)) for _ in range(3))
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        bias = "attn" in config.biases
        self.b_Q, self.b_K, self.b_V = (_bias(bias, heads, d_head) for _ in range(3))
        self.b_O = _bias(bias, d_model)

    def project(
        self, x: Float[Tensor, "*rows d_model"], name: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "*rows head d_head"]:
        """Queries, keys or values of each head."""
        weight, bias = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
        heads, d_model, d_head = weight.shape
        matrix = weight.transpose(0, 1).reshape(d_model, heads * d_head)
        return _affine(x, matrix, None if bias is None else bias.flatten()).unflatten(-1, (heads, d_head))

    def merge(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """The heads' outputs, added up in the residual stream's basis."""
        return _affine(z.flatten(-2), self.W_O.flatten(0, 1), self.b_O)


class MLP(nn.Module):
    """Weights of an MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = "mlp" in config.biases
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_in = _bias(bias, config.d_mlp)
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_out = _bias(bias, config.d_model)
        self.activation_name, self.activation = config.activation, ACTIVATIONS[config.activation]

    def read(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_mlp"]:
        """Neurons before their nonlinearity."""
        return _affine(x, self.W_in, self.b_in)

    def write(self, post: Float[Tensor, "*rows d_mlp"]) -> Float[Tensor, "*rows d_model"]:
        """What active neurons add to the residual stream."""
        return _affine(post, self.W_out, self.b_out)

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What it adds to the residual stream, without its neurons being seen."""
        kernels = kernels_for(x.device)
        return kernels.mlp(x, self.W_in, self.b_in, self.W_out, self.b_out, self.activation_name)


class Block(nn.Module):
    """Weights of one block, without places."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.d_model) if config.normalization else None
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.d_model) if config.normalization and config.d_mlp else None
        self.mlp = MLP(config) if config.d_mlp else None

    @property
    def matrices(self) -> tuple[nn.Parameter, ...]:
        """The parameters that multiply."""
        attn, mlp = self.attn, self.mlp
        return (attn.W_Q, attn.W_K, attn.W_V, attn.W_O, *(() if mlp is None else (mlp.W_in, mlp.W_out)))

    @property
    def biases(self) -> tuple[nn.Parameter, ...]:
        """The biases of attention and MLP, where there are any."""
        attn, mlp = self.attn, self.mlp
        biases = (attn.b_Q, attn.b_K, attn.b_V, attn.b_O, *(() if mlp is None else (mlp.b_in, mlp.b_out)))
        return tuple(bias for bias in biases if bias is not None)

    @property
    def writers(self) -> tuple[nn.Parameter, ...]:
        """The matrices that write to the residual stream."""
        return (self.attn.W_O, *(() if self.mlp is None else (self.mlp.W_out,)))


class NormPlaces(nn.Module):
    """Places of a LayerNorm, computed in the open so that the scale can be read and frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_scale = Place()
        self.hook_normalized = Place()

    def forward(self, x: Tensor, norm: LayerNorm | None, edits: Edits) -> Tensor:
        """The normalised residual stream; without a LayerNorm, the stream itself."""
        if norm is None:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scale = visit(self.hook_scale, (centred.square().mean(-1, keepdim=True) + EPS).sqrt(), edits)
        return visit(self.hook_normalized, centred / scale * norm.w + norm.b, edits)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Past:
    """Keys and values of earlier positions, where a pass goes on from a cached one."""

    k: Float[Tensor, "batch past head d_head"]
    v: Float[Tensor, "batch past head d_head"]


class AttentionPlaces(nn.Module):
    """Places of softmax attention: the pattern does not depend on v, and z = pattern @ v."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_q, self.hook_k, self.hook_v = Place(), Place(), Place()
        self.hook_attn_scores, self.hook_pattern, self.hook_z = Place(), Place(), Place()

    def forward(
        self, x: Tensor, weights: Attention, allowed: Bool[Tensor, "#batch dest src"], edits: Edits, past: Past | None
    ) -> Tensor:
        """What attention adds to the residual stream."""
        q = visit(self.hook_q, weights.project(x, "Q"), edits)
        k = visit(self.hook_k, weights.project(x, "K"), edits)
        v = visit(self.hook_v, weights.project(x, "V"), edits)
        if past is not None:
            k, v = torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)
        scores = torch.einsum("bdhe,bshe->bhds", q, k) / q.shape[-1] ** 0.5
        scores = visit(self.hook_attn_scores, scores.masked_fill(~allowed[:, None], MASKED), edits)
        pattern = visit(self.hook_pattern, scores.softmax(-1), edits)
        z = visit(self.hook_z, torch.einsum("bhds,bshe->bdhe", pattern, v), edits)
        return weights.merge(z)


class MLPPlaces(nn.Module):
    """Places of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_pre, self.hook_post = Place(), Place()

    def forward(self, x: Tensor, weights: MLP, edits: Edits) -> Tensor:
        """What the MLP adds to the residual stream."""
        pre = visit(self.hook_pre, weights.read(x), edits)
        return weights.write(visit(self.hook_post, weights.activation(pre), edits))


class Step(nn.Module):
    """One step of the depth schedule: the places of a block's pass. The block's weights come as an argument."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = Place(), Place(), Place()
        self.ln1, self.attn, self.hook_attn_out = NormPlaces(), AttentionPlaces(), Place()
        if config.d_mlp:
            self.ln2, self.mlp, self.hook_mlp_out = NormPlaces(), MLPPlaces(), Place()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        weights: Block,
        allowed: Bool[Tensor, "#batch dest src"],
        edits: Edits,
        past: Past | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block."""
        x = visit(self.hook_resid_pre, x, edits)
        attended = self.attn(self.ln1(x, weights.ln1, edits), weights.attn, allowed, edits, past)
        x = visit(self.hook_resid_mid, x + visit(self.hook_attn_out, attended, edits), edits)
        if weights.mlp is not None:
            written = self.mlp(self.ln2(x, weights.ln2, edits), weights.mlp, edits)
            x = x + visit(self.hook_mlp_out, written, edits)
        return visit(self.hook_resid_post, x, edits)


class Embed(nn.Module):
    """Token embedding."""

    W_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.embedding == "one_hot":
            self.register_buffer("W_E", torch.eye(config.d_vocab, config.d_model))
        else:
            self.W_E = nn.Parameter(torch.empty(config.d_vocab, config.d_model))


class PosEmbed(nn.Module):
    """Absolute positions."""

    W_pos: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.embedding == "one_hot":
            before = torch.zeros(config.n_ctx, config.d_model - config.n_ctx)
            self.register_buffer("W_pos", torch.cat([before, torch.eye(config.n_ctx)], 1))
        else:
            self.W_pos = nn.Parameter(torch.empty(config.n_ctx, config.d_model))


class Unembed(nn.Module):
    """From the residual stream to logits; without a matrix of its own when tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.W_U = None if config.tied else nn.Parameter(torch.empty(config.d_model, config.d_vocab_out))
        self.b_U = _bias("unembed" in config.biases, config.d_vocab_out)


class Transformer(nn.Module):
    """A transformer with a named place at every site. Implements `Instrumented`."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None) -> None:
        """Matrices drawn as the config says, biases zero.

        Without a generator they are drawn from torch's own: for models that are loaded over at once.
        """
        super().__init__()
        self.config = config
        self.sites = model_sites(config, normalized=config.normalization is not None, mlp=bool(config.d_mlp))
        self.provenance = Provenance(code_version=code_version())
        self.embed, self.pos_embed = Embed(config), PosEmbed(config)
        self.hook_embed, self.hook_pos_embed = Place(), Place()
        self.weights = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.blocks = nn.ModuleList(Step(config) for _ in config.steps)
        self.ln_final = NormPlaces()
        self.final_norm = LayerNorm(config.d_model) if config.normalization else None
        self.unembed = Unembed(config)
        self._draw_weights(generator)

    def _draw_weights(self, generator: torch.Generator | None) -> None:
        init, bound = self.config.init, self.config.d_model**-0.5
        blocks = [cast(Block, block) for block in self.weights]
        if init == "uniform":
            biases = [bias for block in blocks for bias in block.biases]
            for parameter in (*self.matrices, *biases):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            return
        for matrix in self.matrices:
            nn.init.normal_(matrix, std=GPT2_STD if init == "gpt2" else bound, generator=generator)
        if init == "gpt2":
            # As many branches write to the residual stream as there are layers of attention and MLP.
            with torch.no_grad():
                for writer in (writer for block in blocks for writer in block.writers):
                    writer.div_((2 * self.config.n_layers) ** 0.5)

    @property
    def matrices(self) -> tuple[nn.Parameter, ...]:
        """The parameters that multiply, learned embeddings among them; the others are biases and LayerNorms' scales."""
        return (
            *self.embed.parameters(),
            *self.pos_embed.parameters(),
            *self.block_matrices,
            *(() if self.unembed.W_U is None else (self.unembed.W_U,)),
        )

    @property
    def block_matrices(self) -> tuple[nn.Parameter, ...]:
        """Those of `matrices` inside the blocks."""
        return tuple(matrix for block in self.weights for matrix in cast(Block, block).matrices)

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding matrix, tied or not."""
        return self.embed.W_E.T if self.unembed.W_U is None else self.unembed.W_U

    def block(self, step: int) -> Block:
        """Weights of the block that runs at a step."""
        return cast(Block, self.weights[self.config.steps[step]])

    def with_schedule(self, schedule: tuple[int, ...]) -> Transformer:
        """The same weights run along another schedule, with places for each of its steps.

        A model that was trained with shared blocks can go round more often than it was trained to. Nothing is copied:
        both models hold the same parameters.
        """
        # On the meta device nothing is drawn or allocated: what the new model has of its own are places.
        with torch.device("meta"):
            model = Transformer(replace(self.config, schedule=schedule), generator=None)
        for owner in ("embed", "pos_embed", "weights", "final_norm", "unembed"):
            setattr(model, owner, getattr(self, owner))
        model.provenance = self.provenance
        return model.train(self.training)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position."""
        edits = edits or {}
        x = self.start(tokens, edits)
        for step in range(self.config.n_steps):
            x = self.advance(step, x, tokens, edits)
        return self.finish(x, edits)

    def start(self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the first step."""
        active = self._by_place(edits, None)
        embedded = visit(self.hook_embed, self.embed.W_E[tokens], active)
        positions = self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embedded)
        return embedded + visit(self.hook_pos_embed, positions, active)

    def advance(
        self,
        step: int,
        x: Float[Tensor, "batch pos d_model"],
        tokens: Int[Tensor, "batch full"],
        edits: Mapping[Site, Edit],
        past: Past | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One step. With `past`, `x` holds only the last positions and attention reads the earlier ones from there."""
        allowed = self.allowed(tokens)[:, tokens.shape[1] - x.shape[1] :]
        return self.blocks[step](x, self.block(step), allowed, self._by_place(edits, step), past)

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the rows given."""
        return _affine(self.ln_final(x, self.final_norm, self._by_place(edits, None)), self.W_U, self.unembed.b_U)

    def embedded(self, tokens: Int[Tensor, " row"], position: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """The residual stream before the first step, row by row."""
        return functional.embedding(tokens, self.embed.W_E) + functional.embedding(position, self.pos_embed.W_pos)

    def write_inputs(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
        """What token and position embeddings write to the residual stream."""
        embedded = self.embed.W_E[tokens]
        return embedded, self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embedded)

    def read_heads(
        self, step: int, slot: Slot, heads: slice, x: Float[Tensor, "*rows #head d_model"]
    ) -> Float[Tensor, "*rows head d_head"]:
        """Queries, keys or values of some heads, each from an input of its own, or all from one."""
        block = self.block(step)
        x = x if block.ln1 is None else block.ln1(x)
        weight, bias = getattr(block.attn, f"W_{slot.upper()}"), getattr(block.attn, f"b_{slot.upper()}")
        weight = weight[heads]
        if x.shape[-2] == 1:
            # One input for all heads is one product; as a sum over each it takes several times as long.
            read = (x[..., 0, :] @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (len(weight), -1))
        else:
            read = _each_head(x, weight)
        return read if bias is None else read + bias[heads]

    def pull_heads(
        self,
        step: int,
        slot: Slot,
        x: Float[Tensor, "point *rows d_model"],
        gradient: Float[Tensor, "point *rows head d_head"],
    ) -> Float[Tensor, "*rows head d_model"]:
        """Gradient at what each head reads, from that at its queries, keys or values: the mean over points.

        All heads read the same stream `x`. With a LayerNorm of scale s and output n * w + b, a gradient g at the latter
        pulls back to (gw - mean(gw) - n mean(gw n)) / s; all of it but the last term is the same matrix at every point,
        so that the points are added up before it, in the few dimensions of a head.
        """
        block = self.block(step)
        weight = getattr(block.attn, f"W_{slot.upper()}")
        heads, d_model, d_head = weight.shape
        if block.ln1 is None:
            return _each_head(gradient.mean(0), weight.mT)
        weight = weight * block.ln1.w[:, None]
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        normalized, scaled = centred / scale, gradient / scale[..., None]
        direct = _each_head(scaled.mean(0), weight.mT)
        read = (normalized @ weight.transpose(0, 1).reshape(d_model, heads * d_head)).unflatten(-1, (heads, d_head))
        along = (scaled * read).sum(-1) / (d_model * len(x))
        return direct - direct.mean(-1, keepdim=True) - along.movedim(0, -1) @ normalized.movedim(0, -2)

    def patterns(
        self,
        step: int,
        heads: slice,
        scores: Float[Tensor, "*rows head dest src"],
        allowed: Bool[Tensor, "*#rows #head dest src"],
        dest: Int[Tensor, " dest"],
    ) -> Float[Tensor, "*rows head dest src"]:
        """Softmax of the scores, the same at every step, for every head and position."""
        return scores.masked_fill(~allowed, MASKED).softmax(-1)

    def write_heads(
        self, step: int, heads: slice, z: Float[Tensor, "*rows head d_head"]
    ) -> Float[Tensor, "*rows head d_model"]:
        """What each of some heads writes; the bias of their sum belongs to none of them."""
        return _each_head(z, self.block(step).attn.W_O[heads])

    def sum_heads(self, step: int, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """What all heads write together, without the bias of their sum."""
        return z.flatten(-2) @ self.block(step).attn.W_O.flatten(0, 1)

    def write_neurons(
        self, step: int, neurons: Int[Tensor, " neuron"] | None, x: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """What an MLP writes, or some of its neurons; the output bias belongs to the whole MLP alone."""
        block = self.block(step)
        assert block.mlp is not None
        x = x if block.ln2 is None else block.ln2(x)
        if neurons is None:
            return block.mlp(x)
        pre = x @ block.mlp.W_in[:, neurons]
        pre = pre if block.mlp.b_in is None else pre + block.mlp.b_in[neurons]
        return block.mlp.activation(pre) @ block.mlp.W_out[neurons]

    def constant(self, step: int, part: Literal["attn", "mlp"]) -> Float[Tensor, " d_model"]:
        """The output bias of a step's attention or MLP: zeros where it has none."""
        owner = getattr(self.block(step), part)
        bias = owner.b_O if part == "attn" else owner.b_out
        return self.embed.W_E.new_zeros(self.config.d_model) if bias is None else bias

    def allowed(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "#batch dest src"]:
        """Which position may attend to which."""
        return allowed(self.config, tokens)

    def _by_place(self, edits: Mapping[Site, Edit], layer: int | None) -> Edits:
        return {self.get_submodule(site.place): edit for site, edit in edits.items() if site.layer == layer}


def allowed(config: ModelConfig, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "#batch dest src"]:
    """Which position may attend to which: not to later ones if causal, to padding only from itself."""
    n = tokens.shape[1]
    found = torch.ones(1, n, n, dtype=torch.bool, device=tokens.device)
    if config.causal:
        found = found.tril()
    if config.pad_token is not None:
        itself = torch.eye(n, dtype=torch.bool, device=tokens.device)
        found = found & ((tokens != config.pad_token)[:, None] | itself)
    return found


def _each_head(x: Float[Tensor, "*rows head d_in"], weight: Float[Tensor, "head d_in d_out"]) -> Tensor:
    """Each head's rows through its own matrix, the heads as a batch of products."""
    return (x.movedim(-2, 0).flatten(1, -2) @ weight).movedim(0, 1).unflatten(0, x.shape[:-2])


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return kernels_for(x.device).affine(x, matrix, bias)


def _bias(present: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(shape)) if present else None
