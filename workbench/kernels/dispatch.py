"""Which implementation of the fused operations is used: chosen once for a kind of device, and by name.

Triton's where there is a CUDA device and Triton can be imported, oneDNN's on a processor whose PyTorch has it, else the
reference. `WORKBENCH_KERNELS=reference` (or `triton`, or `onednn`) overrides the choice. What a kernel does not take
(another dtype, a longer prompt, wider rows, few rows), and what PyTorch was measured to do faster, is the reference's.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.kernels import onednn, reference
from workbench.kernels.reference import Group
from workbench.runtime import WorkbenchError

OVERRIDE = "WORKBENCH_KERNELS"
NAMES = ("reference", "triton", "onednn")
MOST_POSITIONS = 16
"""Longest prompt that the kernel takes: on an H200 it is 2.9 times as fast as PyTorch's at 12, 0.9 times at 24."""
WIDEST = 256
"""Entries of the longest rows that cross-entropy's kernels take: a program sums whole ones, in registers."""
MOST_LOGITS = 2**28
"""Up to as many logits are written to memory: on an H200 PyTorch's matrix products are 1.6 to 2.5 times as fast as
kernels that compute each logit three times. More of them, and their gradient, are memory that a card may not have."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The fused operations, by one implementation."""

    name: str
    affine: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    mlp: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor, Tensor | None, Tensor, torch.dtype], Tensor]
    adamw: Callable[[Sequence[Group], tuple[float, float], float, tuple[float, float] | None], None]


REFERENCE = Kernels(
    name="reference",
    affine=reference.affine,
    mlp=reference.mlp,
    add_norm=reference.add_norm,
    attention=reference.attention,
    cross_entropy=reference.cross_entropy,
    adamw=reference.adamw,
)


def kernels_for(device: torch.device) -> Kernels:
    """The fused operations on this device.

    Raises:
        WorkbenchError: the override names no implementation, or one that is not installed or does not run there.
    """
    return _chosen(device.type, os.environ.get(OVERRIDE))


@functools.cache
def _chosen(device: str, override: str | None) -> Kernels:
    if override not in (None, *NAMES):
        raise WorkbenchError(f"{OVERRIDE}={override} names no kernels. Known: {', '.join(NAMES)}.")
    present = importlib.util.find_spec("triton") is not None
    if override == "triton" and not present:
        raise WorkbenchError(f"{OVERRIDE}=triton, but Triton is not installed: pip install 'interp-workbench[gpu]'.")
    if override == "triton" and device != "cuda" and not _interpreted():
        raise WorkbenchError(
            f"{OVERRIDE}=triton needs a CUDA device, and this is {device!r}: unset it, or TRITON_INTERPRET=1."
        )
    if override is None and device == "cuda" and not present:
        log.warning("Triton is not installed, so the plain kernels are used: pip install 'interp-workbench[gpu]'.")
    if override == "onednn" and (device != "cpu" or not onednn.is_available()):
        raise WorkbenchError(f"{OVERRIDE}=onednn needs a processor and a PyTorch with oneDNN: unset it.")
    if override == "triton" or (override is None and device == "cuda" and present):
        return _triton()
    if override == "onednn" or (override is None and device == "cpu" and onednn.is_available()):
        return _onednn()
    return REFERENCE


def _interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the processor."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _onednn() -> Kernels:
    def dtype_of(x: Tensor, *matrices: Tensor) -> torch.dtype | None:
        """What these are multiplied in; None where the reference takes them."""
        if x.numel() < onednn.FEWEST_ROWS * x.shape[-1] or min(matrices[0].shape) < onednn.NARROWEST:
            return None
        if torch.is_autocast_enabled("cpu"):
            return torch.get_autocast_dtype("cpu")
        return torch.float32 if all(each.dtype == torch.float32 for each in (x, *matrices)) else None

    def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        dtype = dtype_of(x, w)
        return reference.affine(x, w, b) if dtype is None else onednn.affine(x, w, b, dtype)

    def mlp(
        x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, activation: str
    ) -> Tensor:
        dtype, operands = dtype_of(x, w_in, w_out), (x, w_in, b_in, w_out, b_out, activation)
        return reference.mlp(*operands) if dtype is None else onednn.mlp(*operands, dtype)

    def cross_entropy(x: Tensor, w: Tensor, b: Tensor | None, answer: Tensor, dtype: torch.dtype) -> Tensor:
        if w.ndim > 2:
            return reference.cross_entropy(x, w, b, answer, dtype)
        return reference.answer_losses(affine(x, w, b), answer, dtype)

    return replace(REFERENCE, name="onednn", affine=affine, mlp=mlp, cross_entropy=cross_entropy)


def _triton() -> Kernels:
    # Triton launches on the process's current card, whichever holds the tensors: hence `device_of`.
    from workbench.kernels import fused_adamw, fused_add_norm, fused_attention, fused_cross_entropy

    def add_norm(x: Tensor, added: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        fits = x.dtype == added.dtype == torch.float32 and x.numel() > 0
        with torch.cuda.device_of(x):
            return (fused_add_norm if fits else reference).add_norm(x, added, w, b, eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        short = max(q.shape[1], k.shape[1]) <= MOST_POSITIONS
        fits = q.dtype == torch.float32 and q.numel() > 0 and short
        with torch.cuda.device_of(q):
            return (fused_attention if fits else reference).attention(q, k, v, allowed)

    def cross_entropy(x: Tensor, w: Tensor, b: Tensor | None, answer: Tensor, dtype: torch.dtype) -> Tensor:
        many = answer.numel() * w.shape[-1] > MOST_LOGITS
        fits = x.dtype == torch.float32 and many and x.shape[-1] <= WIDEST
        with torch.cuda.device_of(x):
            return (fused_cross_entropy if fits else reference).cross_entropy(x, w, b, answer, dtype)

    def adamw(
        groups: Sequence[Group], betas: tuple[float, float], eps: float, grokfast: tuple[float, float] | None
    ) -> None:
        weights = [weight for group in groups for weight in group.weights]
        single = all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights)
        # Without the filter PyTorch's own update reads and writes as little.
        with torch.cuda.device_of(weights[0]):
            if single and grokfast is not None:
                fused_adamw.adamw(groups, betas, eps, grokfast)
            else:
                reference.adamw(groups, betas, eps, grokfast)

    return Kernels(
        name="triton",
        affine=reference.affine,
        mlp=reference.mlp,
        add_norm=add_norm,
        attention=attention,
        cross_entropy=cross_entropy,
        adamw=adamw,
    )
