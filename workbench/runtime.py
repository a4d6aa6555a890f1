"""Device, seeds and the one error that is the user's.

Nothing here leaves the state of the process changed: a generator is returned, never set. Torch is imported by the
function that needs it, so that the command line can read this module for free.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class WorkbenchError(ValueError):
    """A mistake that its user can mend: says what came, what was wanted and what to do."""


def code_version() -> str:
    """Version of the distribution that made a result."""
    from workbench import __version__

    return __version__


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best one present.

    Raises:
        WorkbenchError: the device is not on this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise WorkbenchError(f"Device {name!r} was asked for, but this machine has no CUDA device. Use 'cpu'.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise WorkbenchError(f"Device {name!r} is not one that torch knows. Use 'cpu' or 'cuda'.") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself multiplies matrices in bfloat16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(present for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of its own for each use of `seed`, so that streams never overlap and adding one moves no other."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int | torch.Generator, *names: str | int) -> torch.Generator:
    """A CPU generator seeded for one use of `seed`; a generator passes through unchanged."""
    import torch

    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: threads that wait for each other use CPU time, which then measures the machine's load."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_count() -> int:
    """Threads torch computes with: part of what makes a run repeat bit by bit."""
    import torch

    return torch.get_num_threads()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the closest known spelling, or lists all when none is close."""
    known = [str(item) for item in known]
    # A dotted name is also compared by its last part: people leave the first one out.
    spellings = {spelling: item for item in reversed(known) for spelling in (item.rpartition(".")[2], item)}
    close = difflib.get_close_matches(name, spellings, n=1)
    if close:
        return f"Did you mean {spellings[close[0]]!r}?"
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"Known: {shown or 'none'}."


def is_main_process() -> bool:
    """Whether this process is the one that writes, in a run of several processes."""
    return int(os.environ.get("RANK", "0")) == 0
