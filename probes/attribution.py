"""Direct logit attribution, and the matrices that attention heads are made of.

The logits are linear in the final residual stream once its norm's scale is held at its value, and the stream is a sum:
embedding, position, what each head and each MLP (each neuron) wrote, and biases. So the difference of two logits splits
exactly into what each part contributes *directly*; what a part does through later layers is not seen here (Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits"; the same paper names the QK and OV circuits).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind
from workbench.instrument.trace import Trace
from workbench.intervals import paired_bootstrap
from workbench.metrics import mean_over_reads
from workbench.models.transformer import Block, Transformer
from workbench.runtime import WorkbenchError
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch, check_choice

Granularity = Literal["component", "head", "neuron"]
Against = Literal["distractor", "mean"]
SHOWN = 30
"""Largest contributions that the table shows; neurons are many."""
METRIC = {"distractor": "answer logit minus distractor logit", "mean": "answer logit minus mean logit"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Attribution:
    """What each part of a model adds directly to the answer's lead."""

    parts: tuple[str, ...]
    """Sites as `str(Site)`; biases as their parameter: `L0.b_O`, `L0.b_out`, `ln_final.b`, `b_U`."""
    values: Float[Tensor, "batch part"]
    """Contribution for each example, averaged over its read positions; a row sums to the example's metric."""
    metric: str
    provenance: Provenance

    @property
    def effect(self) -> Float[Tensor, " part"]:
        """Mean contribution over the examples."""
        return self.values.mean(0)

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.values)

    def summary(self) -> dict[str, object]:
        """Flat cells, one for each part, and what they sum to."""
        low, high = paired_bootstrap(self.values)
        columns = zip(self.parts, self.effect.tolist(), low.tolist(), high.tolist(), strict=True)
        return {
            "cells": [{"part": part, "effect": effect, "low": a, "high": b} for part, effect, a, b in columns],
            "total": float(self.effect.sum()),
            "metric": self.metric,
            "n": self.n,
        }

    def tables(self) -> Sequence[Table]:
        """The largest contributions, largest first."""
        summary = self.summary()
        frame = pd.DataFrame(summary["cells"]).sort_values("effect", key=abs, ascending=False)
        shown = min(SHOWN, len(frame))
        return [
            Table(
                name="direct_logit_attribution",
                frame=frame.head(shown).reset_index(drop=True),
                kind="bar",
                axes={"x": "part", "y": "effect", "low": "low", "high": "high"},
                unit="logits",
                caption=f"Direct contribution to the {self.metric} (mean {summary['total']:.3f}); the {shown} largest "
                f"of {len(frame)} parts, n = {self.n}, 95 % bootstrap interval.",
            )
        ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CircuitMatrix:
    """A head's QK or OV circuit between all tokens."""

    circuit: Literal["qk", "ov"]
    site: Site
    """The head, as its `z`."""
    matrix: Float[Tensor, "row column"]
    """QK: score of destination token (row) for source token (column). OV: what attending to a token (row) adds to the
    logit of a token (column)."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    provenance: Provenance

    def summary(self) -> dict[str, object]:
        """Shape and size of the matrix."""
        rows, columns = self.matrix.shape
        return {
            "circuit": self.circuit,
            "site": str(self.site),
            "rows": rows,
            "columns": columns,
            "norm": float(self.matrix.norm()),
        }

    def tables(self) -> Sequence[Table]:
        """The matrix as a heat map."""
        row, column = ("destination", "source") if self.circuit == "qk" else ("attended", "predicted")
        unit = "attention score" if self.circuit == "qk" else "logits"
        frame = pd.DataFrame(
            {
                row: [label for label in self.rows for _ in self.columns],
                column: list(self.columns) * len(self.rows),
                "value": self.matrix.flatten().tolist(),
            }
        )
        return [
            Table(
                name=f"{self.circuit}_{self.site.layer}_{self.site.head}",
                frame=frame,
                kind="heatmap",
                axes={"x": column, "y": row, "value": "value"},
                unit=unit,
                caption=f"{self.circuit.upper()} circuit of layer {self.site.layer}, head {self.site.head}, from token "
                "embeddings; positions, biases, norms and other layers are left out.",
            )
        ]


def direct_logit_attribution(
    model: Instrumented, batch: Batch, *, by: Granularity = "component", against: Against = "distractor"
) -> Attribution:
    """Each part's direct contribution to the answer's lead at the positions that are read.

    Args:
        model: one of our own, whose weights can be read.
        batch: prompts with answers, and distractors if they are compared with.
        by: `component` takes attention and MLP of a layer whole; `head` splits attention into heads; `neuron` splits
            the MLP into neurons as well.
        against: what the answer's logit is compared with: the distractor's, or the mean over all tokens.

    Raises:
        WorkbenchError: the weights cannot be read, or the batch has no distractors.
    """
    check_choice("granularity", by, get_args(Granularity))
    check_choice("comparison", against, get_args(Against))
    model = _own(model)
    trace = run(model, batch.tokens, record=_recorded(model, by))
    example, position = batch.read.nonzero().unbind(1)
    reads = (example, position)
    with torch.no_grad():
        direction, offset = _direction(model, batch, against)
        if model.final_norm is None:
            folded, constants = direction, []
        else:
            # With the scale held, the norm is linear: centring goes over to the direction.
            folded = direction * model.final_norm.w
            folded = (folded - folded.mean(1, keepdim=True)) / trace["ln_final_scale"][reads]
            constants = [("ln_final.b", direction @ model.final_norm.b)]
        if offset is not None:
            constants.append(("b_U", offset))
        names, values = zip(*_contributions(model, trace, reads, folded, by), *constants, strict=True)
    return Attribution(
        parts=tuple(names),
        values=torch.stack([mean_over_reads(value, batch.read) for value in values], 1),
        metric=METRIC[against],
        provenance=trace.provenance,
    )


def qk_matrix(model: Instrumented, layer: int, head: int, *, labels: Sequence[str] | None = None) -> CircuitMatrix:
    """Attention score of every token for every token: W_E W_Q W_K^T W_E^T / sqrt(d_head)."""
    model = _own(model)
    site, weights = _head(model, layer, head)
    embedding, attention = model.embed.W_E.detach(), weights.attn
    queries, keys = (embedding @ matrix[head].detach() for matrix in (attention.W_Q, attention.W_K))
    return _matrix(model, "qk", site, queries @ keys.T / queries.shape[1] ** 0.5, labels)


def ov_matrix(model: Instrumented, layer: int, head: int, *, labels: Sequence[str] | None = None) -> CircuitMatrix:
    """What attending to each token adds to the logits: W_E W_V W_O W_U."""
    model = _own(model)
    site, weights = _head(model, layer, head)
    written = model.embed.W_E @ weights.attn.W_V[head] @ weights.attn.W_O[head]
    return _matrix(model, "ov", site, (written @ model.W_U).detach(), labels)


def _own(model: Instrumented) -> Transformer:
    if not isinstance(model, Transformer):
        raise WorkbenchError(
            f"This reads weights, which {type(model).__name__} does not offer. Import the model as one of the "
            "workbench's own."
        )
    return model


def _recorded(model: Transformer, by: Granularity) -> list[Site]:
    wanted = {"embed", "pos_embed", "ln_final_scale"}
    wanted |= {"attn_out"} if by == "component" else {"z"}
    wanted |= {"post"} if by == "neuron" else {"mlp_out"}
    return [site for site in model.sites if site.kind.name in wanted]


def _direction(
    model: Transformer, batch: Batch, against: Against
) -> tuple[Float[Tensor, "reads d_model"], Float[Tensor, " reads"] | None]:
    """The unembedding's direction of the answer's lead at each read, and what the unembedding's bias adds to it."""
    answer, bias = batch.targets[batch.read], model.unembed.b_U
    if against == "mean":
        direction = model.W_U.T[answer] - model.W_U.mean(1)
        return direction, None if bias is None else bias[answer] - bias.mean()
    distractor = batch.pairs()[1][batch.read]
    direction = model.W_U.T[answer] - model.W_U.T[distractor]
    return direction, None if bias is None else bias[answer] - bias[distractor]


def _contributions(
    model: Transformer,
    trace: Trace,
    reads: tuple[Tensor, Tensor],
    direction: Float[Tensor, "reads d_model"],
    by: Granularity,
) -> Iterator[tuple[str, Float[Tensor, " reads"]]]:
    """Each part of the final residual stream along the direction, in the order of depth."""
    for site, activation in trace.activations.items():
        at_reads, name = activation[reads], site.kind.name
        if name == "ln_final_scale":
            continue
        if site.layer is None or name in ("attn_out", "mlp_out"):
            yield str(site), (at_reads * direction).sum(-1)
            continue
        parts = _head_parts if name == "z" else _neuron_parts
        yield from parts(model.block(site.layer), site.layer, at_reads, direction)


def _head_parts(
    block: Block, layer: int, z: Float[Tensor, "reads head d_head"], direction: Float[Tensor, "reads d_model"]
) -> Iterator[tuple[str, Float[Tensor, " reads"]]]:
    along = torch.einsum("rhe,hed,rd->hr", z, block.attn.W_O, direction)
    for head, values in enumerate(along):
        yield str(Site(kind=SiteKind.z, layer=layer, head=head)), values
    if block.attn.b_O is not None:
        yield f"L{layer}.b_O", direction @ block.attn.b_O


def _neuron_parts(
    block: Block, layer: int, post: Float[Tensor, "reads d_mlp"], direction: Float[Tensor, "reads d_model"]
) -> Iterator[tuple[str, Float[Tensor, " reads"]]]:
    assert block.mlp is not None
    along = post * (direction @ block.mlp.W_out.T)
    for neuron, values in enumerate(along.unbind(1)):
        yield str(Site(kind=SiteKind.post, layer=layer, neuron=neuron)), values
    if block.mlp.b_out is not None:
        yield f"L{layer}.b_out", direction @ block.mlp.b_out


def _head(model: Transformer, layer: int, head: int) -> tuple[Site, Block]:
    if not (0 <= layer < model.config.n_steps and 0 <= head < model.config.n_heads):
        raise WorkbenchError(
            f"No head {head} in layer {layer}: layers go from 0 to {model.config.n_steps - 1}, heads from 0 to "
            f"{model.config.n_heads - 1}."
        )
    return Site(kind=SiteKind.z, layer=layer, head=head), model.block(layer)


def _matrix(
    model: Transformer,
    circuit: Literal["qk", "ov"],
    site: Site,
    matrix: Float[Tensor, "row column"],
    labels: Sequence[str] | None,
) -> CircuitMatrix:
    names = tuple(map(str, range(len(matrix)))) if labels is None else tuple(labels)
    if len(names) != len(matrix):
        raise WorkbenchError(f"{len(names)} labels for a vocabulary of {len(matrix)} tokens. Give one for each.")
    columns = names[: matrix.shape[1]]
    return CircuitMatrix(
        circuit=circuit, site=site, matrix=matrix, rows=names, columns=columns, provenance=model.provenance
    )
