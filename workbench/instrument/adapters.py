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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.instrument.sites import Edit, Instrumented, Shape, Site, SiteKind, model_sites
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
            d_mlp=0 if cfg.attn_only else cfg.d_mlp,
            n_ctx=cfg.n_ctx,
            causal=cfg.attention_dir == "causal",
            d_vocab=cfg.d_vocab,
        )
        hooks = bridge.hook_dict
        found = model_sites(self.config, normalized=cfg.normalization_type is not None, mlp=not cfg.attn_only)
        self.sites: Sequence[Site] = tuple(
            site
            for site in found
            if site.kind is not SiteKind.attn_scores and all(hook in hooks for hook in _bridge_hooks(site))
        )

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, with each edit applied to what flows through its site.

        Raises:
            WorkbenchError: TransformerLens says that it dropped an edit.
        """
        hooks = [hook for site in sorted(edits or {}) for hook in _edit_hooks(site, edits or {})]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=DISCARDED, category=UserWarning)
            try:
                return self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
            except UserWarning as warning:
                raise WorkbenchError(f"TransformerLens dropped an edit, so nothing was patched: {warning}") from None


def _bridge_hooks(site: Site) -> tuple[str, ...]:
    """Names of the hooks that stand for a site on a bridge."""
    if site.kind is SiteKind.resid_mid:
        return f"blocks.{site.layer}.hook_resid_pre", f"blocks.{site.layer}.hook_attn_out"
    return (NORMALIZED.get(site.kind, site.kind.place).format(site.layer),)


def _edit_hooks(site: Site, edits: Mapping[Site, Edit]) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """What to hang where, so that the edit at a site happens. Hooks of one place run in the order of the sites."""
    edit = edits[site]
    if site.kind is not SiteKind.resid_mid:
        return [(_bridge_hooks(site)[0], partial(_edited, edit))]
    # The stream between attention and MLP is no tensor of the bridge. It is resid_pre + attn_out, so an edit of it is
    # an edit of what attention adds. Sites are sorted: resid_pre is kept, and attn_out read, after their own edits.
    before: list[Tensor] = []
    pre, out = _bridge_hooks(site)
    return [(pre, partial(_remember, before)), (out, partial(_edited_sum, edit, before))]


def _edited(edit: Edit, tensor: Tensor, *, hook: object) -> Tensor:
    return edit(tensor)


def _remember(before: list[Tensor], tensor: Tensor, *, hook: object) -> None:
    before[:] = [tensor]


def _edited_sum(edit: Edit, before: Sequence[Tensor], tensor: Tensor, *, hook: object) -> Tensor:
    return edit(before[0] + tensor) - before[0]


class NnsightModel:
    """Any module as an `Instrumented` model, through nnsight: one trace a pass, edits inside the trace."""

    def __init__(self, module: nn.Module, places: Mapping[Site, str], *, config: Shape, provenance: Provenance) -> None:
        """Use `nnsight_model`, which copies the module first."""
        self.config = config
        self.provenance = provenance
        self.sites: Sequence[Site] = tuple(sorted(places))
        self._places = {site: places[site] for site in self.sites}
        self._module = module
        self._nnsight = _import_nnsight()
        self._traced = self._nnsight.NNsight(module)
        self._order: tuple[str, ...] | None = None

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, with each edit applied to the output of the submodule that its site names."""
        if self._order is None:
            self._order = self._calls(tokens)
        wanted = {self._places[site]: (site, edit) for site, edit in (edits or {}).items()}
        ordered = [(self._traced.get(path), *wanted[path]) for path in self._order if path in wanted]
        n_heads, nnsight, traced = self.config.n_heads, self._nnsight, self._traced
        with traced.trace(tokens):
            for envoy, site, edit in ordered:
                envoy.output = _edit_output(envoy.output, site, edit, n_heads)
            logits = nnsight.save(traced.output)
        return logits  # noqa: RET504 (a return inside the block would be traced)

    def _calls(self, tokens: Int[Tensor, "batch pos"]) -> tuple[str, ...]:
        """Submodules that sites name, in the order in which a pass calls them: nnsight must meet them in this one."""
        called: list[str] = []
        handles = [
            self._module.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
            for path in self._places.values()
        ]
        try:
            with torch.no_grad():
                self._module(tokens)
        finally:
            for handle in handles:
                handle.remove()
        for site, path in self._places.items():
            if (times := called.count(path)) != 1:
                raise WorkbenchError(
                    f"Site {site}: a pass calls its submodule {path!r} {times} times, and a site is met exactly once. "
                    "Name one that is called once, or give each call a submodule of its own."
                )
        return tuple(called)


def nnsight_model(
    module: nn.Module, places: Mapping[Site, str], *, config: Shape, provenance: Provenance | None = None
) -> NnsightModel:
    """Any module as an `Instrumented` model, its caller saying which submodule's output is which site.

    nnsight leaves `forward` replaced on what it traced, so it gets a copy of the module, which shares the parameters
    and buffers: training the module trains the copy. Of an output that is a tuple, the first is the activation. At a
    site with heads, an output of three dimensions is taken as `[batch, pos, head * d_head]`.

    Args:
        module: takes tokens and returns logits.
        places: whole site -> path of a submodule (`"layers.0.attn.q"`) which each pass calls once.
        config: the shape of the module, such as a `ModelShape`.
        provenance: where its weights come from.

    Raises:
        WorkbenchError: a site that is not whole, a path that is no submodule, or one path for two sites.
    """
    paths = dict(module.named_modules())
    for site, path in places.items():
        if site != site.whole:
            raise WorkbenchError(
                f"Site {site} is a part of {site.whole}. Name the whole site; parts are sliced from it."
            )
        if path not in paths:
            raise WorkbenchError(f"Site {site}: the module has no submodule {path!r}. {nearest(path, paths)}")
    shared = sorted({path for path in places.values() if list(places.values()).count(path) > 1})
    if shared:
        raise WorkbenchError(
            f"Submodules {', '.join(shared)} are named for more than one site. Name one site for each."
        )
    return NnsightModel(
        _structural_copy(module),
        places,
        config=config,
        provenance=provenance or Provenance(code_version=code_version()),
    )


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
        n_heads=config.n_heads,
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


def _edit_output(output: Any, site: Site, edit: Edit, n_heads: int) -> Any:
    """A submodule's output after the edit, in the form in which it came."""
    if isinstance(output, tuple):
        return (_edit_output(output[0], site, edit, n_heads), *output[1:])
    if site.kind.dims[-2:] == ("head", "d_head") and output.ndim == 3:
        return edit(output.unflatten(-1, (n_heads, -1))).flatten(-2)
    return edit(output)


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
