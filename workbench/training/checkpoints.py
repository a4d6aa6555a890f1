"""Checkpoints and the run: weights at a step, verified, and everything that belongs to them.

`load("gallery:modular")` is where a notebook begins: the run with its recipe, task, log and checkpoints, and a model at
any of its steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from workbench.models.program import TransformerProgram
from workbench.models.program_config import ProgramConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance, RunFolder, find_run, load_tensors, read_json, save_tensors, write_json
from workbench.tasks.base import Task
from workbench.training.curves import TrainLog
from workbench.training.recipe import Recipe

ModelT = TypeVar("ModelT", Transformer, TransformerProgram)
METRICS = "metrics.jsonl"
MEASURES = "measures.jsonl"
STATUS = "status.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Weights at a step, on disk."""

    step: int
    path: Path
    sha256: str
    reasons: tuple[str, ...]
    """Why it was kept: schedule, memorised, generalised, best, final."""
    dtype: str
    """Precision that it is stored in; loading gives float32."""

    def tensors(self) -> dict[str, Tensor]:
        """The weights in float32, verified against the hash."""
        tensors, _ = load_tensors(self.path)
        return {name: tensor.float() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run: recipe, task, log and checkpoints."""

    folder: RunFolder
    recipe: Recipe

    @property
    def reference(self) -> str:
        """How a person calls it."""
        return self.folder.reference

    @property
    def task(self) -> Task:
        """What it learnt."""
        return self.recipe.task

    @cached_property
    def log(self) -> TrainLog:
        """The training log, as it is when first asked for."""
        return TrainLog.of(self.task, self.folder.lines(METRICS))

    @cached_property
    def measures(self) -> pd.DataFrame:
        """Progress measures by checkpoint; empty if the run was not measured."""
        return pd.DataFrame(self.folder.lines(MEASURES))

    @property
    def status(self) -> dict[str, Any]:
        """How the run ended: `finished`, `reason`, `seconds`. Before that, `finished` is false.

        A run that was trained here also says with how many `threads`, and whether it is `repeatable`: bit by bit on the
        same machine with as many threads and processes.
        """
        path = self.folder.path / STATUS
        return read_json(path) if path.exists() else {"finished": False, "reason": "not finished", "seconds": None}

    @cached_property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """Checkpoints by step. One whose card is missing was never completed and does not count."""
        return list_checkpoints(self.folder)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The checkpoint at a step, or the one that the run ends with: the last, or the best where it keeps that.

        Raises:
            WorkbenchError: there is none at that step.
        """
        # The log is read first: what it tells of has its weights. A run that has just begun has only these.
        if step is None and self._keeps_best and self.log.rows:
            step = self.log.step_best
        if not self.checkpoints:
            raise WorkbenchError(f"Run {self.reference!r} has no checkpoints yet. Train it first.")
        if step is None:
            return self.checkpoints[-1]
        for checkpoint in self.checkpoints:
            if checkpoint.step == step:
                return checkpoint
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        near = min(steps, key=lambda known: abs(known - step))
        raise WorkbenchError(
            f"Run {self.reference!r} has no checkpoint at step {step}; the nearest is {near}. "
            f"It has {len(steps)}, from {steps[0]} to {steps[-1]}."
        )

    @property
    def last(self) -> Mapping[str, Any]:
        """The evaluation of the checkpoint that the run ends with; empty of a run that was not trained here."""
        if not self.log.rows:
            return {}
        kept = self.log.step_best if self._keeps_best else self.log.rows[-1]["step"]
        return next(row for row in self.log.rows if row["step"] == kept)

    @property
    def _keeps_best(self) -> bool:
        return self.recipe.train is not None and self.recipe.train.keep == "best"

    def model(self, step: int | None = None) -> Transformer:
        """The transformer at a step, or at the end, ready to be looked into.

        Raises:
            WorkbenchError: the run learnt a Transformer Program.
        """
        return self._load(Transformer(self.recipe.transformer, generator=None), step)

    def program(self, step: int | None = None) -> TransformerProgram:
        """The Transformer Program at a step, or at the end, discretised.

        Raises:
            WorkbenchError: the run learnt a transformer.
        """
        config = self.recipe.model
        if not isinstance(config, ProgramConfig):
            raise WorkbenchError(
                f"Run {self.reference!r} learnt a transformer, no Transformer Program. Train one: "
                "`workbench train program-hist`."
            )
        return self._load(TransformerProgram(config, generator=None), step)

    def instrumented(self, step: int | None = None) -> Transformer | TransformerProgram:
        """The model at a step, or at the end, whichever it is: what patching needs."""
        return self.program(step) if isinstance(self.recipe.model, ProgramConfig) else self.model(step)

    def _load(self, model: ModelT, step: int | None) -> ModelT:
        checkpoint = self.checkpoint(step)
        try:
            model.load_state_dict(checkpoint.tensors())
        except RuntimeError as error:
            raise WorkbenchError(f"{checkpoint.path} does not hold this recipe's model: {error}") from error
        model.provenance = self.provenance(checkpoint)
        return model.eval()

    def provenance(self, checkpoint: Checkpoint) -> Provenance:
        """Where results on this checkpoint come from."""
        return Provenance(
            code_version=code_version(),
            recipe=self.recipe.name,
            seed=None if self.recipe.train is None else self.recipe.train.init_seed,
            parents=(checkpoint.sha256,),
        )


def load(reference: str, *, runs: Path | str | None = None) -> Run:
    """The run that a person names: a name under the runs folder, a path, or `gallery:NAME`.

    Raises:
        WorkbenchError: there is none, or it is not a run of this workbench.
    """
    folder = find_run(reference, None if runs is None else Path(runs))
    return Run(folder=folder, recipe=Recipe.from_json(folder.recipe_json()))


def list_checkpoints(folder: RunFolder) -> tuple[Checkpoint, ...]:
    """Completed checkpoints of a run, by step."""
    found = []
    for card_path in sorted((folder.path / "checkpoints").glob("step_*.json")):
        card = read_json(card_path)
        found.append(
            Checkpoint(
                step=card["step"],
                path=card_path.with_suffix(".safetensors"),
                sha256=card["sha256"],
                reasons=tuple(card["reasons"]),
                dtype=card["dtype"],
            )
        )
    return tuple(found)


def save_checkpoint(
    folder: RunFolder, step: int, weights: Mapping[str, Tensor], reasons: Sequence[str], *, dtype: torch.dtype
) -> None:
    """Keep weights for analysis, in the precision given."""
    path = folder.path / "checkpoints" / f"step_{step:08d}.safetensors"
    card = {"step": step, "reasons": list(reasons), "dtype": str(dtype).removeprefix("torch.")}
    save_tensors(path, {name: tensor.to(dtype) for name, tensor in weights.items()}, card)


def add_reason(folder: RunFolder, step: int, reason: str) -> None:
    """Note on a checkpoint's card one more reason why it is kept, if there is a checkpoint at that step."""
    path = folder.path / "checkpoints" / f"step_{step:08d}.json"
    if path.exists():
        card = read_json(path)
        write_json(path, {**card, "reasons": list(dict.fromkeys([*card["reasons"], reason]))})


def thin(run: Run, count: int, *, among: Collection[int] | None = None) -> tuple[Checkpoint, ...]:
    """About `count` checkpoints that tell the run's story: at least half of them between memorising and generalising.

    From four on the moments of memorising and generalising, the first and the last are always among them; of three, the
    first and the last; so is the best, where the run keeps that. They are taken from those at the steps `among`, if
    given, else from all.
    """
    marks = run.log.landmarks()
    known = [checkpoint for checkpoint in run.checkpoints if among is None or checkpoint.step in among]
    # A run may generalise before it has memorised all of its training set.
    start, end = sorted((marks.get("memorised", 0), marks.get("generalised", known[-1].step)))
    inside = [checkpoint for checkpoint in known if start <= checkpoint.step <= end]
    before = [checkpoint for checkpoint in known if checkpoint.step < start]
    after = [checkpoint for checkpoint in known if checkpoint.step > end]
    rest = count - count // 2
    # From its end: where one is left of what comes after, it is the run's last.
    outside = [*_spread(before, rest // 2), *_spread(after[::-1], rest - rest // 2)]
    # What a run that starts or ends in between leaves over tells more of what lies there.
    chosen = {each.step: each for each in (*outside, *_spread(inside, count - len(outside)))}
    chosen |= {each.step: each for each in known if "best" in each.reasons}
    return tuple(chosen[step] for step in sorted(chosen))


def _spread(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    if len(checkpoints) <= count:
        return list(checkpoints)
    places = torch.linspace(0, len(checkpoints) - 1, count).round().long().tolist()
    return [checkpoints[place] for place in places]


def export(run: Run, target: RunFolder, *, count: int, dtype: torch.dtype) -> None:
    """Write a thinned copy of a finished run into an empty folder: the way a run enters the gallery.

    Of a measured run only checkpoints that were measured are kept, so that each has its numbers.
    """
    write_json(target.path / "recipe.json", run.recipe.to_json())
    for name in (METRICS, MEASURES, STATUS):
        source = run.folder.path / name
        if source.exists():
            (target.path / name).write_bytes(source.read_bytes())
    measured = {row["step"] for row in run.folder.lines(MEASURES)}
    for checkpoint in thin(run, count, among=measured or None):
        save_checkpoint(target, checkpoint.step, checkpoint.tensors(), checkpoint.reasons, dtype=dtype)
