"""Recipes: what to train, as values.

A recipe is a task, a model and a way of training. The shipped ones are functions in `RECIPES`; a user's own is a
function in a file of theirs, named as `my_recipes.py:name`, that returns a `Recipe` and works like a shipped one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from beartype.door import is_bearable

from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError, nearest
from workbench.store import digest
from workbench.tasks.base import Task
from workbench.tasks.modular import Modular
from workbench.tasks.pairs import Pairs

TASKS: dict[str, type] = {Modular.name: Modular, Pairs.name: Pairs}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule and stopping."""

    steps: int
    """Most steps to take."""
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    """Decoupled (AdamW), on the parameters that `decay` names."""
    decay: Literal["all", "matrices"] = "all"
    """What is decayed: every parameter, or only those that multiply, not biases and LayerNorms, as GPT-2 is trained."""
    dropout: float = 0.0
    """Share of the embeddings' sum, of each attention pattern and of what each branch writes that is dropped at a step,
    as in GPT-2; 0 drops nothing."""
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its value."""
    batch_size: int | None = None
    """Examples a step, drawn at random; None takes the whole training split at every step.

    With batches, at most 3,000 examples of each split are measured, drawn once and the same in every run; without, all.
    """
    clip_norm: float | None = None
    """Largest gradient norm; None does not clip."""
    loss_dtype: Literal["float32", "float64"] = "float64"
    """Precision of the log-softmax. In float32 losses below 1e-7 are lost and training slingshots."""
    evaluate_every: int = 100
    stop_when_clean: bool = True
    """Stop once the task is generalised and the sum of squared weights has settled."""
    init_seed: int = 0
    batch_seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "warmup_steps": 0, "evaluate_every": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise WorkbenchError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise WorkbenchError(f"batch_size must be at least 1, or null for full batch, got {self.batch_size}.")
        # So written that a NaN is refused too.
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise WorkbenchError(
                "learning_rate must be above 0 and weight_decay at least 0, "
                f"got {self.learning_rate} and {self.weight_decay}."
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise WorkbenchError(f"clip_norm must be above 0, or null for none, got {self.clip_norm}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise WorkbenchError(f"betas must lie in [0, 1), got {self.betas}.")
        if not 0 <= self.dropout < 1:
            raise WorkbenchError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.decay not in ("all", "matrices"):
            raise WorkbenchError(f"Unknown decay {self.decay!r}. Known: all, matrices.")
        if self.loss_dtype not in ("float32", "float64"):
            raise WorkbenchError(f"Unknown loss_dtype {self.loss_dtype!r}. Known: float32, float64.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run is made from."""

    name: str
    task: Task
    model: ModelConfig
    train: TrainConfig | None
    """None for a model that came trained."""
    shows: str
    """What a run of it should show, in a sentence."""
    minutes: float | None = None
    """Expected wall time on 2 cores, measured; None where nobody measured it."""

    def __post_init__(self) -> None:
        if not (dataclasses.is_dataclass(self.task) and isinstance(self.task, Task)):
            raise WorkbenchError(
                f"Recipe {self.name!r}: its task, a {type(self.task).__name__}, must be a frozen dataclass with all "
                "that workbench.tasks.base.Task asks for."
            )
        if self.model.d_vocab != len(self.task.vocab):
            raise WorkbenchError(
                f"Recipe {self.name!r}: the task has {len(self.task.vocab)} tokens, the model {self.model.d_vocab}. "
                "Set model.d_vocab to the task's vocabulary."
            )
        if self.model.n_ctx < len(self.task.position_labels):
            raise WorkbenchError(
                f"Recipe {self.name!r}: prompts have {len(self.task.position_labels)} positions, "
                f"the model reads {self.model.n_ctx}. Raise model.n_ctx."
            )

    def with_seed(self, seed: int) -> Recipe:
        """The recipe with one seed for world (where the task draws one), initial weights and batches."""
        if seed < 0:
            raise WorkbenchError(f"A seed must be at least 0, got {seed}.")
        train = None if self.train is None else replace(self.train, init_seed=seed, batch_seed=seed)
        world = {"seed": seed} if "seed" in _hints(self.task) else {}
        return replace(self, task=_replace_fields(self.task, world), train=train)

    def override(self, settings: Sequence[str]) -> Recipe:
        """The recipe with `key=value` settings, such as `train.steps=500` or just `p=59`.

        The model's vocabulary follows the task's.

        Raises:
            WorkbenchError: a key is unknown or ambiguous, or a value is not of its kind.
        """
        changes: dict[str, dict[str, Any]] = {"task": {}, "model": {}, "train": {}}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise WorkbenchError(f"Setting {setting!r} must be key=value, such as train.steps=500.")
            part, field = self._find_field(key.strip())
            changes[part][field.name] = _read_value(key, text, _hints(getattr(self, part))[field.name])
        task = _replace_fields(self.task, changes["task"])
        size, silent = len(task.vocab), self.model.d_vocab - self.model.d_vocab_out
        vocabulary = {} if size == self.model.d_vocab else {"d_vocab": size, "d_vocab_out": size - silent}
        model = replace(self.model, **{**vocabulary, **changes["model"]})
        train = None if self.train is None else replace(self.train, **changes["train"])
        return replace(self, task=task, model=model, train=train)

    def to_json(self) -> dict[str, Any]:
        """Everything that rebuilds the recipe."""
        task = self.task.to_json()
        if type(self.task) not in TASKS.values():
            file = Path(inspect.getfile(type(self.task)))
            task["source"] = {"file": str(file), "class": type(self.task).__name__, "sha256": digest(file.read_bytes())}
        return {
            "name": self.name,
            "task": task,
            "model": self.model.to_json(),
            "train": None if self.train is None else asdict(self.train),
            "shows": self.shows,
            "minutes": self.minutes,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            WorkbenchError: a part is missing, or the task's own source file has gone or changed.
        """
        try:
            return cls(
                name=content["name"],
                task=_task_from_json(_with_tuples(content["task"])),
                model=ModelConfig(**_with_tuples(content["model"])),
                train=None if content["train"] is None else TrainConfig(**_with_tuples(content["train"])),
                shows=content["shows"],
                minutes=content["minutes"],
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise WorkbenchError(f"This is not a recipe that this version reads: {error}.") from error

    def _find_field(self, key: str) -> tuple[str, dataclasses.Field[Any]]:
        known = {
            f"{part}.{field.name}": (part, field)
            for part in ("task", "model", "train")
            if getattr(self, part) is not None
            for field in dataclasses.fields(getattr(self, part))
        }
        matches = [name for name in known if key in (name, name.partition(".")[2])]
        if not matches:
            raise WorkbenchError(f"Unknown setting {key!r} for recipe {self.name!r}. {nearest(key, known)}")
        if len(matches) > 1:
            raise WorkbenchError(f"Setting {key!r} is ambiguous: say {' or '.join(matches)}.")
        return known[matches[0]]


def modular_smoke() -> Recipe:
    """A small prime that generalises in seconds."""
    task = Modular(p=59, train_fraction=0.5)
    return Recipe(
        name="modular-smoke",
        task=task,
        model=_one_layer(task, d_model=64, d_mlp=256),
        train=TrainConfig(steps=1000, learning_rate=1e-2, evaluate_every=10),
        shows="Generalises almost without delay; a sparse Fourier circuit. Proves the pipeline, not grokking.",
        minutes=0.3,
    )


def modular() -> Recipe:
    """Addition mod 113 from 30 % of all pairs: memorises early, generalises thousands of steps later."""
    task = Modular(p=113, train_fraction=0.3)
    return Recipe(
        name="modular",
        task=task,
        model=_one_layer(task, d_model=128, d_mlp=512),
        # Every 50 steps: more than 50 looks between memorising and generalising, even in a run that is quick.
        train=TrainConfig(steps=25_000, evaluate_every=50),
        shows="Groks: train loss < 1e-4 long before test loss falls; 3 to 6 key frequencies; the Clock-like circuit.",
        minutes=8.0,
    )


def modular_paper() -> Recipe:
    """The mainline setting of Nanda et al. 2023: as `modular`, for all of its 40,000 epochs."""
    return replace(
        modular(),
        name="modular-paper",
        train=TrainConfig(steps=40_000, evaluate_every=50, stop_when_clean=False),
        shows="As modular, and that the circuit stays: the published 40,000 full-batch epochs without early stop.",
        minutes=25.0,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "modular-smoke": modular_smoke,
    "modular": modular,
    "modular-paper": modular_paper,
}


def find_recipe(name: str) -> Recipe:
    """The shipped recipe of that name, or the user's own from `file.py:function`.

    Raises:
        WorkbenchError: there is none, or the user's function does not return a recipe.
    """
    if name in RECIPES:
        return RECIPES[name]()
    file, colon, function = name.rpartition(":")
    if not colon:
        raise WorkbenchError(f"Unknown recipe {name!r}. {nearest(name, RECIPES)} Your own: my_recipes.py:name.")
    make = getattr(import_file(Path(file)), function, None)
    if not callable(make):
        raise WorkbenchError(f"{file} has no function {function!r} that returns a recipe.")
    try:
        recipe = make()
    except WorkbenchError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WorkbenchError(f"{name} failed: {type(error).__name__}: {reason}") from error
    if not isinstance(recipe, Recipe):
        raise WorkbenchError(f"{name} returned a {type(recipe).__name__}; it must return a workbench Recipe.")
    return recipe


def import_file(path: Path) -> Any:
    """Run a Python file of the user's as a module.

    Raises:
        WorkbenchError: it is missing or fails.
    """
    if path.suffix != ".py" or not path.is_file():
        raise WorkbenchError(f"No Python file {str(path)!r}. Name it as path/to/file.py:function.")
    name = f"workbench_user_{digest(str(path.resolve()).encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while the class is made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise WorkbenchError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _one_layer(task: Modular, *, d_model: int, d_mlp: int) -> ModelConfig:
    return ModelConfig(
        n_layers=1,
        d_model=d_model,
        n_heads=4,
        d_head=d_model // 4,
        d_mlp=d_mlp,
        n_ctx=3,
        d_vocab=len(task.vocab),
        d_vocab_out=task.p,
    )


def _task_from_json(content: dict[str, Any]) -> Task:
    name, source = content.pop("name"), content.pop("source", None)
    if source is None:
        if name not in TASKS:
            raise WorkbenchError(f"Unknown task {name!r}. {nearest(name, TASKS)}")
        return TASKS[name](**content)
    file = Path(source["file"])
    if not file.is_file() or digest(file.read_bytes()) != source["sha256"]:
        raise WorkbenchError(f"The run's own task is defined in {file}, which has gone or changed since. Restore it.")
    return getattr(import_file(file), source["class"])(**content)


def _with_tuples(content: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(content, Mapping):
        return {key: _with_tuples(value) for key, value in content.items()}
    return tuple(map(_with_tuples, content)) if isinstance(content, list) else content


def _replace_fields(task: Task, changes: Mapping[str, Any]) -> Task:
    return replace(typing.cast(Any, task), **changes)


def _hints(value: object) -> dict[str, Any]:
    return typing.get_type_hints(type(value))


def _read_value(key: str, text: str, hint: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = _with_tuples(value)
    if isinstance(value, int) and not isinstance(value, bool) and not is_bearable(value, hint):
        value = float(value)
    if not is_bearable(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise WorkbenchError(f"Setting {key}={text} is not of the kind {wanted}.")
    return value
