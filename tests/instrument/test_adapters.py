"""One meaning of a site on every backend: the same trace, the same patches, the same gradients."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from workbench.instrument.adapters import BridgeModel, ModelShape, NnsightModel, PlaceSpec, hooked_root, nnsight_model
from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Site, SiteKind
from workbench.instrument.trace import FromTrace, Patch, Trace, Value, Zero
from workbench.models.bridges import from_hugging_face, to_bridge
from workbench.models.config import BIASES, ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

# TransformerLens, a browser's engine or whole commands are started here: seconds each.
pytestmark = pytest.mark.slow

SMALL = ModelConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=10, n_ctx=5, d_vocab=7, d_vocab_out=6)
CONFIGS = {
    "plain": SMALL,
    "norm": replace(SMALL, normalization="LN", biases=BIASES, activation="gelu_new"),
    "attention_only": replace(SMALL, d_mlp=0, biases=()),
    "shared_tied_both_ways": replace(SMALL, tied=True, d_vocab_out=7, schedule=(0, 1, 1), causal=False),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def prompts(seed: int = 0, n: int = 4) -> Tensor:
    return torch.randint(0, 7, (n, 5), generator=torch.Generator().manual_seed(seed))


def bridged(model: Transformer) -> BridgeModel:
    return BridgeModel(to_bridge(model)[0])


def traced(model: Transformer) -> NnsightModel:
    return nnsight_model(model, {site: site.place for site in model.sites}, config=model.config)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def halve(activation: Tensor) -> Tensor:
    return 0.5 * activation


BACKENDS: Mapping[str, Callable[[Transformer], Instrumented]] = {"bridge": bridged, "nnsight": traced}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(CONFIGS[request.param])


@pytest.fixture(params=BACKENDS)
def other(request: pytest.FixtureRequest, model: Transformer) -> Instrumented:
    return BACKENDS[request.param](model)


def test_both_are_instrumented_with_all_sites_that_they_can_edit(model: Transformer, other: Instrumented) -> None:
    assert isinstance(other, Instrumented)
    lost = {SiteKind.attn_scores} if isinstance(other, BridgeModel) else set()
    assert list(other.sites) == [site for site in model.sites if site.kind not in lost]
    for name in ("n_steps", "n_heads", "d_mlp", "n_ctx", "causal", "d_vocab"):
        assert getattr(other.config, name) == getattr(model.config, name)


def test_the_same_trace(model: Transformer, other: Instrumented) -> None:
    mine, theirs = (run(which, prompts(), record=other.sites) for which in (model, other))
    assert close(theirs.logits, mine.logits)
    for site in other.sites:
        assert close(theirs[site], mine[site]), site


def test_the_same_patch_at_every_site(model: Transformer, other: Instrumented) -> None:
    clean, corrupt = prompts(0), prompts(1)
    base = run(model, corrupt).logits
    mine, theirs = (run(which, clean, record=other.sites) for which in (model, other))
    moved = 0
    for site in other.sites:
        patch = {"rows": torch.tensor([0, 2])}
        patch |= {"dest": 4, "src": 1} if "dest" in site.kind.dims else {"positions": [1, 4]}
        ours = run(model, corrupt, patches=[Patch(site=site, source=FromTrace(mine), **patch)]).logits
        found = run(other, corrupt, patches=[Patch(site=site, source=FromTrace(theirs), **patch)]).logits
        assert close(found, ours), site
        assert torch.equal(found[[1, 3]], run(other, corrupt).logits[[1, 3]]), site
        moved += not close(ours, base)
    # Only pos_embed is the same in both prompts, and a pattern in the last layer may hardly differ.
    assert moved >= len(other.sites) - 4


def test_patches_at_neighbouring_sites_compose(model: Transformer, other: Instrumented) -> None:
    kinds = ("resid_pre", "attn_out", "resid_mid", "resid_post")
    patches = [
        Patch(
            site=Site.parse(f"L1.{kind}"),
            source=Value(torch.randn(8, generator=torch.Generator().manual_seed(n))),
            positions=[n + 1],
        )
        for n, kind in enumerate(kinds)
    ]
    patches.append(Patch(site=Site.parse("L0.z.h1"), source=Zero()))
    record = [site for site in other.sites if site.layer == 1]
    mine, theirs = (run(which, prompts(), record=record, patches=patches) for which in (model, other))
    assert close(theirs.logits, mine.logits)
    for site in record:
        assert close(theirs[site], mine[site]), site


def test_the_same_gradients(model: Transformer, other: Instrumented) -> None:
    def score(logits: Tensor) -> Tensor:
        return logits[:, -1].square().sum()

    mine, theirs = (run(which, prompts(), record=other.sites, gradient_of=score) for which in (model, other))
    for site in other.sites:
        scale = mine.gradient(site).abs().max().clamp_min(1e-6)
        assert (theirs.gradient(site) - mine.gradient(site)).abs().max() <= 1e-4 * scale, site


def each_cell(
    model: Instrumented, corrupt: Tensor, clean: Trace, metric: Callable[[Tensor], Tensor], kind: SiteKind
) -> Tensor:
    """The metric after each patch, over [layer, head, position or dest, src], flat."""
    heads = range(model.config.n_heads) if "head" in kind.dims else [None]
    positions, cells = range(corrupt.shape[1]), []
    for layer, head in itertools.product(range(model.config.n_steps), heads):
        for first, second in itertools.product(positions, positions if "dest" in kind.dims else [None]):
            place = {"positions": [first]} if second is None else {"dest": first, "src": second}
            patch = Patch(site=Site(kind=kind, layer=layer, head=head), source=FromTrace(clean), **place)
            cells.append(metric(run(model, corrupt, patches=[patch]).logits))
    return torch.stack(cells)


SWEEPS = {
    "resid_pre": SiteKind.resid_pre,
    "attn_out": SiteKind.attn_out,
    "mlp_out": SiteKind.mlp_out,
    "attn_head_out_by_pos": SiteKind.z,
    "attn_head_q_by_pos": SiteKind.q,
    "attn_head_k_by_pos": SiteKind.k,
    "attn_head_v_by_pos": SiteKind.v,
    "attn_head_pattern_dest_src_pos": SiteKind.pattern,
}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_patching_of_transformer_lens_finds_what_our_passes_find(backend: str, sweep: str) -> None:
    from transformer_lens import patching

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 1] - logits[:, -1, 2]).mean()

    model = build(replace(SMALL, normalization="LN", n_layers=1, schedule=(0, 0)))
    kind, clean, corrupt = SWEEPS[sweep], prompts(0), prompts(1)
    theirs = to_bridge(model)[0] if backend == "bridge" else hooked_root(model)
    record = [site for site in model.sites if site.kind is kind]
    names = [site.place for site in record]
    with torch.no_grad():
        _, cache = theirs.run_with_cache(clean, names_filter=names)
        found = getattr(patching, f"get_act_patch_{sweep}")(theirs, corrupt, cache, metric)
    wanted = each_cell(model, corrupt, run(model, clean, record=record), metric, kind)
    assert close((found.transpose(1, 2) if sweep.endswith("by_pos") else found).flatten(), wanted)
    assert len(wanted.unique()) > model.config.n_steps


def test_a_hooked_model_has_our_sites_shares_our_weights_and_leaves_ours_alone() -> None:
    model = build(CONFIGS["norm"])
    before = {name: type(module) for name, module in model.named_modules()}
    hooked = hooked_root(model)
    assert set(hooked.hook_dict) == {site.place for site in model.sites}
    assert {name: id(value) for name, value in hooked.named_parameters()} == {
        name: id(value) for name, value in model.named_parameters()
    }
    assert {name: type(module) for name, module in model.named_modules()} == before
    logits, cache = hooked.run_with_cache(prompts())
    trace = run(model, prompts(), record=model.sites)
    assert torch.equal(logits, trace.logits)
    for site in model.sites:
        assert torch.equal(cache[site.place], trace[site]), site


@pytest.mark.parametrize("site", ["L0.resid_mid", "L1.attn_scores", "L0.ln2_normalized", "L1.z"])
def test_an_edit_of_a_hooked_model_means_what_ours_means(site: str) -> None:
    model, place = build(CONFIGS["norm"]), Site.parse(site)
    edited = hooked_root(model).run_with_hooks(prompts(), fwd_hooks=[(place.place, lambda x, hook: halve(x))])
    assert torch.equal(edited, model(prompts(), {place: halve}))


def test_only_a_model_with_places_can_be_hooked() -> None:
    with pytest.raises(WorkbenchError, match="Linear has no submodule at every site. Give a model of the workbench"):
        hooked_root(nn.Linear(2, 2))


def test_an_edit_that_transformer_lens_drops_is_an_error() -> None:
    model = build(SMALL)
    bridge = bridged(model)
    scores = Site.parse("L0.attn_scores")
    with pytest.raises(WorkbenchError, match="dropped an edit, so nothing was patched.*hook_attn_scores"):
        bridge.forward(prompts(), {scores: halve})
    with pytest.raises(WorkbenchError, match="Site L0.attn_scores is not in this model"):
        run(bridge, prompts(), patches=[Patch(site=scores, source=Zero())])


def test_an_edit_of_what_a_bridge_lacks_or_skips_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, z = bridged(build(SMALL)), Site.parse("L0.z")
    with pytest.raises(WorkbenchError, match="Site L7.z is not in this model"):
        bridge.forward(prompts(), {Site.parse("L7.z"): halve})
    monkeypatch.setattr(bridge.bridge, "run_with_hooks", lambda tokens, **_: bridge.bridge(tokens))
    with pytest.raises(WorkbenchError, match="pass never computed L0.z, so nothing was recorded or patched there"):
        bridge.forward(prompts(), {z: halve})


def test_a_bridge_without_aliases_is_looked_into_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["norm"])
    usual = bridged(model)
    own = {name: hook for name, hook in usual.bridge.hook_dict.items() if hook.name == name}
    monkeypatch.setattr(type(usual.bridge), "hook_dict", property(lambda _: own))
    bare = BridgeModel(usual.bridge)
    assert "blocks.0.hook_resid_pre" not in bare.bridge.hook_dict
    assert bare.sites == usual.sites
    for site in bare.sites:
        assert close(bare.forward(prompts(), {site: halve}), model(prompts(), {site: halve})), site


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ["norm", "shared_tied_both_ways"])
def test_a_stream_of_any_depth_and_form_becomes_logits(backend: str, config: str) -> None:
    model, final = build(CONFIGS[config]), Site.parse("ln_final_scale")
    other = BACKENDS[backend](model)
    edits = {final: halve} if final in model.sites else {}
    streams = run(model, prompts(), record=["L0.resid_pre", "L1.resid_mid", "L1.resid_post"]).activations
    for site, x in streams.items():
        assert close(other.finish(x, {}), model.finish(x, {})), site
        assert close(other.finish(x, edits), model.finish(x, edits)), site
        assert close(other.finish(x[:, 0], {}), model.finish(x[:, 0], {})), site
    assert close(other.finish(x.repeat(1, 4, 1), {}), model.finish(x, {}).repeat(1, 4, 1))


def test_names_alone_would_mislead() -> None:
    # The mutant: the bridge's own hooks of those names, which the adapter does not use. Each gives other logits.
    model = build(CONFIGS["norm"])
    raw = to_bridge(model)[0]
    for name in ("L0.resid_mid", "L0.ln1_normalized", "ln_final_normalized"):
        site = Site.parse(name)
        wanted = model(prompts(), {site: halve})
        assert close(bridged(model).forward(prompts(), {site: halve}), wanted)
        misled = raw.run_with_hooks(prompts(), fwd_hooks=[(site.place, lambda x, hook: halve(x))])
        assert not close(misled, wanted, 1e-2), name


def test_a_bridge_is_as_before_when_a_pass_is_over() -> None:
    model = build(SMALL)
    bridge = bridged(model)
    before = bridge.forward(prompts())
    for site in bridge.sites:
        bridge.forward(prompts(), {site: halve})
    with pytest.raises(ZeroDivisionError):
        bridge.forward(prompts(), {Site.parse("L0.z"): lambda x: x * (1 // 0)})
    assert torch.equal(bridge.forward(prompts()), before)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 6, "n_head": 2, "n_positions": 5, "vocab_size": 7, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation="eager")).eval()


def test_a_gpt2_in_a_bridge_is_looked_into_like_its_import() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    theirs = gpt2()
    ours = from_hugging_face(theirs)
    bridge = BridgeModel(build_bridge_from_module(theirs, "GPT2LMHeadModel", hf_config=theirs.config))
    mine, found = (run(which, prompts(), record=bridge.sites) for which in (ours, bridge))
    assert close(found.logits, mine.logits)
    for site in bridge.sites:
        assert close(found[site], mine[site]), site
        edited = bridge.forward(prompts(1), {site: halve})
        assert close(edited, ours(prompts(1), {site: halve})), site
    assert close(bridge.finish(mine["L0.resid_mid"], {}), ours.finish(mine["L0.resid_mid"], {}))


def test_blocks_side_by_side_are_refused() -> None:
    bridge = to_bridge(build(SMALL))[0]
    bridge.cfg.parallel_attn_mlp = True
    with pytest.raises(WorkbenchError, match="attention and MLP side by side"):
        BridgeModel(bridge)


class Foreign(nn.Module):
    """Someone's model: joint heads, a tuple for an output, modules in an order of their own, one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tokens, self.value, self.query = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.mixer, self.twice, self.unused, self.head = Mixer(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.boxed = Boxed()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        value, query = self.value(x), self.query(x)
        mixed, _ = self.mixer(query, value)
        return self.head(self.twice(self.twice(self.boxed(x + mixed)["x"])))


class Boxed(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


class Mixer(nn.Module):
    def forward(self, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pattern = (query @ value.mT).softmax(-1)
        return pattern @ value, pattern


SHAPE = ModelShape(n_steps=1, n_heads=2, d_mlp=0, n_ctx=5, causal=False, d_vocab=7)
FOREIGN = {"embed": "tokens", "L0.q": "query", "L0.v": "value", "L0.attn_out": "mixer"}


def foreign(module: nn.Module, **places: PlaceSpec | str) -> NnsightModel:
    return nnsight_model(module, places or FOREIGN, config=SHAPE)


def test_any_module_can_be_patched_through_nnsight() -> None:
    module = Foreign()
    model, tokens = foreign(module), prompts()
    trace = run(model, tokens, record=model.sites)
    assert torch.equal(trace.logits, module(tokens))
    assert torch.equal(trace["L0.q.h1"], module.query(module.tokens(tokens))[..., 3:])
    # Worked by hand: without attention the model is linear in the embedding.
    bare = module.head(module.twice(module.twice(module.tokens(tokens))))
    assert torch.allclose(
        run(model, tokens, patches=[Patch(site=Site.parse("L0.attn_out"), source=Zero())]).logits, bare
    )
    # The first half of every value gone: so is the first half of what is mixed, and the pattern knows.
    value, query = module.value(module.tokens(tokens)), module.query(module.tokens(tokens))
    value[..., :3] = 0
    mixed = (query @ value.mT).softmax(-1) @ value
    wanted = module.head(module.twice(module.twice(module.tokens(tokens) + mixed)))
    assert torch.allclose(run(model, tokens, patches=[Patch(site=Site.parse("L0.v.h0"), source=Zero())]).logits, wanted)


def test_nnsight_works_on_a_copy_that_shares_the_weights() -> None:
    module = Foreign()
    names = dict(module.named_modules())
    model = foreign(module)
    run(model, prompts(), record=model.sites)
    assert all("forward" not in vars(part) for part in names.values())
    with torch.no_grad():
        module.head.weight.mul_(2)
    assert torch.equal(model.forward(prompts()), module(prompts()))


@pytest.mark.parametrize(("path", "times"), [("twice", 2), ("unused", 0)])
def test_a_submodule_that_a_site_does_not_meet_once_is_an_error(path: str, times: int) -> None:
    model = foreign(Foreign(), **{"L0.resid_post": path})
    with pytest.raises(WorkbenchError, match=f"L0.resid_post: a pass calls its submodule '{path}' {times} times"):
        model.forward(prompts())


@pytest.mark.parametrize(
    ("site", "place", "message"),
    [
        ("L0.pattern", "mixer", r"output is \[4, 5, 6\], and \[batch, head, dest, src\] is wanted"),
        ("L0.q", PlaceSpec(path="query", heads=4), "output of width 6 is not that of 4 heads. Say how many it has"),
        ("L0.attn_out", "boxed", "submodule 'boxed': its output is a dict, and .* is wanted"),
    ],
)
def test_an_output_in_another_form_than_its_site_is_an_error(site: str, place: PlaceSpec | str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        foreign(Foreign(), **{site: place}).forward(prompts())


def test_grouped_heads_are_split_as_the_caller_says() -> None:
    model, tokens = foreign(Foreign(), **{"L0.v": PlaceSpec(path="value", heads=1), "L0.q": "query"}), prompts()
    trace = run(model, tokens, record=model.sites)
    assert trace["L0.v"].shape == (4, 5, 1, 6)
    assert trace["L0.q"].shape == (4, 5, 2, 3)
    with pytest.raises(WorkbenchError, match="Patch at L0.v.h1: head 1 is outside 0 to 0"):
        run(model, tokens, patches=[Patch(site=Site.parse("L0.v.h1"), source=Zero())])


def test_a_gpt2_through_nnsight_is_looked_into_like_its_import() -> None:
    theirs = gpt2()
    ours = from_hugging_face(theirs)
    places = {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "ln_final_normalized": "transformer.ln_f"}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        places |= {f"L{layer}.ln1_normalized": f"{block}.ln_1", f"L{layer}.attn_out": f"{block}.attn"}
        places |= {f"L{layer}.pre": f"{block}.mlp.c_fc", f"L{layer}.post": f"{block}.mlp.act"}
        places |= {f"L{layer}.mlp_out": f"{block}.mlp", f"L{layer}.resid_post": block}
    with pytest.raises(
        WorkbenchError, match="gives CausalLM.*, and logits .* are wanted. Say how to get them with forwa"
    ):
        nnsight_model(theirs, places, config=ours.config).forward(prompts())
    model = nnsight_model(theirs, places, config=ours.config, forward=lambda module, tokens: module(tokens).logits)
    mine, found = (run(which, prompts(), record=model.sites) for which in (ours, model))
    assert close(found.logits, mine.logits)
    for site in model.sites:
        assert close(found[site], mine[site]), site
        assert close(model.forward(prompts(1), {site: halve}), ours(prompts(1), {site: halve})), site
    assert close(model.finish(mine["L0.resid_post"], {}), ours.finish(mine["L0.resid_post"], {}))


def test_without_the_last_stream_there_is_no_lens() -> None:
    with pytest.raises(WorkbenchError, match="Site L0.resid_post is not in this model"):
        foreign(Foreign()).finish(torch.zeros(4, 5, 6), {})


def test_a_site_that_was_not_named_is_an_error() -> None:
    with pytest.raises(WorkbenchError, match="Site L0.k is not in this model"):
        foreign(Foreign()).forward(prompts(), {Site.parse("L0.k"): halve})


def test_wrong_places_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="no submodule 'quary'. Did you mean 'query'?"):
        foreign(Foreign(), **{"L0.q": "quary"})
    with pytest.raises(WorkbenchError, match="Site L0.q.h1 is a part of L0.q. Name the whole site"):
        foreign(Foreign(), **{"L0.q.h1": "query"})
    with pytest.raises(WorkbenchError, match="Submodules query are named for more than one site"):
        foreign(Foreign(), **{"L0.q": "query", "L0.k": "query"})


def test_a_mistake_inside_an_edit_keeps_its_kind() -> None:
    model = foreign(Foreign())
    source = FromTrace(run(model, prompts(n=2), record=["L0.q"]))
    with pytest.raises(WorkbenchError, match="replaces 4 rows from a trace of 2 rows"):
        run(model, prompts(), patches=[Patch(site=Site.parse("L0.q"), source=source)])


def test_nnsight_leaves_the_process_as_it_was() -> None:
    script = """
import sys
hook, known = sys.excepthook, set(sys.modules)
from workbench.instrument import adapters
assert not {"nnsight", "transformer_lens", "transformers"} & set(sys.modules)
adapters._import_nnsight()
assert sys.excepthook is hook and sys.gettrace() is None
assert not hasattr(3, "save") and not hasattr("text", "save")
import torch
x = torch.ones(2, requires_grad=True)
x.square().sum().backward()
assert x.grad.tolist() == [2.0, 2.0]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
