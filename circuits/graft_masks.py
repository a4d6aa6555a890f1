"""Which weights to graft: learned regions, and the choices that they have to beat.

A method is a function of a `Search` and an entry in `METHODS`; it returns a mask of exactly the wanted size, but for
`relaxed`, whose size is what comes out, for whole parts (see graft_parts.py), of which as many are taken as fit, and
for the named sets, which have their own. Ways to merge models are entries too, with their scales in `SCALES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from circuits.graft_parts import PartKind, best_parts, parts_of
from circuits.grafting import Delta, Graft, Mask, Weights, place_of
from workbench.runtime import WorkbenchError, generator, nearest

STEPS = 40
BIAS = 10.0
"""The relaxation's shares are sigmoid(score - 10), which begins near 0 (section 2.1 of the authors' code)."""
ARITHMETIC = 0.4
"""Of task arithmetic where nothing is held out to choose it on (Yadav et al. 2023, section 5)."""
OnProgress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labelled:
    """Labelled inputs of a module, and where its answer is read."""

    module: nn.Module
    batches: Sequence[tuple[Any, Int[Tensor, "..."]]]
    """Inputs and the labels' numbers; batches may differ in size."""
    read: Callable[[Any], Float[Tensor, "... label"]]
    """From what the module returns to the labels' logits."""

    def __len__(self) -> int:
        """Examples."""
        return sum(len(labels) for _, labels in self.batches)

    @property
    def answers(self) -> Int[Tensor, " example"]:
        """The right label of each example."""
        return torch.cat([labels for _, labels in self.batches]).cpu()

    @torch.no_grad()
    def logits(self, weights: Weights) -> Float[Tensor, "example label"]:
        """The labels' logits with these weights, the module's own where none are given."""
        return torch.cat([self._read(weights, inputs) for inputs, _ in self.batches]).cpu()

    def accuracy(self, weights: Weights) -> float:
        """Share that is answered rightly with these weights."""
        return float((self.logits(weights).argmax(1) == self.answers).double().mean())

    def gradient(self, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        """Mean cross-entropy over all examples with these weights, and its gradient."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        loss = 0.0
        for inputs, labels in self.batches:
            part = functional.cross_entropy(self._read(leaves, inputs), labels, reduction="sum") / len(self)
            part.backward()
            loss += float(part.detach())
        return loss, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    def _read(self, weights: Weights, inputs: Any) -> Float[Tensor, "... label"]:
        return self.read(functional_call(self.module, dict(weights), (inputs,)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Search:
    """What a method chooses weights by."""

    delta: Delta
    examples: Labelled
    size: int
    """Weights wanted."""
    steps: int
    """Of the methods that learn."""
    generator: torch.Generator
    on_progress: OnProgress

    @property
    def density(self) -> float:
        """The share that is wanted."""
        return self.size / len(self.delta)

    def gains(self, mask: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The graft's loss, and to first order how much each weight's switch from base to donor lowers it."""
        loss, gradient = self.examples.gradient(self.delta.weights(mask))
        return loss, {name: -gradient[name] * change for name, change in self.delta.change.items()}

    def first_gains(self) -> dict[str, Tensor]:
        """How much each weight's switch would lower the base's loss, to first order, each alone."""
        return self.gains({name: torch.zeros_like(tensor) for name, tensor in self.delta.change.items()})[1]


def find_graft(
    delta: Delta,
    examples: Labelled,
    *,
    method: str = "learned",
    density: float = 0.01,
    seed: int = 0,
    steps: int = STEPS,
    on_progress: OnProgress = lambda share: None,
) -> Graft:
    """A graft of this density, by one of `METHODS`.

    Raises:
        WorkbenchError: the method is unknown, the density leaves no weight or is above 1, or there are no steps.
    """
    if method not in METHODS:
        raise WorkbenchError(f"Unknown method {method!r}. {nearest(method, METHODS)}")
    if not 0 < density <= 1:
        raise WorkbenchError(f"density must be above 0 and at most 1, got {density}.")
    if steps < 1:
        raise WorkbenchError(f"steps must be at least 1, got {steps}.")
    search = Search(
        delta=delta,
        examples=examples,
        size=max(1, round(density * len(delta))),
        steps=steps,
        generator=generator(seed, "graft"),
        on_progress=on_progress,
    )
    scale = SCALES[method](search.density) if method in SCALES else 1.0
    return Graft(delta=delta, mask=METHODS[method](search), method=method, scale=scale)


def learned(search: Search) -> dict[str, Tensor]:
    """Exactly `size` weights whose graft has the least loss, by iterated thresholding.

    Each step measures, at the graft of the step before, what switching every weight on would gain to first order, adds
    that to the weight's score, and keeps the largest scores: what overshoots or comes twice loses its place again. Of
    all grafts on the way the one with the least loss on the examples is kept.
    """
    scores = {name: torch.zeros_like(tensor) for name, tensor in search.delta.change.items()}
    mask = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in search.delta.change.items()}
    best, least = mask, math.inf
    for step in range(search.steps + 1):
        loss, gain = search.gains(mask)
        if step and loss < least:
            best, least = mask, loss
        for name, tensor in gain.items():
            scores[name] += tensor
        mask = largest(scores, search.size)
        search.on_progress((step + 1) / (search.steps + 1))
    return best


def relaxed(search: Search) -> dict[str, Tensor]:
    """The published relaxation (section 2.1, equation 4) from an empty base; its size is near `size`, not exact.

    Shares sigmoid(score - 10) follow the gradient; those above a half are grafted. The published rate of 1e7 fits one
    way of fine-tuning; here it is set so that a weight with the `size`-th largest first gain would just reach a half
    in all steps. All scores begin at 0, where the authors draw them.
    """
    scores = {name: torch.zeros_like(tensor) for name, tensor in search.delta.change.items()}
    rate = 0.0
    for step in range(search.steps):
        share = {name: (score - BIAS).sigmoid() for name, score in scores.items()}
        _, gain = search.gains(share)
        if step == 0:
            cut = float(_flat(gain).topk(search.size).values[-1])
            if cut <= 0:
                raise WorkbenchError(
                    f"Fewer than {search.size:,} weights would lower the loss: ask for a lower density."
                )
            rate = (1 - math.exp(-BIAS)) / (math.exp(-BIAS) * search.steps * cut)
        for name, tensor in gain.items():
            # A share is 1 there; a score without an end would never come back.
            scores[name] = (scores[name] + rate * tensor * share[name] * (1 - share[name])).clamp(max=2 * BIAS)
        search.on_progress((step + 1) / search.steps)
    mask = {name: score > BIAS for name, score in scores.items()}
    if not any(bool(tensor.any()) for tensor in mask.values()):
        raise WorkbenchError("The relaxation ended with an empty region. Use the method learned, or a higher density.")
    return mask


def magnitude(search: Search) -> dict[str, Tensor]:
    """The weights that changed most."""
    return largest({name: tensor.abs() for name, tensor in search.delta.change.items()}, search.size)


def saliency(search: Search) -> dict[str, Tensor]:
    """The weights whose switch would lower the base's loss most, to first order, each alone."""
    return largest(search.first_gains(), search.size)


def at_random(search: Search) -> dict[str, Tensor]:
    """Any weights."""
    return largest(
        {name: _drawn_like(tensor, search.generator) for name, tensor in search.delta.change.items()}, search.size
    )


def biases(search: Search) -> dict[str, Tensor]:
    """All biases, those of LayerNorms too (BitFit, Ben Zaken et al. 2022), whatever the size."""
    return _named(search.delta, lambda name: name.rpartition(".")[2].startswith("b"))


def layer_norms(search: Search) -> dict[str, Tensor]:
    """All scales and shifts of LayerNorms, whatever the size."""
    return _named(search.delta, lambda name: "ln" in name.lower() or "layernorm" in name.lower())


def ties(search: Search) -> dict[str, Tensor]:
    """Of each tensor the same share, those that changed most (TIES, Yadav et al. 2023; one donor's signs all agree)."""
    return {
        name: largest({name: tensor.abs()}, round(search.density * tensor.numel()))[name]
        for name, tensor in search.delta.change.items()
    }


def everything(search: Search) -> dict[str, Tensor]:
    """All weights, whatever the size: task arithmetic (Ilharco et al. 2023), whose scale is below 1."""
    return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in search.delta.change.items()}


def one_layer(search: Search) -> dict[str, Tensor]:
    """The first gains' largest, all in one layer: the one where they promise most."""
    gains = search.first_gains()
    layers = dict.fromkeys(place_of(name)[0] for name in gains)
    inside = [{name: gain for name, gain in gains.items() if place_of(name)[0] == layer} for layer in layers]
    masks = [largest(layer, search.size) for layer in inside]
    best = max(masks, key=lambda mask: sum(float(gains[name][chosen].sum()) for name, chosen in mask.items()))
    return {name: torch.zeros_like(gain, dtype=torch.bool) for name, gain in gains.items()} | best


def whole_parts(search: Search, kind: PartKind) -> dict[str, Tensor]:
    """Whole heads, neurons or layers, those of the largest mean first gain, as many as fit but at least one."""
    parts = parts_of(search.delta.change, kind, search.examples.module)
    return best_parts(parts, search.first_gains(), search.size)


METHODS: dict[str, Callable[[Search], dict[str, Tensor]]] = {
    "learned": learned,
    "relaxed": relaxed,
    "magnitude": magnitude,
    "saliency": saliency,
    "random": at_random,
    "biases": biases,
    "layer_norms": layer_norms,
    "one_layer": one_layer,
    "heads": partial(whole_parts, kind="heads"),
    "neurons": partial(whole_parts, kind="neurons"),
    "layers": partial(whole_parts, kind="layers"),
    "ties": ties,
    "dare": at_random,
    "task_arithmetic": everything,
}
SCALES: dict[str, Callable[[float], float]] = {
    "dare": lambda density: 1 / density,
    "task_arithmetic": lambda density: ARITHMETIC,
}
"""By which a method multiplies its region's change, given the density; DARE keeps the mean change (Yu et al. 2024)."""


def matched(mask: Mask, first: Mask, generator: torch.Generator) -> dict[str, Tensor]:
    """The control: as many weights in each tensor, drawn anew, those of `first` before the others."""
    return {
        name: largest({name: first[name] + _drawn_like(tensor, generator)}, int(tensor.sum()))[name]
        for name, tensor in mask.items()
    }


def largest(scores: Mapping[str, Float[Tensor, "..."]], size: int) -> dict[str, Tensor]:
    """A mask of the `size` largest scores over all tensors; of equal ones the first."""
    flat = _flat(scores)
    # Not a sort: of a hundred million scores a hundredth is wanted.
    cut = flat.topk(size, sorted=False).values.min() if size else math.inf
    kept = flat > cut
    kept[(flat == cut).nonzero()[: size - int(kept.sum()), 0]] = True
    parts = kept.split([tensor.numel() for tensor in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _named(delta: Delta, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    mask = {name: torch.full_like(tensor, chosen(name), dtype=torch.bool) for name, tensor in delta.change.items()}
    if not any(bool(tensor.any()) for tensor in mask.values()):
        raise WorkbenchError("The model has no such weights. Choose another method.")
    return mask


def _flat(tensors: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, " weight"]:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _drawn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers of a tensor's shape and on its device, drawn by a generator of the processor."""
    return torch.rand(tensor.shape, generator=generator).to(tensor.device)
