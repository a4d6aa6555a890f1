"""What a pass answers: its most probable tokens where the answer is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.runtime import WorkbenchError

TOP = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """The most probable tokens of each example, best first."""

    tokens: Int[Tensor, "batch top"]
    probabilities: Float[Tensor, "batch top"]


def top_answers(
    logits: Float[Tensor, "batch pos vocab"], read: Bool[Tensor, "batch pos"], *, top: int = TOP
) -> Answers:
    """The most probable tokens at the last place of each example that is read.

    Raises:
        WorkbenchError: an example is read nowhere.
    """
    if not read.any(1).all():
        raise WorkbenchError("Some prompt of this batch is read nowhere, so it has no answer.")
    last = torch.where(read, torch.arange(read.shape[1]), -1).amax(1)
    at_read = logits[torch.arange(len(logits)), last]
    probabilities, tokens = at_read.softmax(-1).topk(min(top, at_read.shape[-1]), dim=-1)
    return Answers(tokens=tokens, probabilities=probabilities)
