"""What runs a sweep has: variants x alternatives of settings x seeds, each an ordinary run with a name of its own.

    plan_sweep(recipe, ...) -> Members, every recipe of them checked -> `members_to_train`, those that are not finished

How they are trained is `engines`' business, what they found that of `landmarks`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, check_run_name, digest, runs_root
from workbench.training.checkpoints import Run
from workbench.training.recipe import Recipe, differing_settings

LONGEST_NAME = 100
SHOWN = 4
"""So many settings are named where a run was made by another recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One run of a sweep."""

    name: str
    """Of its run."""
    setting: str
    """What it has in common with the runs that differ from it by their seed alone."""
    recipe: Recipe

    def run(self, runs: Path | None = None) -> Run:
        """Its run in a runs folder, as far as it has got there; with an empty log if it was never begun."""
        return Run(folder=RunFolder(path=runs_root(runs) / self.name, reference=self.name), recipe=self.recipe)


def plan_sweep(
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    variants: Mapping[str, Sequence[str]] | None = None,
    alternatives: Mapping[str, Sequence[str]] | None = None,
    name: str | None = None,
) -> tuple[Member, ...]:
    """The runs of a sweep, in the order in which they are trained: seed after seed, so that all settings grow together.

    Args:
        recipe: what all of them start from; a run is what `workbench train` makes of its seed and its settings.
        seeds: of world, initial weights and batches.
        variants: name of a bundle of `key=value` settings -> the bundle; empty is the recipe as it is.
        alternatives: key -> the values that it takes.
        name: of the sweep, with which the names of its runs begin; the recipe's by default.

    Raises:
        WorkbenchError: a recipe cannot be, nothing is to be trained, or two runs would be the same.
    """
    variants = variants or {"": ()}
    values = {recipe.full_key(key): tuple(texts) for key, texts in (alternatives or {}).items()}
    if not seeds or not all(values.values()):
        raise WorkbenchError("The sweep is empty: it needs a seed, and a value for every key.")
    _check_apart(recipe, variants, values)
    members = []
    for seed, variant, choice in itertools.product(seeds, variants, itertools.product(*values.values())):
        settings = [f"{key}={text}" for key, text in zip(values, choice, strict=True)]
        varying = [setting for setting, texts in zip(settings, values.values(), strict=True) if len(texts) > 1]
        parts = [*([variant] if len(variants) > 1 else []), *(setting.partition(".")[2] for setting in varying)]
        members.append(
            Member(
                name=_run_name([name or recipe.name, *parts, f"s{seed}"]),
                setting=" ".join(parts) or variant or recipe.name,
                recipe=recipe.with_seed(seed).override([*variants[variant], *settings]),
            )
        )
    _check_members(members)
    return tuple(members)


def members_to_train(members: Sequence[Member], runs: Path | None = None) -> tuple[Member, ...]:
    """Those that are not finished in a runs folder.

    Raises:
        WorkbenchError: a run of that name was made by another recipe, is being written, or is no run at all.
    """
    for member in members:
        _check_folder(member.run(runs))
    return tuple(member for member in members if not member.run(runs).status["finished"])


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds as a person lists them: `0..2` for 0, 1 and 2; `0,3,7`; or both.

    Raises:
        WorkbenchError: it says something else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()):
            raise WorkbenchError(f"Seeds are listed as 0..2 or as 0,3,7, got {text!r}.")
        seeds += range(int(first), int(last if dots else first) + 1)
    return tuple(seeds)


def read_alternatives(settings: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`key=value,value` settings as key -> values; a comma inside brackets belongs to its value.

    Raises:
        WorkbenchError: one is something else, or a key comes twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = tuple(value.strip() for value in split_outside_brackets(text, ","))
        if not equals or not all(values):
            raise WorkbenchError(f"Setting {setting!r} must be key=value or key=value,value.")
        if key.strip() in found:
            raise WorkbenchError(
                f"Setting {key.strip()!r} comes twice: list all of its values in one, a comma between."
            )
        found[key.strip()] = values
    return found


def read_variants(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`name: key=value key=value` bundles as name -> settings; white space inside brackets belongs to its value.

    Raises:
        WorkbenchError: one has no name, or a name comes twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, settings = text.partition(":")
        name = name.strip()
        if not name or "=" in name:
            raise WorkbenchError(f"Variant {text!r} must be 'NAME: KEY=VALUE KEY=VALUE', or a name alone.")
        if name in found:
            raise WorkbenchError(f"Variant {name!r} comes twice. Give one another name.")
        found[name] = tuple(part for part in split_outside_brackets(settings, " \t\n") if part)
    return found


def split_outside_brackets(text: str, separators: str) -> list[str]:
    """The parts between separators that stand outside of every bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[({") - (sign in "])}")
        if sign in separators and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _run_name(parts: Sequence[str]) -> str:
    """A name that a run's folder can have, told from all others by a hash where it must be cut."""
    plain = "-".join(parts)
    safe = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9_.]+", "-", plain)).strip("-.")
    name = safe if len(safe) <= LONGEST_NAME else f"{safe[: LONGEST_NAME - 9]}-{digest(plain.encode())[:8]}"
    check_run_name(name)
    return name


def _check_apart(recipe: Recipe, variants: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> None:
    """Raise a WorkbenchError if a variant sets what has alternatives of its own: one of the two would be lost."""
    for variant, settings in variants.items():
        for setting in settings:
            key = recipe.full_key(setting.partition("=")[0].strip())
            if key in values:
                raise WorkbenchError(f"Variant {variant!r} sets {key}, which --set sets, too. Leave one of them out.")


def _check_members(members: Sequence[Member]) -> None:
    """Raise a WorkbenchError unless every run has a name of its own, a world that can be, and can be trained."""
    name, times = Counter(member.name for member in members).most_common(1)[0]
    if times > 1:
        raise WorkbenchError(
            f"{times} runs of the sweep would be called {name!r}: a seed or a value comes twice. Leave one out."
        )
    for member in members:
        member.recipe.trainable()
    for task in {repr(member.recipe.task): member.recipe.task for member in members}.values():
        task.examples(task.splits[0])


def _check_folder(run: Run) -> None:
    path, name = run.folder.path, run.reference
    if not (path / "recipe.json").is_file():
        if path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise WorkbenchError(f"{path} is not a run, but holds files. Choose another --name.")
        return
    there = Recipe.from_json(run.folder.recipe_json())
    if differing := differing_settings(there, run.recipe):
        listed = "; ".join(f"{key} {old!r}, not {new!r}" for key, (old, new) in list(differing.items())[:SHOWN])
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise WorkbenchError(
            f"Run {name!r} at {path} was made by another recipe: it has {listed}{more}. Choose another --name."
        )
    if run.folder.busy:
        raise WorkbenchError(
            f"Run {name!r} is being written by another process. Wait for it, or choose another --name."
        )
