"""The one function that runs a model while it is looked into or changed.

`run` turns patches and recordings into one edit per site, hands them to the model's `forward`, and checks afterwards
that every patch was met by the pass: an intervention that touched nothing is an error, never a silent no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.instrument.sites import Edit, Instrumented, Site, check_site
from workbench.instrument.trace import Patch, Trace
from workbench.runtime import WorkbenchError


def run(
    model: Instrumented,
    tokens: Int[Tensor, "batch pos"],
    *,
    record: Iterable[Site | str] = (),
    patches: Sequence[Patch] = (),
    gradient_of: Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, ""]] | None = None,
) -> Trace:
    """One forward pass that records sites and applies patches.

    Args:
        model: any instrumented model.
        tokens: prompts, all of one length.
        record: sites to keep, as they are after the patches; a head or neuron keeps its whole site.
        patches: applied in order at each site.
        gradient_of: a scalar of the logits; its gradient at every recorded site is kept too.

    Raises:
        WorkbenchError: tokens outside the vocabulary, a site that the model lacks, a patch that did not fire.
    """
    check_tokens(tokens, model)
    recorded = {(Site.parse(site) if isinstance(site, str) else site).whole for site in record}
    for site in [*recorded, *(patch.site for patch in patches)]:
        check_site(site, model)
    fired = Fired(patches)
    edits = patch_edits(patches, batch=len(tokens), fired=fired)
    kept: dict[Site, Tensor] = {}
    for site in recorded:
        edits[site] = partial(_keep, kept, site, edits.get(site), gradient_of is not None)
    with torch.set_grad_enabled(gradient_of is not None):
        logits = model.forward(tokens, edits)
    fired.confirm()
    missing = recorded - set(kept)
    if missing:
        raise WorkbenchError(
            f"The pass never reached {', '.join(map(str, sorted(missing)))}: nothing was recorded there."
        )
    gradients = {} if gradient_of is None else _gradients(gradient_of(logits), kept)
    return Trace(
        tokens=tokens,
        logits=logits.detach(),
        activations={site: kept[site].detach() for site in sorted(kept)},
        gradients=gradients,
        provenance=model.provenance,
    )


class Fired:
    """Counts what each patch of a pass wrote."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        """Expect these patches."""
        self._written = {id(patch): 0 for patch in patches}
        self._patches = patches

    def note(self, patch: Patch, elements: int) -> None:
        """`patch` wrote that many numbers."""
        self._written[id(patch)] += elements

    def confirm(self) -> None:
        """Raise a WorkbenchError if a patch wrote nothing."""
        silent = [str(patch.site) for patch in self._patches if self._written[id(patch)] == 0]
        if silent:
            raise WorkbenchError(
                f"{len(silent)} of {len(self._patches)} patches did not fire: {', '.join(sorted(set(silent)))}. "
                "The pass never computed those sites, so its result would be that of an unpatched run."
            )


def patch_edits(
    patches: Sequence[Patch], *, batch: int, fired: Fired, offsets: Mapping[str, int] | None = None
) -> dict[Site, Edit]:
    """One edit for each patched site, which applies its patches in order.

    Args:
        patches: what to replace.
        batch: rows of the pass.
        fired: told of every write.
        offsets: where a dimension of a partial pass begins (`pos`, `dest`), if it does not begin at 0.
    """
    by_site: dict[Site, list[Patch]] = {}
    for patch in patches:
        by_site.setdefault(patch.site.whole, []).append(patch)
    return {site: partial(_apply, group, batch, fired, offsets or {}) for site, group in by_site.items()}


def check_tokens(tokens: Int[Tensor, "batch pos"], model: Instrumented) -> None:
    """Raise a WorkbenchError unless the model can read these prompts."""
    if tokens.ndim != 2 or tokens.shape[1] > model.config.n_ctx or 0 in tokens.shape:
        raise WorkbenchError(
            f"Prompts must be [batch, pos] with 1 to {model.config.n_ctx} positions, got shape {tuple(tokens.shape)}."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.d_vocab:
        wrong = low if low < 0 else high
        raise WorkbenchError(
            f"Token {wrong} is outside the vocabulary: tokens go from 0 to {model.config.d_vocab - 1}."
        )


def _apply(patches: Sequence[Patch], batch: int, fired: Fired, offsets: Mapping[str, int], tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    for patch in patches:
        for place in patch.places(batch):
            block = place.narrow(changed, offsets)
            value = patch.source.value(place)
            if isinstance(value, Tensor):
                value = value.to(block).expand(len(place.rows), *block.shape[1:])
            block[place.rows.to(block.device)] = value
            fired.note(patch, len(place.rows) * block[0].numel())
    return changed


def _keep(kept: dict[Site, Tensor], site: Site, edit: Edit | None, differentiable: bool, tensor: Tensor) -> Tensor:
    tensor = tensor if edit is None else edit(tensor)
    if differentiable and not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    kept[site] = tensor
    return tensor


def _gradients(scalar: Float[Tensor, ""], kept: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    sites = sorted(kept)
    found = torch.autograd.grad(scalar, [kept[site] for site in sites], allow_unused=True)
    return {
        site: torch.zeros_like(kept[site]) if gradient is None else gradient
        for site, gradient in zip(sites, found, strict=True)
    }
