"""A training step as one CUDA graph: all its kernels in one launch, where the processor would start each by itself.

    Captured(step)(inputs) -> the inputs copied to where the graph reads -> the first steps as they are, then replayed

A graph repeats kernels on the memory that they had while it was recorded. So a step that is captured is a function of
tensors: what changes from one step to the next comes in through them, and what a step leaves behind is changed in
place. A graph is recorded for each shape of the inputs.

Chosen once for a run: a graph wherever there is a CUDA device and nothing hinders it, and it says what does.
`WORKBENCH_LAUNCH=pieces` (or `graph`) overrides the choice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from workbench.runtime import WorkbenchError
from workbench.training.recipe import TrainConfig

OVERRIDE = "WORKBENCH_LAUNCH"
NAMES = ("graph", "pieces")
WARM_UP = 3
"""Steps taken before one is recorded: libraries and kernels load at their first."""
Launch = Literal["graph", "pieces"]
Inputs = Mapping[str, Tensor]
log = logging.getLogger(__name__)


def launch_on(device: torch.device, hindrance: str | None = None) -> Launch:
    """How the steps of a run are launched on this device: as one graph, or piece by piece.

    Args:
        device: where the run computes.
        hindrance: why its step cannot be captured, as half a sentence.

    Raises:
        WorkbenchError: the override names no way to launch, or one that is not to be had.
    """
    override = os.environ.get(OVERRIDE)
    if override not in (None, *NAMES):
        raise WorkbenchError(f"{OVERRIDE}={override} is no way to launch a step. Known: {', '.join(NAMES)}.")
    if override == "graph" and device.type != "cuda":
        raise WorkbenchError(f"{OVERRIDE}=graph needs a CUDA device, and this is {device.type!r}: unset it.")
    if override == "graph" and hindrance is not None:
        raise WorkbenchError(f"{OVERRIDE}=graph, but {hindrance}: unset it.")
    if override is not None:
        return cast(Launch, override)
    if device.type != "cuda":
        return "pieces"
    if hindrance is not None:
        log.warning("Steps are launched piece by piece, not as one CUDA graph: %s.", hindrance)
    return "graph" if hindrance is None else "pieces"


def hindrance(config: TrainConfig, processes: int) -> str | None:
    """Why a recipe's step cannot be captured; None if it can."""
    if processes > 1:
        return f"{processes} processes wait for each other's gradients"
    if config.dropout:
        return "dropout is drawn by the processor"
    if config.optimiser == "sgd":
        return "plain SGD takes its learning rate from the processor"
    return None


class Captured:
    """A step that is recorded once for each shape of what it takes, and then replayed."""

    def __init__(
        self, step: Callable[[Inputs], None], device: torch.device, generators: Sequence[torch.Generator] = ()
    ) -> None:
        """Nothing is recorded yet.

        Args:
            step: may read no value of a tensor, and leaves nothing behind but changes of tensors that were there.
            device: where its inputs shall be.
            generators: those on the device that it draws from.
        """
        self.step, self.device, self.generators = step, device, generators
        self.held: dict[tuple[torch.Size, ...], _Held] = {}

    def __call__(self, inputs: Inputs) -> None:
        """One step with these inputs, on the device or not."""
        shapes = tuple(each.shape for each in inputs.values())
        held = self.held.get(shapes)
        if held is None:
            inside = {name: torch.empty_like(each, device=self.device) for name, each in inputs.items()}
            held = self.held[shapes] = _Held(inside)
        for name, each in inputs.items():
            held.inputs[name].copy_(each, non_blocking=True)
        if held.taken < WARM_UP:
            held.taken += 1
            aside(lambda: self.step(held.inputs))
            return
        if held.replay is None:
            held.replay = recorded(lambda: self.step(held.inputs), self.generators)
        held.replay()


class _Held:
    """What a graph reads, and the graph once it is recorded."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.taken = 0
        self.replay: Callable[[], None] | None = None


def aside(step: Callable[[], None]) -> None:
    """Take a step on a stream of its own, as it must be before it is recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)


def recorded(step: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> Callable[[], None]:
    """The step as one launch, which holds what the graph points to; recording takes no step."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()

    def replay(step: Callable[[], None] = step) -> None:
        graph.replay()

    return replay
