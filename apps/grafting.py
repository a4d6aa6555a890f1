"""`workbench finetune` and `workbench graft`: donors of a base, and the grafts that carry what they learnt."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from apps.analyses import kept_under
from apps.graft_pairs import Pair, delta_of, examples_of, open_pairs, pair_of_runs
from apps.printing import Printout, as_columns, as_lines, progress_bar, scalars, share_bar, stopwatch
from circuits.graft_judgement import JUDGEMENT, GraftJudgement, judge, read_judgement
from circuits.graft_masks import STEPS, OnProgress, find_graft
from circuits.grafting import Graft
from workbench.intervals import columns_of, student_of
from workbench.models.real_models import PREFIX, load_real_model
from workbench.runtime import WorkbenchError, code_version
from workbench.store import kept_result, new_run, read_json, result_key, save_result
from workbench.training.checkpoints import Run, load
from workbench.training.finetune import donor_recipe
from workbench.training.loop import train
from workbench.training.text_donors import TextRecipe, teach, text_recipe

MEASURES = ("weights", "density", "accuracy", "relative_gain", "agreement", "ece", "ece_debiased", "nll")
REAL_STEPS = 12
"""Of a method that learns, with a real model: each takes seconds."""
USUAL = {"method": "learned", "density": 0.01, "seed": 0, "steps": STEPS, "examples": None}
"""How a region is found where nothing else is said."""
COLUMNS = ("weights_of", "weights", "accuracy", "relative_gain", "low", "high", "agreement", "nll", "ece")


def finetune(options: argparse.Namespace) -> Printout:
    """Train a donor, or go on with one."""
    return _finetune_real(options) if options.base.startswith(PREFIX) else _finetune_run(options)


def _finetune_run(options: argparse.Namespace) -> Printout:
    """A donor of a run."""
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
    content = {"run": folder.reference, "base": options.base, **log_of(run), **clock}
    return Printout(content=content, text=as_lines(content))


def log_of(run: Run) -> dict[str, int | float]:
    """What a donor of a run has learnt, by the names that a donor of a real model has for it."""
    first, last = run.log.rows[0], run.log.rows[-1]
    return {
        "steps": last["step"],
        "base_accuracy": first["test_accuracy"],
        "test_accuracy": last["test_accuracy"],
        "train_accuracy": last["train_accuracy"],
    }


def _finetune_real(options: argparse.Namespace) -> Printout:
    """A donor of a real model."""
    if options.resume:
        raise WorkbenchError("A real model's donor is made in one go: leave --resume out, and choose another --run.")
    with stopwatch() as clock:
        base = load_real_model(options.base)
        recipe = text_recipe(base, options.task, way=options.way, seed=options.seed).override(options.set)
        folder = new_run(name_of(recipe) if options.run is None else options.run, options.runs)
        with share_bar(f"finetune {folder.reference}") as on_progress:
            donor = teach(base, recipe, folder, on_progress=on_progress)
    content = {"run": folder.reference, "base": options.base, **donor.log, **clock}
    return Printout(content=content, text=as_lines(content))


def name_of(recipe: TextRecipe) -> str:
    """What a real model's donor is called where nobody says."""
    base = recipe.base.removeprefix(PREFIX).rpartition("/")[2]
    return f"{base}-{recipe.task}-{recipe.way}"


def graft(options: argparse.Namespace) -> Printout:
    """Find and judge a graft of each donor; with several, their means with Student's intervals."""
    return judge_donors(options, options.donors)


def judge_donors(options: argparse.Namespace, donors: Sequence[str]) -> Printout:
    """The same, of the donors that are named here."""
    pairs = open_pairs(options.base, donors, options.runs)
    if any(pair.task != pairs[0].task for pair in pairs):
        raise WorkbenchError("The donors learnt different tasks: name donors of one task, and judge others apart.")
    foreign = None if options.foreign is None else open_pairs(options.base, [options.foreign], options.runs)[0]
    told = {name: getattr(options, name) for name in USUAL}
    found: list[dict[str, Any]] = []
    with stopwatch() as clock, share_bar(f"graft {', '.join(donors)}") as on_progress:
        for place, pair in enumerate(pairs):
            part = _part(on_progress, place, len(pairs))
            compute = partial(graft_in, pair, foreign=foreign, on_progress=part, **told)
            summary = kept_under(pair.folder, _key(pair, foreign, told), compute)
            found.append({"run": pair.reference, "step": pair.step, **summary})
    over_seeds = _over_seeds(found)
    content = {"base": options.base, **over_seeds, "seeds": len(pairs), **clock}
    means = [as_lines({**scalars(over_seeds), "seeds": len(pairs)})] if len(pairs) > 1 else []
    return Printout(content=content, text="\n\n".join([*map(_as_text, found), *means]))


def graft_of(base: Run, donor: Run, *, foreign: Run | None = None, **options: Any) -> GraftJudgement:
    """A graft of a run's donor at its last checkpoint: `graft_in` of the two."""
    other = None if foreign is None else pair_of_runs(base, foreign)
    return graft_in(pair_of_runs(base, donor), foreign=other, **options)


def graft_in(
    pair: Pair,
    *,
    method: str = "learned",
    density: float = 0.01,
    foreign: Pair | None = None,
    seed: int = 0,
    steps: int = STEPS,
    examples: int | None = None,
    on_progress: OnProgress = lambda share: None,
) -> GraftJudgement:
    """A graft of a donor, found on its training examples, so many of them, and judged on its test.

    Raises:
        WorkbenchError: the donor did not begin with this base's weights, the density is not one, the method unknown, or
            there are no examples.
    """
    delta = pair.delta()
    train_part, val, test = pair.examples_to_learn(examples), pair.examples("val"), pair.examples("test")
    chosen = {"method": method, "density": density, "seed": seed, "steps": steps}
    found = find_graft(delta, train_part, on_progress=lambda share: on_progress(share / 2), **chosen)
    return judge(
        found,
        train_part,
        val,
        test,
        foreign=None if foreign is None else foreign.delta(),
        seed=seed,
        steps=steps,
        on_progress=lambda share: on_progress(0.5 + share / 2),
        provenance=pair.provenance,
    )


def kept_graft(pair: Pair, *, foreign: Pair | None = None, **told: Any) -> Callable[[], GraftJudgement] | None:
    """What reads the graft that `graft_in` would find with these options, where it was kept; None if it was not."""
    path = kept_result(pair.folder, _key(pair, foreign, told))
    if path is None:
        return None
    file, method = path / JUDGEMENT, {**USUAL, **told}["method"]
    return lambda: read_judgement(file.read_bytes(), pair.delta(), method=method, provenance=pair.provenance)


def newest_graft(pair: Pair) -> GraftJudgement | None:
    """The graft of this donor that was judged last, however it was found; None where none is kept."""
    files = sorted(pair.folder.results.glob(f"*/{JUDGEMENT}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        path = kept_result(pair.folder, file.parent.name)
        if path is None:
            continue
        # Of these weights, and by this version of the code.
        made_from = read_json(path / "result.json")["provenance"]
        if made_from["parents"] != list(pair.provenance.parents) or made_from["code_version"] != code_version():
            continue
        method = read_json(path / "summary.json")["method"]
        return read_judgement(file.read_bytes(), pair.delta(), method=method, provenance=pair.provenance)
    return None


def keep_graft(
    pair: Pair, *, foreign: Pair | None = None, on_progress: OnProgress = lambda share: None, **told: Any
) -> GraftJudgement:
    """The kept graft, or else the same found, judged and kept."""
    read = kept_graft(pair, foreign=foreign, **told)
    if read is not None:
        return read()
    found = graft_in(pair, foreign=foreign, on_progress=on_progress, **told)
    save_result(pair.folder, _key(pair, foreign, told), found)
    return found


def learn_regions(base: Run, donors: Mapping[str, Run], *, method: str, density: float) -> dict[str, Graft]:
    """The graft of each donor, found on its own training examples."""
    return {
        name: find_graft(delta_of(base, donor), examples_of(base, donor, "train"), method=method, density=density)
        for name, donor in donors.items()
    }


def _key(pair: Pair, foreign: Pair | None, told: Mapping[str, Any]) -> str:
    """Under which a graft is kept with its donor."""
    parents = [*pair.provenance.parents, *(() if foreign is None else foreign.provenance.parents)]
    return result_key("graft", {"reference": pair.recipe, **USUAL, **told}, parents)


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
