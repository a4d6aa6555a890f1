"""Whether the explained operations are what the answer is computed by: they are kept alone, and they are removed.

An entry of an attention pattern is ablated by zero, or by its mean over the prompts in which neither of its rows is
padding. Kept entries are computed again in the pass, after what was ablated before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.attention_ops import Operation
from circuits.path_merging import PathTrace
from workbench.instrument.passes import run
from workbench.instrument.sites import Site, SiteKind
from workbench.intervals import Estimate, columns_of, share_of
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, generator

Mask = Bool[Tensor, "batch dest src"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablations:
    """Accuracy with some attention entries ablated."""

    full: Estimate
    accuracy: Mapping[tuple[str, str], Estimate]
    """By ablation (`zero`, `mean`) and condition: `kept`, all but the explained operations ablated; `removed`, these
    alone; `removed_random`, as many others into the same rows of the same layers; `nothing_kept`, every entry."""
    chance: float
    """Mean share of the start's children that are right."""
    n: int
    """Prompts."""
    operations: float
    """Explained operations of a prompt, on average."""

    def rows(self) -> list[dict[str, object]]:
        """One row an ablation and condition."""
        found = {("none", "full"): self.full, **self.accuracy}
        return [
            {"ablation": ablation, "condition": condition, **columns_of("accuracy", estimate), "n": self.n}
            for (ablation, condition), estimate in found.items()
        ]


def ablate_operations(model: Transformer, traces: Sequence[PathTrace], *, seed: int) -> Ablations:
    """Keep or remove the operations that the strict merge explained.

    Args:
        model: the traced one.
        traces: of several prompts of one length.
        seed: of the random operations.

    Raises:
        WorkbenchError: no traces, or a pass that did not meet an ablation.
    """
    if not traces:
        raise WorkbenchError("No traced inputs to ablate operations of. Trace at least one.")
    tokens = torch.stack([trace.prompt.padded for trace in traces])
    real = tokens != traces[0].prompt.layout.pad
    both = real[:, :, None] & real[:, None]
    sites = [Site(kind=SiteKind.pattern, layer=layer) for layer in range(model.config.n_steps)]
    clean = run(model, tokens, record=sites)
    explained = {site: torch.zeros_like(both) for site in sites}
    others = {site: torch.zeros_like(both) for site in sites}
    draw = generator(seed, "ablated operations")
    for row, trace in enumerate(traces):
        position = trace.prompt.position
        for operation in trace.strict.operations:
            explained[sites[operation.layer]][row, position[operation.dest], position[operation.src]] = True
        for operation in _beside(trace, draw):
            others[sites[operation.layer]][row, position[operation.dest], position[operation.src]] = True

    conditions = {
        "kept": {site: both & ~explained[site] for site in sites},
        "removed": explained,
        "removed_random": others,
        "nothing_kept": dict.fromkeys(sites, both),
    }
    values = {
        "zero": {site: torch.zeros(both.shape[1:]) for site in sites},
        "mean": {site: _mean(clean[site][:, 0], both) for site in sites},
    }
    return Ablations(
        full=share_of(_right(clean.logits[:, -1], traces)),
        accuracy={
            (ablation, condition): share_of(_right(_ablated_logits(model, tokens, masks, value), traces))
            for ablation, value in values.items()
            for condition, masks in conditions.items()
        },
        chance=sum(_chance(trace) for trace in traces) / len(traces),
        n=len(traces),
        operations=sum(len(trace.strict.operations) for trace in traces) / len(traces),
    )


def _ablated_logits(
    model: Transformer,
    tokens: Tensor,
    masks: Mapping[Site, Mask],
    values: Mapping[Site, Float[Tensor, "dest src"]],
) -> Float[Tensor, "batch vocab"]:
    met: list[Site] = []

    def edit(site: Site, pattern: Tensor) -> Tensor:
        met.append(site)
        return torch.where(masks[site][:, None], values[site], pattern)

    with torch.no_grad():
        logits = model.forward(tokens, {site: partial(edit, site) for site in masks})
    if sorted(met) != sorted(masks):
        raise WorkbenchError(f"The pass met {len(met)} of {len(masks)} ablated patterns, each once.")
    return logits[:, -1]


def _mean(pattern: Float[Tensor, "batch dest src"], both: Mask) -> Float[Tensor, "dest src"]:
    return (pattern * both).sum(0) / both.sum(0).clamp(min=1)


def _right(logits: Float[Tensor, "batch vocab"], traces: Sequence[PathTrace]) -> Bool[Tensor, " batch"]:
    answers = logits.argmax(1).tolist()
    return torch.tensor([answer in trace.prompt.answers for answer, trace in zip(answers, traces, strict=True)])


def _chance(trace: PathTrace) -> float:
    prompt = trace.prompt
    return len(prompt.answers) / len(prompt.graph.children(prompt.start))


def _beside(trace: PathTrace, draw: torch.Generator) -> list[Operation]:
    """For each explained operation another one of its layer and row that copies from elsewhere and is not explained."""
    taken = {(each.layer, each.dest, each.src) for each in trace.strict.operations}
    found = []
    for operation in trace.strict.operations:
        order = torch.randperm(len(trace.prompt), generator=draw).tolist()
        src = next((row for row in order if (operation.layer, operation.dest, row) not in taken), None)
        if src is not None:
            taken.add((operation.layer, operation.dest, src))
            found.append(Operation(layer=operation.layer, dest=operation.dest, src=src, sign=1, strength=0.0))
    return found
