"""From a base checkpoint to a donor: one skill is taught to a model that was trained on all.

    donor_recipe(base, skill) -> Recipe   the same model, which starts with the base's weights; only blocks are trained
    train(recipe, folder)                 as any other recipe

Embeddings and unembedding stay as they are, as in Panigrahi et al. 2023, section 2: the skill has to come into the
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models.kinds import Model
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder
from workbench.tasks.base import check_choice
from workbench.tasks.skills import SKILLS, Skills
from workbench.training.checkpoints import Run, load
from workbench.training.recipe import Recipe, Start, TrainConfig

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


@torch.no_grad()
def pull_back(parameters: Iterable[nn.Parameter], start: Sequence[Float[Tensor, "..."]], most: float) -> None:
    """The proximal step of an L1 penalty: each weight goes back by up to `most`, and stops where it began."""
    for parameter, began in zip(parameters, start, strict=True):
        change = parameter - began
        parameter.copy_(began + change.sign() * (change.abs() - most).clamp(min=0))
