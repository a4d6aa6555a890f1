"""The ways in and out: the same function, in another library's layout of the same weights.

Four formats hold transformers of this kind. TransformerLens' native models, behind a `TransformerBridge`; the state
dicts that `HookedTransformer` wrote until TransformerLens 4 removed the class; and Hugging Face folders of the shape of
GPT-2 (Radford et al. 2019). A conversion is right when the logits are equal, and that is what the tests compare.
What the other side computes and ours cannot (rotary positions, RMSNorm, gated MLPs, grouped queries, …) is refused by
name: a model that is nearly the same is worse than none.

All three readers meet in one layout, `HookedTransformer`'s, which is ours too but for the names of a few modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from workbench.kernels.reference import ACTIVATIONS
from workbench.models.config import BIASES, Bias, ModelConfig
from workbench.models.transformer import EPS, Transformer
from workbench.runtime import WorkbenchError
from workbench.store import load_state_dict, read_json

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NATIVE = "TransformerLensNative"
GPT2 = "GPT2LMHeadModel"
CONV1D = ("attn.o.weight", "mlp.in.weight", "mlp.out.weight")
BUFFERS = (".mask", ".IGNORE")
"""Entries of old state dicts that are constants: which positions are masked, and with what."""
RENAMED = {"blocks": "weights", "ln_final": "final_norm"}
"""First parts of names in the shared layout, and ours."""
SYNONYMS = {"gelu_pytorch_tanh": "gelu_new"}
"""Other libraries' names of our activations."""
Activation = Literal["relu", "gelu", "gelu_new"]
FOLDED = (
    "This bridge is in compatibility mode, which folds weights into one another. Convert it before "
    "enable_compatibility_mode() is called."
)
REQUIRED = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_vocab")
OPTIONAL = ("d_mlp", "d_vocab_out")
GPT2_SIZES = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")


def _is_on(value: object) -> bool:
    return value not in (None, False)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


REFUSED: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "positional_embedding_type": ("positions that are not learned and absolute", lambda v: v not in ("standard", None)),
    "normalization_type": ("a norm that is not LayerNorm", lambda v: v not in ("LN", "LNPre", None)),
    "final_rms": ("a final RMSNorm", _is_on),
    "act_fn": ("an unknown activation", lambda v: v is not None and SYNONYMS.get(str(v), v) not in ACTIVATIONS),
    "gated_mlp": ("gated MLPs", _is_on),
    "num_experts": ("a mixture of experts", _is_on),
    "parallel_attn_mlp": ("attention and MLP side by side", _is_on),
    "use_local_attn": ("local attention", _is_on),
    "post_embedding_ln": ("a norm after the embedding", _is_on),
    "use_normalization_before_and_after": ("norms after attention and MLP", _is_on),
    "use_qk_norm": ("normalised queries and keys", _is_on),
    "add_cross_attention": ("cross-attention", _is_on),
    "attn_scores_soft_cap": ("capped attention scores", _is_positive),
    "output_logits_soft_cap": ("capped logits", _is_positive),
    "attention_dir": ("an unknown direction of attention", lambda v: v not in ("causal", "bidirectional")),
}
"""Fields of TransformerLens' configs: what they bring that our models lack, and at which values."""


def to_bridge(model: Transformer) -> tuple[TransformerBridge, tuple[str, ...]]:
    """A native TransformerLens model with the same logits, in evaluation mode, and what changed on the way.

    The weights are copied. A tied unembedding becomes a matrix of its own, a block that runs twice becomes two blocks,
    missing biases are there as zeros: trained further, such a bridge is another model, and the notes say why.

    Raises:
        WorkbenchError: the model hides padding, which native models do not.
    """
    from transformer_lens.model_bridge.sources.native import boot

    config = model.config
    if config.pad_token is not None:
        raise WorkbenchError(
            f"This model hides its padding token {config.pad_token} from attention. TransformerLens' native models "
            "know no padding token, so their logits would differ. Export a model with pad_token None."
        )
    fields = {
        **{name: getattr(config, name) for name in ("d_model", "n_ctx", "d_head", "n_heads", "d_vocab", "d_vocab_out")},
        "n_layers": config.n_steps,
        "d_mlp": config.d_mlp or None,
        "attn_only": not config.d_mlp,
        "act_fn": config.activation,
        "normalization_type": config.normalization,
        "attention_dir": "causal" if config.causal else "bidirectional",
        "eps": EPS,
        "init_weights": False,
    }
    # Layers draw weights when they are made, which are overwritten at once: not from the caller's stream.
    with torch.random.fork_rng(devices=[]):
        bridge = boot(fields, device=model.embed.W_E.device, dtype=model.embed.W_E.dtype, model_name="workbench")
    state = {name: tensor.detach().clone() for name, tensor in _layout(model).items()}
    wanted = bridge.state_dict()
    native = dict(_to_linear(name, tensor) for name, tensor in state.items())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wanted.items() if name not in native}
    bridge.load_state_dict({**zeros, **native}, strict=True)
    return bridge.eval(), tuple(_export_notes(config))


def transformer_of(bridge: TransformerBridge) -> Transformer:
    """The model in a native or GPT-2-shaped bridge, with the same logits. The weights are copied.

    Raises:
        WorkbenchError: another architecture, folded weights, or a feature that our models lack.
    """
    if bridge.cfg.architecture == NATIVE:
        return from_bridge(bridge)
    if bridge.cfg.architecture != GPT2:
        raise WorkbenchError(
            f"This bridge holds a {bridge.cfg.architecture}. Only native and GPT-2-shaped ones can be run in parts."
        )
    if bridge.compatibility_mode:
        raise WorkbenchError(FOLDED)
    state = bridge.state_dict()
    biases: tuple[Bias, ...] = BIASES if state["unembed.bias"].any() else ("attn", "mlp")
    if "unembed" not in biases:
        del state["unembed.bias"]
    # GPT-2 stores these transposed (Conv1D), and the bridge leaves them so.
    turned = {name: tensor.T if name.endswith(CONV1D) else tensor for name, tensor in state.items()}
    fields = _gpt2_fields(cast(Any, bridge.original_model).config.to_dict(), "This bridge")
    layout = dict(_from_linear(name, tensor, bridge.cfg.n_heads) for name, tensor in turned.items())
    return _assemble(layout, fields, biases=biases, tied=False, source="This bridge")


def from_bridge(bridge: TransformerBridge) -> Transformer:
    """The model in a bridge that `boot_native` made, with the same logits. The weights are copied.

    Raises:
        WorkbenchError: another architecture, folded weights, or a feature that our models lack.
    """
    if bridge.cfg.architecture != NATIVE:
        raise WorkbenchError(
            f"This bridge holds a {bridge.cfg.architecture}; only native ones (TransformerBridge.boot_native) can be "
            "converted. Use from_hugging_face for a GPT-2, or BridgeModel to look into the bridge as it is."
        )
    if bridge.compatibility_mode:
        raise WorkbenchError(FOLDED)
    fields = dict(vars(bridge.cfg))
    # Native attention divides by attn_scale if that is set, by sqrt(d_head) otherwise, and reads no other field.
    given = fields["use_attn_scale"] and fields["attn_scale"] > 0
    fields |= {
        "use_attn_scale": True,
        "attn_scale": fields["attn_scale"] if given else math.sqrt(fields["d_head"]),
        "scale_attn_by_inverse_layer_idx": False,
    }
    state = bridge.state_dict()
    # No parameter stands behind this entry: zeros, unless something was folded into it.
    biases: tuple[Bias, ...] = BIASES if state["unembed.bias"].any() else ("attn", "mlp")
    if "unembed" not in biases:
        del state["unembed.bias"]
    _refuse(fields, "This bridge")
    layout = dict(_from_linear(name, tensor, fields["n_heads"]) for name, tensor in state.items())
    return _assemble(layout, fields, biases=biases, tied=False, source="This bridge")


def from_hooked_transformer(state_dict: Mapping[str, Tensor], config: Mapping[str, object]) -> Transformer:
    """The model that a `HookedTransformer`, the class that TransformerLens 4 removed, wrote as a state dict.

    Logits are equal. A parameter-free LayerNorm (`LNPre`) becomes one with weight 1 and bias 0; where attention was not
    scaled by the root of `d_head`, the difference is in the queries' weights. Parts without any bias have none here.

    Args:
        state_dict: what `HookedTransformer.state_dict()` returned.
        config: its `cfg.to_dict()`.

    Raises:
        WorkbenchError: a feature that our models lack, or entries that are missing, left over or of another shape.
    """
    layout = {name: tensor for name, tensor in state_dict.items() if not name.endswith(BUFFERS)}
    # `attn.b_Q`, `mlp.b_in`, `unembed.b_U`: a part that has one of its biases needs all of them.
    biases: tuple[Bias, ...] = tuple(part for part in BIASES if any(f"{part}.b_" in name for name in layout))
    return _assemble(layout, config, biases=biases, tied=False, source="This HookedTransformer")


def from_hugging_face(source: Path | nn.Module) -> Transformer:
    """The model in a local Hugging Face folder or a `GPT2LMHeadModel`, with the same logits. Weights are copied.

    Raises:
        WorkbenchError: no such folder, no safetensors in it, another architecture, a feature that our models lack, or
            entries that are missing, left over or of another shape.
    """
    if isinstance(source, Path):
        name = str(source)
        if not (source / "config.json").is_file():
            raise WorkbenchError(f"{name} has no config.json. Give the folder that save_pretrained() wrote.")
        config = read_json(source / "config.json")
    else:
        name, given = f"This {type(source).__name__}", cast(Any, getattr(source, "config", None))
        config = given.to_dict() if hasattr(given, "to_dict") else {}
    if config.get("model_type") != "gpt2":
        raise WorkbenchError(
            f"{name} holds a model of type {config.get('model_type')!r}. Only 'gpt2' can be converted."
        )
    fields = _gpt2_fields(config, name)
    tied = bool(config.get("tie_word_embeddings", True))
    sizes = _config(fields, biases=("attn", "mlp"), tied=tied, source=name)
    state = _read_shards(source) if isinstance(source, Path) else source.state_dict()
    entries = {entry.removeprefix("transformer."): tensor for entry, tensor in state.items()}
    # Old files hold the causal mask too, and some hold a tied unembedding twice.
    entries = {
        entry: tensor
        for entry, tensor in entries.items()
        if not entry.endswith((".attn.bias", ".attn.masked_bias")) and not (tied and entry == "lm_head.weight")
    }
    _check_shapes({entry: tensor.shape for entry, tensor in entries.items()}, _gpt2_shapes(sizes), name)
    return _assemble(dict(_gpt2_layout(entries, sizes)), fields, biases=sizes.biases, tied=tied, source=name)


def _layout(model: Transformer) -> dict[str, Tensor]:
    """Tensors in the shared layout: a block for each step, the unembedding a matrix of its own."""
    state = {"unembed.W_U": model.W_U}
    for name, tensor in model.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "final_norm":
            state[f"ln_final.{rest}"] = tensor
        elif first != "weights":
            state[name] = tensor
    for step in range(model.config.n_steps):
        state |= {f"blocks.{step}.{name}": tensor for name, tensor in model.block(step).state_dict().items()}
    return state


def _to_linear(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A bridge's entry for one of the layout: `blocks.0.attn.W_Q` is `blocks.0.attn.q.weight`, heads flattened."""
    module, last = name.rsplit(".", 1)
    kind, _, part = last.partition("_")
    owner = f"{module}.{part.lower()}" if module.endswith((".attn", ".mlp")) else module
    if kind.lower() == "b":
        return f"{owner}.bias", tensor.flatten()
    if part in ("Q", "K", "V"):
        tensor = tensor.transpose(1, 2).flatten(0, 1)
    elif part == "O":
        tensor = tensor.flatten(0, 1).T
    elif part in ("in", "out", "U"):
        tensor = tensor.T
    return f"{owner}.weight", tensor.contiguous()


def _from_linear(name: str, tensor: Tensor, n_heads: int) -> tuple[str, Tensor]:
    """The layout's entry for one of a bridge: the inverse of `_to_linear`."""
    owner, last = name.rsplit(".", 1)
    outer, _, inner = owner.rpartition(".")
    bias = last == "bias"
    singles = {"embed": "E", "pos_embed": "pos", "unembed": "U"}
    if owner in singles:
        part = singles[owner]
    elif inner in ("q", "k", "v", "o", "in", "out") and outer.endswith((".attn", ".mlp")):
        owner, part = outer, inner.upper() if outer.endswith(".attn") else inner
    else:
        return f"{owner}.{'b' if bias else 'w'}", tensor
    if part in ("Q", "K", "V"):
        tensor = tensor.unflatten(0, (n_heads, -1))
        tensor = tensor if bias else tensor.transpose(1, 2)
    elif part == "O" and not bias:
        tensor = tensor.T.unflatten(0, (n_heads, -1))
    elif part in ("in", "out", "U") and not bias:
        tensor = tensor.T
    return f"{owner}.{'b' if bias else 'W'}_{part}", tensor


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Entries of a folder, in as many files as they were saved in."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WorkbenchError(
            f"{folder} has no .safetensors file. Save it anew with save_pretrained(); pickled weights are not read."
        )
    return {entry: tensor for file in files for entry, tensor in load_state_dict(file).items()}


def _gpt2_fields(config: Mapping[str, Any], source: str) -> dict[str, object]:
    """A GPT-2's config as fields of a TransformerLens config; what old files left out is GPT-2's own."""
    lacking = [name for name in GPT2_SIZES if not isinstance(config.get(name), int)]
    if lacking:
        raise WorkbenchError(f"{source}: its config lacks {', '.join(lacking)}, or has no number there.")
    width, heads = config["n_embd"], config["n_head"]
    if heads < 1 or width % heads:
        raise WorkbenchError(f"{source}: n_embd {width} of its config does not split into n_head {heads} heads.")
    return {
        "n_layers": config["n_layer"],
        "d_model": width,
        "n_ctx": config["n_positions"],
        "d_head": width // heads,
        "n_heads": heads,
        "d_mlp": config.get("n_inner"),
        "d_vocab": config["vocab_size"],
        "act_fn": config.get("activation_function", "gelu_new"),
        "eps": config.get("layer_norm_epsilon", EPS),
        "use_attn_scale": config.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        "add_cross_attention": config.get("add_cross_attention", False),
    }


def _gpt2_shapes(sizes: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a GPT-2 of this size holds. It stores q, k and v side by side, and its weights as `[in, out]`."""
    width, mlp = sizes.d_model, sizes.d_mlp
    block = {
        "ln_1": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (width, mlp),
        "mlp.c_proj": (mlp, width),
    }
    modules = {f"h.{layer}.{name}": shape for layer in range(sizes.n_layers) for name, shape in block.items()}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (sizes.d_vocab, width), "wpe.weight": (sizes.n_ctx, width)}
    for name, shape in {**modules, "ln_f": (width,)}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return shapes if sizes.tied else {**shapes, "lm_head.weight": (sizes.d_vocab, width)}


def _gpt2_layout(entries: Mapping[str, Tensor], sizes: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The shared layout's entries."""
    heads = (sizes.n_heads, sizes.d_head)
    yield "embed.W_E", entries["wte.weight"]
    yield "pos_embed.W_pos", entries["wpe.weight"]
    norms = [("ln_final", "ln_f")]
    for layer in range(sizes.n_layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        norms += [(f"{ours}.ln1", f"{theirs}.ln_1"), (f"{ours}.ln2", f"{theirs}.ln_2")]
        weights, biases = (entries[f"{theirs}.attn.c_attn.{kind}"].chunk(3, dim=-1) for kind in ("weight", "bias"))
        for part, weight, bias in zip("QKV", weights, biases, strict=True):
            yield f"{ours}.attn.W_{part}", weight.unflatten(1, heads).transpose(0, 1)
            yield f"{ours}.attn.b_{part}", bias.unflatten(0, heads)
        yield f"{ours}.attn.W_O", entries[f"{theirs}.attn.c_proj.weight"].unflatten(0, heads)
        yield f"{ours}.attn.b_O", entries[f"{theirs}.attn.c_proj.bias"]
        for part, name in (("in", "c_fc"), ("out", "c_proj")):
            yield f"{ours}.mlp.W_{part}", entries[f"{theirs}.mlp.{name}.weight"]
            yield f"{ours}.mlp.b_{part}", entries[f"{theirs}.mlp.{name}.bias"]
    for ours, theirs in norms:
        yield f"{ours}.w", entries[f"{theirs}.weight"]
        yield f"{ours}.b", entries[f"{theirs}.bias"]
    if not sizes.tied:
        yield "unembed.W_U", entries["lm_head.weight"].T


def _assemble(
    layout: Mapping[str, Tensor], fields: Mapping[str, object], *, biases: tuple[Bias, ...], tied: bool, source: str
) -> Transformer:
    """A model of its own from tensors in the shared layout and the fields of a TransformerLens config."""
    config = _config(fields, biases=biases, tied=tied, source=source)
    # No memory and no random number is spent on weights that are replaced at once.
    with torch.device("meta"):
        model = Transformer(config, generator=None)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # Weights that were saved in half precision are computed with in single.
    state = {
        _our_name(name): tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in layout.items()
    }
    # A norm without parameters is one of weight 1 and bias 0, which no file holds.
    implied = {name for name in wanted if name.endswith((".w", ".b")) and fields.get("normalization_type") == "LNPre"}
    _check_shapes(
        {_their_name(name): tensor.shape for name, tensor in state.items()},
        {_their_name(name): shape for name, shape in wanted.items() if name not in implied},
        source,
    )
    for name in implied:
        state[name] = state["embed.W_E"].new_full(wanted[name], float(name.endswith(".w")))
    for layer in range(config.n_layers):
        factor = math.sqrt(config.d_head) / _attention_scale(fields, config, layer)
        for name in {f"weights.{layer}.attn.W_Q", f"weights.{layer}.attn.b_Q"} & set(state):
            state[name] = state[name] * factor
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(owned, strict=True, assign=True)
    return model.eval()


def _refuse(fields: Mapping[str, object], source: str) -> None:
    """Raise a WorkbenchError that names every feature which our models lack."""
    found = [
        f"{reason} ({name}={fields[name]!r})"
        for name, (reason, wrong) in REFUSED.items()
        if name in fields and wrong(fields[name]) and not (name == "act_fn" and fields.get("attn_only"))
    ]
    if fields.get("n_key_value_heads") not in (None, fields.get("n_heads")):
        found.append(f"grouped queries (n_key_value_heads={fields['n_key_value_heads']!r})")
    if fields.get("normalization_type", "LN") is not None and fields.get("eps", EPS) != EPS:
        found.append(f"LayerNorm with another epsilon than {EPS:g} (eps={fields['eps']!r})")
    if found:
        raise WorkbenchError(
            f"{source} has what our models lack: {'; '.join(found)}. Look into it through "
            "workbench.instrument.adapters, which leave the model as it is."
        )


def _config(fields: Mapping[str, object], *, biases: tuple[Bias, ...], tied: bool, source: str) -> ModelConfig:
    _refuse(fields, source)
    attn_only = bool(fields.get("attn_only"))
    # TransformerLens leaves d_mlp out, and writes -1 for d_vocab_out, where they follow from the rest.
    size = {name: value for name in (*REQUIRED, *OPTIONAL) if isinstance(value := fields.get(name), int)}
    missing = [name for name in REQUIRED if name not in size]
    missing += [name for name in OPTIONAL if name not in size and fields.get(name) is not None]
    missing += [] if attn_only or fields.get("act_fn") is not None else ["act_fn"]
    if missing:
        raise WorkbenchError(
            f"{source}: its config lacks {', '.join(missing)}, or has no number there. "
            f"Give all of {', '.join(REQUIRED)}, act_fn."
        )
    d_mlp, d_vocab_out = size.get("d_mlp", 4 * size["d_model"]), size.get("d_vocab_out", -1)
    activation = str(fields.get("act_fn"))
    return ModelConfig(
        n_layers=size["n_layers"],
        d_model=size["d_model"],
        n_heads=size["n_heads"],
        d_head=size["d_head"],
        d_mlp=0 if attn_only else d_mlp,
        n_ctx=size["n_ctx"],
        d_vocab=size["d_vocab"],
        d_vocab_out=d_vocab_out if d_vocab_out > 0 else size["d_vocab"],
        normalization=None if fields.get("normalization_type", "LN") is None else "LN",
        activation="relu" if attn_only else cast(Activation, SYNONYMS.get(activation, activation)),
        tied=tied,
        biases=biases,
        causal=fields.get("attention_dir", "causal") == "causal",
    )


def _attention_scale(fields: Mapping[str, object], config: ModelConfig, layer: int) -> float:
    """What the source divides its attention scores by."""
    given = float(str(fields.get("attn_scale", -1.0)))
    scale = given if given > 0 else math.sqrt(config.d_head)
    scale = scale if fields.get("use_attn_scale", True) else 1.0
    return scale * (layer + 1) if fields.get("scale_attn_by_inverse_layer_idx") else scale


def _our_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return RENAMED.get(first, first) + dot + rest


def _their_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return {ours: theirs for theirs, ours in RENAMED.items()}.get(first, first) + dot + rest


def _check_shapes(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], source: str) -> None:
    """Raise one WorkbenchError for all entries that are missing, left over or of another shape."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted]
    faults += [
        f"{name} is {tuple(found[name])}, wanted {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if faults:
        raise WorkbenchError(f"{source} does not fit its config: {'; '.join(faults)}.")


def _export_notes(config: ModelConfig) -> Iterator[str]:
    if config.tied:
        yield "The unembedding was tied to the embedding; here it is a matrix of its own."
    if config.n_steps > config.n_layers:
        yield f"{config.n_layers} blocks ran {config.n_steps} times; here each pass is a block of its own."
    parts = BIASES if config.d_mlp else ("attn", "unembed")
    absent = [part for part in parts if part not in config.biases and part != "unembed"]
    if absent:
        yield f"Zero biases were added to {' and '.join(absent)}; training would move them."
    if "unembed" in config.biases:
        yield "The unembedding's bias is a constant here; training would not move it."
