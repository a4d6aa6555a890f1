"""The glossary: every place in a model where an activation can be read or replaced.

A site is a value, never a formatted string elsewhere. Its kind carries the names of the tensor's dimensions and the
path of the identity submodule ("place") that the tensor flows through; paths and names are those that TransformerLens
made common. `layer` counts the steps that are executed, so that a block that runs twice has two sites of each kind.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.runtime import WorkbenchError, nearest
from workbench.store import Provenance

Edit = Callable[[Tensor], Tensor]
"""What happens at a place: takes the activation, returns the one that flows on."""

Slot = Literal["q", "k", "v"]
"""What a head reads the residual stream for."""
RESID = ("batch", "pos", "d_model")
SCALE = ("batch", "pos", "one")
HEADS = ("batch", "pos", "head", "d_head")
ATTENTION = ("batch", "head", "dest", "src")
NEURONS = ("batch", "pos", "d_mlp")
NUMBERS = ("batch", "pos", "head")


class SiteKind(Enum):
    """Kinds of site in the order in which a forward pass meets them: name, dimensions, path of the place."""

    embed = (RESID, "hook_embed")
    pos_embed = (RESID, "hook_pos_embed")
    token_values = (HEADS, "hook_token_values")
    position_values = (HEADS, "hook_position_values")
    resid_pre = (RESID, "blocks.{}.hook_resid_pre")
    ln1_scale = (SCALE, "blocks.{}.ln1.hook_scale")
    ln1_normalized = (RESID, "blocks.{}.ln1.hook_normalized")
    q = (HEADS, "blocks.{}.attn.hook_q")
    k = (HEADS, "blocks.{}.attn.hook_k")
    v = (HEADS, "blocks.{}.attn.hook_v")
    attn_scores = (ATTENTION, "blocks.{}.attn.hook_attn_scores")
    pattern = (ATTENTION, "blocks.{}.attn.hook_pattern")
    z = (HEADS, "blocks.{}.attn.hook_z")
    sums = (NUMBERS, "blocks.{}.attn.hook_sums")
    codes = (HEADS, "blocks.{}.mlp.hook_codes")
    attn_out = (RESID, "blocks.{}.hook_attn_out")
    resid_mid = (RESID, "blocks.{}.hook_resid_mid")
    ln2_scale = (SCALE, "blocks.{}.ln2.hook_scale")
    ln2_normalized = (RESID, "blocks.{}.ln2.hook_normalized")
    pre = (NEURONS, "blocks.{}.mlp.hook_pre")
    post = (NEURONS, "blocks.{}.mlp.hook_post")
    mlp_out = (RESID, "blocks.{}.hook_mlp_out")
    resid_post = (RESID, "blocks.{}.hook_resid_post")
    ln_final_scale = (SCALE, "ln_final.hook_scale")
    ln_final_normalized = (RESID, "ln_final.hook_normalized")

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the tensor's dimensions."""
        return self.value[0]

    @property
    def place(self) -> str:
        """Path of the submodule, with `{}` for the layer where there is one."""
        return self.value[1]

    @property
    def layered(self) -> bool:
        """Whether each layer has one."""
        return "{}" in self.place

    @functools.cached_property
    def rank(self) -> int:
        """Order within a layer."""
        return list(SiteKind).index(self)


PROGRAM_KINDS = (SiteKind.token_values, SiteKind.position_values, SiteKind.sums, SiteKind.codes)
"""Variables of a Transformer Program, whose `z` are its categorical heads' variables; a head here is a variable."""
SITE = re.compile(r"(?:L(?P<layer>\d+)\.)?(?P<kind>[a-z]\w*?)(?:\.h(?P<head>\d+)|\.n(?P<neuron>\d+))?")


@functools.total_ordering
@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One place in a model: `L0.z.h3` is head 3 of layer 0's `z`, `L0.post.n17` one neuron, `embed` has no layer."""

    kind: SiteKind
    layer: int | None = None
    head: int | None = None
    neuron: int | None = None

    def __post_init__(self) -> None:
        if (self.layer is not None) != self.kind.layered:
            raise WorkbenchError(
                f"Site kind {self.kind.name!r} {'needs a' if self.kind.layered else 'has no'} layer, got {self.layer}."
            )
        if self.head is not None and "head" not in self.kind.dims:
            raise WorkbenchError(f"Site kind {self.kind.name!r} has no heads. Kinds with heads: q, k, v, z, pattern.")
        if self.neuron is not None and "d_mlp" not in self.kind.dims:
            raise WorkbenchError(f"Site kind {self.kind.name!r} has no neurons. Kinds with neurons: pre, post.")

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer}."
        part = "" if self.head is None else f".h{self.head}"
        part += "" if self.neuron is None else f".n{self.neuron}"
        return f"{layer}{self.kind.name}{part}"

    def __lt__(self, other: Site) -> bool:
        return self._depth < other._depth

    @property
    def whole(self) -> Site:
        """The site without head or neuron: the tensor that flows through the place."""
        return replace(self, head=None, neuron=None)

    @property
    def place(self) -> str:
        """Path of the submodule that the tensor flows through."""
        return self.kind.place.format(self.layer)

    def axis(self, dim: str) -> int:
        """Index of a named dimension."""
        return self.kind.dims.index(dim)

    @property
    def _depth(self) -> tuple[float, int, int, int]:
        first = self.kind.name in ("embed", "pos_embed", "token_values", "position_values")
        layer = (-1.0 if first else float("inf")) if self.layer is None else float(self.layer)
        return layer, self.kind.rank, -1 if self.head is None else self.head, -1 if self.neuron is None else self.neuron

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `str` wrote.

        Raises:
            WorkbenchError: the text is no site.
        """
        match = SITE.fullmatch(text.strip())
        if match is None or match["kind"] not in SiteKind.__members__:
            kind = match["kind"] if match else text
            raise WorkbenchError(f"Unknown site {text!r}. {nearest(kind, SiteKind.__members__)} Example: L0.z.h3")
        number = {name: int(value) for name in ("layer", "head", "neuron") if (value := match[name]) is not None}
        return cls(kind=SiteKind[match["kind"]], **number)


@runtime_checkable
class Shape(Protocol):
    """What instrumentation needs to know of a model's configuration."""

    @property
    def n_steps(self) -> int:
        """Layers that are executed; a shared block counts each time."""
        ...

    def heads_of(self, kind: SiteKind) -> int:
        """Heads that each site of a kind with heads has."""
        ...

    @property
    def d_mlp(self) -> int:
        """Neurons of each MLP, 0 if there is none."""
        ...

    @property
    def n_ctx(self) -> int:
        """Longest prompt."""
        ...

    @property
    def causal(self) -> bool:
        """Whether positions attend only to themselves and earlier ones."""
        ...

    @property
    def d_vocab(self) -> int:
        """Tokens that can be read."""
        ...


@runtime_checkable
class Instrumented(Protocol):
    """A model that can be looked into: our own, a TransformerLens bridge, or any module through nnsight."""

    @property
    def config(self) -> Shape:
        """Its shape."""
        ...

    @property
    def sites(self) -> Sequence[Site]:
        """Every place of the model, whole (heads and neurons are slices of these), in order of depth."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Where the weights come from."""
        ...

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, with each edit applied to what flows through its (whole) site."""
        ...


@runtime_checkable
class EdgeReadable(Instrumented, Protocol):
    """A model whose parts can be run one by one, each head's q, k and v from an input of its own.

    What is told apart in here is what an edge of a circuit joins: a writer's own part of the residual stream, and a
    reader's own sum of them.
    """

    def write_inputs(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]:
        """What token and position embeddings write to the residual stream."""
        ...

    def read_heads(
        self, step: int, slot: Slot, heads: slice, x: Float[Tensor, "*rows #head d_model"]
    ) -> Float[Tensor, "*rows head d_head"]:
        """Queries, keys or values of some heads, each from an input of its own, or all from one."""
        ...

    def pull_heads(
        self,
        step: int,
        slot: Slot,
        x: Float[Tensor, "point *rows d_model"],
        gradient: Float[Tensor, "point *rows head d_head"],
    ) -> Float[Tensor, "*rows head d_model"]:
        """Gradient at what each head reads, from that at its queries, keys or values: the mean over points."""
        ...

    def patterns(
        self,
        step: int,
        heads: slice,
        scores: Float[Tensor, "*rows head dest src"],
        allowed: Bool[Tensor, "*#rows #head dest src"],
        dest: Int[Tensor, " dest"],
    ) -> Float[Tensor, "*rows head dest src"]:
        """Where some heads look from positions `dest`, by their scaled scores: differentiable, and not by values."""
        ...

    def write_heads(
        self, step: int, heads: slice, z: Float[Tensor, "*rows head d_head"]
    ) -> Float[Tensor, "*rows head d_model"]:
        """What each of some heads writes; the bias of their sum belongs to none of them."""
        ...

    def sum_heads(self, step: int, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """What all heads write together, without the bias of their sum."""
        ...

    def write_neurons(
        self, step: int, neurons: Int[Tensor, " neuron"] | None, x: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """What an MLP writes, or some of its neurons; the output bias belongs to the whole MLP alone."""
        ...

    def constant(self, step: int, part: Literal["attn", "mlp"]) -> Float[Tensor, " d_model"]:
        """The output bias of a step's attention or MLP."""
        ...

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the residual streams given."""
        ...

    def allowed(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "#batch dest src"]:
        """Which position may attend to which."""
        ...


def model_sites(config: Shape, *, normalized: bool, mlp: bool) -> tuple[Site, ...]:
    """All whole sites of a transformer of this shape, in order of depth."""
    kinds = [
        kind
        for kind in SiteKind
        if kind not in PROGRAM_KINDS
        if (normalized or not kind.name.startswith("ln")) and (mlp or kind.name not in ("pre", "post", "mlp_out"))
        if mlp or not kind.name.startswith("ln2")
    ]
    single = [Site(kind=kind) for kind in kinds if not kind.layered]
    layered = [Site(kind=kind, layer=layer) for layer in range(config.n_steps) for kind in kinds if kind.layered]
    return tuple(sorted(single + layered))


def check_site(site: Site, model: Instrumented) -> None:
    """Raise a WorkbenchError unless the model has this site."""
    if site.whole not in model.sites:
        raise WorkbenchError(
            f"Site {site} is not in this model ({model.config.n_steps} layers). "
            f"{nearest(str(site.whole), map(str, model.sites))} List all with model.sites."
        )
    if site.head is not None and site.head >= (heads := model.config.heads_of(site.kind)):
        raise WorkbenchError(f"Site {site}: this model has heads 0 to {heads - 1}.")
    if site.neuron is not None and site.neuron >= model.config.d_mlp:
        raise WorkbenchError(f"Site {site}: this model has neurons 0 to {model.config.d_mlp - 1}.")


def select_sites(wanted: str | Iterable[str | Site], model: Instrumented) -> tuple[Site, ...]:
    """The sites that a person names, in order of depth.

    Args:
        wanted: sites or a comma-separated list. A kind (`z`) stands for all its layers; a kind with heads, without one
            named, for every head (`L0.z` is all heads of layer 0); `L0.post.n*` for every neuron of a layer.
        model: whose sites they are.

    Raises:
        WorkbenchError: a name is no site, or the model has none such.
    """
    names = [name for name in wanted.split(",") if name.strip()] if isinstance(wanted, str) else list(wanted)
    if not names:
        raise WorkbenchError("No sites given. Name kinds or sites, such as 'resid_pre,attn_out' or 'L0.z.h3'.")
    chosen: set[Site] = set()
    for name in names:
        for site in _named_sites(name, model):
            check_site(site, model)
            chosen.update(_heads_of(site, model))
    return tuple(sorted(chosen))


def _named_sites(name: str | Site, model: Instrumented) -> Iterable[Site]:
    if isinstance(name, Site):
        return [name]
    bare = name.strip()
    if bare.endswith(".n*"):
        layer = Site.parse(bare.removesuffix(".n*"))
        return [replace(layer, neuron=neuron) for neuron in range(model.config.d_mlp)]
    if bare in SiteKind.__members__ and SiteKind[bare].layered:
        found = [site for site in model.sites if site.kind.name == bare]
        if not found:
            raise WorkbenchError(f"Site kind {bare!r} is not in this model. List all with model.sites.")
        return found
    return [Site.parse(bare)]


def _heads_of(site: Site, model: Instrumented) -> Iterable[Site]:
    if "head" not in site.kind.dims or site.head is not None:
        return [site]
    return [replace(site, head=head) for head in range(model.config.heads_of(site.kind))]
