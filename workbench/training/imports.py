"""A model and prompt pairs of the user's own, checked, as a run.

    read the model -> read the pairs -> check length, alignment, vocabulary -> measure headroom -> write the run

Nothing is written before everything has passed, and the run folder appears whole or not at all.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import pandas as pd
import torch
from beartype.door import is_bearable
from jaxtyping import Float
from torch import Tensor

from workbench.instrument.passes import run as run_model
from workbench.intervals import paired_bootstrap
from workbench.metrics import metric
from workbench.models.bridges import from_bridge, from_hooked_transformer, from_hugging_face
from workbench.models.config import ModelConfig
from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError, code_version
from workbench.store import (
    Provenance,
    RunFolder,
    check_run_name,
    load_state_dict,
    read_json,
    runs_root,
    write_atomic,
    write_json,
    writing,
)
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.pairs import Pairs
from workbench.training.checkpoints import STATUS, Run, load, save_checkpoint
from workbench.training.pair_files import read_pairs
from workbench.training.recipe import Recipe, import_file

WEIGHTS = (".safetensors", ".pt", ".pth")
FEW = 10
"""Pairs below which a bootstrap interval is too narrow to trust."""
LOGITS = 2**25
"""Logits of one pass: a large vocabulary is measured a few prompts at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Findings:
    """What the validator found in pairs that it let pass."""

    pairs: int
    """Pairs that were read."""
    dropped: int
    """Pairs whose answer is their distractor: no headroom."""
    n: int
    """Pairs that were kept, and that the numbers below are of."""
    length: tuple[int, int]
    """Shortest and longest prompt."""
    differing: tuple[int, float, int]
    """Positions at which clean and corrupt differ: least, median, most."""
    accuracy: float
    """Share of clean prompts that the model answers right."""
    clean: float
    """Mean logit difference of answer and distractor on the clean prompts."""
    corrupt: float
    """The same on the corrupt prompts."""
    headroom: float
    """Clean minus corrupt: what there is for a patch to restore or to break."""
    headroom_interval: tuple[float, float]
    provenance: Provenance

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting a patch map of these pairs."""
        low, high = self.headroom_interval
        doubts = [
            (
                self.dropped > 0,
                f"{self.dropped} of {self.pairs} pairs have the same answer and distractor and are left out.",
            ),
            (self.n < FEW, f"Only {self.n} pairs: intervals over so few are too narrow to trust."),
            (
                self.length[0] < self.length[1],
                f"Prompts are {self.length[0]} to {self.length[1]} tokens long: a position is not one place in all.",
            ),
            (
                self.differing[2] > 1,
                f"Clean and corrupt differ at up to {self.differing[2]} positions: no effect is that of one change.",
            ),
            (
                self.accuracy < 0.5,
                f"The model answers only {self.accuracy:.0%} of the clean prompts right (n = {self.n}).",
            ),
            (
                low <= 0,
                f"The model hardly tells clean from corrupt: headroom {self.headroom:.3g} logits, "
                f"95 % interval {low:.3g} to {high:.3g} (n = {self.n}).",
            ),
        ]
        return tuple(doubt for holds, doubt in doubts if holds)

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "pairs": self.pairs,
            "dropped": self.dropped,
            "n": self.n,
            "length": list(self.length),
            "differing": list(self.differing),
            "accuracy": self.accuracy,
            "metric": "logit_difference",
            "clean": self.clean,
            "corrupt": self.corrupt,
            "headroom": self.headroom,
            "headroom_interval": list(self.headroom_interval),
            "warnings": list(self.warnings),
        }

    def tables(self) -> Sequence[Table]:
        """The findings, one a row."""
        low, high = self.headroom_interval
        rows = [
            ("pairs read", f"{self.pairs}", ""),
            ("pairs without headroom, left out", f"{self.dropped}", ""),
            ("shortest and longest prompt", f"{self.length[0]} to {self.length[1]}", "tokens"),
            ("positions that differ (least, median, most)", ", ".join(f"{value:g}" for value in self.differing), ""),
            ("clean prompts answered right", f"{self.accuracy:.3g}", f"fraction of {self.n}"),
            ("logit difference, clean", f"{self.clean:.3g}", f"logits, n = {self.n}"),
            ("logit difference, corrupt", f"{self.corrupt:.3g}", f"logits, n = {self.n}"),
            ("headroom", f"{self.headroom:.3g} ({low:.3g} to {high:.3g})", f"logits, n = {self.n}"),
        ]
        frame = pd.DataFrame(rows, columns=["finding", "value", "unit"])
        caption = (
            "What the validator found; headroom is the drop of the logit difference from clean to corrupt, with its "
            "95 % paired bootstrap interval."
        )
        return [Table(name="import_findings", frame=frame, kind="table", axes={}, unit="", caption=caption)]


def import_run(
    model: str, pairs: Path, *, name: str, vocab: Path | None = None, runs: Path | None = None
) -> tuple[Run, Findings]:
    """A run of the user's own model and pairs.

    Args:
        model: `X.safetensors` or `X.pt` with its config in `X.json` (the workbench's, or a HookedTransformer's), a
            Hugging Face folder of GPT-2 shape, or `file.py:function` that returns a Transformer or a TransformerBridge.
        pairs: CSV or JSONL with the columns clean, corrupt, answer, distractor; tokens are separated by spaces.
        name: of the run.
        vocab: one token a line; without it tokens are ids.
        runs: the runs folder.

    Raises:
        WorkbenchError: anything is unreadable or does not fit; nothing is written then.
    """
    _free_target(name, runs)
    transformer = read_model(model)
    task = read_pairs(pairs, transformer.config, vocab)
    shows = f"Imported from {Path(model).absolute().name}."
    return keep_as_run(transformer, task, name=name, shows=shows, runs=runs)


def keep_as_run(
    model: Transformer,
    task: Pairs,
    *,
    name: str,
    shows: str,
    files: Mapping[str, bytes] = MappingProxyType({}),
    runs: Path | None = None,
) -> tuple[Run, Findings]:
    """A run of a model and pairs that are at hand.

    Args:
        model: whose weights are kept, in float32.
        task: the pairs.
        name: of the run.
        shows: what it is, in a sentence.
        files: what else to keep in the run's folder, by path.
        runs: the runs folder.

    Raises:
        WorkbenchError: the name is taken, or there is nothing to measure; nothing is written then.
    """
    target = _free_target(name, runs)
    findings = examine(model, task)
    _write(Recipe(name="imported", task=task, model=model.config, train=None, shows=shows), model, target, files)
    run = load(name, runs=runs)
    return run, replace(findings, provenance=run.provenance(run.checkpoint()))


def read_model(reference: str) -> Transformer:
    """The model that a person names, as `import_run` takes it, in float32.

    Raises:
        WorkbenchError: there is none, or it is not one that the workbench computes.
    """
    path = Path(reference)
    with _foreign(reference):
        if path.is_dir():
            made = from_hugging_face(path)
        elif path.suffix.lower() in WEIGHTS:
            made = _from_files(path)
        else:
            made = _from_function(reference)
    return _rebuilt(made.config, made.state_dict())


def examine(model: Transformer, task: Pairs) -> Findings:
    """Length, alignment and headroom of the pairs on this model.

    Raises:
        WorkbenchError: no pair has headroom, or the model's logits are no numbers.
    """
    batch = task.contrast(task.examples(task.splits[0]))
    if len(batch) == 0:
        raise WorkbenchError("Every pair has the same answer and distractor: there is nothing that a patch could move.")
    corrupt, _ = batch.pairs()
    clean_difference, accuracy = _measured(model, batch)
    corrupt_difference, _ = _measured(model, replace(batch, tokens=corrupt))
    drop = clean_difference - corrupt_difference
    if not drop.isfinite().all():
        raise WorkbenchError("The model's logits on these prompts are not finite numbers. Check its weights.")
    low, high = paired_bootstrap(drop)
    differing = (batch.tokens != corrupt).sum(1)
    lengths = batch.read.int().argmax(1) + 1
    return Findings(
        pairs=len(task.clean),
        dropped=batch.dropped,
        n=len(batch),
        length=(int(lengths.min()), int(lengths.max())),
        differing=(int(differing.min()), float(differing.double().quantile(0.5)), int(differing.max())),
        accuracy=float(accuracy.mean()),
        clean=float(clean_difference.mean()),
        corrupt=float(corrupt_difference.mean()),
        headroom=float(drop.mean()),
        headroom_interval=(float(low), float(high)),
        provenance=model.provenance,
    )


def _measured(model: Transformer, batch: Batch) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Logit difference of answer and distractor, and whether the answer is the top token, at each prompt."""
    rows = max(1, LOGITS // (batch.tokens.shape[1] * model.config.d_vocab_out))
    parts = [batch.select(slice(first, first + rows)) for first in range(0, len(batch), rows)]
    logits = torch.cat([run_model(model, part.tokens).logits[part.read] for part in parts])
    return metric("logit_difference")(logits, batch).double(), metric("accuracy")(logits, batch).double()


@contextmanager
def _foreign(reference: str) -> Iterator[None]:
    """Turn what other people's files and functions raise into the user's error."""
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise WorkbenchError(f"Cannot make a model of {reference}: {type(error).__name__}: {reason}") from error


def _from_files(path: Path) -> Transformer:
    if not path.is_file():
        raise WorkbenchError(f"No model file {str(path)!r}. Name one that ends in {', '.join(WEIGHTS)}.")
    config_file = path.with_suffix(".json")
    if not config_file.is_file():
        raise WorkbenchError(
            f"{path} needs its config beside it in {config_file.name}: the fields of the workbench's ModelConfig, "
            "or a HookedTransformer's cfg.to_dict()."
        )
    config, state = read_json(config_file), load_state_dict(path)
    blocks = {name.partition(".")[0] for name in state} & {"weights", "blocks"}
    if blocks == {"blocks"}:
        return from_hooked_transformer(state, config)
    if blocks != {"weights"}:
        raise WorkbenchError(
            f"{path} holds {', '.join(sorted(state)[:3]) or 'nothing'}, …: neither the workbench's names (weights.0.…) "
            "nor a HookedTransformer's (blocks.0.…)."
        )
    kinds = get_type_hints(ModelConfig)
    if unknown := sorted(set(config) - set(kinds)):
        raise WorkbenchError(f"{config_file} is not a ModelConfig: unknown {', '.join(unknown)}.")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    if wrong := [f"{key}={value!r}" for key, value in values.items() if not is_bearable(value, kinds[key])]:
        raise WorkbenchError(f"{config_file} is not a ModelConfig: {', '.join(wrong)} is not of its kind.")
    return _rebuilt(ModelConfig(**values), state)


def _from_function(reference: str) -> Transformer:
    file, colon, function = reference.rpartition(":")
    if not colon:
        raise WorkbenchError(
            f"{reference!r} is no model: give a file ({', '.join(WEIGHTS)}) with its .json config beside it, "
            "a Hugging Face folder, or file.py:function."
        )
    make = getattr(import_file(Path(file)), function, None)
    if not callable(make):
        raise WorkbenchError(f"{file} has no function {function!r} that returns a model.")
    made: Any = make()
    # Looked up by name: importing TransformerLens to ask takes seconds, and who returns a bridge has imported it.
    if any(cls.__name__ == "TransformerBridge" for cls in type(made).__mro__):
        return from_bridge(made)
    # A subclass may compute something else, and the run is rebuilt from weights and config alone.
    if type(made) is not Transformer:
        raise WorkbenchError(
            f"{reference} returned a {type(made).__name__}; it must return a Transformer or a TransformerBridge. "
            "Look into any other module in a notebook, through workbench.instrument.adapters.nnsight_model."
        )
    return made


def _rebuilt(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    """A model of its own with these weights in float32: what a checkpoint of it will hold."""
    # No memory and no random number is spent on weights that are replaced at once.
    with torch.device("meta"):
        model = Transformer(config, generator=None)
    owned = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
    try:
        model.load_state_dict(owned, assign=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise WorkbenchError(f"The weights do not fit the config: {reasons}") from error
    return model.eval()


def _free_target(name: str, runs: Path | None) -> Path:
    check_run_name(name)
    target = runs_root(runs) / name
    if target.exists():
        raise WorkbenchError(f"Run {name!r} exists at {target}. Choose another --run.")
    return target


def _write(recipe: Recipe, model: Transformer, target: Path, files: Mapping[str, bytes]) -> None:
    """The run, written beside its place and moved there whole."""
    staging = target.parent / f".importing-{target.name}-{secrets.token_hex(4)}"
    folder = RunFolder(path=staging, reference=target.name)
    with writing(target):
        try:
            staging.mkdir(parents=True)
            save_checkpoint(folder, 0, model.state_dict(), ["imported"], dtype=torch.float32)
            for path, content in files.items():
                write_atomic(staging / path, content)
            write_json(staging / STATUS, {"finished": True, "reason": "imported", "seconds": None})
            write_json(staging / "recipe.json", {**recipe.to_json(), "imported_with": code_version()})
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
