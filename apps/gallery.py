"""Put a finished run into the gallery: thinned, with its whole log; transformers in half precision.

    python -m apps.gallery RUN NAME [CHECKPOINTS]

The gallery ships with the package, so a run goes in once, when it is final.
"""

from __future__ import annotations

import argparse
import sys

import torch

from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError
from workbench.store import GALLERY, RunFolder
from workbench.training.checkpoints import Run, export, load

CHECKPOINTS = 16


def add_to_gallery(run: Run, name: str, *, checkpoints: int = CHECKPOINTS) -> RunFolder:
    """The run's new place in the gallery, with about so many checkpoints.

    Raises:
        WorkbenchError: the run is not finished, or the place is taken.
    """
    if not run.status["finished"]:
        raise WorkbenchError(f"Run {run.reference!r} is not finished. Go on with it: `workbench train … --resume`.")
    target = RunFolder(path=GALLERY / name, reference=f"gallery:{name}")
    if target.path.exists():
        raise WorkbenchError(f"The gallery already has {name!r} at {target.path}. Delete it first.")
    target.path.mkdir(parents=True)
    # A program is small, and rounding may move its most likely choices.
    dtype = torch.float32 if isinstance(run.recipe.model, ProgramConfig) else torch.float16
    export(run, target, count=checkpoints, dtype=dtype)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("name")
    parser.add_argument("checkpoints", nargs="?", type=int, default=CHECKPOINTS)
    options = parser.parse_args()
    try:
        add_to_gallery(load(options.run), options.name, checkpoints=options.checkpoints)
    except WorkbenchError as error:
        sys.exit(f"gallery: {error}")
