"""The specification: against mathematics that is written out independently, and every option of it flipped."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.instrument.passes import run
from workbench.instrument.sites import Instrumented, Shape, Site, SiteKind
from workbench.instrument.trace import FromTrace, Patch
from workbench.models.config import BIASES, ModelConfig
from workbench.models.transformer import Past, Transformer
from workbench.runtime import WorkbenchError

SMALL = ModelConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=10, n_ctx=5, d_vocab=7, d_vocab_out=6)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "norm": {"normalization": "LN"},
    "gelu": {"activation": "gelu"},
    "gelu_new": {"activation": "gelu_new"},
    "tied": {"tied": True, "d_vocab_out": 7},
    "no biases": {"biases": ()},
    "all biases": {"biases": BIASES},
    "attention only": {"d_mlp": 0},
    "both ways": {"causal": False},
    "padding": {"pad_token": 0},
    "padding both ways": {"pad_token": 0, "causal": False},
    "shared": {"schedule": (0, 1, 0)},
    "one-hot": {"embedding": "one_hot", "d_model": 14},
    "everything": {
        "normalization": "LN",
        "activation": "gelu",
        "tied": True,
        "d_vocab_out": 7,
        "biases": BIASES,
        "pad_token": 3,
        "schedule": (1, 0, 1, 1),
    },
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator).double())
    return model


def prompts(seed: int = 0, n: int = 4, length: int = 5) -> Tensor:
    return torch.randint(0, 7, (n, length), generator=torch.Generator().manual_seed(seed))


def reference(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Logits and activations by place, one prompt, one head, one position at a time."""
    rows = [_one_prompt(model, row) for row in tokens]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _one_prompt(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    config, w, n = model.config, model.state_dict(), len(tokens)
    erf = lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))  # noqa: E731
    tanh = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    act = {"relu": lambda x: torch.where(x > 0, x, 0.0 * x), "gelu": erf, "gelu_new": tanh}[config.activation]
    seen: dict[str, Tensor] = {}

    def norm(x: Tensor, name: str, place: str) -> Tensor:
        if config.normalization is None:
            return x
        seen[f"{place}.hook_scale"] = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        centred = (x - x.mean(-1, keepdim=True)) / seen[f"{place}.hook_scale"]
        seen[f"{place}.hook_normalized"] = torch.einsum("pm,m->pm", centred, w[f"{name}.w"]) + w[f"{name}.b"]
        return seen[f"{place}.hook_normalized"]

    def attention(x: Tensor, block: str, place: str) -> Tensor:
        heads = {name: [] for name in ("q", "k", "v", "attn_scores", "pattern", "z")}
        out = torch.zeros_like(x)
        for h in range(config.n_heads):
            q, k, v = (
                torch.einsum("pm,me->pe", x, w[f"{block}.W_{i}"][h]) + (w[f"{block}.b_{i}"][h] if biased else 0)
                for i in "QKV"
            )
            scores = torch.full((n, n), -1e5, dtype=x.dtype)
            for d in range(n):
                for s in range(n):
                    if s == d or ((s < d or not config.causal) and int(tokens[s]) != config.pad_token):
                        scores[d, s] = q[d].dot(k[s]) / math.sqrt(config.d_head)
            odds = (scores - scores.max(-1, keepdim=True).values).exp()
            pattern = odds / odds.sum(-1, keepdim=True)
            z = torch.einsum("ds,se->de", pattern, v)
            out = out + torch.einsum("de,em->dm", z, w[f"{block}.W_O"][h])
            for name, value in zip(heads, (q, k, v, scores, pattern, z), strict=True):
                heads[name].append(value)
        for name, values in heads.items():
            seen[f"{place}.hook_{name}"] = torch.stack(values, 0 if values[0].shape == (n, n) else 1)
        return out + w[f"{block}.b_O"] if biased else out

    biased, neurons = "attn" in config.biases, "mlp" in config.biases
    seen["hook_embed"] = w["embed.W_E"][tokens]
    seen["hook_pos_embed"] = w["pos_embed.W_pos"][:n]
    x = seen["hook_embed"] + seen["hook_pos_embed"]
    for step, number in enumerate(config.schedule or range(config.n_layers)):
        block, place = f"weights.{number}", f"blocks.{step}"
        seen[f"{place}.hook_resid_pre"] = x
        out = attention(norm(x, f"{block}.ln1", f"{place}.ln1"), f"{block}.attn", f"{place}.attn")
        x = x + out
        seen |= {f"{place}.hook_attn_out": out, f"{place}.hook_resid_mid": x}
        if config.d_mlp:
            pre = norm(x, f"{block}.ln2", f"{place}.ln2") @ w[f"{block}.mlp.W_in"]
            pre = pre + w[f"{block}.mlp.b_in"] if neurons else pre
            out = act(pre) @ w[f"{block}.mlp.W_out"]
            out = out + w[f"{block}.mlp.b_out"] if neurons else out
            x = x + out
            seen |= {f"{place}.mlp.hook_pre": pre, f"{place}.mlp.hook_post": act(pre), f"{place}.hook_mlp_out": out}
        seen[f"{place}.hook_resid_post"] = x
    unembed = w["embed.W_E"].T if config.tied else w["unembed.W_U"]
    seen["logits"] = norm(x, "final_norm", "ln_final") @ unembed
    if "unembed" in config.biases:
        seen["logits"] = seen["logits"] + w["unembed.b_U"]
    return seen


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(replace(SMALL, **OPTIONS[request.param]))


def test_every_site_and_the_logits_are_those_of_the_mathematics(model: Transformer) -> None:
    wanted = reference(model, prompts())
    trace = run(model, prompts(), record=model.sites)
    torch.testing.assert_close(trace.logits, wanted.pop("logits"), rtol=1e-10, atol=1e-12)
    assert set(wanted) == {site.place for site in model.sites}
    for site in model.sites:
        assert trace[site].ndim == len(site.kind.dims)
        torch.testing.assert_close(trace[site], wanted[site.place], rtol=1e-10, atol=1e-12, msg=str(site))


# One-hot embeddings are weights that stay: what they compute is what any embedding with those weights does.
@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("plain", "everything", "one-hot")])
def test_every_option_changes_the_model(option: str) -> None:
    # The mutant: a model that ignores its option, which is the reference at the plain config with the same weights.
    changed = build(replace(SMALL, **OPTIONS[option]))
    tokens = torch.cat([prompts(), torch.tensor([[1, 0, 2, 0, 3]])])
    ignored = build(SMALL)
    ignored.load_state_dict(changed.state_dict(), strict=False)
    found, other = changed(tokens), reference(ignored, tokens)["logits"]
    assert found.shape != other.shape or (found - other).abs().max() > 1e-3


def test_a_model_is_instrumented_and_every_edit_counts(model: Transformer) -> None:
    assert isinstance(model, Instrumented)
    assert isinstance(model.config, Shape)
    plain = model(prompts())
    for site in model.sites:
        edited = model(prompts(), {site: lambda x: x + torch.linspace(0, 1, x.numel()).view(x.shape)})
        assert (edited - plain).abs().max() > 1e-6, site


@settings(max_examples=25)
@given(cut=st.integers(1, 4), seed=st.integers(0, 9))
def test_causal_models_do_not_look_ahead(cut: int, seed: int) -> None:
    one, other = prompts(seed), prompts(seed + 100)
    mixed = torch.cat([one[:, :cut], other[:, cut:]], 1)
    for options, blind in (("norm", True), ("shared", True), ("padding", True), ("both ways", False)):
        model = build(replace(SMALL, **OPTIONS[options]))
        same = torch.allclose(model(mixed)[:, :cut], model(one)[:, :cut], atol=1e-12)
        assert same == (blind or torch.equal(mixed, one)), options
        if blind:
            assert torch.allclose(model(one[:, :cut]), model(one)[:, :cut], atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 20), padding=st.lists(st.booleans(), min_size=5, max_size=5))
def test_nothing_reads_padding_but_padding(seed: int, padding: list[bool]) -> None:
    tokens, hidden = prompts(seed).clamp_min(1), torch.tensor(padding)
    for causal in (True, False):
        model = build(replace(SMALL, pad_token=0, causal=causal, schedule=(0, 1, 0)))
        padded = tokens.masked_fill(hidden, 0)
        before = model(padded)
        with torch.no_grad():
            model.embed.W_E[0] += 3
        after = model(padded)
        assert torch.allclose(after[:, ~hidden], before[:, ~hidden], atol=1e-12)
        assert not hidden.any() or (after[:, hidden] - before[:, hidden]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_a_prompt_means_the_same_padded_and_in_company(causal: bool) -> None:
    model, tokens = build(replace(SMALL, pad_token=0, causal=causal, normalization="LN")), prompts().clamp_min(1)
    padded = tokens.clone()
    for row, length in enumerate((5, 2, 3, 1)):
        padded[row, length:] = 0
        alone = model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(model(padded)[row, :length], alone, rtol=1e-10, atol=1e-12)
    # The mutant: a model that does not know its padding is moved by it, unless it cannot look there.
    deaf = build(replace(SMALL, causal=causal, normalization="LN"))
    assert torch.allclose(deaf(padded)[1, :2], deaf(tokens[1:2, :2])[0]) == causal


def test_without_a_pad_token_padding_is_read() -> None:
    model, tokens = build(SMALL), torch.tensor([[0, 1, 2]])
    before = model(tokens)
    with torch.no_grad():
        model.embed.W_E[0] += 3
    assert (model(tokens) - before)[:, 1:].abs().max() > 1e-3


def test_a_block_that_runs_twice_is_saved_once_and_patched_apart() -> None:
    model = build(replace(SMALL, n_layers=1, schedule=(0, 0)))
    assert model.config.n_steps == 2
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("weights.")} == {"0"}
    assert len(model.state_dict()) == len(build(replace(SMALL, n_layers=1)).state_dict())
    assert model.block(0) is model.block(1)
    first, second = (Site(kind=SiteKind.z, layer=layer) for layer in (0, 1))
    clean = run(model, prompts(0), record=[first, second])
    assert not torch.allclose(clean[first], clean[second])
    found = [
        run(model, prompts(1), record=[first, second], patches=[Patch(site=site, source=FromTrace(clean))])
        for site in (first, second)
    ]
    plain = run(model, prompts(1), record=[first])
    assert torch.equal(found[0][first], clean[first])
    assert torch.equal(found[1][first], plain[first])
    assert torch.equal(found[1][second], clean[second])
    assert not torch.equal(found[0][second], clean[second])
    assert len({tuple(trace.logits.flatten().tolist()) for trace in [*found, plain]}) == 3


def test_a_pass_can_go_on_from_a_cached_one() -> None:
    model, tokens = build(replace(SMALL, **OPTIONS["everything"])), prompts()
    record = [site for site in model.sites if site.kind.name in ("resid_pre", "k", "v")]
    whole = run(model, tokens, record=record)
    for step in range(model.config.n_steps):
        x = whole[f"L{step}.resid_pre"][:, 3:]
        for later in range(step, model.config.n_steps):
            past = Past(k=whole[f"L{later}.k"][:, :3], v=whole[f"L{later}.v"][:, :3])
            x = model.advance(later, x, tokens, {}, past)
        torch.testing.assert_close(model.finish(x, {}), whole.logits[:, 3:], rtol=1e-10, atol=1e-12)


def test_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (Transformer(SMALL, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.embed.W_E, same.embed.W_E)
    assert not torch.equal(one.embed.W_E, other.embed.W_E)
    big = Transformer(replace(SMALL, d_model=64, d_mlp=256), generator=torch.Generator().manual_seed(0))
    assert float(big.weights[0].mlp.W_in.detach().std()) == pytest.approx(64**-0.5, rel=0.05)
    assert not big.weights[0].mlp.b_in.any()


@pytest.mark.parametrize("option", OPTIONS)
def test_matrices_are_what_is_called_w(option: str) -> None:
    model = build(replace(SMALL, **OPTIONS[option]))
    wanted = [parameter for name, parameter in model.named_parameters() if name.rsplit(".", 1)[-1].startswith("W_")]
    assert list(map(id, model.matrices)) == list(map(id, wanted))


def test_gpt2s_weights_are_small_and_what_writes_smaller() -> None:
    config = replace(SMALL, n_layers=2, d_model=64, n_heads=4, d_head=16, d_mlp=256, biases=BIASES, init="gpt2")
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        std = 0.01 if last in ("W_O", "W_out") else 0.02
        # The embedding of 7 tokens has few entries to estimate a spread from.
        found = float(parameter.detach().std())
        assert (found == pytest.approx(std, rel=0.15)) == last.startswith("W_"), name
    # Plain and scaled weights come from the same draws.
    plain = Transformer(replace(config, init="fan_in"), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.weights[1].mlp.W_out, plain.weights[1].mlp.W_out * 0.02 * 8 / 2)


def test_a_linear_layers_weights_are_uniform_and_so_are_its_biases() -> None:
    config = replace(SMALL, d_model=64, d_mlp=256, biases=BIASES, normalization="LN", init="uniform")
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last.startswith("W_") or (last.startswith("b_") and last != "b_U"):
            assert float(parameter.detach().abs().max()) <= 1 / 8, name
        if last.startswith("W_"):
            assert float(parameter.detach().std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.15), name
    assert model.weights[1].mlp.b_in.detach().std() > 0.05
    assert not model.unembed.b_U.any()
    assert not model.final_norm.b.any()


def test_one_hot_embeddings_are_fixed_and_stand_side_by_side() -> None:
    config = replace(SMALL, embedding="one_hot", d_model=14, tied=True, d_vocab_out=7)
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    # 7 tokens, 2 dimensions between, 5 positions.
    by_hand = torch.zeros(5, 14)
    by_hand[0, 3] = by_hand[1, 6] = by_hand[2, 0] = by_hand[3, 0] = by_hand[4, 5] = 1
    by_hand[:, 9:] = torch.eye(5)
    assert torch.equal(model.start(torch.tensor([[3, 6, 0, 0, 5]]), {})[0], by_hand)
    # Tied, a logit is a coordinate of the stream.
    assert torch.equal(model.finish(by_hand, {}), by_hand[:, :7])
    assert not any(name.startswith(("embed", "pos_embed")) for name, _ in model.named_parameters())
    # They are kept with the weights, so that a checkpoint holds the whole model.
    assert {"embed.W_E", "pos_embed.W_pos"} < set(model.state_dict())


def test_the_published_search_model_has_the_published_number_of_parameters() -> None:
    # 6 d² + 10 d a layer and 2 d after the last, d = 46 tokens + 16 + 128 positions.
    config = ModelConfig(
        n_layers=6, d_model=190, n_heads=1, d_head=190, d_mlp=190, n_ctx=128, d_vocab=46, d_vocab_out=46,
        embedding="one_hot", tied=True, normalization="LN", biases=("attn", "mlp"), causal=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config, generator=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_311_380


def test_a_model_goes_round_once_more_with_the_same_weights() -> None:
    model = build(replace(SMALL, **OPTIONS["everything"]))
    state, before = torch.get_rng_state(), model(prompts())
    longer = model.with_schedule((1, 0, 1, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert longer.config == replace(model.config, schedule=(1, 0, 1, 1, 0))
    assert longer.provenance == model.provenance
    # By hand: the run so far, then the block once more, through places of its own.
    x = run(model, prompts(), record=["L3.resid_post"])["L3.resid_post"]
    by_hand = model.finish(longer.advance(4, x, prompts(), {}), {})
    torch.testing.assert_close(longer(prompts()), by_hand, rtol=1e-10, atol=1e-12)
    assert (longer(prompts()) - before).abs().max() > 1e-3
    # One set of parameters under the same names; each model's places are its own.
    mine, theirs = dict(model.named_parameters()), dict(longer.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert len(longer.blocks) == 5
    assert set(model.sites) < set(longer.sites)
    assert not {id(each) for each in model.blocks.modules()} & {id(each) for each in longer.blocks.modules()}
    # The model that was given is as it was, and its schedule is kept to.
    assert model.config.steps == (1, 0, 1, 1)
    assert torch.equal(model(prompts()), before)
    assert torch.equal(longer.with_schedule((1, 0, 1, 1))(prompts()), before)
    with pytest.raises(WorkbenchError, match="must run every block of 0 to 1 at least once"):
        model.with_schedule((1, 1))


def test_a_config_is_a_value() -> None:
    assert replace(SMALL, biases=("unembed", "attn")) == replace(SMALL, biases=("attn", "unembed", "attn"))
    assert ModelConfig(**SMALL.to_json()) == SMALL
    assert SMALL.to_json() == asdict(SMALL)
    assert SMALL.steps == (0, 1)
    assert replace(SMALL, schedule=(1, 0, 1)).steps == (1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("n_layers", "d_model", "n_heads", "n_ctx")),
        *(({name: -1}, f"{name} must be at least 1, got -1") for name in ("d_head", "d_vocab", "d_vocab_out")),
        ({"d_mlp": -1}, r"d_mlp must be 0 \(attention only\) or more, got -1"),
        ({"d_vocab_out": 8}, "d_vocab_out 8 must be at most d_vocab 7, and equal to it when tied"),
        ({"tied": True}, "d_vocab_out 6 must be at most d_vocab 7, and equal to it when tied"),
        (
            {"embedding": "one_hot", "d_model": 11},
            "One-hot embeddings of 7 tokens and 5 positions need d_model of at least 12, got 11",
        ),
        ({"pad_token": 7}, "pad_token 7 is outside the vocabulary of 7 tokens"),
        ({"pad_token": -1}, "pad_token -1 is outside the vocabulary of 7 tokens"),
        ({"schedule": ()}, r"schedule \(\) must run every block of 0 to 1 at least once, and no other"),
        ({"schedule": (0, 0)}, r"schedule \(0, 0\) must run every block of 0 to 1 at least once"),
        ({"schedule": (0, 1, 2)}, r"schedule \(0, 1, 2\) must run every block of 0 to 1 at least once, and no other"),
    ],
    ids=str,
)
def test_a_wrong_config_says_what_is_wrong(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "selu", "Unknown activation 'selu'. Known: relu, gelu, gelu_new."),
        ("normalization", "RMS", "Unknown normalization 'RMS'. Known: LN, None."),
        ("init", "zeros", "Unknown init 'zeros'. Known: fan_in, gpt2, uniform."),
        ("embedding", "sine", "Unknown embedding 'sine'. Known: learned, one_hot."),
        ("biases", ("mlp", "embed"), r"Unknown biases \['embed'\]. Known: attn, mlp, unembed."),
    ],
)
def test_a_wrong_word_is_answered_with_the_known_ones(field: str, value: object, message: str) -> None:
    # The constructor is type-checked in the tests, as it is not for users: the wrong word comes in behind it.
    config = replace(SMALL)
    object.__setattr__(config, field, value)
    with pytest.raises(WorkbenchError, match=message):
        config.__post_init__()
