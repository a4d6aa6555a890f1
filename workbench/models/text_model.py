"""What real models of text share: texts in, the labels' logits out, and blocks that may be trained and grafted.

    model.classifier(task)              answers before it is taught: the model as it is, and a direction for each label
    model.batches(task, texts, labels)  texts as that classifier reads them

How a text is read and where a label's direction comes from differs: see encoder.py and language_model.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.runtime import WorkbenchError
from workbench.tasks.text import TextTask

BATCH = 64
"""Texts in a batch, of nearly equal length."""


class TextClassifier(nn.Module, ABC):
    """A real model that compares what it makes of a text with a direction for each label."""

    directions: Tensor

    def __init__(self, directions: Float[Tensor, "label d_model"]) -> None:
        super().__init__()
        self.register_buffer("directions", directions)

    @abstractmethod
    def states(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch d_model"]:
        """What the model makes of tokenised texts."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch label"]:
        """The labels' logits of tokenised texts."""
        return self.states(inputs) @ self.directions.T

    @property
    def graftable(self) -> tuple[str, ...]:
        """Names of the weights in the blocks: those with a layer's number in them, as in Panigrahi et al. 2023.

        Raises:
            WorkbenchError: there are none.
        """
        names = tuple(name for name, _ in self.named_parameters() if any(map(str.isdigit, name.split("."))))
        if not names:
            raise WorkbenchError("No weight of this model has a layer's number in its name: it needs blocks.")
        return names


@dataclass(frozen=True, kw_only=True, eq=False)
class TextModel(ABC):
    """A real model of text with its tokenizer."""

    reference: str
    """As a person calls it: hf: and a name, or hf: and a folder."""
    sha256: str
    """Of its weights on disk."""
    model: nn.Module
    tokenizer: Any

    @abstractmethod
    def classifier(self, task: TextTask) -> TextClassifier:
        """The model as it is, with a direction for each label of a task."""

    @abstractmethod
    def tokens(self, task: TextTask, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Each text as the model reads it, the text cut so that all of it has at most `max_length` tokens."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def batches(
        self, task: TextTask, texts: Sequence[str], labels: Sequence[int], *, max_length: int
    ) -> list[tuple[dict[str, Tensor], Int[Tensor, " batch"]]]:
        """Tokenised texts with their labels' numbers, the shortest first."""
        tokens = self.tokens(task, texts, max_length)
        order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
        parts = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        return [
            (
                self.padded([tokens[place] for place in part]),
                torch.tensor([labels[place] for place in part], device=self.device),
            )
            for part in parts
        ]

    def padded(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Texts of one length, filled up at the end, and where they have tokens of their own."""
        longest = max(map(len, tokens))
        # Any token will do where there is none to pad with: what is not attended to is not read.
        pad = self.tokenizer.pad_token_id or 0
        ids = [[*each, *[pad] * (longest - len(each))] for each in tokens]
        mask = [[1] * len(each) + [0] * (longest - len(each)) for each in tokens]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
