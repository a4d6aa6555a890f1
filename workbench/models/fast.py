"""The transformer's logits at the positions that are read, with no work that they do not need.

Equal to the hooked forward, value by value and gradient by gradient; nothing can be recorded or patched on the way. Two
exact savings:

- the last step computes queries, MLP and unembedding at the read positions only;
- before the first step a residual vector depends only on (token, position), so norm, queries, keys and values of the
  first step are computed once for each distinct one and gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.models.transformer import MASKED, Attention, Block, Transformer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadPlan:
    """What a batch lets the forward pass skip, worked out once for the batch."""

    tokens: Int[Tensor, "batch pos"]
    distinct_token: Int[Tensor, " distinct"]
    distinct_position: Int[Tensor, " distinct"]
    index: Int[Tensor, "batch pos"]
    """Which distinct (token, position) stands where."""
    example: Int[Tensor, " reads"]
    position: Int[Tensor, " reads"]
    """Where each read logit is, in the order of `read.nonzero()`."""
    one_read_each: bool
    """Whether read i belongs to example i, so that nothing needs to be gathered by example."""

    @classmethod
    def of(cls, tokens: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]) -> ReadPlan:
        """The plan for these prompts, read at these places."""
        n = tokens.shape[1]
        code = tokens * n + torch.arange(n, device=tokens.device)
        distinct, index = code.unique(return_inverse=True)
        example, position = read.nonzero().unbind(1)
        return cls(
            tokens=tokens,
            distinct_token=distinct // n,
            distinct_position=distinct % n,
            index=index,
            example=example,
            position=position,
            one_read_each=len(example) == len(tokens)
            and bool((example == torch.arange(len(tokens), device=tokens.device)).all()),
        )


def read_logits(model: Transformer, plan: ReadPlan) -> Float[Tensor, "reads vocab"]:
    """Logits at the read positions, in the order of `read.nonzero()`."""
    weights = model.block(model.config.n_steps - 1)
    return model.finish(_add_mlp(weights, _last_mid(model, plan)), {})


def read_neurons(
    model: Transformer, plan: ReadPlan
) -> tuple[Float[Tensor, "reads vocab"], Float[Tensor, "reads d_mlp"]]:
    """Logits, and the last step's neurons (its site `post`), at the read positions. The model must have an MLP."""
    mid, weights = _last_mid(model, plan), model.block(model.config.n_steps - 1)
    assert weights.mlp is not None
    post = weights.mlp.activation(weights.mlp.read(mid if weights.ln2 is None else weights.ln2(mid)))
    return model.finish(mid + weights.mlp.write(post), {}), post


def _last_mid(model: Transformer, plan: ReadPlan) -> Float[Tensor, "reads d_model"]:
    """The residual stream at the reads, between attention and MLP of the last step."""
    # Rows of every distinct (token, position); the first step's projections are computed on these alone.
    rows = functional.embedding(plan.distinct_token, model.embed.W_E)
    x = rows + functional.embedding(plan.distinct_position, model.pos_embed.W_pos)
    index: Tensor | None = plan.index
    allowed = model.allowed(plan.tokens)
    for step in range(model.config.n_steps - 1):
        weights = model.block(step)
        attended = _attend(weights.attn, x if weights.ln1 is None else weights.ln1(x), index, allowed)
        x = _add_mlp(weights, (x if index is None else functional.embedding(index, x)) + attended)
        index = None
    weights = model.block(model.config.n_steps - 1)
    attended = _attend_at_reads(weights.attn, x if weights.ln1 is None else weights.ln1(x), index, plan, allowed)
    if index is None:
        return x[plan.example, plan.position] + attended
    return functional.embedding(index[plan.example, plan.position], x) + attended


def _attend(
    weights: Attention, x: Tensor, index: Int[Tensor, "batch pos"] | None, allowed: Bool[Tensor, "#batch dest src"]
) -> Float[Tensor, "batch pos d_model"]:
    q, k, v = (_gather(weights.project(x, name), index) for name in ("Q", "K", "V"))
    z = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allowed[:, None]
    )
    return weights.merge(z.transpose(1, 2))


def _attend_at_reads(
    weights: Attention,
    x: Tensor,
    index: Int[Tensor, "batch pos"] | None,
    plan: ReadPlan,
    allowed: Bool[Tensor, "#batch dest src"],
) -> Float[Tensor, "reads d_model"]:
    k, v = weights.project(x, "K"), weights.project(x, "V")
    mask = allowed.expand(len(plan.tokens), -1, -1)[plan.example, plan.position]
    if index is None:
        q = weights.project(x[plan.example, plan.position], "Q")
        keys = k if plan.one_read_each else k[plan.example]
        values = v if plan.one_read_each else v[plan.example]
        scores = torch.einsum("rhe,rshe->rsh", q, keys)
    else:
        query, query_of = index[plan.example, plan.position].unique(return_inverse=True)
        sources = index if plan.one_read_each else index[plan.example]
        # Scores of each distinct query against each distinct key, then a lookup: rows share most of them.
        table = torch.einsum("uhe,she->ush", weights.project(x[query], "Q"), k)
        scores = functional.embedding(query_of[:, None] * len(x) + sources, table.flatten(0, 1))
        values = functional.embedding(sources, v.flatten(1)).unflatten(-1, v.shape[1:])
    scores = (scores / k.shape[-1] ** 0.5).masked_fill(~mask[..., None], MASKED)
    pattern = scores.softmax(1)
    return weights.merge((pattern[..., None] * values).sum(1))


def _add_mlp(weights: Block, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    if weights.mlp is None:
        return x
    normed = x if weights.ln2 is None else weights.ln2(x)
    return x + weights.mlp.write(weights.mlp.activation(weights.mlp.read(normed)))


def _gather(rows: Float[Tensor, "*rows head d_head"], index: Int[Tensor, "batch pos"] | None) -> Tensor:
    if index is None:
        return rows
    return functional.embedding(index, rows.flatten(-2)).unflatten(-1, rows.shape[-2:])
