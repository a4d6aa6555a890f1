"""What training minimises: a split, planned for the model, and the loss at its read positions.

The loss is computed inside one module, so that with several processes its gradients are synchronised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.models.fast import ReadPlan
from workbench.models.kinds import Model, Reads, logits_at, plan_reads
from workbench.models.program import Gumbel, TransformerProgram
from workbench.tasks.base import Batch
from workbench.training.acceleration import Loss
from workbench.training.dropout import Masks, as_edits
from workbench.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """A split on the device, with its plan."""

    batch: Batch
    plan: ReadPlan | Reads
    answers: Int[Tensor, " reads"]
    weights: Float[Tensor, " reads"]
    """What each answer counts in the loss."""

    @classmethod
    def of(cls, recipe: Recipe, batch: Batch) -> Dataset:
        """The split, planned for the recipe's model."""
        plan = plan_reads(recipe.model, batch.tokens, batch.read)
        weights = torch.ones(len(plan.example), device=batch.read.device)
        if recipe.trainable().average == "prompts":
            # A prompt counts as much as its answers would if all had as many.
            reads = batch.read.sum(1)
            weights = reads.double().mean() / reads[plan.example]
        return cls(batch=batch, plan=plan, answers=batch.targets[batch.read], weights=weights)


class AnswerLoss(nn.Module):
    """The model with its loss at the read positions, as one module to wrap."""

    def __init__(self, model: Model, loss: Loss, loss_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.loss_dtype = loss_dtype

    def forward(self, rows: Dataset, total: float, noise: Masks | Gumbel) -> Float[Tensor, ""]:
        """Weighted sum of these rows' losses, divided by `total`, with what the noise drops or draws."""
        plan = rows.plan
        if isinstance(self.model, TransformerProgram):
            assert isinstance(noise, Gumbel)
            logits = self.model.relaxed(plan.tokens, noise)[plan.example, plan.position]
        elif noise:
            assert not isinstance(noise, Gumbel)
            logits = self.model(plan.tokens, as_edits(noise))[plan.example, plan.position]
        else:
            logits = logits_at(self.model, plan)
        return (rows.weights * self.loss(logits.to(self.loss_dtype), rows.answers)).sum() / total
