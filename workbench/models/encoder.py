"""Real encoders of sentences as classifiers that were taught nothing.

A text is the mean of its tokens' last states; a label is the mean of some sentences that name it, embedded before any
training; logits are 20 times the cosine of both. So an encoder answers before it is taught, fine-tuning starts from
what it knew, and no head has to be learnt or grafted. It is not the setting of Panigrahi et al. 2023, where a masked
language model fills in a label's word: such encoders have no head for words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from workbench.models.text_model import TextClassifier, TextModel
from workbench.tasks.text import TextTask

SCALE = 20.0
"""Logits of cosines: the inverse temperature with which these encoders were trained (Reimers and Gurevych 2019)."""


class PrototypeClassifier(TextClassifier):
    """An encoder that compares texts with a prototype of each label."""

    def __init__(self, encoder: nn.Module, prototypes: Float[Tensor, "label d_model"]) -> None:
        super().__init__(functional.normalize(prototypes, dim=1))
        self.encoder = encoder

    def states(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch d_model"]:
        """The direction of each text's mean state, as long as logits are to be."""
        return SCALE * functional.normalize(mean_state(self.encoder, inputs), dim=1)


class Encoder(TextModel):
    """A real encoder of sentences."""

    @torch.no_grad()
    def classifier(self, task: TextTask) -> PrototypeClassifier:
        """The encoder as it is, with a prototype of each label from the sentences that name it."""
        prototypes = []
        for sentences in task.names.values():
            tokens = self.tokenizer(list(sentences))["input_ids"]
            prototypes.append(functional.normalize(mean_state(self.model, self.padded(tokens)), dim=1).mean(0))
        return PrototypeClassifier(self.model, torch.stack(prototypes)).eval()

    def tokens(self, task: TextTask, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """The texts alone: no prompt."""
        return self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


def mean_state(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch d_model"]:
    """The mean of the last states of each text's tokens, padding left out."""
    state = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(state.dtype)
    return (state * mask).sum(1) / mask.sum(1)
