"""Fresh examples for every step of training, of a task that streams them, and how hard they may be.

Both follow from the step, the seed and the log, so that a state that training resumes from need not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workbench.runtime import generator
from workbench.tasks.base import Batch, Streamed
from workbench.training.recipe import TrainConfig

STEPS_AT_ONCE = 32
"""Steps whose examples are drawn together: a call that draws few costs nearly as much as one that draws many."""
NEXT_BATCH = "next_batch"
"""What the log calls the batch of the step to come."""


class ExampleStream:
    """The examples of each step; those of the steps drawn last are kept."""

    def __init__(self, task: Streamed, config: TrainConfig, device: torch.device) -> None:
        """Nothing is drawn yet."""
        assert config.batch_size is not None
        self.task, self.config, self.device, self.batch_size = task, config, device, config.batch_size
        self.drawn: tuple[tuple[int, int | None], Batch] | None = None

    def batch(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The examples of a step, with the log of what was before it."""
        block, place = divmod(step, STEPS_AT_ONCE)
        level = self.level(rows)
        if self.drawn is None or self.drawn[0] != (block, level):
            seed = generator(self.config.batch_seed, "stream", block)
            examples = self.task.stream(STEPS_AT_ONCE * self.batch_size, seed=seed, level=level)
            self.drawn = (block, level), examples.to(self.device)
        return self.drawn[1].select(slice(place * self.batch_size, (place + 1) * self.batch_size))

    def level(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """Where the curriculum stands: one level up for each batch that was answered before it was trained on."""
        threshold = self.config.curriculum
        if threshold is None:
            return None
        return min(self.task.hardest, 1 + sum(row[f"{NEXT_BATCH}_accuracy"] >= threshold for row in rows))
