"""From a real model to a donor: it learns to tell the labels of a text task apart, in its blocks alone.

    recipe = text_recipe(base, task, way="l1")
    donor = teach(base, recipe, folder)              kept as what changed, in 16 bits, not as a model

A donor is the base plus what is kept, so what is grafted is what was measured. Embeddings stay as they are, and the
model is taught without dropout: with one seed, one machine and one number of threads the donor repeats.
"""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.models.language_model import LanguageModel
from workbench.models.text_model import TextClassifier, TextModel
from workbench.runtime import WorkbenchError, generator, nearest
from workbench.store import (
    RunFolder,
    load_tensors,
    read_json,
    runs_root,
    save_tensors,
    write_json,
)
from workbench.tasks.base import check_choice
from workbench.tasks.text import Line, TextTask, find_task
from workbench.training.finetune import fit
from workbench.training.recipe import read_value

CARD = "donor.json"
DELTA = "delta.safetensors"


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """All that a donor is made from, beside the base's weights."""

    base: str
    """hf:minilm, hf:smollm2, or hf: and a folder."""
    base_sha256: str
    task: str
    way: str
    optimiser: Literal["adamw", "sgd"]
    learning_rate: float
    """At the first step; it falls linearly to 0."""
    l1_to_start: float = 0.0
    """Strength lambda of lambda |w - w_start|_1, taken as a proximal step after each update; 0 is none."""
    steps: int = 256
    batch_size: int = 16
    shots: int = 512
    """Examples of each label."""
    max_length: int = 48
    """Tokens of a text with its prompt, after which the text is cut."""
    tested: int = 1_024
    """Most examples of a split that accuracies are measured on, the first ones."""
    seed: int = 0
    """Of the shots and of their order."""

    def __post_init__(self) -> None:
        check_choice("optimiser", self.optimiser, ("adamw", "sgd"))
        for name in ("steps", "batch_size", "shots", "tested"):
            if getattr(self, name) < 1:
                raise WorkbenchError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_length < 4:
            raise WorkbenchError(f"max_length must be at least 4 tokens, got {self.max_length}.")
        if not (0 < self.learning_rate < math.inf and 0 <= self.l1_to_start < math.inf):
            raise WorkbenchError(
                "learning_rate must be above 0 and l1_to_start at least 0, "
                f"got {self.learning_rate} and {self.l1_to_start}."
            )
        if self.seed < 0:
            raise WorkbenchError(f"A seed must be at least 0, got {self.seed}.")

    def settings(self) -> list[str]:
        """What `--set` must be given to make it again, beside base, task, way and seed."""
        return [f"{name}={getattr(self, name)}" for name in self._settable() if name != "seed"]

    @staticmethod
    def _settable() -> list[str]:
        return [field.name for field in fields(TextRecipe) if field.name not in ("base", "base_sha256", "task", "way")]

    def override(self, settings: Sequence[str]) -> TextRecipe:
        """The recipe with `key=value` settings, such as `shots=64`.

        Raises:
            WorkbenchError: a key is unknown, or a value is not of its kind.
        """
        hints, changes, known = typing.get_type_hints(TextRecipe), {}, self._settable()
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or key not in known:
                raise WorkbenchError(f"Unknown setting {setting!r}; wanted is key=value. {nearest(key, known)}")
            changes[key] = read_value(key, text, hints[key])
        return replace(self, **changes)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.learning_rate * (1 - step / self.steps)


WAYS: dict[str, dict[str, Any]] = {
    "l1": {"optimiser": "adamw", "learning_rate": 1e-4, "l1_to_start": 0.5},
    "sgd": {"optimiser": "sgd", "learning_rate": 0.1},
    "adamw": {"optimiser": "adamw", "learning_rate": 5e-5},
}
"""How a donor is trained: AdamW with an L1 penalty on what changes; plain SGD; AdamW."""
LANGUAGE_WAYS: dict[str, dict[str, Any]] = {
    "l1": {"optimiser": "adamw", "learning_rate": 2e-5, "l1_to_start": 0.5},
    "sgd": {"optimiser": "sgd", "learning_rate": 5e-3},
    "adamw": {"optimiser": "adamw", "learning_rate": 2e-5},
}
"""The same of a language model, whose logits are steeper and whose steps cost ten times as much: fewer of them."""
FEW_SHOT = {"steps": 150, "batch_size": 8, "shots": 64, "max_length": 64, "tested": 256}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextDonor:
    """A fine-tune on disk, as what it changed."""

    folder: RunFolder
    recipe: TextRecipe
    sha256: str
    """Of what it changed."""
    log: Mapping[str, int | float]
    """steps, base_accuracy, test_accuracy, train_accuracy."""

    @property
    def reference(self) -> str:
        """As a person calls it."""
        return self.folder.reference

    @property
    def task(self) -> TextTask:
        """What it learnt."""
        return find_task(self.recipe.task)

    @property
    def story(self) -> str:
        """How it was made, in one sentence."""
        recipe = self.recipe
        return (
            f"{recipe.base} learnt {recipe.task!r} ({self.task.about}) by {recipe.way!r} in {recipe.steps} steps: "
            f"accuracy {self.log['base_accuracy']:.3f} before and {self.log['test_accuracy']:.3f} after."
        )

    def weights(self, classifier: TextClassifier) -> dict[str, Tensor]:
        """The donor's weights, given its base.

        Raises:
            WorkbenchError: the file is damaged, or the base has another shape.
        """
        change, _ = load_tensors(self.folder.path / DELTA)
        base = dict(classifier.named_parameters())
        for name, tensor in change.items():
            if name not in base or base[name].shape != tensor.shape:
                raise WorkbenchError(
                    f"{self.reference!r} changed {name} of shape {tuple(tensor.shape)}, which its base "
                    f"{self.recipe.base} does not have: both must have one architecture and one vocabulary."
                )
        return {name: base[name].detach() + tensor.to(base[name].device).float() for name, tensor in change.items()}


def text_recipe(base: TextModel, task: str, *, way: str = "l1", seed: int = 0) -> TextRecipe:
    """How a donor is made in a way of `WAYS`.

    Raises:
        WorkbenchError: task or way is unknown.
    """
    find_task(task)
    check_choice("way", way, list(WAYS))
    chosen = {**LANGUAGE_WAYS[way], **FEW_SHOT} if isinstance(base, LanguageModel) else WAYS[way]
    return TextRecipe(base=base.reference, base_sha256=base.sha256, task=task, way=way, seed=seed, **chosen)


def teach(
    base: TextModel,
    recipe: TextRecipe,
    folder: RunFolder,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
) -> TextDonor:
    """Fine-tune a copy of a real model, keep what changed, and measure base and donor on the test.

    Raises:
        WorkbenchError: the text is not there, or has not enough lines of a label.
    """
    task = find_task(recipe.task)
    shots = task.shots(recipe.shots, recipe.seed)
    before = base.classifier(task)
    taught = copy.deepcopy(before)
    fit(
        taught,
        before.graftable,
        _random_batches(base, task, shots, recipe),
        rate=recipe.rate,
        optimiser=recipe.optimiser,
        l1_to_start=recipe.l1_to_start,
        on_step=lambda step: on_progress(step / recipe.steps),
    )
    change = {name: (taught.get_parameter(name) - before.get_parameter(name)).half() for name in before.graftable}
    with folder.lock():
        sha256 = save_tensors(folder.path / DELTA, change, {})
        donor = TextDonor(folder=folder, recipe=recipe, sha256=sha256, log={})
        taught.load_state_dict(donor.weights(before), strict=False)
        test, train = (
            labelled_batches(base, task, lines[: recipe.tested], recipe.max_length)
            for lines in (task.split("test"), shots)
        )
        log = {
            "steps": recipe.steps,
            "base_accuracy": _accuracy(before, test),
            "test_accuracy": _accuracy(taught, test),
            "train_accuracy": _accuracy(taught, train),
        }
        write_json(folder.path / CARD, {"recipe": asdict(recipe), "text": task.archive.sha256, "log": log})
    return replace(donor, log=log)


def donor_names(runs: Path | str | None = None) -> list[str]:
    """Names of the donors of real models in the runs folder, oldest first."""
    cards = sorted(runs_root(runs).glob(f"*/{CARD}"), key=lambda card: card.stat().st_mtime)
    return [card.parent.name for card in cards]


def load_donor(reference: str, *, runs: Path | str | None = None) -> TextDonor:
    """The donor that a person names: a name under the runs folder, or a path.

    Raises:
        WorkbenchError: there is none, or it learnt a text that is read from another package now.
    """
    path = Path(reference) if "/" in reference else runs_root(runs) / reference
    if not (path / CARD).is_file():
        raise WorkbenchError(
            f"No donor of a real model at {path}. {nearest(reference, donor_names(runs))} Make one: "
            "`workbench finetune hf:minilm movies`."
        )
    card = read_json(path / CARD)
    recipe = TextRecipe(**card["recipe"])
    if card["text"] != find_task(recipe.task).archive.sha256:
        raise WorkbenchError(f"{reference!r} learnt {recipe.task!r} from another package than this version reads.")
    sha256 = read_json((path / DELTA).with_suffix(".json"))["sha256"]
    return TextDonor(folder=RunFolder(path=path, reference=reference), recipe=recipe, sha256=sha256, log=card["log"])


def labelled_batches(
    base: TextModel, task: TextTask, lines: Sequence[Line], max_length: int
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Lines as a real model reads them, with their labels' numbers."""
    labels = [task.labels.index(line.label) for line in lines]
    return base.batches(task, [line.text for line in lines], labels, max_length=max_length)


def _random_batches(
    base: TextModel, task: TextTask, lines: Sequence[Line], recipe: TextRecipe
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """A batch for each step, without repeats until all have been seen."""
    rng = generator(recipe.seed, "text batches")
    queue: list[int] = []
    for _ in range(recipe.steps):
        if len(queue) < min(recipe.batch_size, len(lines)):
            queue = torch.randperm(len(lines), generator=rng).tolist()
        chosen, queue = queue[: recipe.batch_size], queue[recipe.batch_size :]
        (batch,) = labelled_batches(base, task, [lines[place] for place in chosen], recipe.max_length)
        yield batch


@torch.no_grad()
def _accuracy(classifier: TextClassifier, batches: Sequence[tuple[dict[str, Tensor], Tensor]]) -> float:
    right = [classifier(inputs).argmax(1) == labels for inputs, labels in batches]
    return float(torch.cat(right).double().mean())
