"""`workbench finetune` and `workbench graft`: donors of a base, and the grafts that carry what they learnt."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from apps.analyses import kept
from apps.printing import Printout, as_columns, as_lines, progress_bar, scalars, share_bar, stopwatch
from circuits.graft_judgement import GraftJudgement, judge
from circuits.graft_masks import Labelled, OnProgress, find_graft
from circuits.grafting import Delta, Graft
from workbench.intervals import columns_of, student_of
from workbench.runtime import WorkbenchError, code_version
from workbench.store import Provenance, new_run
from workbench.tasks.base import Batch
from workbench.tasks.skills import ANSWERS
from workbench.training.checkpoints import Run, load
from workbench.training.finetune import donor_recipe
from workbench.training.loop import train

EXAMPLES = 1_024
"""Examples on which a region is found, as published."""
MEASURES = ("weights", "density", "accuracy", "relative_gain", "agreement", "ece", "ece_debiased", "nll")
COLUMNS = ("weights_of", "weights", "accuracy", "relative_gain", "low", "high", "agreement", "nll", "ece")


def finetune(options: argparse.Namespace) -> Printout:
    """Train a donor, or go on with one."""
    with stopwatch() as clock:
        base = load(options.base, runs=options.runs)
        recipe = donor_recipe(base, options.task, way=options.way, seed=options.seed).override(options.set)
        name = recipe.name if options.run is None else options.run
        if options.resume:
            if options.set or options.seed:
                raise WorkbenchError("--resume goes on with the donor's own recipe; leave --set and --seed out.")
            found = load(name, runs=options.runs)
            recipe, folder = found.recipe, found.folder
        else:
            folder = new_run(name, options.runs)
        with progress_bar(f"finetune {folder.reference}", recipe) as on_progress:
            run = train(recipe, folder, resume=options.resume, on_progress=on_progress)
    first, last = run.log.rows[0], run.log.rows[-1]
    content = {
        "run": folder.reference,
        "base": options.base,
        "steps": last["step"],
        "base_accuracy": first["test_accuracy"],
        "test_accuracy": last["test_accuracy"],
        "train_accuracy": last["train_accuracy"],
        **clock,
    }
    return Printout(content=content, text=as_lines(content))


def graft(options: argparse.Namespace) -> Printout:
    """Find and judge a graft of each donor; with several, their means with Student's intervals."""
    base = load(options.base, runs=options.runs)
    donors = [load(name, runs=options.runs) for name in options.donors]
    if len({donor.task for donor in donors}) > 1:
        raise WorkbenchError("The donors learnt different tasks: name donors of one task, and judge others apart.")
    foreign = None if options.foreign is None else load(options.foreign, runs=options.runs)
    found: list[dict[str, Any]] = []
    with stopwatch() as clock, share_bar(f"graft {', '.join(options.donors)}") as on_progress:
        for place, donor in enumerate(donors):
            arguments = {"method": options.method, "density": options.density, "seed": options.seed}
            told = {
                **arguments,
                "base": base.checkpoint().sha256,
                "foreign": None if foreign is None else foreign.checkpoint().sha256,
            }
            compute = partial(
                _kept_graft, base_run=base, foreign_run=foreign, on_progress=_part(on_progress, place, len(donors))
            )
            found.append(kept(donor, "graft", compute, None, told))
    over_seeds = _over_seeds(found)
    content = {"base": base.reference, **over_seeds, "seeds": len(donors), **clock}
    means = [as_lines({**scalars(over_seeds), "seeds": len(donors)})] if len(donors) > 1 else []
    return Printout(content=content, text="\n\n".join([*map(_as_text, found), *means]))


def graft_of(
    base: Run,
    donor: Run,
    *,
    method: str = "learned",
    density: float = 0.01,
    foreign: Run | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda share: None,
) -> GraftJudgement:
    """A graft of a donor at its last checkpoint, found on its training examples and judged on its test.

    Raises:
        WorkbenchError: the donor did not begin with this base's weights, the density is not one, or the method unknown.
    """
    delta = delta_of(base, donor)
    train_part, val, test = (examples_of(base, donor, split) for split in ("train", "val", "test"))
    found = find_graft(
        delta, train_part, method=method, density=density, seed=seed, on_progress=lambda share: on_progress(share / 2)
    )
    return judge(
        found,
        train_part,
        val,
        test,
        foreign=None if foreign is None else delta_of(base, foreign),
        seed=seed,
        on_progress=lambda share: on_progress(0.5 + share / 2),
        provenance=Provenance(
            code_version=code_version(),
            recipe=donor.recipe.name,
            seed=donor.recipe.trainable().batch_seed,
            parents=(base.checkpoint().sha256, donor.checkpoint().sha256),
        ),
    )


def learn_regions(base: Run, donors: Mapping[str, Run], *, method: str, density: float) -> dict[str, Graft]:
    """The graft of each donor, found on its own training examples."""
    return {
        name: find_graft(delta_of(base, donor), examples_of(base, donor, "train"), method=method, density=density)
        for name, donor in donors.items()
    }


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


def examples_of(base: Run, donor: Run, split: str) -> Labelled:
    """A split of the donor's task, for the base's model: yes or no, read at the question."""
    batch = donor.task.examples(split)
    return labelled(base, batch.select(slice(EXAMPLES)) if split == "train" else batch)


def labelled(base: Run, batch: Batch) -> Labelled:
    """Prompts of any skill, for the base's model."""
    return Labelled(module=base.model(), batches=[(batch.tokens, batch.targets[batch.read])], read=_answers)


def _answers(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, : len(ANSWERS)]


def _kept_graft(
    donor: Run,
    step: int | None,
    *,
    base_run: Run,
    foreign_run: Run | None,
    on_progress: OnProgress,
    **told: Any,
) -> GraftJudgement:
    chosen = {name: told[name] for name in ("method", "density", "seed")}
    return graft_of(base_run, donor, foreign=foreign_run, on_progress=on_progress, **chosen)


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One donor's figures, or the means of several."""
    if len(found) == 1:
        return dict(found[0])
    means: dict[str, Any] = {}
    for name in MEASURES:
        values = [each[name] for each in found]
        if None not in values:
            means |= columns_of(name, student_of(torch.tensor(values, dtype=torch.float64)))
    return {"method": found[0]["method"], **means, "n": found[0]["n"], "donors": list(found)}


def _as_text(found: Mapping[str, Any]) -> str:
    """A donor's graft with a row for each set of weights."""
    each = {"base": found["base"], "donor": found["donor"], "graft": found, **found["controls"]}
    rows = [
        {**row, "weights_of": name, "low": row["relative_gain_low"], "high": row["relative_gain_high"]}
        for name, row in each.items()
    ]
    said = "localised" if found["localised"] else f"not localised: {found['objection']}"
    head = f"{found['run']}: {found['method']}, density {found['density']:.4g}, n = {found['n']:,}: {said}"
    return head + "\n" + as_columns([{name: _shown(row[name]) for name in COLUMNS} for row in rows], COLUMNS)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _part(on_progress: OnProgress, place: int, total: int) -> OnProgress:
    return lambda share: on_progress((place + share) / total)
