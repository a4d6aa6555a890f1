"""A model and prompt pairs of the user's own, checked, as a run.

    read the model -> read the pairs -> check length, alignment, vocabulary -> measure headroom -> write the run

Nothing is written before everything has passed, and the run folder appears whole or not at all.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from workbench.instrument.passes import run as run_model
from workbench.intervals import paired_bootstrap
from workbench.metrics import metric
from workbench.models.bridges import from_bridge, from_hooked_transformer, from_hugging_face
from workbench.models.transformer import ModelConfig, Transformer
from workbench.runtime import WorkbenchError
from workbench.store import (
    Provenance,
    RunFolder,
    check_run_name,
    load_state_dict,
    read_json,
    runs_root,
    write_json,
    writing,
)
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.pairs import Pairs, encode
from workbench.training.checkpoints import STATUS, Run, load, save_checkpoint
from workbench.training.recipes import Recipe, import_file

COLUMNS = ("clean", "corrupt", "answer", "distractor")
NAMED = 5
"""Faulty lines that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Findings:
    """What the validator found in pairs that it let pass."""

    pairs: int
    dropped: int
    """Pairs whose answer is their distractor: no headroom."""
    length: tuple[int, int]
    """Shortest and longest prompt."""
    differing: tuple[int, float, int]
    """Positions at which clean and corrupt differ: least, median, most."""
    accuracy: float
    """Share of clean prompts that the model answers right."""
    headroom: float
    """Mean logit difference of the clean prompts minus that of the corrupt ones."""
    headroom_interval: tuple[float, float]
    n: int
    provenance: Provenance

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting a patch map of these pairs."""
        found = []
        if self.dropped:
            found.append(f"{self.dropped} of {self.pairs} pairs have the same answer and distractor and are left out.")
        if self.differing[2] > 1:
            found.append(
                f"Clean and corrupt differ at up to {self.differing[2]} positions: no effect can be told to one."
            )
        if self.accuracy < 0.5:
            found.append(f"The model answers only {self.accuracy:.0%} of the clean prompts right (n = {self.n}).")
        if self.headroom_interval[0] <= 0:
            found.append(
                f"The model hardly tells clean from corrupt: headroom {self.headroom:.3g} logits, "
                f"95 % interval {self.headroom_interval[0]:.3g} to {self.headroom_interval[1]:.3g} (n = {self.n})."
            )
        return tuple(found)

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "pairs": self.pairs,
            "dropped": self.dropped,
            "length": list(self.length),
            "differing": list(self.differing),
            "accuracy": self.accuracy,
            "headroom": self.headroom,
            "headroom_interval": list(self.headroom_interval),
            "n": self.n,
            "warnings": list(self.warnings),
        }

    def tables(self) -> Sequence[Table]:
        """The findings, one a row."""
        rows = [
            ("pairs read", self.pairs, ""),
            ("pairs without headroom, left out", self.dropped, ""),
            ("shortest and longest prompt", f"{self.length[0]} to {self.length[1]}", "tokens"),
            ("positions that differ (least, median, most)", ", ".join(f"{value:g}" for value in self.differing), ""),
            ("clean prompts answered right", f"{self.accuracy:.3g}", f"fraction of {self.n}"),
            (
                "headroom",
                f"{self.headroom:.3g} ({self.headroom_interval[0]:.3g} to {self.headroom_interval[1]:.3g})",
                f"logits, n = {self.n}",
            ),
        ]
        frame = pd.DataFrame(
            [(name, str(value), unit) for name, value, unit in rows], columns=["finding", "value", "unit"]
        )
        caption = "What the validator found; headroom is the drop of the logit difference from clean to corrupt."
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
    check_run_name(name)
    target = runs_root(runs) / name
    if target.exists():
        raise WorkbenchError(f"Run {name!r} exists at {target}. Choose another --run.")
    transformer = read_model(model)
    task = read_pairs(pairs, transformer.config, vocab)
    findings = examine(transformer, task)
    recipe = Recipe(
        name="imported", task=task, model=transformer.config, train=None, shows=f"Imported from {Path(model).name}."
    )
    _write(recipe, transformer, target)
    return load(name, runs=runs_root(runs)), findings


def read_model(reference: str) -> Transformer:
    """The model that a person names, as `import_run` takes it."""
    path = Path(reference)
    if path.is_dir():
        return from_hugging_face(path)
    if path.suffix in (".safetensors", ".pt", ".pth"):
        return _from_files(path)
    file, colon, function = reference.rpartition(":")
    if not colon:
        raise WorkbenchError(
            f"{reference!r} is no model: give a .safetensors or .pt file with its .json config beside it, "
            "a Hugging Face folder, or file.py:function."
        )
    make = getattr(import_file(Path(file)), function, None)
    if not callable(make):
        raise WorkbenchError(f"{file} has no function {function!r} that returns a model.")
    made: Any = make()
    if isinstance(made, Transformer):
        return made
    if type(made).__name__ != "TransformerBridge":
        raise WorkbenchError(
            f"{reference} returned a {type(made).__name__}; it must return a Transformer or a TransformerBridge. "
            "Look into any other module in a notebook, through workbench.instrument.adapters.nnsight_model."
        )
    return from_bridge(made)


def read_pairs(path: Path, config: ModelConfig, vocab: Path | None) -> Pairs:
    """The pairs of a CSV or JSONL file, as the model reads them."""
    words = _vocabulary(vocab, config)
    rows = list(_rows(path))
    if not rows:
        raise WorkbenchError(f"{path} holds no pairs. Each line needs {', '.join(COLUMNS)}.")
    encoded: dict[str, list[tuple[int, ...]]] = {column: [] for column in COLUMNS}
    faults = []
    for line, row in rows:
        try:
            tokens = {column: tuple(encode(row[column], words)) for column in COLUMNS}
            _check_pair(tokens, config)
        except WorkbenchError as error:
            faults.append(f"line {line}: {error}")
            continue
        for column in COLUMNS:
            encoded[column].append(tokens[column])
    if faults:
        more = f" And {len(faults) - NAMED} more." if len(faults) > NAMED else ""
        raise WorkbenchError(f"{path}: {len(faults)} of {len(rows)} pairs are faulty. {' '.join(faults[:NAMED])}{more}")
    return Pairs(
        vocab=words,
        clean=tuple(encoded["clean"]),
        corrupt=tuple(encoded["corrupt"]),
        answer=tuple(answer[0] for answer in encoded["answer"]),
        distractor=tuple(distractor[0] for distractor in encoded["distractor"]),
        pad_token=config.pad_token,
    )


def examine(model: Transformer, task: Pairs) -> Findings:
    """Length, alignment and headroom of the pairs on this model.

    Raises:
        WorkbenchError: no pair has headroom.
    """
    batch = task.contrast(task.examples("test"))
    if len(batch) == 0:
        raise WorkbenchError("Every pair has the same answer and distractor: there is nothing that a patch could move.")
    corrupt, _ = batch.pairs()
    difference = metric("logit_difference")
    logits = {
        name: run_model(model, tokens).logits[batch.read]
        for name, tokens in (("clean", batch.tokens), ("corrupt", corrupt))
    }
    drop = difference(logits["clean"], batch) - difference(logits["corrupt"], batch)
    low, high = paired_bootstrap(drop)
    differing = (batch.tokens != corrupt).sum(1)
    lengths = [len(prompt) for prompt in task.clean]
    return Findings(
        pairs=len(task.clean),
        dropped=batch.dropped,
        length=(min(lengths), max(lengths)),
        differing=(int(differing.min()), float(differing.double().median()), int(differing.max())),
        accuracy=float(_accuracy(logits["clean"], batch)),
        headroom=float(drop.mean()),
        headroom_interval=(float(low), float(high)),
        n=len(batch),
        provenance=model.provenance,
    )


def _accuracy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return metric("accuracy")(logits, batch).mean()


def _from_files(path: Path) -> Transformer:
    config = read_json(path.with_suffix(".json"))
    state = load_state_dict(path)
    if "n_layers" in config and "act_fn" in config:
        return from_hooked_transformer(state, config)
    try:
        model = Transformer(ModelConfig(**_tuples(config)), generator=None)
        model.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise WorkbenchError(f"{path} and its config do not make a model of the workbench: {error}") from error
    return model.eval()


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _vocabulary(path: Path | None, config: ModelConfig) -> tuple[str, ...]:
    if path is None:
        return tuple(map(str, range(config.d_vocab)))
    words = tuple(_text(path).split())
    if len(words) != config.d_vocab or len(set(words)) != len(words):
        raise WorkbenchError(
            f"{path} has {len(words)} tokens, {len(set(words))} of them different; the model has {config.d_vocab}. "
            "Give one token a line, in the order of their ids."
        )
    return words


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and columns of each pair."""
    text = _text(path)
    if path.suffix == ".jsonl":
        for line, content in enumerate(text.splitlines(), start=1):
            if content.strip():
                try:
                    row = json.loads(content)
                except ValueError as error:
                    raise WorkbenchError(f"{path}, line {line} is not JSON: {error}.") from error
                yield line, _checked_columns(path, row)
    elif path.suffix == ".csv":
        for line, row in enumerate(csv.DictReader(text.splitlines()), start=2):
            yield line, _checked_columns(path, row)
    else:
        raise WorkbenchError(f"Pairs come as .csv or .jsonl, got {path.name!r}.")


def _checked_columns(path: Path, row: object) -> dict[str, str]:
    if not isinstance(row, Mapping) or any(row.get(column) is None for column in COLUMNS):
        missing = [column for column in COLUMNS if not isinstance(row, Mapping) or row.get(column) is None]
        raise WorkbenchError(f"{path} lacks {', '.join(missing)}. Each line needs {', '.join(COLUMNS)}.")
    return {column: str(row[column]) for column in COLUMNS}


def _check_pair(tokens: Mapping[str, Sequence[int]], config: ModelConfig) -> None:
    clean, corrupt = tokens["clean"], tokens["corrupt"]
    if len(clean) != len(corrupt):
        raise WorkbenchError(f"clean has {len(clean)} tokens and corrupt {len(corrupt)}; they must align one to one.")
    if len(clean) > config.n_ctx:
        raise WorkbenchError(f"{len(clean)} tokens are more than the model reads ({config.n_ctx}).")
    if clean == corrupt:
        raise WorkbenchError("clean and corrupt are the same prompt.")
    for column in ("answer", "distractor"):
        if len(tokens[column]) != 1 or tokens[column][0] >= config.d_vocab_out:
            raise WorkbenchError(f"{column} must be one token that the model predicts (0 to {config.d_vocab_out - 1}).")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"Cannot read {path}: {error}.") from error


def _write(recipe: Recipe, model: Transformer, target: Path) -> None:
    """The run, written beside its place and moved there whole."""
    staging = RunFolder(path=target.parent / f".importing-{target.name}", reference=target.name)
    with writing(target):
        shutil.rmtree(staging.path, ignore_errors=True)
        staging.path.mkdir(parents=True)
        try:
            save_checkpoint(staging, 0, model.state_dict(), ["imported"], dtype=torch.float32)
            write_json(staging.path / STATUS, {"finished": True, "reason": "imported", "seconds": 0.0})
            write_json(staging.path / "recipe.json", recipe.to_json())
            staging.path.rename(target)
        finally:
            shutil.rmtree(staging.path, ignore_errors=True)
