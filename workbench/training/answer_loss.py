"""What training minimises: a split, planned for the model, and the loss at its read positions.

The loss is computed inside one module, so that with several processes its gradients are synchronised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, filled_up, read_cross_entropy
from workbench.models.kinds import Config, Model, Reads, logits_at, plan_reads
from workbench.models.program import Gumbel, TransformerProgram
from workbench.tasks.base import Batch
from workbench.training.acceleration import Loss, cross_entropy
from workbench.training.dropout import Masks, as_edits
from workbench.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What the loss looks at: where prompts are read, and what is right there."""

    plan: ReadPlan | Reads
    answers: Int[Tensor, " reads"]
    weights: Float[Tensor, " reads"]
    """What each answer counts in the loss."""

    @classmethod
    def filled(cls, config: Config, inputs: Mapping[str, Tensor]) -> Reading:
        """What a model of this shape reads, from tensors as `filled_reads` gives them."""
        places = {name: inputs[name] for name in ("tokens", "example", "position")}
        plan = ReadPlan.whole(**places) if isinstance(config, ModelConfig) else Reads(**places)
        return cls(plan=plan, answers=inputs["answers"], weights=inputs["weights"])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset(Reading):
    """A split on the device, with its plan."""

    batch: Batch

    @classmethod
    def of(cls, recipe: Recipe, batch: Batch) -> Dataset:
        """The split, planned for the recipe's model."""
        plan = plan_reads(recipe.model, batch.tokens, batch.read)
        weights = _weights(recipe, batch.read, plan.example)
        return cls(batch=batch, plan=plan, answers=batch.targets[batch.read], weights=weights)


def filled_reads(recipe: Recipe, batch: Batch) -> dict[str, Tensor]:
    """What the loss looks at in a batch, in tensors whose sizes are those of every batch like it.

    Every prompt counts with as many reads as the one that has most; those filled in have no weight. `total`, a number,
    is how many answers there are.
    """
    example, position = batch.read.nonzero().unbind(1)
    weights = _weights(recipe, batch.read, example)
    size = len(batch) * int(batch.read.sum(1).max())
    reads = {"example": example, "position": position, "answers": batch.targets[batch.read]}
    return {
        "tokens": batch.tokens,
        **{name: filled_up([each], size) for name, each in reads.items()},
        "weights": nn.functional.pad(weights, (0, size - len(weights))),
        "total": torch.tensor(float(len(example)), dtype=torch.float64),
    }


class AnswerLoss(nn.Module):
    """The model with its loss at the read positions, as one module to wrap."""

    def __init__(self, model: Model, loss: Loss, loss_dtype: torch.dtype, precision: torch.dtype) -> None:
        """In a precision of bfloat16 the model multiplies matrices; sums, softmax and weights stay as they are."""
        super().__init__()
        self.model = model
        self.loss = loss
        self.loss_dtype = loss_dtype
        self.precision = precision

    def forward(self, rows: Reading, total: float | Tensor, noise: Masks | Gumbel) -> Float[Tensor, ""]:
        """Weighted sum of these rows' losses, divided by `total`, with what the noise drops or draws."""
        lower = self.precision == torch.bfloat16
        with torch.autocast(rows.answers.device.type, torch.bfloat16, enabled=lower):
            return (rows.weights * self._losses(rows, noise)).sum() / total

    def _losses(self, rows: Reading, noise: Masks | Gumbel) -> Float[Tensor, " reads"]:
        plan = rows.plan
        if isinstance(self.model, TransformerProgram):
            assert isinstance(noise, Gumbel)
            logits = self.model.relaxed(plan.tokens, noise)[plan.example, plan.position]
        elif noise:
            assert not isinstance(noise, Gumbel)
            logits = self.model(plan.tokens, as_edits(noise))[plan.example, plan.position]
        elif self.loss is cross_entropy:
            assert isinstance(plan, ReadPlan)
            return read_cross_entropy(self.model, plan, rows.answers, self.loss_dtype)
        else:
            logits = logits_at(self.model, plan)
        return self.loss(logits.to(self.loss_dtype), rows.answers)


def _weights(
    recipe: Recipe, read: Bool[Tensor, "batch pos"], example: Int[Tensor, " reads"]
) -> Float[Tensor, " reads"]:
    if recipe.trainable().average == "answers":
        return torch.ones(len(example), device=read.device)
    # A prompt counts as much as its answers would if all had as many.
    reads = read.sum(1)
    return reads.double().mean() / reads[example]
