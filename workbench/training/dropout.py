"""Dropout, drawn before the pass: a mask for every site where GPT-2 drops (Radford et al. 2019).

These are the embeddings' sum, the attention patterns, and what attention and MLP add to the residual stream. A mask
holds zeros where an activation is dropped and 1 / (1 - rate) where it is kept, so that its mean is 1. The forward pass
draws nothing: it multiplies by what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.instrument.sites import Edit, Site, SiteKind
from workbench.models.transformer import Transformer

BRANCHES = (SiteKind.pattern, SiteKind.attn_out, SiteKind.mlp_out)

Masks = Mapping[Site, Tensor]
"""What each site's activation is multiplied by."""


def draw_masks(model: Transformer, tokens: Int[Tensor, "batch pos"], rate: float, rng: torch.Generator) -> Masks:
    """A mask for each site at which a pass over these prompts drops."""
    batch, pos = tokens.shape
    config = model.config
    size = {"batch": batch, "pos": pos, "dest": pos, "src": pos, "d_model": config.d_model, "head": config.n_heads}
    first = Site(kind=SiteKind.resid_pre, layer=0)
    masks = {}
    for site in model.sites:
        if site == first or site.kind in BRANCHES:
            kept = torch.empty([size[dim] for dim in site.kind.dims]).bernoulli_(1 - rate, generator=rng)
            masks[site] = kept.div_(1 - rate).to(tokens.device)
    return masks


def as_edits(masks: Masks) -> Mapping[Site, Edit]:
    """The masks as what the hooked forward does at their sites."""
    return {site: mask.mul for site, mask in masks.items()}
