"""The kinds of model that are trained here, and what training asks of each: weights, and logits where they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.models.config import ModelConfig
from workbench.models.fast import ReadPlan, read_logits
from workbench.models.program import TransformerProgram
from workbench.models.program_config import ProgramConfig
from workbench.models.transformer import Transformer

Config = ModelConfig | ProgramConfig
Model = Transformer | TransformerProgram


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reads:
    """Where a batch is read, of a model that computes every position."""

    tokens: Int[Tensor, "batch pos"]
    example: Int[Tensor, " reads"]
    position: Int[Tensor, " reads"]
    """Where each read logit is, in the order of `read.nonzero()`."""


def build(config: Config, *, generator: torch.Generator | None) -> Model:
    """A model of this shape: new weights, or none without a generator."""
    if isinstance(config, ProgramConfig):
        return TransformerProgram(config, generator=generator)
    return Transformer(config, generator=generator)


def plan_reads(config: Config, tokens: Int[Tensor, "batch pos"], read: Bool[Tensor, "batch pos"]) -> ReadPlan | Reads:
    """What is worked out once for a batch that a model of this shape reads."""
    if isinstance(config, ProgramConfig):
        example, position = read.nonzero().unbind(1)
        return Reads(tokens=tokens, example=example, position=position)
    return ReadPlan.of(config, tokens, read)


def logits_at(model: Model, plan: ReadPlan | Reads) -> Float[Tensor, "reads vocab"]:
    """Logits at the read positions; those of a program's most likely choices."""
    if isinstance(model, Transformer) and isinstance(plan, ReadPlan):
        return read_logits(model, plan)
    return model.forward(plan.tokens)[plan.example, plan.position]
