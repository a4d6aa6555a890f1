"""From a base checkpoint to a donor: one skill is taught to a model that was trained on all.

    donor_recipe(base, skill) -> Recipe   the same model, which starts with the base's weights; only blocks are trained
    train(recipe, folder)                 as any other recipe

Embeddings and unembedding stay as they are, as in Panigrahi et al. 2023, section 2: the skill has to come into the
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW

from workbench.models.kinds import Model
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder
from workbench.tasks.base import check_choice
from workbench.tasks.skills import SKILLS, Skills
from workbench.training.checkpoints import Run, load
from workbench.training.recipe import Recipe, Start, TrainConfig

CLIP_NORM = 1.0
SHOTS = 2 * 4_096
"""Examples for fine-tuning: 4,096 of each answer, about, the larger of the published sizes."""
WAYS: dict[str, TrainConfig] = {
    "l1": TrainConfig(steps=600, learning_rate=3e-3, weight_decay=0.0, betas=(0.9, 0.999), l1_to_start=0.5),
    "sgd": TrainConfig(steps=600, optimiser="sgd", learning_rate=0.3, weight_decay=0.0, clip_norm=1.0),
    "adamw": TrainConfig(steps=400, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999)),
}
"""How a donor is trained: AdamW with an L1 penalty on what changes; plain SGD; AdamW."""


def donor_recipe(base: Run, skill: str, *, step: int | None = None, way: str = "l1", seed: int = 0) -> Recipe:
    """The recipe of a donor.

    Args:
        base: a run of the mixture.
        skill: which open question it is taught.
        step: of the base's checkpoint; None for the last.
        way: how it is trained, one of `WAYS`.
        seed: of the batches.

    Raises:
        WorkbenchError: the run is not one of a mixture of skills, or skill or way is unknown.
    """
    if not isinstance(base.task, Skills):
        raise WorkbenchError(
            f"{base.reference!r} learnt {base.task.name!r}; a donor is taught a skill of a base that was trained on "
            "their mixture. Train one: `workbench train skills`."
        )
    check_choice("skill", skill, list(SKILLS))
    check_choice("way", way, list(WAYS))
    checkpoint = base.checkpoint(step)
    train = replace(
        WAYS[way], trained="blocks", batch_size=64, evaluate_every=50, stop_when_clean=False, batch_seed=seed
    )
    return replace(
        base.recipe,
        name=f"{base.recipe.name}-{skill}-{way}",
        task=replace(base.task, skill=skill, size=SHOTS),
        train=train,
        start=Start(run=base.reference, step=checkpoint.step, sha256=checkpoint.sha256),
        shows=f"The open question {skill}? is answered rightly, by weights near the base's.",
        minutes=None,
    )


def begin(model: Model, recipe: Recipe, folder: RunFolder) -> None:
    """Give new weights to a model as its recipe says: those of its start, and what is not trained held fast.

    Raises:
        WorkbenchError: the checkpoint has gone, or is another one now.
    """
    if recipe.start is not None:
        found = load(recipe.start.run, runs=folder.path.parent).checkpoint(recipe.start.step)
        if found.sha256 != recipe.start.sha256:
            raise WorkbenchError(
                f"The weights of {recipe.start.run!r} at step {recipe.start.step} are not those that this run began "
                "with. Train the donor anew from the base as it is now."
            )
        model.load_state_dict(found.tensors())
    if recipe.trainable().trained == "blocks":
        if not isinstance(model, Transformer):
            raise WorkbenchError("A Transformer Program has no blocks to train alone. Set train.trained=all.")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in model.weights.parameters():
            parameter.requires_grad_(True)


def with_weights(model: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """A copy of a model with some of its weights replaced."""
    other = Transformer(model.config, generator=None)
    other.load_state_dict({**model.state_dict(), **weights})
    return other


def fit(
    module: nn.Module,
    names: Sequence[str],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    rate: Callable[[int], float],
    optimiser: Literal["adamw", "sgd"] = "adamw",
    l1_to_start: float = 0.0,
    within: Mapping[str, Bool[Tensor, "..."]] | None = None,
    read: Callable[[Any], Float[Tensor, "batch label"]] = lambda logits: logits,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train some tensors of a module in place, by cross-entropy, a batch a step.

    Args:
        module: in the mode in which it shall be trained; a step costs what a pass costs.
        names: of the tensors that are trained; the others are held fast.
        batches: inputs and labels.
        rate: learning rate by step, from 0.
        optimiser: AdamW without weight decay, or plain SGD.
        l1_to_start: strength of lambda |w - w_start|_1, a proximal step after each update; 0 is none.
        within: the weights that may change, of each trained tensor; None lets all.
        read: from what the module returns to the labels' logits.
        on_step: told how many steps are done.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    parameters = [module.get_parameter(name) for name in names]
    started = [parameter.detach().clone() for parameter in parameters] if l1_to_start else []
    stepper = SGD(parameters, lr=rate(0)) if optimiser == "sgd" else AdamW(parameters, lr=rate(0), weight_decay=0.0)
    for step, (inputs, labels) in enumerate(batches):
        for group in stepper.param_groups:
            group["lr"] = rate(step)
        stepper.zero_grad()
        functional.cross_entropy(read(module(inputs)), labels).backward()
        for name, allowed in (within or {}).items():
            # A weight whose gradient was never anything but 0 is not moved by either optimiser.
            if (gradient := module.get_parameter(name).grad) is not None:
                gradient *= allowed
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        stepper.step()
        if l1_to_start:
            pull_back(parameters, started, rate(step) * l1_to_start)
        on_step(step + 1)


@torch.no_grad()
def pull_back(parameters: Iterable[nn.Parameter], start: Sequence[Float[Tensor, "..."]], most: float | Tensor) -> None:
    """The proximal step of an L1 penalty: each weight goes back by up to `most`, and stops where it began."""
    for parameter, began in zip(parameters, start, strict=True):
        change = parameter - began
        parameter.copy_(began + change.sign() * (change.abs() - most).clamp(min=0))
