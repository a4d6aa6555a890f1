"""A base and a donor: what a graft is found on, the same for runs of the workbench and for real models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.graft_masks import Labelled
from circuits.grafting import Delta
from workbench.models.real_models import PREFIX, load_real_model
from workbench.models.text_model import TextModel
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance, RunFolder, gallery_names, run_names
from workbench.tasks.base import Batch
from workbench.tasks.skills import ANSWERS, Skills
from workbench.training.checkpoints import Run, load
from workbench.training.text_donors import TextDonor, labelled_batches, load_donor

EXAMPLES = 1_024
"""Examples on which a region is found, as published."""
TEXTS = 128
"""The same of a real model, where each costs as much as a thousand prompts of ours."""
CHOOSING = 4
"""A real model's controls are chosen on the fourth part of as many texts as it is judged on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A base and what was fine-tuned from it."""

    folder: RunFolder
    """The donor's, where results on it are kept."""
    task: Any
    recipe: Mapping[str, Any]
    """What the donor was made from."""
    delta: Callable[[], Delta]
    examples: Callable[..., Labelled]
    """Of train, to find a region on; val, to choose controls on; test, to judge on; with `most`, so many of them."""
    labels: Sequence[str]
    typed: Callable[[str], Labelled]
    """What a person types, as one example; its label is the right one only of a run, whose task knows it."""
    first: Callable[[], str]
    """The test's first example, as one types it."""
    provenance: Provenance
    step: int

    @property
    def is_real(self) -> bool:
        """Whether base and donor are a real model."""
        return isinstance(self.task, str)

    @property
    def reference(self) -> str:
        """The donor, as a person calls it."""
        return self.folder.reference

    def examples_to_learn(self, most: int | None) -> Labelled:
        """The training examples that a region is found on: so many, or the usual number.

        Raises:
            WorkbenchError: none are asked for.
        """
        if most is not None and most < 1:
            raise WorkbenchError(f"A region is found on at least 1 example, got {most}.")
        return self.examples("train", most=most)


def open_pairs(base: str, donors: Sequence[str], runs: Path | None) -> list[Pair]:
    """Base and donors that a person names; a base `hf:…` is a real model.

    Raises:
        WorkbenchError: one is missing, or did not begin with this base.
    """
    if base.startswith(PREFIX):
        return [pair_of_texts(base, load_donor(donor, runs=runs)) for donor in donors]
    run = load(base, runs=runs)
    return [pair_of_runs(run, load(donor, runs=runs)) for donor in donors]


def tests_elsewhere(base: str, donors: Sequence[str], runs: Path | None) -> dict[str, Labelled]:
    """The tests of these donors' tasks and, where the base is a run, of its plain questions.

    Raises:
        WorkbenchError: one is missing, or did not begin with this base.
    """
    found = {pair.reference: pair.examples("test") for pair in open_pairs(base, donors, runs)}
    if not base.startswith(PREFIX):
        run = load(base, runs=runs)
        assert isinstance(run.task, Skills)
        found["plain questions"] = labelled(run, run.task.plain("test"))
    return found


def pair_of_runs(base: Run, donor: Run) -> Pair:
    """A base of the recipe `skills` and one of its donors."""
    return Pair(
        folder=donor.folder,
        task=donor.task,
        recipe=donor.recipe.to_json(),
        delta=partial(delta_of, base, donor),
        examples=partial(examples_of, base, donor),
        labels=ANSWERS,
        typed=lambda text: labelled(base, donor.task.prompt(text)),
        first=lambda: donor.task.decode(donor.task.examples("test").tokens[0].tolist()),
        provenance=Provenance(
            code_version=code_version(),
            recipe=donor.recipe.name,
            seed=donor.recipe.trainable().batch_seed,
            parents=(base.checkpoint().sha256, donor.checkpoint().sha256),
        ),
        step=donor.checkpoint().step,
    )


def pair_of_texts(reference: str, donor: TextDonor) -> Pair:
    """A real model and one of its donors.

    Raises:
        WorkbenchError: the donor is of another base, or of other weights of it.
    """
    base = _real_model(reference)
    recipe = donor.recipe
    if recipe.base_sha256 != base.sha256:
        raise WorkbenchError(
            f"{donor.reference!r} did not begin with these weights of {reference!r} but with others, of "
            f"{recipe.base!r}: a graft is between a base and what was fine-tuned from it, and weights that were "
            "dequantised are another base than their original. Make one: "
            f"`workbench finetune {reference} {recipe.task}`."
        )
    task = donor.task
    classifier = base.classifier(task)
    usual = {"train": TEXTS, "val": max(1, recipe.tested // CHOOSING), "test": recipe.tested}

    def examples(split: str, most: int | None = None) -> Labelled:
        lines = task.shots(recipe.shots, recipe.seed) if split == "train" else task.split(split)
        batches = labelled_batches(base, task, lines[: most or usual[split]], recipe.max_length)
        return Labelled(module=classifier, batches=batches, read=_as_it_is)

    def typed(text: str) -> Labelled:
        if not text.strip():
            raise WorkbenchError("There is nothing to answer. Type a sentence.")
        batches = base.batches(task, [text], [0], max_length=recipe.max_length)
        return Labelled(module=classifier, batches=batches, read=_as_it_is)

    def delta() -> Delta:
        return Delta.between(dict(classifier.named_parameters()), donor.weights(classifier), classifier.graftable)

    return Pair(
        folder=donor.folder,
        task=recipe.task,
        recipe=asdict(recipe),
        delta=delta,
        examples=examples,
        labels=task.labels,
        typed=typed,
        first=lambda: task.split("test")[0].text,
        provenance=Provenance(
            code_version=code_version(),
            recipe=f"{recipe.task}-{recipe.way}",
            seed=recipe.seed,
            device=base.device.type,
            parents=(base.sha256, donor.sha256),
        ),
        step=recipe.steps,
    )


def is_donor(run: Run) -> bool:
    """Whether a run was taught one skill of a base."""
    return isinstance(run.task, Skills) and run.recipe.start is not None and bool(run.checkpoints)


def is_sibling(other: Run, run: Run) -> bool:
    """Whether another run was taught another skill of a donor's base."""
    return is_donor(other) and other.recipe.start == run.recipe.start and other.task != run.task


def base_of(run: Run) -> Run:
    """The run that a donor began with, beside it or in the gallery.

    Raises:
        WorkbenchError: it is not there any more.
    """
    assert run.recipe.start is not None
    return load(run.recipe.start.run, runs=run.folder.path.parent)


def sibling_runs(run: Run) -> dict[str, Run]:
    """Donors of the same base that learnt another skill, one of each, beside this run; a damaged run is none."""
    folder = run.folder.path.parent
    if run.reference.startswith("gallery:"):
        references = [f"gallery:{name}" for name in gallery_names()]
    else:
        references = run_names(folder)
    found: dict[Any, Run] = {}
    for reference in references:
        with contextlib.suppress(WorkbenchError):
            if is_sibling(other := load(reference, runs=folder), run):
                found.setdefault(other.task, other)
    return {other.reference: other for other in found.values()}


def delta_of(base: Run, donor: Run) -> Delta:
    """What the donor's blocks have that the base's have not.

    Raises:
        WorkbenchError: the donor did not begin with the base's last weights, or has another shape.
    """
    start = donor.recipe.start
    if start is None or start.sha256 != base.checkpoint().sha256:
        began = "with weights of its own" if start is None else f"with {start.run!r} at step {start.step}"
        raise WorkbenchError(
            f"{donor.reference!r} did not begin with {base.reference!r} but {began}: a graft is between a base and "
            f"what was fine-tuned from it. Make one: `workbench finetune {base.reference} tone`."
        )
    names = [name for name, _ in base.model().named_parameters() if name.startswith("weights.")]
    return Delta.between(base.checkpoint().tensors(), donor.checkpoint().tensors(), names)


def examples_of(base: Run, donor: Run, split: str, most: int | None = None) -> Labelled:
    """A split of the donor's task, for the base's model: yes or no, read at the question; of train 1,024 by default."""
    batch = donor.task.examples(split)
    return labelled(base, batch.select(slice(most or (EXAMPLES if split == "train" else None))))


def labelled(base: Run, batch: Batch) -> Labelled:
    """Prompts of any skill, for the base's model."""
    return Labelled(module=base.model(), batches=[(batch.tokens, batch.targets[batch.read])], read=answers_of)


@cache
def _real_model(reference: str) -> TextModel:
    """A real model, read once a process: it is never changed."""
    return load_real_model(reference)


def answers_of(logits: Tensor) -> Tensor:
    """The answers' logits at the question, of all that a run's model says."""
    return logits[:, -1, : len(ANSWERS)]


def _as_it_is(logits: Tensor) -> torch.Tensor:
    return logits
