"""What a pass recorded, and what a pass shall replace.

A Trace holds whole activations by site. A Patch names a place, the rows and positions of it, and a source to take the
replacement from: another trace, zero, a mean (which says over what), or a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.instrument.sites import Site
from workbench.runtime import WorkbenchError
from workbench.store import Provenance


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """What one pass recorded."""

    tokens: Int[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos vocab"]
    activations: Mapping[Site, Tensor]
    """Whole site -> activation, shaped as the site's kind says."""
    gradients: Mapping[Site, Tensor] = field(default_factory=dict)
    """Whole site -> derivative of the scalar that was asked for; empty unless one was."""
    provenance: Provenance

    def __getitem__(self, site: Site | str) -> Tensor:
        """The activation at a site; a head or neuron is sliced out and its dimension dropped.

        Raises:
            WorkbenchError: the pass did not record that site.
        """
        return _slice(self.activations, site, "record")

    def gradient(self, site: Site | str) -> Tensor:
        """The gradient at a site, sliced like the activation."""
        return _slice(self.gradients, site, "record, with gradient_of")


def _slice(tensors: Mapping[Site, Tensor], site: Site | str, argument: str) -> Tensor:
    site = Site.parse(site) if isinstance(site, str) else site
    if site.whole not in tensors:
        held = ", ".join(map(str, tensors)) or "nothing"
        raise WorkbenchError(f"This trace did not record {site}; it holds {held}. Name it in `{argument}=` of run().")
    tensor = tensors[site.whole]
    if site.head is not None:
        tensor = tensor.select(site.axis("head"), site.head)
    if site.neuron is not None:
        tensor = tensor.select(site.axis("d_mlp"), site.neuron)
    return tensor


@runtime_checkable
class Source(Protocol):
    """Where a patch takes its values from."""

    def value(self, place: Place) -> Tensor | float:
        """What to write, broadcastable to `[rows, …]` of the place."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """One block of a site's tensor that a patch writes: the rows, and one index for each dimension that is fixed."""

    site: Site
    rows: Int[Tensor, " rows"]
    fixed: Mapping[str, int]
    """Dimension name -> index, in the coordinates of a full pass."""

    def narrow(self, tensor: Tensor, offsets: Mapping[str, int]) -> Tensor:
        """The view of the block, all rows of it; `offsets` says where a dimension of a partial pass begins."""
        for dim, index in self.fixed.items():
            axis, first = self.site.axis(dim), offsets.get(dim, 0)
            if not first <= index < first + tensor.shape[axis]:
                raise WorkbenchError(
                    f"Patch at {self.site}: {dim} {index} is outside {first} to {first + tensor.shape[axis] - 1}."
                )
            tensor = tensor.narrow(axis, index - first, 1)
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class FromTrace:
    """The same site, position and row of another pass; `rows` maps patched rows to rows of the trace."""

    trace: Trace
    rows: Int[Tensor, " rows"] | None = None

    def value(self, place: Place) -> Tensor:
        """Activations of the other pass, `[rows, …]`."""
        tensor = place.narrow(self.trace[place.site.whole], {})
        rows = place.rows if self.rows is None else self.rows
        if len(rows) != len(place.rows) or (len(rows) and int(rows.max()) >= len(tensor)):
            raise WorkbenchError(
                f"Patch at {place.site} replaces {len(place.rows)} rows from a trace of {len(tensor)} rows, "
                f"using {len(rows)} of them. Give as many source rows as patched rows, all inside the trace."
            )
        return tensor[rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    """Zero."""

    def value(self, place: Place) -> float:
        """Zero, wherever."""
        return 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """The mean of another pass: over its examples at each position, or over examples and positions."""

    trace: Trace
    over: Literal["batch", "batch_pos"]

    def value(self, place: Place) -> Tensor:
        """One row that serves all rows."""
        tensor = self.trace[place.site.whole]
        if self.over == "batch_pos":
            if "pos" not in place.site.kind.dims:
                raise WorkbenchError(f"Mean over positions is not defined at {place.site}. Use over='batch'.")
            tensor = tensor.mean(place.site.axis("pos"), keepdim=True).expand_as(tensor)
        return place.narrow(tensor, {}).mean(0, keepdim=True)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of the caller's, broadcast over rows and positions."""

    tensor: Tensor

    def value(self, place: Place) -> Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Patch:
    """Replace what flows through a site: everything, or only some rows and positions of it."""

    site: Site
    source: Source
    rows: Int[Tensor, " rows"] | None = None
    """None means every row."""
    positions: Sequence[int] | None = None
    """None means every position. For patterns and scores use `dest` and `src`."""
    dest: int | None = None
    src: int | None = None

    def __post_init__(self) -> None:
        attention = "dest" in self.site.kind.dims
        if attention and self.positions is not None:
            raise WorkbenchError(f"Patch at {self.site}: say dest= and src=, not positions=.")
        if not attention and (self.dest is not None or self.src is not None):
            raise WorkbenchError(
                f"Patch at {self.site}: say positions=; only pattern and attn_scores have dest and src."
            )
        empty = self.positions is not None and len(self.positions) == 0
        if empty or (self.rows is not None and len(self.rows) == 0):
            raise WorkbenchError(
                f"Patch at {self.site} names no {'position' if empty else 'row'}: it would do nothing."
            )

    def places(self, batch: int) -> Iterator[Place]:
        """The blocks that this patch writes in a batch of that many rows."""
        rows = torch.arange(batch) if self.rows is None else self.rows
        fixed = {"head": self.site.head, "d_mlp": self.site.neuron, "dest": self.dest, "src": self.src}
        common = {dim: index for dim, index in fixed.items() if index is not None}
        if self.positions is None:
            yield Place(site=self.site, rows=rows, fixed=common)
        else:
            for position in self.positions:
                yield Place(site=self.site, rows=rows, fixed={**common, "pos": position})
