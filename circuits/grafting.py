"""Grafts: some of the weights that fine-tuning changed, put back into the base (Panigrahi et al. 2023).

    delta = Delta.between(base, donor, names)       what fine-tuning changed, in the weights that may be grafted
    graft = Graft(delta=delta, mask=…)              which of it is kept
    graft.weights()                                 base + mask · change (section 2, equation 1)

Outside the mask weights are the base's, not zero. Any `nn.Module` will do: weights are mappings of names to tensors,
and what is computed with them goes through `torch.func.functional_call`; no module is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.runtime import WorkbenchError
from workbench.tables import Table

Weights = Mapping[str, Float[Tensor, "..."]]
Mask = Mapping[str, Bool[Tensor, "..."]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Delta:
    """What fine-tuning changed, weight by weight, in the tensors that may be grafted."""

    base: Weights
    change: Weights

    @classmethod
    def between(cls, base: Weights, donor: Weights, names: Iterable[str]) -> Delta:
        """The change from base to donor in the tensors of these names.

        Raises:
            WorkbenchError: a tensor is missing or of another shape, a change is not finite, or nothing changed.
        """
        names = tuple(names)
        for name in names:
            if name not in base or name not in donor:
                where = "base" if name not in base else "donor"
                raise WorkbenchError(f"The {where} has no tensor {name!r}: base and donor must be of one architecture.")
            if base[name].shape != donor[name].shape:
                raise WorkbenchError(
                    f"{name} is {tuple(base[name].shape)} in the base and {tuple(donor[name].shape)} in the donor: "
                    "both must have one shape and one vocabulary."
                )
            if not (donor[name] - base[name]).isfinite().all():
                raise WorkbenchError(
                    f"The change of {name} is not finite: one of the checkpoints holds NaN or infinity."
                )
        change = {name: (donor[name] - base[name]).detach() for name in names}
        if not any(bool(tensor.any()) for tensor in change.values()):
            raise WorkbenchError("Base and donor have the same weights: there is nothing to graft.")
        return cls(base={name: base[name].detach() for name in names}, change=change)

    def __len__(self) -> int:
        """Weights that may be grafted."""
        return sum(tensor.numel() for tensor in self.change.values())

    def weights(self, mask: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Base + scale · mask · change, for a mask of booleans or of shares."""
        return {
            name: torch.where(mask[name], base + scale * self.change[name], base)
            if mask[name].dtype == torch.bool
            else base + scale * mask[name] * self.change[name]
            for name, base in self.base.items()
        }

    def uniform(self, share: float) -> dict[str, Tensor]:
        """The same share of the change everywhere (WiSE-FT, Wortsman et al. 2022)."""
        return {name: base + share * self.change[name] for name, base in self.base.items()}

    def permuted(self, generator: torch.Generator) -> Delta:
        """The control: the same changes, within each tensor at places drawn anew."""
        change = {
            name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
            for name, tensor in self.change.items()
        }
        return Delta(base=self.base, change=change)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Graft:
    """A region of weights that takes the donor's values."""

    delta: Delta
    mask: Mask
    method: str
    scale: float = 1.0
    """By which the region's change is multiplied: 1 gives the donor's values."""

    def __post_init__(self) -> None:
        if {name: tensor.shape for name, tensor in self.mask.items()} != {
            name: tensor.shape for name, tensor in self.delta.change.items()
        }:
            raise WorkbenchError("A mask needs one value for each weight of its delta.")

    def __len__(self) -> int:
        """Weights in the region."""
        return sum(int(tensor.sum()) for tensor in self.mask.values())

    @property
    def density(self) -> float:
        """The region's share of the weights that may be grafted."""
        return len(self) / len(self.delta)

    def weights(self) -> dict[str, Tensor]:
        """The base with the region's weights taken from the donor, or moved towards them by the scale."""
        return self.delta.weights(self.mask, self.scale)

    def removed(self) -> dict[str, Tensor]:
        """The donor with the region's weights taken from the base: whether the region is needed."""
        return self.delta.weights({name: ~tensor for name, tensor in self.mask.items()})

    def without(self, names: Iterable[str]) -> Graft:
        """The graft without what lies in these tensors."""
        left_out = set(names)
        mask = {name: tensor & (name not in left_out) for name, tensor in self.mask.items()}
        return replace(self, mask=mask)

    def where(self) -> Table:
        """In which tensors the region lies, against their sizes."""
        rows = [
            {
                "layer": layer,
                "component": component,
                "weights": int(self.mask[name].sum()),
                "size": self.mask[name].numel(),
                "density": float(self.mask[name].double().mean()),
                "times_even": float(self.mask[name].double().mean()) / max(self.density, 1 / len(self.delta)),
            }
            for name in self.mask
            for layer, component in [place_of(name)]
        ]
        return Table(
            name="graft_places",
            frame=pd.DataFrame(rows),
            kind="heatmap",
            axes={"x": "component", "y": "layer", "value": "times_even"},
            unit="density over the whole graft's density",
            caption=f"Where the {len(self):,} grafted weights lie, against the tensors' sizes: 1 is evenly spread.",
        )


def place_of(name: str) -> tuple[str, str]:
    """Layer and component of a tensor: the first number in its name, and what follows it."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ("-", name) if at is None else (parts[at], ".".join(parts[at + 1 :]))


def union(grafts: Iterable[Graft]) -> dict[str, Tensor]:
    """The base with all regions grafted; where regions meet, the mean of their changes.

    Raises:
        WorkbenchError: the grafts are not of one base.
    """
    grafts = tuple(grafts)
    found = {}
    for name, base in _one_base(grafts).items():
        count = torch.stack([graft.mask[name] for graft in grafts]).sum(0)
        found[name] = base + _changes(grafts, name).sum(0) / count.clamp(min=1)
    return found


def elected(grafts: Iterable[Graft]) -> dict[str, Tensor]:
    """The base with all regions grafted; where regions meet, the mean of the changes that have the sign of their sum.

    With grafts by the method `ties` this is TIES (Yadav et al. 2023, section 4) with a scale of 1.

    Raises:
        WorkbenchError: the grafts are not of one base.
    """
    grafts = tuple(grafts)
    found = {}
    for name, base in _one_base(grafts).items():
        changes = _changes(grafts, name)
        agreeing = changes.sign() == changes.sum(0).sign()
        found[name] = base + (changes * agreeing).sum(0) / (agreeing & (changes != 0)).sum(0).clamp(min=1)
    return found


def overlap(one: Mask, other: Mask) -> tuple[float, float]:
    """Share of the other region that is in this one too, and what chance would give.

    Returns:
        |one ∧ other| / |other| (Panigrahi et al. 2023, figure 8), and its mean over regions that have as many weights
        in each tensor as `one` has.

    Raises:
        WorkbenchError: the other region is empty.
    """
    size = sum(int(tensor.sum()) for tensor in other.values())
    if not size:
        raise WorkbenchError("An empty region overlaps with nothing: graft at least one weight.")
    shared = sum(int((one[name] & tensor).sum()) for name, tensor in other.items())
    chance = sum(float(one[name].double().mean()) * int(tensor.sum()) for name, tensor in other.items())
    return shared / size, chance / size


def _one_base(grafts: Sequence[Graft]) -> Weights:
    base = grafts[0].delta.base
    if any(not _same(graft.delta.base, base) for graft in grafts):
        raise WorkbenchError("Grafts of different bases have no union: find them on one base.")
    return base


def _changes(grafts: Sequence[Graft], name: str) -> Float[Tensor, "graft ..."]:
    """What each graft adds to the base in one tensor."""
    return torch.stack([graft.scale * graft.mask[name] * graft.delta.change[name] for graft in grafts])


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
