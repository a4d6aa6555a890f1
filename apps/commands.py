"""What each `workbench` command does that is no analysis of a run: options in, a printout back.

The analyses are in `apps.analysis_commands`.

Heavy imports happen inside the command that needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.printing import Printout, as_columns, as_lines, part_line, progress_bar, share_bar, stopwatch
from workbench.runtime import WorkbenchError, is_main_process
from workbench.store import RunFolder, gallery_names, new_run, run_names, runs_root

if TYPE_CHECKING:
    from workbench.training.checkpoints import Run
    from workbench.training.imports import Findings
    from workbench.training.recipe import Recipe
    from workbench.training.text_donors import TextDonor


RUN_COLUMNS = ("run", "recipe", "steps", "test_accuracy", "step_memorised", "step_generalised", "status")


def app(options: argparse.Namespace) -> Printout:
    """Serve the pages until interrupted."""
    from apps.ui.server import serve

    code = serve(port=options.port, open_browser=not options.no_browser, runs=options.runs)
    return Printout(content={"port": options.port}, text="", exit_code=code)


def recipes(options: argparse.Namespace) -> Printout:
    """What can be trained."""
    from workbench.training.recipes import RECIPES

    rows = [describe_recipe(make()) for make in RECIPES.values()]
    return Printout(content={"recipes": rows}, text=as_columns(rows, ("name", "parameters", "minutes", "shows")))


def train(options: argparse.Namespace) -> Printout:
    """Train a recipe, or go on with a run."""
    from apps.analyses import measure
    from apps.programs import by_answer
    from apps.searching import by_lookahead
    from workbench.training.loop import train as train_recipe

    with stopwatch() as clock:
        recipe, folder = _run_to_continue(options) if options.resume else _run_to_start(options)
        with progress_bar(f"train {folder.reference}", recipe) as on_progress:
            run = train_recipe(recipe, folder, resume=options.resume, on_progress=on_progress)
        if not options.no_measures and is_main_process():
            with share_bar(f"measure {folder.reference}") as on_share:
                measure(run, on_share)
    last = run.last
    content = {
        "run": folder.reference,
        "steps": run.log.rows[-1]["step"],
        "step_kept": last["step"],
        **clock,
        **{f"{split}_loss": last[f"{split}_loss"] for split in ("train", "test")},
        **accuracies(run),
        **by_lookahead(run),
        **by_answer(run),
        "step_memorised": run.log.step_memorised,
        "step_generalised": run.log.step_generalised,
        **{name: run.status[name] for name in ("reason", "threads", "kernels", "launch", "repeatable")},
    }
    return Printout(content=content, text=as_lines(content))


def finetune(options: argparse.Namespace) -> Printout:
    """A donor from a base."""
    from apps.grafting import finetune as teach

    return teach(options)


def sweep(options: argparse.Namespace) -> Printout:
    """Many runs of a recipe, and when they generalised."""
    from apps.sweeping import sweep as train_and_compare

    return train_and_compare(options)


def runs(options: argparse.Namespace) -> Printout:
    """All runs, the gallery's too."""
    rows = list_runs(options.runs)
    text = as_columns(rows, RUN_COLUMNS) if rows else _no_runs(options)
    return Printout(content={"runs": rows}, text=text)


def show(options: argparse.Namespace) -> Printout:
    """One run in full."""
    from workbench.training.checkpoints import load

    run = load(options.run, runs=options.runs)
    results = run.folder.results
    content = {
        **describe_run(run),
        "settings": run.recipe.to_json(),
        "checkpoints": [
            {"step": each.step, "reasons": list(each.reasons), "dtype": each.dtype, "sha256": each.sha256}
            for each in run.checkpoints
        ],
        "results": sorted(path.name for path in results.iterdir()) if results.is_dir() else [],
    }
    steps = ", ".join(str(each["step"]) for each in content["checkpoints"])
    text = as_lines({**content, "settings": run.recipe.shows, "checkpoints": steps, "results": len(content["results"])})
    return Printout(content=content, text=text)


def bench(options: argparse.Namespace) -> Printout:
    """Benchmarks, one after another."""
    from apps.bench_table import bench as measure

    return measure(options)


def import_model(options: argparse.Namespace) -> Printout:
    """A run from a model and pairs of the user's own, or from a model whose circuit is known."""
    run, findings = _known_run(options) if options.model.startswith("known:") else _own_run(options)
    content = {"run": run.reference, "sites": len(run.model().sites), **findings.summary()}
    notes = [f"Note: {warning}" for warning in findings.warnings]
    text = as_lines({key: value for key, value in content.items() if key != "warnings"})
    return Printout(content=content, text="\n".join([text, *notes]))


def _own_run(options: argparse.Namespace) -> tuple[Run, Findings]:
    from workbench.training.imports import import_run

    if options.pairs is None:
        raise WorkbenchError("A model of your own needs --pairs FILE: clean, corrupt, answer, distractor.")
    name = Path(options.model.rpartition(":")[0] or options.model).stem if options.run is None else options.run
    return import_run(options.model, options.pairs, name=name, vocab=options.vocab, runs=options.runs)


def _known_run(options: argparse.Namespace) -> tuple[Run, Findings]:
    from apps.known_runs import import_known

    if options.pairs is not None or options.vocab is not None:
        raise WorkbenchError(f"{options.model} brings pairs and vocabulary of its own: leave --pairs and --vocab out.")
    return import_known(options.model, name=options.run, runs=options.runs)


def report(options: argparse.Namespace) -> Printout:
    """The report of a run, or of a donor."""
    from apps.report import report as write

    name = Path(options.run.removeprefix("gallery:")).name
    out = options.out or Path(f"report-{name}")
    with part_line(f"report {options.run}") as on_part:
        written = write(options.run, out, runs=options.runs, on_part=on_part)
    return Printout(content=written.summary(), text=as_lines(written.summary()))


def rerun(options: argparse.Namespace) -> Printout:
    """A report rebuilt from its manifest, and how it compares."""
    from apps.report import rerun_report

    comparison = rerun_report(options.manifest, options.out, runs=options.runs)
    summary = comparison.summary()
    return Printout(content=summary, text=as_lines(summary), exit_code=0 if comparison.reproduced else 1)


def doctor(options: argparse.Namespace) -> Printout:
    """The installation."""
    from apps.doctor import examine

    content = examine()
    return Printout(content=content, text=as_lines(content))


def _run_to_start(options: argparse.Namespace) -> tuple[Recipe, RunFolder]:
    from workbench.training.recipes import find_recipe

    recipe = find_recipe(options.recipe)
    recipe = recipe if options.seed is None else recipe.with_seed(options.seed)
    recipe = recipe.override(options.set)
    # A world that cannot be is refused before there is a folder for it.
    recipe.task.examples(recipe.task.splits[0])
    name = recipe.name if options.run is None else options.run
    if is_main_process():
        return recipe, new_run(name, options.runs)
    return recipe, RunFolder(path=runs_root(options.runs) / name, reference=name)


def _run_to_continue(options: argparse.Namespace) -> tuple[Recipe, RunFolder]:
    from workbench.training.checkpoints import load
    from workbench.training.recipes import find_recipe

    if options.set or options.seed is not None:
        raise WorkbenchError("--resume goes on with the run's own recipe; leave --set and --seed out.")
    name = find_recipe(options.recipe).name if options.run is None else options.run
    run = load(name, runs=options.runs)
    if run.recipe.train is None:
        raise WorkbenchError(f"Run {name!r} was imported: it has no training to go on with. Train a recipe instead.")
    return run.recipe, run.folder


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe in one row."""
    import torch

    from workbench.models.kinds import build

    with torch.device("meta"):
        model = build(recipe.model, generator=None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": recipe.name, "parameters": parameters, "minutes": recipe.minutes, "shows": recipe.shows}


def list_runs(root: Path | None = None) -> list[dict[str, Any]]:
    """A row for each run, the gallery's too, and each donor of a real model; one that cannot be read says so."""
    from workbench.training.checkpoints import load
    from workbench.training.text_donors import donor_names, load_donor

    names = [*run_names(root), *(f"gallery:{name}" for name in gallery_names())]
    described = {name: lambda name: describe_run(load(name, runs=root)) for name in names}
    described |= {name: lambda name: describe_donor(load_donor(name, runs=root)) for name in donor_names(root)}
    rows = []
    for name, describe in described.items():
        try:
            rows.append(describe(name))
        except WorkbenchError as error:
            rows.append(dict.fromkeys(RUN_COLUMNS) | {"run": name, "status": f"unreadable: {error}"})
    return rows


def accuracies(run: Run) -> dict[str, float]:
    """The accuracy it ended with on each split that is measured; where there are OOD facts, test's goes by `id` too."""
    last, measured = run.last, run.task.measured
    found = {f"{split}_accuracy": last[f"{split}_accuracy"] for split in measured}
    has_ood = any("ood" in split for split in measured)
    return {**found, **({"id_accuracy": found["test_accuracy"]} if has_ood else {})}


def describe_run(run: Run) -> dict[str, Any]:
    """A run in one row."""
    last = run.last
    status = "training" if run.folder.busy else str(run.status["reason"])
    return {
        "run": run.reference,
        "recipe": run.recipe.name,
        "steps": last.get("step", 0),
        "test_accuracy": last.get("test_accuracy"),
        "step_memorised": run.log.step_memorised,
        "step_generalised": run.log.step_generalised,
        "status": status,
    }


def describe_donor(donor: TextDonor) -> dict[str, Any]:
    """A donor of a real model in one row."""
    recipe = donor.recipe
    return dict.fromkeys(RUN_COLUMNS) | {
        "run": donor.reference,
        "recipe": f"{recipe.base} {recipe.task}-{recipe.way}",
        "steps": recipe.steps,
        "test_accuracy": donor.log["test_accuracy"],
        "status": "finished",
    }


def _no_runs(options: argparse.Namespace) -> str:
    return "No runs yet. Train one: `workbench train modular-smoke`."
