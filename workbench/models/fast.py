"""The transformer's logits at the positions that are read, with no work that they do not need.

Equal to the hooked forward, value by value and gradient by gradient; nothing can be recorded or patched on the way.
Three exact savings:

- a residual vector is computed once, however often it occurs: before the first step it depends only on (token,
  position), later, in a causal model, only on the prompt up to its position, which prompts that begin alike share;
- what no read depends on is not computed: padding, and in a causal model what follows the last read;
- the last step computes queries, MLP and unembedding at the read positions only.

Several models of one shape go through it as one (`models/stacked.py`): their prompts and rows stand one model after
another, as many for each, and only what multiplies by weights knows where one ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.kernels.dispatch import kernels_for
from workbench.models.config import ModelConfig
from workbench.models.stacked import StackedAttention, StackedBlock, StackedNorm, StackedTransformer
from workbench.models.transformer import EPS, MASKED, Attention, Block, Transformer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Residual vectors that are computed once each, however often they occur in a batch."""

    index: Int[Tensor, "batch pos"]
    """Which row stands where; the first, where none that is needed does."""
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    """One of the places where each row stands."""
    query: Int[Tensor, " query"]
    """The rows that stand where something is read."""
    query_of: Int[Tensor, " reads"]
    """Which of them each read has."""

    @classmethod
    def of(
        cls, code: Int[Tensor, "batch pos"], needed: Bool[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]
    ) -> Rows:
        """A row for each distinct code among the places that are needed, those that are read among them."""
        distinct, row = code[needed].unique(return_inverse=True)
        place = torch.arange(len(row), device=row.device)
        first = torch.zeros_like(distinct).scatter_reduce(0, row, place, "amin", include_self=False)
        example, position = needed.nonzero()[first].unbind(1)
        index = torch.zeros_like(code).masked_scatter(needed, row)
        query, query_of = index[read].unique(return_inverse=True)
        return cls(index=index, example=example, position=position, query=query, query_of=query_of)

    @classmethod
    def joined(cls, parts: Sequence[Rows], first: Sequence[int], reads: int) -> Rows:
        """Those of several models, as many for each by repeating their first.

        Args:
            parts: of each model.
            first: where each model's examples begin among all.
            reads: how many each model has when its own are filled up.
        """
        n_rows = max(len(part.example) for part in parts)
        n_queries = max(len(part.query) for part in parts)
        starts = range(0, len(parts) * n_rows, n_rows)
        return cls(
            index=torch.cat([part.index + start for part, start in zip(parts, starts, strict=True)]),
            example=filled_up([part.example + at for part, at in zip(parts, first, strict=True)], n_rows),
            position=filled_up([part.position for part in parts], n_rows),
            query=filled_up([part.query + start for part, start in zip(parts, starts, strict=True)], n_queries),
            query_of=filled_up([part.query_of + at * n_queries for at, part in enumerate(parts)], reads),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadPlan:
    """What a batch lets the forward pass skip, worked out once for the batch."""

    tokens: Int[Tensor, "batch pos"]
    at_first: Rows
    """Before the first step: a row for each distinct token at each position."""
    later: Rows
    """Before the other steps: a row for each distinct prompt up to each position."""
    example: Int[Tensor, " reads"]
    position: Int[Tensor, " reads"]
    """Where each read logit is, in the order of `read.nonzero()`."""
    models: int = 1
    """How many models the prompts belong to, and the rows in equal parts."""

    @classmethod
    def of(cls, config: ModelConfig, tokens: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]) -> ReadPlan:
        """The plan for these prompts, read at these places by a model of this shape."""
        n = tokens.shape[1]
        position = torch.arange(n, device=tokens.device)
        needed = _needed(config, tokens, read)
        example, at = read.nonzero().unbind(1)
        return cls(
            tokens=tokens,
            at_first=Rows.of(tokens * n + position, needed, read),
            later=Rows.of(_seen(config, tokens) * n + position, needed, read),
            example=example,
            position=at,
        )

    @classmethod
    def whole(
        cls, tokens: Int[Tensor, "batch pos"], example: Int[Tensor, " reads"], position: Int[Tensor, " reads"]
    ) -> ReadPlan:
        """The plan that computes every place, whatever stands there: its sizes depend on its arguments' alone."""
        place = torch.arange(tokens.numel(), device=tokens.device)
        n = tokens.shape[1]
        rows = Rows(
            index=place.view(tokens.shape),
            example=place // n,
            position=place % n,
            query=example * n + position,
            query_of=torch.arange(len(example), device=tokens.device),
        )
        return cls(tokens=tokens, at_first=rows, later=rows, example=example, position=position)

    @classmethod
    def joined(cls, plans: Sequence[ReadPlan]) -> ReadPlan:
        """The plan of several models of one shape, each with a batch of its own.

        Each has as many reads as the one that has most, by repeating its first.
        """
        reads = max(len(plan.example) for plan in plans)
        first = list(accumulate((len(plan.tokens) for plan in plans[:-1]), initial=0))
        return cls(
            tokens=torch.cat([plan.tokens for plan in plans]),
            at_first=Rows.joined([plan.at_first for plan in plans], first, reads),
            later=Rows.joined([plan.later for plan in plans], first, reads),
            example=filled_up([plan.example + at for plan, at in zip(plans, first, strict=True)], reads),
            position=filled_up([plan.position for plan in plans], reads),
            models=len(plans),
        )


def read_logits(model: Transformer | StackedTransformer, plan: ReadPlan) -> Float[Tensor, "reads vocab"]:
    """Logits at the read positions, in the order of `read.nonzero()`."""
    return model.finish(_last_post(model, plan), {})


def read_cross_entropy(
    model: Transformer, plan: ReadPlan, answers: Int[Tensor, " reads"], dtype: torch.dtype
) -> Float[Tensor, " reads"]:
    """Negative log-probability of each answer at its read position, by a softmax in this dtype."""
    x = model.ln_final(_last_post(model, plan), model.final_norm, {})
    return kernels_for(x.device).cross_entropy(x, model.W_U, model.unembed.b_U, answers, dtype)


def read_neurons(
    model: Transformer, plan: ReadPlan
) -> tuple[Float[Tensor, "reads vocab"], Float[Tensor, "reads d_mlp"]]:
    """Logits, and the last step's neurons (its site `post`), at the read positions. The model must have an MLP."""
    (mid, normed), weights = _last_mid(model, plan), model.block(model.config.n_steps - 1)
    assert weights.mlp is not None
    post = weights.mlp.activation(weights.mlp.read(normed))
    return model.finish(mid + weights.mlp.write(post), {}), post


def filled_up(parts: Sequence[Int[Tensor, " _"]], size: int) -> Int[Tensor, " all"]:
    """One after another, each with its first entry repeated at its end until it has that size."""
    return torch.cat([torch.cat([part, part[:1].expand(size - len(part))]) for part in parts])


def _needed(
    config: ModelConfig, tokens: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """Places that some read depends on: not those after the last read if causal, nor padding that is not read."""
    needed = read.flip(1).cummax(1).values.flip(1) if config.causal else read.any(1, keepdim=True).expand_as(read)
    if config.pad_token is not None:
        needed = needed & (tokens != config.pad_token) | read
    # One place in any case: where nothing is needed, some row must be pointed to.
    needed = needed.clone()
    needed[:1, :1] = True
    return needed


def _seen(config: ModelConfig, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """A number for what each position can see: the prompt up to there if causal, else the whole prompt."""
    seen = tokens.clone()
    for position in range(1, tokens.shape[1]):
        both = seen[:, position - 1] * config.d_vocab + tokens[:, position]
        seen[:, position] = both.unique(return_inverse=True)[1]
    return seen if config.causal else seen[:, -1:].expand_as(seen)


def _last_post(model: Transformer | StackedTransformer, plan: ReadPlan) -> Float[Tensor, "reads d_model"]:
    """The residual stream at the reads, after the last step."""
    return _add_mlp(model.block(model.config.n_steps - 1), *_last_mid(model, plan))


def _last_mid(
    model: Transformer | StackedTransformer, plan: ReadPlan
) -> tuple[Float[Tensor, "reads d_model"], Float[Tensor, "reads d_model"]]:
    """The residual stream at the reads, between attention and MLP of the last step, and what the MLP reads of it."""
    rows, allowed = plan.at_first, model.allowed(plan.tokens)
    x = model.embedded(plan.tokens[rows.example, rows.position], rows.position)
    for step in range(model.config.n_steps - 1):
        weights, then = model.block(step), plan.later
        attended = _attend(weights.attn, x if weights.ln1 is None else weights.ln1(x), rows, then, allowed)
        own = x if rows is then else functional.embedding(rows.index[then.example, then.position], x)
        x, rows = _add_mlp(weights, *_add_attention(weights, own, attended)), then
    weights = model.block(model.config.n_steps - 1)
    attended = _attend_at_reads(weights.attn, x if weights.ln1 is None else weights.ln1(x), rows, plan, allowed)
    return _add_attention(weights, functional.embedding(rows.index[plan.example, plan.position], x), attended)


def _attend(
    weights: Attention | StackedAttention, x: Tensor, rows: Rows, then: Rows, allowed: Bool[Tensor, "#batch dest src"]
) -> Float[Tensor, "row d_model"]:
    q, k, v = (_gather(weights.project(x, name), rows.index) for name in ("Q", "K", "V"))
    z = kernels_for(x.device).attention(q, k, v, allowed)
    return weights.merge(z[then.example, then.position])


def _attend_at_reads(
    weights: Attention | StackedAttention,
    x: Tensor,
    rows: Rows,
    plan: ReadPlan,
    allowed: Bool[Tensor, "#batch dest src"],
) -> Float[Tensor, "reads d_model"]:
    """As `_attend`, at the reads alone."""
    k, v = weights.project(x, "K"), weights.project(x, "V")
    mask = allowed.expand(len(plan.tokens), -1, -1)[plan.example, plan.position]
    q, sources = weights.project(x[rows.query], "Q"), rows.index[plan.example]
    own_keys = len(k) // plan.models
    if len(q) * own_keys < sources.numel():
        # Queries that reads share, as that of a last token `=`: each against each key of its model once, then a lookup.
        by_model = (each.unflatten(0, (plan.models, -1)) for each in (q, k))
        table = torch.einsum("muhe,mshe->mush", *by_model).flatten(0, 2)
        scores = functional.embedding(rows.query_of[:, None] * own_keys + sources % own_keys, table)
    else:
        scores = (_gather(q, rows.query_of[:, None]) * _gather(k, sources)).sum(-1)
    scores = (scores / k.shape[-1] ** 0.5).masked_fill(~mask[..., None], MASKED)
    return weights.merge((scores.softmax(1)[..., None] * _gather(v, sources)).sum(1))


def _add_attention(
    weights: Block | StackedBlock, x: Float[Tensor, "*rows d_model"], attended: Float[Tensor, "*rows d_model"]
) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows d_model"]]:
    """The residual stream after attention, and what the MLP reads of it."""
    if weights.ln2 is None:
        mid = x + attended
        return mid, mid
    if isinstance(weights.ln2, StackedNorm):
        mid = x + attended
        return mid, weights.ln2(mid)
    return kernels_for(x.device).add_norm(x, attended, weights.ln2.w, weights.ln2.b, EPS)


def _add_mlp(
    weights: Block | StackedBlock, x: Float[Tensor, "*rows d_model"], normed: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    if weights.mlp is None:
        return x
    return x + weights.mlp(normed)


def _gather(
    rows: Float[Tensor, "row head d_head"], index: Int[Tensor, "*places"]
) -> Float[Tensor, "*places head d_head"]:
    return functional.embedding(index, rows.flatten(-2)).unflatten(-1, rows.shape[-2:])
