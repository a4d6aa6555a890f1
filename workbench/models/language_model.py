"""Real causal language models as classifiers: a prompt around the text, and the label whose word comes next.

This is the setting of Panigrahi et al. 2023, section 2: logits are the language model's own, those of one word for each
label; embedding and unembedding are never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models.text_model import TextClassifier, TextModel
from workbench.runtime import WorkbenchError
from workbench.tasks.text import TextTask


class WordClassifier(TextClassifier):
    """A causal language model that says which label's word comes next."""

    # A PreTrainedModel of transformers, which is not imported before it is needed.
    language_model: Any

    def __init__(self, language_model: nn.Module, words: Float[Tensor, "label d_model"]) -> None:
        super().__init__(words)
        self.language_model = language_model

    def states(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch d_model"]:
        """The last state at each prompt's last token; what fills up comes after it, so no mask is needed."""
        found = self.language_model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        return found[torch.arange(len(found), device=found.device), inputs["attention_mask"].sum(1) - 1]


class LanguageModel(TextModel):
    """A real causal language model, as transformers reads it."""

    model: Any

    def classifier(self, task: TextTask) -> WordClassifier:
        """The model as it is, with the unembedding of each label's word.

        Raises:
            WorkbenchError: a word is not one token, or two words are the same one.
        """
        tokens = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in task.words]
        if any(len(each) != 1 for each in tokens) or len({each[0] for each in tokens}) < len(tokens):
            raise WorkbenchError(
                f"The words of {task.name!r}, {', '.join(map(repr, task.words))}, must be tokens of their own in "
                f"{self.reference}, where they are {tokens}: a label is read at one token."
            )
        head = self.model.get_output_embeddings().weight
        return WordClassifier(self.model, head[[each[0] for each in tokens]].detach().clone()).eval()

    def tokens(self, task: TextTask, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """The task's prompt around each text; only the text is cut."""
        before, after = task.prompt.split("{}")
        last = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        room = max_length - len(last)
        if room < 4:
            raise WorkbenchError(
                f"max_length is {max_length} and the prompt of {task.name!r} takes {len(last)} of it: raise it."
            )
        first = self.tokenizer([before + text for text in texts], truncation=True, max_length=room)["input_ids"]
        return [[*each, *last] for each in first]
