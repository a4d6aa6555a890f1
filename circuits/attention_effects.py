"""What every single entry of every attention pattern does to the answer of one prompt.

An entry is edited in two ways, as Saparov et al. (2025, appendix) do: set to zero, and set to the largest entry of its
column, the row not normalised again. Patterns of earlier layers stay as they are, those of later layers are computed
again. What counts is a measure of the last row of the final residual stream, and how the last row's scores for every
row change in the last layer, where it reads the answer off.

An edit changes one row of the layer it is made in, and one row of queries, keys and values of the next; the last layer
matters at the last row alone; padding is read by no other row. So the effects are those of one forward pass an edit,
computed for all edits of a layer at once and only where they can differ. The largest entry of a column is taken over
rows that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.search_prompts import SearchPrompt
from workbench.instrument.sites import Slot
from workbench.models.transformer import MASKED, Transformer
from workbench.runtime import WorkbenchError

Measure = Callable[[Float[Tensor, "edit d_model"]], Float[Tensor, " edit"]]
"""A number of the last row of the residual stream after the last layer."""
NO_OP = 1e-6
"""An edit by less than this is none."""
CHUNK = 2**18
"""Numbers of one residual stream that are held at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CleanPass:
    """One prompt's pass through a model with one head a layer, all that edits start from, by layer as executed."""

    model: Transformer
    prompt: SearchPrompt
    allowed: Bool[Tensor, "row row"]
    resid: tuple[Float[Tensor, "row d_model"], ...]
    """Before each layer, and after the last."""
    q: tuple[Float[Tensor, "row d_head"], ...]
    k: tuple[Float[Tensor, "row d_head"], ...]
    v: tuple[Float[Tensor, "row d_head"], ...]
    pattern: tuple[Float[Tensor, "row row"], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Transformer, prompt: SearchPrompt) -> CleanPass:
        """Run the prompt.

        Raises:
            WorkbenchError: several heads a layer, or a prompt that the model cannot read.
        """
        config = model.config
        if config.n_heads != 1:
            raise WorkbenchError(
                f"Path merging is traced in models with one head a layer; this one has {config.n_heads}. Train one "
                "with n_heads=1."
            )
        length, largest = len(prompt.padded), int(prompt.padded.max())
        if length > config.n_ctx or largest >= config.d_vocab:
            raise WorkbenchError(
                f"The prompt has {length} positions and tokens up to {largest}; the model reads {config.n_ctx} "
                f"positions and {config.d_vocab} tokens. Draw prompts of the model's own task."
            )
        rows = prompt.position
        allowed = model.allowed(prompt.padded[None])[0][rows][:, rows]
        embedded, placed = model.write_inputs(prompt.padded[None])
        resid, pattern = [(embedded + placed)[0, rows]], []
        read: dict[Slot, list[Tensor]] = {"q": [], "k": [], "v": []}
        for step in range(config.n_steps):
            for slot, found in read.items():
                found.append(read_slot(model, step, slot, resid[-1]))
            q, k, v = (found[-1] for found in read.values())
            pattern.append(attend(q, k, allowed))
            resid.append(write(model, step, resid[-1], pattern[-1] @ v))
        return cls(
            model=model,
            prompt=prompt,
            allowed=allowed,
            resid=tuple(resid),
            pattern=tuple(pattern),
            **{slot: tuple(found) for slot, found in read.items()},
        )

    @property
    def last(self) -> int:
        """The last layer."""
        return len(self.pattern) - 1

    @property
    def logits(self) -> Float[Tensor, " vocab"]:
        """Where the answer is read."""
        return self.model.finish(self.resid[-1][-1], {}).detach()

    @property
    def read_scores(self) -> Float[Tensor, " row"]:
        """The last row's scores for every row in the last layer."""
        return score(self.q[-1][-1:], self.k[-1])[0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Effects:
    """What both edits of every entry of one layer do; `mode` 0 is zero, 1 the largest of the column."""

    measure: Float[Tensor, "mode dest src"]
    """Of the answer."""
    key_score: Float[Tensor, "mode dest src row"]
    """The last row's score in the last layer for each row, if only that row's key is changed by the edit."""
    query_score: Float[Tensor, "mode dest src row"]
    """The same, if only the last row's query is."""


@torch.no_grad()
def edit_effects(clean: CleanPass, step: int, measure: Measure) -> Effects:
    """Both edits of every entry of a layer."""
    pattern = clean.pattern[step]
    change = torch.stack([-pattern, pattern.amax(0) - pattern])
    live = (change.abs() > NO_OP) & clean.allowed
    if step == clean.last:
        live[:, :-1] = False
    dest, src = live.nonzero()[:, 1:].unbind(1)
    n_rows, width = clean.resid[0].shape
    size = max(1, CHUNK // (n_rows * width))
    chunks = zip(dest.split(size), src.split(size), change[live].split(size), strict=True)
    parts = [_outcome(clean, step, *chunk, measure=measure) for chunk in chunks]
    unedited = (measure(clean.resid[-1][-1:])[0], clean.read_scores, clean.read_scores)
    found = []
    for kind, start in enumerate(unedited):
        whole = start.expand(*live.shape, *start.shape).clone()
        whole[live] = torch.cat([part[kind] for part in parts])
        found.append(whole)
    return Effects(measure=found[0], key_score=found[1], query_score=found[2])


def _outcome(
    clean: CleanPass,
    step: int,
    dest: Int[Tensor, " edit"],
    src: Int[Tensor, " edit"],
    change: Float[Tensor, " edit"],
    *,
    measure: Measure,
) -> tuple[Float[Tensor, " edit"], Float[Tensor, "edit row"], Float[Tensor, "edit row"]]:
    """Measure and scores of the last row after edits of one layer, each by itself."""
    model, last, each = clean.model, clean.last, torch.arange(len(dest))
    z = (clean.pattern[step] @ clean.v[step])[dest] + change[:, None] * clean.v[step][src]
    changed = write(model, step, clean.resid[step][dest], z)
    if step == last:
        scores = clean.read_scores.expand(len(dest), -1)
        return measure(changed), scores, scores
    x = _put(clean.resid[step + 1], each, dest, changed)
    for later in range(step + 1, last + 1):
        if later == step + 1:
            # Only one row came in changed.
            q, k, v = (
                _put(slot_of[later], each, dest, read_slot(model, later, slot, changed))
                for slot, slot_of in zip(("q", "k", "v"), (clean.q, clean.k, clean.v), strict=True)
            )
        else:
            k, v = (read_slot(model, later, slot, x) for slot in ("k", "v"))
            q = read_slot(model, later, "q", x[:, -1:] if later == last else x)
        if later == last:
            q, x = q[:, -1:], x[:, -1:]
        z = attend(q, k, clean.allowed[-q.shape[1] :]) @ v
        x = write(model, later, x, z)
    key_score = score(clean.q[last][-1:].expand(len(dest), -1, -1), k)[:, 0]
    query_score = score(q, clean.k[last].expand_as(k))[:, 0]
    return measure(x[:, 0]), key_score, query_score


def read_slot(
    model: Transformer, step: int, slot: Slot, x: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_head"]:
    """Queries, keys or values of a layer's only head."""
    return model.read_heads(step, slot, slice(0, 1), x[..., None, :])[..., 0, :]


def score(
    q: Float[Tensor, "*batch dest d_head"], k: Float[Tensor, "*batch src d_head"]
) -> Float[Tensor, "*batch dest src"]:
    """Attention scores before the mask."""
    return q @ k.mT / q.shape[-1] ** 0.5


def attend(
    q: Float[Tensor, "*batch dest d_head"], k: Float[Tensor, "*batch src d_head"], allowed: Bool[Tensor, "dest src"]
) -> Float[Tensor, "*batch dest src"]:
    """The attention pattern."""
    return score(q, k).masked_fill(~allowed, MASKED).softmax(-1)


def write(
    model: Transformer, step: int, x: Float[Tensor, "*rows d_model"], z: Float[Tensor, "*rows d_head"]
) -> Float[Tensor, "*rows d_model"]:
    """The residual stream after a layer, of rows that attend to this."""
    x = x + model.sum_heads(step, z[..., None, :]) + model.constant(step, "attn")
    return x + model.write_neurons(step, None, x) if model.config.d_mlp else x


def _put(
    rows: Float[Tensor, "row d"], each: Int[Tensor, " edit"], dest: Int[Tensor, " edit"], value: Float[Tensor, "edit d"]
) -> Float[Tensor, "edit row d"]:
    """The same rows for each edit, with the one that it changes."""
    copies = rows.expand(len(each), *rows.shape).clone()
    copies[each, dest] = value
    return copies
