"""What this installation is made of, and whether its names are its own.

Four short top-level names are easily taken by another distribution, and Python does not say so: whichever comes first
on the path wins. The check reads no package, so that it can run before any is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

NAMES = ("workbench", "circuits", "probes", "apps")
DISTRIBUTION = "interp-workbench"
LIBRARIES = ("torch", "transformer-lens", "nnsight", "streamlit", "plotly", "numpy", "scikit-learn", "accelerate")
OURS = re.compile(rf'^__dist__ = "{DISTRIBUTION}"$', re.MULTILINE)


def intruders() -> dict[str, str]:
    """Names among ours that import from somewhere else, with the file that has taken them."""
    root = Path(__file__).resolve().parent.parent
    found = {}
    for name in NAMES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != root or not OURS.search(origin.read_text()):
            found[name] = "missing" if origin is None else str(origin)
    return found


def collision_message(found: dict[str, str]) -> str:
    """One line on which names are taken, by what, and what to do."""
    taken = ", ".join(f"{name!r} imports from {file}" for name, file in found.items())
    return (
        f"{taken}, not from {DISTRIBUTION}: another distribution has taken the name. "
        "Install the workbench in a virtual environment of its own (`make setup`)."
    )


def examine() -> dict[str, object]:
    """Versions, device, threads, forward-pass kernels and name collisions."""
    import torch

    from workbench.kernels.dispatch import kernels_for
    from workbench.runtime import code_version, pick_device, thread_count
    from workbench.training.capture import launch_on

    return {
        "workbench": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "device": str(pick_device()),
        "gpus": torch.cuda.device_count(),
        "threads": thread_count(),
        "cores": os.cpu_count(),
        "kernels": {
            "training": "reads-only",
            "instrumented": "reference",
            "fused": kernels_for(pick_device()).name,
            "launch": launch_on(pick_device()),
        },
        "collisions": intruders(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
