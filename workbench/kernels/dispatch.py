"""Which implementation of the fused operations is used: chosen once for a kind of device, and by name.

Triton's where there is a CUDA device and Triton can be imported, else the reference. `WORKBENCH_KERNELS=reference` (or
`triton`) overrides the choice. What a kernel does not take (another dtype, a longer prompt) goes to the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels import reference
from workbench.runtime import WorkbenchError

OVERRIDE = "WORKBENCH_KERNELS"
NAMES = ("reference", "triton")
MOST_POSITIONS = 16
"""Longest prompt that the kernel takes: on an H200 it is 2.9 times as fast as PyTorch's at 12, 0.9 times at 24."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The fused operations, by one implementation."""

    name: str
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


REFERENCE = Kernels(name="reference", add_norm=reference.add_norm, attention=reference.attention)


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
    wanted = override or ("triton" if device == "cuda" and present else "reference")
    return _triton() if wanted == "triton" else REFERENCE


def _interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the processor."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _triton() -> Kernels:
    # Triton launches on the process's current card, whichever holds the tensors: hence `device_of`.
    from workbench.kernels import fused_add_norm, fused_attention

    def add_norm(x: Tensor, added: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        fits = x.dtype == torch.float32 and x.numel() > 0
        with torch.cuda.device_of(x):
            return (fused_add_norm if fits else reference).add_norm(x, added, w, b, eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        short = max(q.shape[1], k.shape[1]) <= MOST_POSITIONS
        fits = q.dtype == torch.float32 and q.numel() > 0 and short
        with torch.cuda.device_of(q):
            return (fused_attention if fits else reference).attention(q, k, v, allowed)

    return Kernels(name="triton", add_norm=add_norm, attention=attention)
