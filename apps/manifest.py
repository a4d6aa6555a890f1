"""What a report was made from, and the commands that make it again on another machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.analyses import PAIRS, PATCH_SITES, SEED
from apps.doctor import examine
from workbench.runtime import WorkbenchError
from workbench.store import digest, read_json
from workbench.training.checkpoints import MEASURES, METRICS, Run
from workbench.training.recipe import TASKS, Recipe
from workbench.training.recipes import RECIPES
from workbench.training.text_donors import TextDonor

FORMAT = 1
NAME = "manifest.json"
PARTS = ("recipe", "run", "checkpoints", "tables", "environment")


def manifest_of(run: Run) -> dict[str, Any]:
    """Everything about a run that its report rests on, but the report's own files."""
    recipe = run.recipe.to_json()
    train = run.recipe.train
    return {
        "format": FORMAT,
        "run": {"reference": run.reference, "status": run.status, "landmarks": run.log.landmarks()},
        "recipe": recipe,
        "seeds": {
            "task": recipe["task"].get("seed"),
            "init": None if train is None else train.init_seed,
            "batches": None if train is None else train.batch_seed,
            "analyses": SEED,
        },
        "analyses": {"pairs": PAIRS, "patch_sites": PATCH_SITES},
        "logs": {name: _file_digest(run.folder.path / name) for name in (METRICS, MEASURES)},
        "checkpoints": [
            {"step": each.step, "reasons": list(each.reasons), "dtype": each.dtype, "sha256": each.sha256}
            for each in run.checkpoints
        ],
        "precision": precision_note(run),
        **_surroundings(run.reference, train_command(run)),
    }


def manifest_of_donor(donor: TextDonor) -> dict[str, Any]:
    """The same of a real model's donor, whose checkpoint is what it changed; the base's hash is in the recipe."""
    recipe = donor.recipe
    settings = [f"--set {setting}" for setting in recipe.settings()]
    command = ["workbench", "finetune", recipe.base, recipe.task, "--way", recipe.way, "--seed", str(recipe.seed)]
    return {
        "format": FORMAT,
        "run": {"reference": donor.reference, "status": dict(donor.log), "landmarks": {}},
        "recipe": asdict(recipe),
        "seeds": {"shots and batches": recipe.seed, "analyses": SEED},
        "text": donor.task.archive.sha256,
        "checkpoints": [{"step": recipe.steps, "reasons": ["last"], "dtype": "float16", "sha256": donor.sha256}],
        "precision": "What the donor changed is stored in float16; analyses add it to the base in float32.",
        **_surroundings(
            donor.reference, " ".join([shlex.join([*command, "--run", donor.folder.path.name]), *settings])
        ),
    }


def _surroundings(reference: str, train: str | None) -> dict[str, Any]:
    """The installation, and the commands that make all of it again."""
    return {
        "environment": {name: value for name, value in examine().items() if name != "collisions"},
        "commands": {
            "train": train,
            "report": shlex.join(["workbench", "report", reference]),
            "rerun": f"workbench rerun {NAME}",
        },
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A report's manifest.

    Raises:
        WorkbenchError: the file is unreadable or something else.
    """
    content = read_json(path)
    if content.get("format") != FORMAT or any(part not in content for part in PARTS):
        raise WorkbenchError(
            f"{path} is not the manifest of a report of this version. "
            "Name the manifest.json that `workbench report` wrote."
        )
    return content


def precision_note(run: Run) -> str:
    """What the stored precision of the checkpoints means for the numbers."""
    stored = sorted({checkpoint.dtype for checkpoint in run.checkpoints})
    if stored == ["float32"]:
        return "Checkpoints are stored in float32, as they were trained."
    return (
        f"Checkpoints are stored in {' and '.join(stored)}; analyses compute with them in float32. The log and the "
        "progress measures were taken in full precision while training, so that small losses differ between the two."
    )


def train_command(run: Run) -> str | None:
    """The command that trains such a run; None for one that came trained or whose recipe no option can express."""
    recipe = run.recipe
    if recipe.train is None or type(recipe.task) not in TASKS.values():
        return None
    base = RECIPES[recipe.name]() if recipe.name in RECIPES else RECIPES["modular"]()
    if type(base.task) is not type(recipe.task):
        return None
    settings = [f"--set {shlex.quote(setting)}" for setting in settings_between(base, recipe)]
    name = run.reference.removeprefix("gallery:")
    return " ".join([shlex.join(["workbench", "train", base.name, "--run", Path(name).name]), *settings])


def settings_between(base: Recipe, recipe: Recipe) -> list[str]:
    """What `--set` must be given to turn one recipe into another that differs in fields alone."""
    settings = _differences("task", base.task.to_json(), recipe.task.to_json())
    # The vocabulary follows the task by itself.
    followed = base.override(settings)
    settings += _differences("model", followed.model.to_json(), recipe.model.to_json())
    assert base.train is not None
    assert recipe.train is not None
    return settings + _differences("train", asdict(base.train), asdict(recipe.train))


def _differences(part: str, base: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    return [f"{part}.{name}={json.dumps(value)}" for name, value in wanted.items() if base.get(name) != value]


def _file_digest(path: Path) -> str | None:
    return digest(path.read_bytes()) if path.is_file() else None
