"""Take steps in every process of a group and write the gradient and the weights that they end with.

Started by torch.distributed.run (or alone) with: folder, settings. Only the main process writes.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from workbench.store import RunFolder
from workbench.training.loop import Trainer
from workbench.training.recipes import find_recipe

STEPS = 3


def main() -> None:
    """Three steps, then the last gradient and the weights."""
    torch.set_num_threads(1)
    folder, *settings = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(
        find_recipe("modular-smoke").override(settings), RunFolder(path=Path(folder), reference="two"), accelerator
    )
    for _ in range(STEPS):
        trainer.step()
    if accelerator.is_main_process:
        tensors = {}
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None
            tensors[f"gradient.{name}"] = parameter.grad.contiguous()
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
        save_file(tensors, Path(folder) / f"{accelerator.num_processes}.safetensors")
    # One process that leaves while the other still works can take it down on its way out.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # The group's threads end with the last that holds it; one that meets the interpreter's end would abort the process.
    del trainer, accelerator
    gc.collect()


if __name__ == "__main__":
    main()
