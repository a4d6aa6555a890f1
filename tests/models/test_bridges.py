"""In and out of other libraries' formats: equal logits, or a reason."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.models.bridges import from_bridge, from_hooked_transformer, from_hugging_face, to_bridge
from workbench.models.config import BIASES, ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError

# TransformerLens, a browser's engine or whole commands are started here: seconds each.
pytestmark = pytest.mark.slow

SMALL = ModelConfig(n_layers=2, d_model=8, n_heads=2, d_head=3, d_mlp=10, n_ctx=5, d_vocab=7, d_vocab_out=6)
TOKENS = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))


def draw(model: Transformer, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.double()


def build(**changes: Any) -> Transformer:
    return draw(Transformer(replace(SMALL, **changes), generator=torch.Generator().manual_seed(1)))


def gap(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


# Out to TransformerLens and back.


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"biases": ("attn", "mlp")}, []),
        ({}, ["Zero biases were added to attn"]),
        ({"biases": ()}, ["Zero biases were added to attn and mlp"]),
        ({"biases": BIASES, "normalization": "LN"}, ["The unembedding's bias is a constant here"]),
        ({"d_mlp": 0, "biases": ("attn",)}, []),
        ({"tied": True, "d_vocab_out": 7, "biases": ("attn", "mlp")}, ["was tied to the embedding"]),
        ({"schedule": (0, 1, 1), "biases": ("attn", "mlp")}, ["2 blocks ran 3 times"]),
        ({"causal": False, "activation": "gelu", "biases": ("attn", "mlp")}, []),
        ({"activation": "gelu_new", "biases": ("attn", "mlp")}, []),
        ({"embedding": "one_hot", "d_model": 16, "biases": ("attn", "mlp")}, []),
    ],
    ids=str,
)
def test_a_bridge_and_the_way_back_keep_the_logits(changes: Mapping[str, Any], notes: list[str]) -> None:
    model = build(**changes)
    bridge, said = to_bridge(model)
    assert not bridge.training
    assert gap(bridge(TOKENS), model(TOKENS)) < 1e-12
    assert len(said) == len(notes)
    for note, words in zip(said, notes, strict=True):
        assert words in note
    back = from_bridge(bridge)
    assert gap(back(TOKENS), model(TOKENS)) < 1e-12
    assert back.config.n_layers == model.config.n_steps
    assert back.config.causal == model.config.causal
    assert ("unembed" in back.config.biases) == ("unembed" in model.config.biases)


def test_a_bridge_has_weights_of_its_own_and_draws_no_number() -> None:
    model = build()
    state, before = torch.get_rng_state(), model(TOKENS)
    bridge, _ = to_bridge(model)
    back = from_bridge(bridge)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in [*bridge.parameters(), *back.parameters()]:
            parameter.zero_()
    assert torch.equal(model(TOKENS), before)


def test_hidden_padding_is_not_exported() -> None:
    with pytest.raises(WorkbenchError, match="hides its padding token 2 from attention"):
        to_bridge(build(pad_token=2))


def native(**changes: Any) -> Any:
    from transformer_lens.model_bridge.sources.native import boot

    fields = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "n_ctx": 5, "d_vocab": 7, "d_mlp": 10}
    bridge = boot({**fields, "act_fn": "relu", "normalization_type": "LN", "seed": 0, **changes}, dtype=torch.float64)
    with torch.no_grad():
        for n, parameter in enumerate(bridge.parameters()):
            generator = torch.Generator().manual_seed(n)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return bridge.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "LNPre"},
        {"normalization_type": None, "d_mlp": None},
        {"attn_only": True},
        {"attn_scale": 3.0},
        {"use_attn_scale": False},
        {"attention_dir": "bidirectional"},
        {"d_vocab_out": 3},
    ],
    ids=str,
)
def test_a_native_model_of_theirs_becomes_ours(changes: Mapping[str, Any]) -> None:
    bridge = native(**changes)
    assert gap(from_bridge(bridge)(TOKENS), bridge(TOKENS)) < 1e-12


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        (
            {"positional_embedding_type": "rotary"},
            r"positions that are not learned and absolute \(positional_embedding_type='rotary'\)",
        ),
        ({"normalization_type": "RMS"}, r"a norm that is not LayerNorm \(normalization_type='RMS'\)"),
        ({"gated_mlp": True}, r"gated MLPs \(gated_mlp=True\)"),
        ({"n_key_value_heads": 1}, r"grouped queries \(n_key_value_heads=1\)"),
        ({"final_rms": True}, r"a final RMSNorm"),
        ({"act_fn": "silu"}, r"an unknown activation \(act_fn='silu'\)"),
        ({"attn_scores_soft_cap": 5.0}, r"capped attention scores"),
        ({"output_logits_soft_cap": 5.0}, r"capped logits"),
        ({"eps": 1e-6}, r"LayerNorm with another epsilon than 1e-05 \(eps=1e-06\)"),
    ],
    ids=str,
)
def test_what_our_models_lack_is_refused_by_name(changes: Mapping[str, Any], feature: str) -> None:
    with pytest.raises(WorkbenchError, match=f"This bridge has what our models lack: {feature}"):
        from_bridge(native(**changes))


def test_all_missing_features_are_named_at_once() -> None:
    with pytest.raises(WorkbenchError, match="absolute .*; a norm that is not LayerNorm .*; gated MLPs"):
        from_bridge(native(positional_embedding_type="rotary", normalization_type="RMS", gated_mlp=True))


def test_folded_and_foreign_bridges_are_refused() -> None:
    folded = native()
    folded.enable_compatibility_mode()
    with pytest.raises(WorkbenchError, match="in compatibility mode, which folds weights"):
        from_bridge(folded)
    foreign = native()
    foreign.cfg.architecture = "GPT2LMHeadModel"
    with pytest.raises(WorkbenchError, match="holds a GPT2LMHeadModel; only native ones"):
        from_bridge(foreign)


# Old HookedTransformer state dicts. The class is gone, so its mathematics is written out below, independently.

OLD = {
    "n_layers": 2,
    "d_model": 8,
    "n_ctx": 5,
    "d_head": 3,
    "n_heads": 2,
    "d_mlp": 10,
    "act_fn": "relu",
    "d_vocab": 7,
    "d_vocab_out": 6,
    "normalization_type": "LN",
    "eps": 1e-5,
    "attention_dir": "causal",
    "attn_only": False,
    "positional_embedding_type": "standard",
    "use_attn_scale": True,
    "attn_scale": math.sqrt(3),
    "scale_attn_by_inverse_layer_idx": False,
    "gated_mlp": False,
    "parallel_attn_mlp": False,
    "use_local_attn": False,
    "n_key_value_heads": None,
    "device": "cpu",
    "seed": None,
}


def old_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    c, generator = SimpleNamespace(**config), torch.Generator().manual_seed(3)
    heads, model, head, mlp = c.n_heads, c.d_model, c.d_head, c.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (c.d_vocab, model), "pos_embed.W_pos": (c.n_ctx, model)}
    norms = ["ln_final"]
    for layer in range(c.n_layers):
        block = f"blocks.{layer}"
        norms += [f"{block}.ln1"] if c.attn_only else [f"{block}.ln1", f"{block}.ln2"]
        shapes |= {f"{block}.attn.W_{x}": (heads, model, head) for x in "QKV"}
        shapes |= {f"{block}.attn.b_{x}": (heads, head) for x in "QKV"}
        shapes |= {f"{block}.attn.W_O": (heads, head, model), f"{block}.attn.b_O": (model,)}
        if not c.attn_only:
            shapes |= {f"{block}.mlp.W_in": (model, mlp), f"{block}.mlp.b_in": (mlp,)}
            shapes |= {f"{block}.mlp.W_out": (mlp, model), f"{block}.mlp.b_out": (model,)}
    if c.normalization_type == "LN":
        shapes |= {f"{norm}.{part}": (model,) for norm in norms for part in "wb"}
    shapes |= {"unembed.W_U": (model, c.d_vocab_out), "unembed.b_U": (c.d_vocab_out,)}
    state = {name: 0.6 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    for layer in range(c.n_layers):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(c.n_ctx, c.n_ctx).tril().bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return state


def old_logits(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """What a HookedTransformer computed."""
    c, n = SimpleNamespace(**config), TOKENS.shape[1]
    act = {
        "relu": lambda x: x.clamp_min(0),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[c.act_fn]

    def norm(x: Tensor, name: str) -> Tensor:
        if c.normalization_type is None:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.var(-1, keepdim=True, unbiased=False) + c.eps).sqrt()
        return x * state[f"{name}.w"] + state[f"{name}.b"] if c.normalization_type == "LN" else x

    x = state["embed.W_E"][TOKENS] + state["pos_embed.W_pos"][:n]
    for layer in range(c.n_layers):
        part = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"blocks.{layer}.")}
        h = norm(x, f"blocks.{layer}.ln1")
        q, k, v = (torch.einsum("bpm,hme->bphe", h, part[f"attn.W_{i}"]) + part[f"attn.b_{i}"] for i in "QKV")
        scale = c.attn_scale if c.use_attn_scale else 1.0
        scale *= layer + 1 if c.scale_attn_by_inverse_layer_idx else 1
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / scale
        if c.attention_dir == "causal":
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        z = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        x = x + torch.einsum("bqhe,hem->bqm", z, part["attn.W_O"]) + part["attn.b_O"]
        if not c.attn_only:
            h = act(norm(x, f"blocks.{layer}.ln2") @ part["mlp.W_in"] + part["mlp.b_in"])
            x = x + h @ part["mlp.W_out"] + part["mlp.b_out"]
    return norm(x, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "LNPre"},
        {"normalization_type": None, "eps": 1e-6},
        {"act_fn": "gelu"},
        {"act_fn": "gelu_new"},
        {"attention_dir": "bidirectional"},
        {"attn_only": True, "d_mlp": None, "act_fn": "relu"},
        {"use_attn_scale": False},
        {"attn_scale": 2.5},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_an_old_state_dict_computes_what_it_did(changes: Mapping[str, Any]) -> None:
    config = {**OLD, **changes}
    state = old_state(config)
    model = from_hooked_transformer(state, config)
    assert gap(model(TOKENS), old_logits(state, config)) < 1e-12
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_oracle_notices_a_wrong_transpose() -> None:
    state = old_state(OLD)
    broken = {**state, "blocks.1.attn.W_Q": state["blocks.1.attn.W_Q"].flip(0)}
    assert gap(from_hooked_transformer(broken, OLD)(TOKENS), old_logits(state, OLD)) > 1e-3


def test_short_configs_have_the_defaults_of_their_time() -> None:
    config = {name: OLD[name] for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_vocab", "act_fn")}
    full = {**OLD, "d_mlp": 32, "d_vocab_out": 7}
    state = old_state(full)
    assert gap(from_hooked_transformer(state, {**config, "d_vocab_out": -1})(TOKENS), old_logits(state, full)) < 1e-12
    with pytest.raises(
        WorkbenchError, match="config lacks d_model, act_fn, or has no number there. Give all of n_layers, d_model"
    ):
        from_hooked_transformer(state, {**config, "d_model": None, "act_fn": None})


@pytest.mark.parametrize("part", BIASES)
def test_a_part_without_biases_has_none_here(part: str) -> None:
    state = old_state(OLD)
    absent = [name for name in state if f"{part}.b_" in name]
    assert absent
    model = from_hooked_transformer({name: tensor for name, tensor in state.items() if name not in absent}, OLD)
    assert set(model.config.biases) == set(BIASES) - {part}
    zeroed = {**state, **{name: torch.zeros_like(state[name]) for name in absent}}
    assert gap(model(TOKENS), old_logits(zeroed, OLD)) < 1e-12
    assert gap(old_logits(zeroed, OLD), old_logits(state, OLD)) > 1e-3


def test_a_norm_that_should_have_no_parameters_is_not_overlooked() -> None:
    with pytest.raises(WorkbenchError, match="unknown blocks.0.ln1.w; unknown blocks.0.ln1.b"):
        from_hooked_transformer(old_state(OLD), {**OLD, "normalization_type": "LNPre"})


@pytest.mark.parametrize("name", ["n_layers", "d_mlp", "d_vocab_out"])
def test_a_size_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(WorkbenchError, match=f"config lacks {name}, or has no number there"):
        from_hooked_transformer(old_state(OLD), {**OLD, name: "two"})


def test_wrong_entries_are_listed_at_once() -> None:
    state = old_state(OLD)
    del state["blocks.0.attn.W_K"]
    state["blocks.1.mlp.W_gate"] = torch.zeros(1)
    state["ln_final.w"] = torch.zeros(9)
    with pytest.raises(WorkbenchError) as raised:
        from_hooked_transformer(state, OLD)
    for part in (
        "missing blocks.0.attn.W_K",
        "unknown blocks.1.mlp.W_gate",
        r"ln_final.w is (9,), wanted (8,)",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"positional_embedding_type": "shortformer"}, "positions that are not learned and absolute"),
        ({"use_local_attn": True}, "local attention"),
        ({"parallel_attn_mlp": True}, "attention and MLP side by side"),
        ({"num_experts": 4}, "a mixture of experts"),
        ({"post_embedding_ln": True}, "a norm after the embedding"),
        ({"use_normalization_before_and_after": True}, "norms after attention and MLP"),
        ({"use_qk_norm": True}, "normalised queries and keys"),
        ({"act_fn": "solu_ln"}, "an unknown activation"),
        ({"attention_dir": "sideways"}, "an unknown direction of attention"),
    ],
    ids=str,
)
def test_old_features_that_our_models_lack_are_refused_by_name(changes: Mapping[str, Any], feature: str) -> None:
    with pytest.raises(WorkbenchError, match=f"This HookedTransformer has what our models lack: {feature}"):
        from_hooked_transformer(old_state(OLD), {**OLD, **changes})


# Hugging Face folders.


def save_gpt2(folder: Path, **changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 5, "vocab_size": 7}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 12, "activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_a_gpt2_folder_keeps_its_logits(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    theirs = save_gpt2(tmp_path, **changes)
    ours = from_hugging_face(tmp_path)
    assert gap(ours(TOKENS), theirs(TOKENS).logits) < 1e-12
    assert ours.config.tied == changes.get("tie_word_embeddings", True)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"activation_function": "silu"}, r"an unknown activation \(act_fn='silu'\)"),
        ({"layer_norm_epsilon": 1e-6}, r"another epsilon than 1e-05"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
    ids=str,
)
def test_another_gpt2_is_refused_by_name(tmp_path: Path, changes: Mapping[str, Any], feature: str) -> None:
    save_gpt2(tmp_path, **changes)
    with pytest.raises(WorkbenchError, match=feature):
        from_hugging_face(tmp_path)


def test_a_gpt2_in_memory_is_read_like_its_folder(tmp_path: Path) -> None:
    theirs = save_gpt2(tmp_path)
    ours, read = from_hugging_face(theirs), from_hugging_face(tmp_path)
    assert ours.config == read.config
    assert torch.equal(ours(TOKENS), read(TOKENS))
    with torch.no_grad():
        theirs.lm_head.weight.zero_()
    assert torch.equal(ours(TOKENS), read(TOKENS))
    with pytest.raises(WorkbenchError, match="This Linear holds a model of type None. Only 'gpt2' can be converted"):
        from_hugging_face(torch.nn.Linear(2, 2))


def test_old_and_sharded_gpt2_files_are_read(tmp_path: Path) -> None:
    # What the first GPT-2 files look like: no prefix, the causal mask as an entry, few words in the config.
    theirs = save_gpt2(tmp_path)
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 5, "vocab_size": 7}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    entries = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    entries = {name: tensor.clone() for name, tensor in entries.items()} | {"h.0.attn.bias": torch.ones(1, 1, 5, 5)}
    (tmp_path / "model.safetensors").unlink()
    for number, chosen in enumerate((sorted(entries)[::2], sorted(entries)[1::2])):
        save_file({name: entries[name] for name in chosen}, tmp_path / f"model-{number}.safetensors")
    assert gap(from_hugging_face(tmp_path)(TOKENS), theirs(TOKENS).logits) < 1e-12


def test_half_precision_is_read_as_single(tmp_path: Path) -> None:
    theirs = save_gpt2(tmp_path).half()
    ours = from_hugging_face(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert gap(ours(TOKENS), theirs.float()(TOKENS).logits) < 1e-5


def test_entries_of_a_gpt2_that_do_not_fit_are_listed_at_once(tmp_path: Path) -> None:
    # Left to itself, transformers draws the missing weights at random.
    entries = save_gpt2(tmp_path).state_dict()
    del entries["lm_head.weight"], entries["transformer.h.0.mlp.c_fc.weight"]
    entries |= {"transformer.h.1.extra": torch.zeros(1), "transformer.ln_f.bias": torch.zeros(9)}
    save_file(entries, tmp_path / "model.safetensors")
    wanted = r"missing h.0.mlp.c_fc.weight; unknown h.1.extra; ln_f.bias is \(9,\), wanted \(8,\)"
    with pytest.raises(WorkbenchError, match=wanted):
        from_hugging_face(tmp_path)


def wrong_folders(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "nowhere", "has no config.json. Give the folder that save_pretrained"
    config = tmp_path / "config.json"
    config.write_text("{")
    yield tmp_path, "Cannot read .*config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    yield tmp_path, "holds a model of type 'llama'. Only 'gpt2'"
    sizes = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 5, "vocab_size": 7}
    config.write_text(json.dumps({**sizes, "n_layer": "two", "n_positions": None}))
    yield tmp_path, "its config lacks n_layer, n_positions, or has no number there"
    config.write_text(json.dumps({**sizes, "n_head": 3}))
    yield tmp_path, "n_embd 8 of its config does not split into n_head 3 heads"
    config.write_text(json.dumps(sizes))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    yield tmp_path, "has no .safetensors file.*pickled weights are not read"
    (tmp_path / "model.safetensors").write_bytes(b"not it")
    yield tmp_path, "Cannot read .*model.safetensors as a state dict"


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    for folder, message in wrong_folders(tmp_path):
        with pytest.raises(WorkbenchError, match=message):
            from_hugging_face(folder)
