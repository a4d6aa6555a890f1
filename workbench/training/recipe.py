"""A recipe: all that a run is made from, as a value.

It is a task, a model and a way of training; it is written as JSON beside the run, and rebuilt from there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from beartype.door import is_bearable

from workbench.models.config import ModelConfig
from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError, nearest
from workbench.store import digest
from workbench.tasks.base import Streamed, Task, Voted
from workbench.tasks.comparison import Comparison
from workbench.tasks.complex_comparison import ComplexComparison
from workbench.tasks.composition import Composition
from workbench.tasks.graph_search import GraphSearch
from workbench.tasks.graph_traces import DepthFirst, SelectionInference
from workbench.tasks.modular import Modular
from workbench.tasks.pairs import Pairs
from workbench.tasks.sequences import Sequences
from workbench.tasks.skills import Skills
from workbench.tasks.words import Words

TASKS: dict[str, type] = {
    task.name: task
    for task in (
        Modular,
        Pairs,
        Composition,
        Comparison,
        ComplexComparison,
        GraphSearch,
        DepthFirst,
        SelectionInference,
        Sequences,
        Skills,
        Words,
    )
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule and stopping."""

    steps: int
    """Most steps to take."""
    optimiser: Literal["adamw", "muon", "signum", "sgd"] = "adamw"
    """What makes updates of gradients. Muon takes the blocks' matrices and leaves the rest to AdamW; plain SGD has no
    momentum."""
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    """Decoupled, on the parameters that `decay` names; Muon decays all that it takes."""
    trained: Literal["all", "blocks"] = "all"
    """What is trained: every parameter, or only those of the blocks; embeddings, final LayerNorm and unembedding keep
    what they began with."""
    l1_to_start: float = 0.0
    """Strength lambda of lambda |w - w_start|_1, taken as a proximal step after each update: a weight that gains less
    than that stays exactly where it began. 0 is none."""
    decay: Literal["all", "matrices"] = "all"
    """What is decayed: every parameter, or only those that multiply, not biases and LayerNorms, as GPT-2 is trained."""
    dropout: float = 0.0
    """Share of the embeddings' sum, of each attention pattern and of what each branch writes that is dropped at a step,
    as in GPT-2; 0 drops nothing."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decays of AdamW's running means of the gradient and of its square; the first is Muon's and Signum's momentum."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly to its value."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, over which the learning rate falls linearly to 0."""
    batch_size: int | None = None
    """Examples a step, drawn at random, or fresh ones of a task that streams them; None takes the whole training split
    at every step.

    With batches, at most 3,000 examples of each split are measured, drawn once and the same in every run; without, all.
    """
    curriculum: float | None = None
    """Accuracy on a batch not yet trained on, from which a streamed task's examples may be one level harder.

    It is looked at where the run is evaluated, and training begins at level 1. None gives all levels from the start.
    """
    clip_norm: float | None = None
    """Largest gradient norm; None does not clip."""
    loss: Literal["cross_entropy", "stablemax"] = "cross_entropy"
    """What is minimised: stablemax replaces the softmax's exponential by a line and its mirror (Prieto et al. 2025).

    What is logged stays the cross-entropy, so that runs compare.
    """
    average: Literal["answers", "prompts"] = "answers"
    """Whether every answer counts as much in the loss, or every prompt, by the mean over its answers."""
    temperature: tuple[float, float] | None = None
    """Temperature of a Transformer Program's choices at the first step and at the last, geometric in between; None for
    other models."""
    keep: Literal["last", "best"] = "last"
    """Which weights a run ends with: the last, or those of the evaluation with the highest accuracy on the split `val`,
    the lowest loss there where several are as accurate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What a step multiplies matrices in; bfloat16 is for devices that have it. Weights, sums and the optimiser are
    float32 in any case, and what is logged is the float32 model's."""
    loss_dtype: Literal["float32", "float64"] = "float64"
    """Precision of the loss. In float32 cross-entropies below 1e-7 are lost and training slingshots."""
    grokfast: tuple[float, float] | None = None
    """Decay alpha of the gradients' running mean, and how many times (lambda) it is added to them at every step, before
    clipping (Grokfast-EMA, Lee et al. 2024: 0.98 and 2); None adds nothing."""
    orthogonal_gradient: bool = False
    """Whether each parameter's gradient loses its part along the parameter and is brought back to its norm, after
    Grokfast and before clipping (Prieto et al. 2025)."""
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
        if self.curriculum is not None and not 0 < self.curriculum <= 1:
            raise WorkbenchError(f"curriculum must be an accuracy above 0, or null for none, got {self.curriculum}.")
        if not 0 <= self.l1_to_start < math.inf:
            raise WorkbenchError(f"l1_to_start must be at least 0, got {self.l1_to_start}.")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise WorkbenchError(f"clip_norm must be above 0, or null for none, got {self.clip_norm}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise WorkbenchError(f"betas must lie in [0, 1), got {self.betas}.")
        if not 0 <= self.cooldown <= 1:
            raise WorkbenchError(f"cooldown must be a share of the steps from 0 to 1, got {self.cooldown}.")
        if not 0 <= self.dropout < 1:
            raise WorkbenchError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.temperature is not None and not all(0 < value < math.inf for value in self.temperature):
            raise WorkbenchError(
                f"temperature must be two numbers above 0, such as [3.0, 0.01], got {self.temperature}."
            )
        if self.grokfast is not None and not (0 <= self.grokfast[0] < 1 and 0 <= self.grokfast[1] < math.inf):
            raise WorkbenchError(
                "grokfast must be null, or alpha in [0, 1) and lambda at least 0, such as [0.98, 2.0], "
                f"got {self.grokfast}."
            )
        words = {
            "optimiser": ("adamw", "muon", "signum", "sgd"),
            "trained": ("all", "blocks"),
            "decay": ("all", "matrices"),
            "loss": ("cross_entropy", "stablemax"),
            "precision": ("float32", "bfloat16"),
            "loss_dtype": ("float32", "float64"),
            "average": ("answers", "prompts"),
            "keep": ("last", "best"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise WorkbenchError(f"Unknown {name} {getattr(self, name)!r}. Known: {', '.join(known)}.")

    def temperature_at(self, step: int) -> float:
        """Temperature of a program's choices at a step."""
        assert self.temperature is not None
        first, last = self.temperature
        return first * (last / first) ** (step / max(1, self.steps - 1))

    def rate(self, step: int) -> float:
        """Learning rate of the update that leads from `step` to the next."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cooling = self.cooldown * self.steps
        cool = min(1.0, (self.steps - step) / cooling) if cooling else 1.0
        return self.learning_rate * warm * cool


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint whose weights a training begins with."""

    run: str
    """As a person calls it: beside the run that begins there, a path, or `gallery:NAME`."""
    step: int
    sha256: str
    """Of its weights, so that another checkpoint under the same name is noticed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run is made from."""

    name: str
    task: Task
    model: ModelConfig | ProgramConfig
    train: TrainConfig | None
    """None for a model that came trained."""
    shows: str
    """What a run of it should show, in a sentence."""
    minutes: float | None = None
    """Expected wall time on 2 cores, measured; None where nobody measured it."""
    start: Start | None = None
    """Where its weights come from; None draws them."""

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
        streamed = isinstance(self.task, Streamed)
        if self.train is not None and streamed and self.train.batch_size is None:
            raise WorkbenchError(
                f"Recipe {self.name!r}: task {self.task.name!r} streams its examples: there is no whole training split "
                "to take at every step. Set train.batch_size."
            )
        if self.train is not None and self.train.curriculum is not None and not streamed:
            raise WorkbenchError(
                f"Recipe {self.name!r}: task {self.task.name!r} has no levels for a curriculum. "
                "Set train.curriculum=null."
            )
        if self.train is not None and (self.train.temperature is not None) != isinstance(self.model, ProgramConfig):
            raise WorkbenchError(
                f"Recipe {self.name!r}: train.temperature belongs to Transformer Programs, which need one such as "
                "[3.0, 0.01], and to no other model."
            )
        if self.train is not None and self.train.keep == "best" and "val" not in self.task.measured:
            raise WorkbenchError(
                f"Recipe {self.name!r}: task {self.task.name!r} measures no split `val` on which the best "
                "weights could be chosen. Set train.keep=last."
            )
        if self.train is not None and self.train.precision == "bfloat16" and isinstance(self.model, ProgramConfig):
            raise WorkbenchError(
                f"Recipe {self.name!r}: a Transformer Program is trained in float32. Set train.precision=float32."
            )
        if self.train is not None and self.train.dropout and isinstance(self.model, ProgramConfig):
            raise WorkbenchError(f"Recipe {self.name!r}: a Transformer Program has no dropout. Set train.dropout=0.")
        if self.model.n_ctx < len(self.task.position_labels):
            raise WorkbenchError(
                f"Recipe {self.name!r}: prompts have {len(self.task.position_labels)} positions, "
                f"the model reads {self.model.n_ctx}. Raise model.n_ctx."
            )

    @property
    def transformer(self) -> ModelConfig:
        """Its model's shape, where that is a transformer.

        Raises:
            WorkbenchError: it is a Transformer Program.
        """
        if isinstance(self.model, ProgramConfig):
            raise WorkbenchError(
                f"Recipe {self.name!r} learns a Transformer Program, and this is for transformers: use "
                "`run.program()`, `workbench decompile` or the page Program."
            )
        return self.model

    def with_seed(self, seed: int) -> Recipe:
        """The recipe with one seed for world (where the task draws one), initial weights and batches."""
        if seed < 0:
            raise WorkbenchError(f"A seed must be at least 0, got {seed}.")
        train = None if self.train is None else replace(self.train, init_seed=seed, batch_seed=seed)
        world = {"seed": seed} if "seed" in _hints(self.task) else {}
        return replace(self, task=_replace_fields(self.task, world), train=train)

    def override(self, settings: Sequence[str]) -> Recipe:
        """The recipe with `key=value` settings, such as `train.steps=500` or just `p=59`.

        The model's vocabulary and padding follow the task's.

        Raises:
            WorkbenchError: a key is unknown or ambiguous, or a value is not of its kind.
        """
        changes: dict[str, dict[str, Any]] = {"task": {}, "model": {}, "train": {}}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise WorkbenchError(f"Setting {setting!r} must be key=value, such as train.steps=500.")
            part, field = self._find_field(key.strip())
            changes[part][field.name] = read_value(key, text, _hints(getattr(self, part))[field.name])
        task = _replace_fields(self.task, changes["task"])
        size, silent = len(task.vocab), self.model.d_vocab - self.model.d_vocab_out
        vocabulary: dict[str, Any] = (
            {} if size == self.model.d_vocab else {"d_vocab": size, "d_vocab_out": size - silent}
        )
        if isinstance(task, Voted) and isinstance(self.model, ProgramConfig):
            vocabulary |= {name: getattr(task, name) for name in ("d_vocab_out", "outputs", "causal", "pooled")}
        if self.model.pad_token is not None and self.model.pad_token == self.task.pad_token:
            vocabulary["pad_token"] = task.pad_token
        model = replace(self.model, **{**vocabulary, **changes["model"]})
        train = None if self.train is None else replace(self.train, **changes["train"])
        return replace(self, task=task, model=model, train=train)

    def trainable(self) -> TrainConfig:
        """How it is trained.

        Raises:
            WorkbenchError: its model came trained, or its task lacks a split that training measures.
        """
        if self.train is None:
            raise WorkbenchError(f"Recipe {self.name!r} was imported: it has no training to do or go on with.")
        if not {"train", "test"} <= set(self.task.measured):
            raise WorkbenchError(
                f"Task {self.task.name!r} measures {', '.join(self.task.measured)}: a task that is trained needs "
                "the splits train and test among them."
            )
        return self.train

    def full_key(self, key: str) -> str:
        """A setting's key with its part: `train.steps` for `steps`.

        Raises:
            WorkbenchError: it is unknown or ambiguous.
        """
        part, field = self._find_field(key)
        return f"{part}.{field.name}"

    def settings(self) -> dict[str, Any]:
        """What task, model and training are made from, as JSON keeps it, under dotted keys."""
        content = json.loads(json.dumps(self.to_json()))
        return flat({part: content[part] or {} for part in ("task", "model", "train")})

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
            **({} if self.start is None else {"start": asdict(self.start)}),
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
                model=_model_from_json(_with_tuples(content["model"])),
                train=None if content["train"] is None else TrainConfig(**_with_tuples(content["train"])),
                shows=content["shows"],
                minutes=content["minutes"],
                start=Start(**content["start"]) if "start" in content else None,
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


def _model_from_json(content: Mapping[str, Any]) -> ModelConfig | ProgramConfig:
    return ProgramConfig(**content) if "cardinality" in content else ModelConfig(**content)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def read_value(key: str, text: str, hint: Any) -> Any:
    """What a person typed for a setting, as a value of its kind.

    Raises:
        WorkbenchError: it is of another kind.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = _with_tuples(value)
    if not is_bearable(value, hint):
        value = _as_floats(value)
    if not is_bearable(value, hint):
        if get_origin(hint) is Literal:
            raise WorkbenchError(f"Setting {key}={text} is none of {', '.join(map(str, get_args(hint)))}.")
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise WorkbenchError(f"Setting {key}={text} is not of the kind {wanted}.")
    return value


def differing_settings(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Settings that are not the same in two recipes, with both values; None where one has no such setting."""
    one, two = recipe.settings(), other.settings()
    keys = [*one, *(key for key in two if key not in one)]
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


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


def _as_floats(value: Any) -> Any:
    """Whole numbers as floats, those in tuples too."""
    if isinstance(value, tuple):
        return tuple(map(_as_floats, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
