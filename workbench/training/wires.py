"""Cutting edges while a model trains: what a reader takes of a writer, replaced by another value, with gradients.

In a model without LayerNorm every head, MLP and the unembedding reads a sum of what the embedding, the positions and
all earlier heads and MLPs have written. An edge is one term of one such sum. Cutting it adds, to the reader's input
alone, another contribution of the writer minus its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.instrument.sites import Edit, Site, SiteKind
from workbench.models.config import ModelConfig
from workbench.models.known import ABLATIONS
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, nearest
from workbench.tasks.base import check_choice

Contributions = Float[Tensor, "writer batch pos d_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wires:
    """Writers and readers of a model of this shape, in the order in which they are computed."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    edges: Bool[Tensor, "reader writer"]
    """Which reader can read which writer."""

    @classmethod
    def of(cls, config: ModelConfig) -> Wires:
        """The wires of a model."""
        writers, readers, reach = ["embed", "pos"], [], []
        for step in range(config.n_steps):
            heads = [f"a{step}.h{head}" for head in range(config.n_heads)]
            readers += [f"{head}<{part}>" for part in "qkv" for head in heads]
            reach += [len(writers)] * (3 * len(heads))
            writers += heads
            if config.d_mlp:
                readers.append(f"m{step}")
                reach.append(len(writers))
                writers.append(f"m{step}")
        reach.append(len(writers))
        edges = torch.arange(len(writers)) < torch.tensor(reach)[:, None]
        return cls(writers=tuple(writers), readers=(*readers, "logits"), edges=edges)

    def names(self, chosen: Bool[Tensor, "reader writer"]) -> frozenset[str]:
        """Edges by name."""
        found = (chosen & self.edges).nonzero().tolist()
        return frozenset(f"{self.writers[writer]}->{self.readers[reader]}" for reader, writer in found)

    def select(self, names: Collection[str]) -> Bool[Tensor, "reader writer"]:
        """Edges by name, as a mask.

        Raises:
            WorkbenchError: an edge that such a model does not have.
        """
        known = self.names(self.edges)
        if unknown := sorted(set(names) - known):
            raise WorkbenchError(f"This model has no edge {unknown[0]!r}. {nearest(unknown[0], sorted(known))}")
        chosen = torch.zeros_like(self.edges)
        for name in names:
            writer, reader = name.split("->")
            chosen[self.readers.index(reader), self.writers.index(writer)] = True
        return chosen

    def leaving(self, node: str) -> Bool[Tensor, "reader writer"]:
        """All edges that leave a node."""
        return self.edges & torch.tensor([writer == node for writer in self.writers])


def contributions(
    model: Transformer, tokens: Int[Tensor, "batch pos"]
) -> tuple[Contributions, Float[Tensor, "batch pos vocab"]]:
    """What each writer adds to the residual stream, in the order of `Wires.writers`, and the logits."""
    written: list[Tensor] = []
    logits = model.forward(tokens, _writing(model, written.append))
    return torch.stack(written), logits


def filling(ablation: str, clean: Contributions, source: Contributions) -> Contributions:
    """What a cut edge carries instead: the other prompt's contribution, the batch's mean at each position, or zero."""
    check_choice("ablation", ablation, ABLATIONS)
    if ablation == "resample":
        return source
    return clean.mean(1, keepdim=True).expand_as(clean) if ablation == "mean" else torch.zeros_like(clean)


def cut_logits(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"],
    cut: Bool[Tensor, "reader writer"],
    values: Contributions,
) -> Float[Tensor, "batch pos vocab"]:
    """Logits with edges cut, what they carried replaced by `values`. Gradients flow through both."""
    return model.forward(tokens, _Cuts(model, cut, values).edits())


class _Cuts:
    """One pass with cut edges. Sites are met in the order of computation: a writer is noted before it is read."""

    def __init__(self, model: Transformer, cut: Bool[Tensor, "reader writer"], values: Contributions) -> None:
        self.model, self.values = model, values
        self.rows = dict(zip(Wires.of(model.config).readers, cut.to(values.dtype), strict=True))
        self.changes: list[Tensor] = []
        """For each writer so far, the value that replaces it minus what it wrote in this pass."""

    def edits(self) -> dict[Site, Edit]:
        """Edits that note what is written and change what is read."""
        model, edits = self.model, _writing(self.model, self.note)
        for step in range(model.config.n_steps):
            block = model.block(step)
            for kind in (SiteKind.q, SiteKind.k, SiteKind.v):
                weight = getattr(block.attn, f"W_{kind.name.upper()}")
                readers = [f"a{step}.h{head}<{kind.name}>" for head in range(model.config.n_heads)]
                edits[Site(kind=kind, layer=step)] = partial(self.read, readers, weight)
            if block.mlp is not None:
                edits[Site(kind=SiteKind.pre, layer=step)] = partial(self.read_whole, f"m{step}", block.mlp.W_in)
        last = Site(kind=SiteKind.resid_post, layer=model.config.n_steps - 1)
        edits[last] = partial(self.read_whole, "logits", None)
        return edits

    def note(self, written: Float[Tensor, "batch pos d_model"]) -> None:
        """The next writer wrote this."""
        self.changes.append(self.values[len(self.changes)] - written)

    def read(self, readers: list[str], weight: Float[Tensor, "head d_model d_head"], tensor: Tensor) -> Tensor:
        """Queries, keys or values of each head after the cuts."""
        rows = torch.stack([self.rows[reader] for reader in readers])[:, : len(self.changes)]
        if not rows.any():
            return tensor
        change = torch.einsum("hw,wbpd->hbpd", rows, torch.stack(self.changes))
        return tensor + torch.einsum("hbpd,hde->bphe", change, weight)

    def read_whole(self, reader: str, weight: Tensor | None, tensor: Tensor) -> Tensor:
        """An MLP's neurons, or the last residual stream, after the cuts."""
        row = self.rows[reader][: len(self.changes)]
        if not row.any():
            return tensor
        change = torch.einsum("w,wbpd->bpd", row, torch.stack(self.changes))
        return tensor + (change if weight is None else change @ weight)


def _writing(model: Transformer, note: Callable[[Tensor], None]) -> dict[Site, Edit]:
    """Edits that change nothing and tell what each writer writes, in the order of `Wires.writers`."""

    def whole(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor

    def heads(weight: Float[Tensor, "head d_head d_model"], z: Tensor) -> Tensor:
        for head, matrix in enumerate(weight):
            note(z[:, :, head] @ matrix)
        return z

    edits: dict[Site, Edit] = {Site(kind=kind): whole for kind in (SiteKind.embed, SiteKind.pos_embed)}
    for step in range(model.config.n_steps):
        block = model.block(step)
        edits[Site(kind=SiteKind.z, layer=step)] = partial(heads, block.attn.W_O)
        if block.mlp is not None:
            edits[Site(kind=SiteKind.mlp_out, layer=step)] = whole
    return edits
