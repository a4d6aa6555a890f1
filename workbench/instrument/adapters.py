"""Other libraries' models as `Instrumented`, and our own models as TransformerLens'.

An adapter moves no number: it says at which of another library's hooks a site is, and hands every edit over there.
Names are not enough for that. TransformerLens 4.3's bridges have a `hook_resid_mid` that only the MLP reads (the
residual stream passes by it), a `hook_normalized` before weight and bias, and a `hook_attn_scores` whose edits are
dropped. Here a site means the same on every model, which the tests hold by patching each of them.

Importing transformer_lens costs seconds and importing nnsight changes the process, so both wait for the call that
needs them.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.instrument.sites import Edit, Instrumented, Shape, Site, SiteKind, check_site, model_sites
from workbench.runtime import WorkbenchError, code_version, nearest
from workbench.store import Provenance

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
    from transformer_lens.model_bridge import TransformerBridge

NORMALIZED = {
    SiteKind.ln1_normalized: "blocks.{}.ln1.hook_out",
    SiteKind.ln2_normalized: "blocks.{}.ln2.hook_out",
    SiteKind.ln_final_normalized: "ln_final.hook_out",
}
"""Where a bridge's norms are whole; its hook_normalized comes before weight and bias."""
CANONICAL = {
    SiteKind.embed: "embed.hook_out",
    SiteKind.pos_embed: "pos_embed.hook_out",
    SiteKind.resid_pre: "blocks.{}.hook_in",
    SiteKind.q: "blocks.{}.attn.q.hook_out",
    SiteKind.k: "blocks.{}.attn.k.hook_out",
    SiteKind.v: "blocks.{}.attn.v.hook_out",
    SiteKind.z: "blocks.{}.attn.o.hook_in",
    SiteKind.attn_out: "blocks.{}.attn.hook_out",
    SiteKind.pre: "blocks.{}.mlp.in.hook_out",
    SiteKind.post: "blocks.{}.mlp.out.hook_in",
    SiteKind.mlp_out: "blocks.{}.mlp.hook_out",
    SiteKind.resid_post: "blocks.{}.hook_out",
}
"""A bridge's own names of hooks whose usual names are aliases, which TransformerLens may drop."""
DISCARDED = ".*edit is discarded"
"""TransformerLens' warning that an edit came too late to change anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What instrumentation needs to know of a model that is not ours. Implements `Shape`."""

    n_steps: int
    n_heads: int
    d_mlp: int
    n_ctx: int
    causal: bool
    d_vocab: int

    def heads_of(self, kind: SiteKind) -> int:
        """As many in every layer."""
        return self.n_heads


class BridgeModel:
    """A TransformerLens bridge as an `Instrumented` model: the same weights, looked into through its own hooks."""

    def __init__(self, bridge: TransformerBridge, *, provenance: Provenance | None = None) -> None:
        """Look into `bridge`, which stays as it is; put it in evaluation mode if it has dropout."""
        cfg = bridge.cfg
        if cfg.parallel_attn_mlp:
            raise WorkbenchError(
                "This bridge's blocks run attention and MLP side by side, so they have no residual stream between the "
                "two. Only models that run them in turn can be looked into."
            )
        self.bridge = bridge
        self.provenance = provenance or Provenance(code_version=code_version())
        self.config = ModelShape(
            n_steps=cfg.n_layers,
            n_heads=cfg.n_heads,
            d_mlp=0 if cfg.attn_only else cfg.d_mlp or 0,
            n_ctx=cfg.n_ctx,
            causal=cfg.attention_dir == "causal",
            d_vocab=cfg.d_vocab,
        )
        found = model_sites(self.config, normalized=cfg.normalization_type is not None, mlp=not cfg.attn_only)
        known = bridge.hook_dict
        self._hooks = {site: hooks for site in found if (hooks := _bridge_hooks(site, known))}
        self.sites: Sequence[Site] = tuple(site for site in self._hooks if site.kind is not SiteKind.attn_scores)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, with each edit applied to what flows through its site.

        Raises:
            WorkbenchError: the bridge lacks a site, never computed it, or dropped its edit.
        """
        edits, met = edits or {}, set[Site]()
        hooks: list[Any] = []
        for site in sorted(edits):
            if site not in self._hooks:
                check_site(site, self)
            hooks += _edit_hooks(site, self._hooks[site], partial(_noted, met, site, edits[site]))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=DISCARDED, category=UserWarning)
            try:
                logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
            except UserWarning as warning:
                raise WorkbenchError(f"TransformerLens dropped an edit, so nothing was patched: {warning}") from None
        if lost := ", ".join(map(str, sorted(set(edits) - met))):
            raise WorkbenchError(f"This bridge's pass never computed {lost}, so nothing was recorded or patched there.")
        return logits

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of residual streams as if they had left the last layer, for the logit lens."""
        return _finish(self, x, edits)


def _bridge_hooks(site: Site, known: Container[str]) -> tuple[str, ...]:
    """Names of the hooks that stand for a site on a bridge which knows these; none if one of them is missing."""
    if site.kind is SiteKind.resid_mid:
        parts = [
            _bridge_hooks(Site(kind=kind, layer=site.layer), known) for kind in (SiteKind.resid_pre, SiteKind.attn_out)
        ]
        return (*parts[0], *parts[1]) if all(parts) else ()
    usual = NORMALIZED.get(site.kind, site.kind.place)
    names = (usual.format(site.layer), CANONICAL.get(site.kind, usual).format(site.layer))
    return tuple(name for name in names if name in known)[:1]


def _edit_hooks(site: Site, names: Sequence[str], edit: Edit) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """What to hang where, so that the edit at a site happens. Hooks of one place run in the order of the sites."""
    if site.kind is not SiteKind.resid_mid:
        return [(names[0], partial(_edited, edit))]
    # The stream between attention and MLP is no tensor of the bridge. It is resid_pre + attn_out, so an edit of it is
    # an edit of what attention adds. Sites are sorted: resid_pre is kept, and attn_out read, after their own edits.
    before: list[Tensor] = []
    return [(names[0], partial(_remember, before)), (names[1], partial(_edited_sum, edit, before))]


def _noted(met: set[Site], site: Site, edit: Edit, tensor: Tensor) -> Tensor:
    met.add(site)
    return edit(tensor)


def _edited(edit: Edit, tensor: Tensor, *, hook: object) -> Tensor:
    return edit(tensor)


def _remember(before: list[Tensor], tensor: Tensor, *, hook: object) -> None:
    before[:] = [tensor]


def _edited_sum(edit: Edit, before: Sequence[Tensor], tensor: Tensor, *, hook: object) -> Tensor:
    return edit(before[0] + tensor) - before[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceSpec:
    """A submodule whose output is the activation of a site."""

    path: str
    heads: int | None = None
    """Heads side by side in an output `[batch, pos, head * d_head]`, where they are not as many as the config says:
    grouped keys and values have fewer."""


class NnsightModel:
    """Any module as an `Instrumented` model, through nnsight: one trace a pass, edits inside the trace.

    For one thread at a time, because a trace lives on the modules: give each thread a model of its own.
    """

    def __init__(
        self, root: _Called, places: Mapping[Site, PlaceSpec], *, config: Shape, provenance: Provenance
    ) -> None:
        """Use `nnsight_model`, which copies the module first."""
        self.config = config
        self.provenance = provenance
        self.sites: Sequence[Site] = tuple(sorted(places))
        self._places = places
        self._root = root
        self._nnsight = _import_nnsight()
        self._traced = self._nnsight.NNsight(root)
        self._order: tuple[Site, ...] | None = None

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, with each edit applied to the output of the submodule that its site names.

        Raises:
            WorkbenchError: a site that was not named, or, in the first pass, one whose submodule does not give it.
        """
        edits = edits or {}
        for site in edits:
            check_site(site, self)
        if self._order is None:
            self._order = self._meet(tokens)
        changes = [
            (self._traced.get(f"called.{self._places[site].path}"), self._change(site, edits[site]))
            for site in self._order
            if site in edits
        ]
        nnsight, traced, batch = self._nnsight, self._traced, len(tokens)
        with traced.trace(tokens):
            for envoy, change in changes:
                envoy.output = change(batch, envoy.output)
            logits = nnsight.save(traced.output)
        return logits  # noqa: RET504 (a return inside the block would be traced)

    def finish(self, x: Float[Tensor, "*rows d_model"], edits: Mapping[Site, Edit]) -> Float[Tensor, "*rows vocab"]:
        """Logits of residual streams as if they had left the last layer, for the logit lens.

        Raises:
            WorkbenchError: the last layer's `resid_post` was not named.
        """
        return _finish(self, x, edits)

    def _meet(self, tokens: Int[Tensor, "batch pos"]) -> tuple[Site, ...]:
        """Sites in the order in which a pass meets them, which nnsight must follow. Each is met once, in its shape."""
        met: list[tuple[Site, Any]] = []
        handles = [
            self._root.called.get_submodule(spec.path).register_forward_hook(partial(_note_output, met, site))
            for site, spec in self._places.items()
        ]
        try:
            with torch.no_grad():
                logits = self._root(tokens)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise WorkbenchError(
                f"The module gives {came}, and logits [batch, pos, vocab] are wanted. Say how to get them with "
                "forward=, such as lambda module, tokens: module(tokens).logits."
            )
        order = [site for site, _ in met]
        for site, spec in self._places.items():
            if (times := order.count(site)) != 1:
                raise WorkbenchError(
                    f"Site {site}: a pass calls its submodule {spec.path!r} {times} times, and a site is met exactly "
                    "once. Name one that is called once, or give each call a submodule of its own."
                )
        for site, output in met:
            _check_output(site, self._places[site].path, self._heads(site), output)
        return tuple(order)

    def _heads(self, site: Site) -> int:
        return self._places[site].heads or self.config.heads_of(site.kind)

    def _change(self, site: Site, edit: Edit) -> Callable[[int, Any], Any]:
        return partial(_edit_output, site, self._heads(site), edit)


def nnsight_model(
    module: nn.Module,
    places: Mapping[Site | str, PlaceSpec | str],
    *,
    config: Shape,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    provenance: Provenance | None = None,
) -> NnsightModel:
    """Any module as an `Instrumented` model, its caller saying which submodule's output is which site.

    nnsight leaves `forward` replaced on what it traced, so it gets a copy of the module, which shares the parameters
    and buffers: training the module trains the copy. Of an output that is a tuple, the first is the activation. At a
    site with heads, an output of three dimensions is taken as `[batch, pos, head * d_head]`. An output for one example,
    such as positions' embeddings, stands for every example.

    Args:
        module: takes tokens and returns logits.
        places: whole site (`"L0.q"`) -> path of a submodule (`"layers.0.attn.q"`) which each pass calls once.
        config: the shape of the module, such as a `ModelShape`.
        forward: logits of tokens, where they are not `module(tokens)`.
        provenance: where its weights come from.

    Raises:
        WorkbenchError: a site that is not whole, a path that is no submodule, or one path for two sites.
    """
    paths = dict(module.named_modules())
    named: dict[Site, PlaceSpec] = {}
    for name, spec in places.items():
        site = Site.parse(name) if isinstance(name, str) else name
        named[site] = PlaceSpec(path=spec) if isinstance(spec, str) else spec
        if site != site.whole:
            raise WorkbenchError(
                f"Site {site} is a part of {site.whole}. Name the whole site; parts are sliced from it."
            )
        if named[site].path not in paths:
            raise WorkbenchError(
                f"Site {site}: the module has no submodule {named[site].path!r}. {nearest(named[site].path, paths)}"
            )
    taken = [spec.path for spec in named.values()]
    if shared := sorted({path for path in taken if taken.count(path) > 1}):
        raise WorkbenchError(
            f"Submodules {', '.join(shared)} are named for more than one site. Name one site for each."
        )
    return NnsightModel(
        _Called(_structural_copy(module), forward or nn.Module.__call__),
        named,
        config=config,
        provenance=provenance or Provenance(code_version=code_version()),
    )


class _Called(nn.Module):
    """A module and its caller's way from tokens to logits: the root that nnsight traces."""

    def __init__(self, called: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.called = called
        self._call = call

    def forward(self, tokens: Tensor) -> Any:
        return self._call(self.called, tokens)


def hooked_root(model: nn.Module) -> HookedRootModule:
    """One of our models as TransformerLens' `HookedRootModule`, so that its tools for hooked modules work on it.

    A copy with HookPoints in the places of its sites, which shares the parameters; in evaluation mode, as
    `transformer_lens.patching` demands. Its sites are ours: `hook_resid_mid` is the whole residual stream, and an edit
    at `hook_attn_scores` counts.

    Raises:
        WorkbenchError: the model has no place at every site, as models of other libraries have not.
    """
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    paths = dict(model.named_modules())
    if not isinstance(model, Instrumented) or any(site.place not in paths for site in model.sites):
        raise WorkbenchError(f"{type(model).__name__} has no submodule at every site. Give a model of the workbench.")

    class HookedModel(HookedRootModule):
        """The copy's modules under their own names, and its forward pass."""

        def __init__(self, inner: nn.Module, cfg: SimpleNamespace) -> None:
            super().__init__()
            for name, child in inner.named_children():
                self.add_module(name, child)
            # A bound method: were the copy itself kept, its modules would be here twice.
            self._run = inner.forward
            self.cfg = cfg
            self.setup()

        def forward(self, tokens: Tensor) -> Tensor:
            return self._run(tokens)

    inner = _structural_copy(model)
    for site in model.sites:
        inner.set_submodule(site.place, HookPoint())
    config = model.config
    cfg = SimpleNamespace(
        n_layers=config.n_steps,
        n_heads=config.heads_of(SiteKind.z),
        n_key_value_heads=None,
        d_mlp=config.d_mlp,
        n_ctx=config.n_ctx,
        d_vocab=config.d_vocab,
        device=next(model.parameters()).device,
    )
    return HookedModel(inner, cfg).eval()


def _structural_copy(module: nn.Module) -> nn.Module:
    """Modules of its own around the same parameters and buffers."""
    held = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in held})


def _finish(model: BridgeModel | NnsightModel, x: Tensor, edits: Mapping[Site, Edit]) -> Tensor:
    """Logits after residual streams: a pass over any tokens, at whose end `x` takes the stream's place.

    It costs the layers before, and in return everything that the model does behind them is in it, soft caps included.
    """
    last = Site(kind=SiteKind.resid_post, layer=model.config.n_steps - 1)
    check_site(last, model)
    # Positions are told apart by edits alone, so rows of any other form can be prompts of one token.
    stream = x if x.ndim == 3 and x.shape[1] <= model.config.n_ctx else x.reshape(-1, 1, x.shape[-1])
    tokens = torch.zeros(stream.shape[:2], dtype=torch.long, device=x.device)
    logits = model.forward(tokens, {**edits, last: lambda _: stream})
    return logits.reshape(*x.shape[:-1], logits.shape[-1])


def _note_output(met: list[tuple[Site, Any]], site: Site, module: nn.Module, inputs: object, output: object) -> None:
    met.append((site, output))


def _check_output(site: Site, path: str, heads: int, output: Any) -> None:
    """Raise a WorkbenchError unless a submodule's output has the form of its site."""
    tensor, where = output[0] if isinstance(output, tuple) else output, f"Site {site}, submodule {path!r}"
    wanted = f"[{', '.join(site.kind.dims)}] is wanted"
    if not isinstance(tensor, Tensor):
        raise WorkbenchError(f"{where}: its output is a {type(tensor).__name__}, and {wanted}. Name another submodule.")
    if _joined(site, tensor):
        if tensor.shape[-1] % heads:
            raise WorkbenchError(
                f"{where}: its output of width {tensor.shape[-1]} is not that of {heads} heads. Say how many it has "
                "with PlaceSpec(path=…, heads=…)."
            )
    elif tensor.ndim != len(site.kind.dims):
        raise WorkbenchError(f"{where}: its output is {list(tensor.shape)}, and {wanted}. Name another submodule.")


def _joined(site: Site, tensor: Tensor) -> bool:
    """Whether the heads of an activation are side by side in its last dimension."""
    return site.kind.dims[-2:] == ("head", "d_head") and tensor.ndim == 3


def _edit_output(site: Site, heads: int, edit: Edit, batch: int, output: Any) -> Any:
    """A submodule's output after the edit, in the form in which it came."""
    if isinstance(output, tuple):
        return (_edit_output(site, heads, edit, batch, output[0]), *output[1:])
    activation = output.expand(batch, *output.shape[1:])
    if _joined(site, output):
        return edit(activation.unflatten(-1, (heads, -1))).flatten(-2)
    return edit(activation)


def _import_nnsight() -> ModuleType:
    """The nnsight module: the one place where it enters.

    Its import mounts `.save` on every Python object; that is taken back, unless someone else had imported it for
    themselves. What remains: `Tensor.backward` is replaced (it behaves as before outside a `with`), libc's `backtrace`
    is turned off, and `-v` or `--verbose` among the program's arguments makes its tracebacks longer.
    """
    present = "nnsight" in sys.modules
    import nnsight

    if not present:
        from nnsight._c import unmount
        from nnsight.schema.config import CONFIG

        CONFIG.APP.PYMOUNT = False
        if unmount is not None:
            unmount("save")
    return nnsight
