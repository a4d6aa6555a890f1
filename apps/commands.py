"""What each `workbench` command does: options in, a printout back.

Heavy imports happen inside the command that needs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.printing import Printout, as_columns, as_lines, progress_bar, scalars, share_bar, stopwatch
from workbench.runtime import WorkbenchError, is_main_process
from workbench.store import RunFolder, gallery_names, new_run, run_names, runs_root, write_atomic

if TYPE_CHECKING:
    from workbench.store import Result
    from workbench.training.checkpoints import Run
    from workbench.training.imports import Findings
    from workbench.training.recipe import Recipe


ROWS = ("cells", "minimality", "rows")
"""Lists of rows that are printed as a table, the first that a result has."""
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
    last = run.log.rows[-1]
    content = {
        "run": folder.reference,
        "steps": last["step"],
        **clock,
        **{f"{split}_loss": last[f"{split}_loss"] for split in ("train", "test")},
        **accuracies(run),
        **by_lookahead(run),
        **by_answer(run),
        "step_memorised": run.log.step_memorised,
        "step_generalised": run.log.step_generalised,
        **{name: run.status[name] for name in ("reason", "threads", "kernels", "repeatable")},
    }
    return Printout(content=content, text=as_lines(content))


def finetune(options: argparse.Namespace) -> Printout:
    """A donor from a base."""
    from apps.grafting import finetune as teach

    return teach(options)


def graft(options: argparse.Namespace) -> Printout:
    """Grafts of donors, judged."""
    from apps.grafting import graft as find_and_judge

    return find_and_judge(options)


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


def lens(options: argparse.Namespace) -> Printout:
    """The logit lens at one checkpoint or all, or the tuned lens beside it."""
    from apps.analyses import PAIRS, TUNED_PROMPTS, lens_of, tuned_lens_of

    name, compute, n = ("lens", lens_of, PAIRS)
    if options.kind == "tuned":
        name, compute, n = ("tuned_lens", tuned_lens_of, TUNED_PROMPTS)
    arguments = {"n": n if options.n is None else options.n, "split": options.split}
    return _analyse(options, name, compute, arguments)


def probe(options: argparse.Namespace) -> Printout:
    """Probes of the task's latents at one checkpoint or all."""
    from apps.probing import probes_of

    arguments = {name: getattr(options, name) for name in ("latent", "sites", "n", "split")}
    with share_bar(f"probe {options.run}") as on_progress:
        positions = _positions(options.positions)
        return _analyse(options, "probe", probes_of, {**arguments, "positions": positions}, on_progress)


def fourier(options: argparse.Namespace) -> Printout:
    """Fourier analysis at one checkpoint or all."""
    from apps.analyses import fourier_of

    return _analyse(options, "fourier", fourier_of, {})


def patch(options: argparse.Namespace) -> Printout:
    """Activation patching at one checkpoint or all."""
    from apps.analyses import patch_of

    names = ("sites", "direction", "n", "split", "metric")
    return _analyse(options, "patch", patch_of, {name: getattr(options, name) for name in names})


def circuit(options: argparse.Namespace) -> Printout:
    """A circuit, found and judged: at one checkpoint, at all, or in several runs."""
    from apps.circuits_of_runs import circuit_of, history_of

    if options.seeds is not None:
        return _circuit_over_seeds(options)
    through = options.checkpoint == "all"
    names = ("method", "edges", "threshold", "ablation", "metric", "granularity", "n", "split", "seed")
    names = names if through else (*names, "select")
    arguments = {**{name: getattr(options, name) for name in names}, "absolute": not options.signed}
    if through and options.out is not None:
        raise WorkbenchError("--out writes one circuit: name one checkpoint, not 'all'.")
    if through and options.select != "top":
        raise WorkbenchError("Through training the largest scores are taken: leave --select out.")
    with share_bar(f"circuit {options.run}") as on_progress:
        if through:
            once = argparse.Namespace(**{**vars(options), "checkpoint": None})
            return _analyse(once, "circuit_history", partial(history_of, on_progress=on_progress), arguments)
        printout = _analyse(options, "circuit", partial(circuit_of, on_progress=on_progress), arguments)
    if options.out is not None:
        _export_circuit(options, arguments)
    return printout


def _circuit_over_seeds(options: argparse.Namespace) -> Printout:
    """The same circuit in several runs, and what these have in common."""
    from apps.agreements_of_runs import MEASURES, over_seeds_of
    from apps.analyses import kept_of_several
    from workbench.training.checkpoints import load

    refused = {
        "--checkpoint all": options.checkpoint == "all",
        "--out": options.out is not None,
        "--threshold": options.threshold is not None,
        "--select": options.select != "top",
    }
    if unfit := [name for name, given in refused.items() if given]:
        raise WorkbenchError(
            f"--seeds compares the largest scores of one size at one checkpoint: leave {', '.join(unfit)} out."
        )
    runs = [load(name, runs=options.runs) for name in [options.run, *(_listed(options.seeds) or [])]]
    names = ("method", "edges", "ablation", "metric", "granularity", "n", "split", "seed")
    arguments = {**{name: getattr(options, name) for name in names}, "absolute": not options.signed}
    with stopwatch() as clock, share_bar(f"circuit of {len(runs)} runs") as on_progress:
        compute = partial(over_seeds_of, on_progress=on_progress)
        found = kept_of_several(runs, "circuit_over_seeds", compute, _step(options.checkpoint), arguments)
    agreement = found["agreement"]
    over = {name: found["over_seeds"][name] for name in MEASURES}
    means = [
        {"run": "mean", **{name: each["mean"] for name, each in over.items()}},
        *(
            {"run": f"95 % {word}", **{name: each["interval"][end] for name, each in over.items()}}
            for end, word in enumerate(("from", "to"))
        ),
    ]
    text = [
        as_lines({name: found[name] for name in ("method", "requested", "ablation", "metric", "n")}),
        as_columns([*found["circuits"], *means], ("run", *MEASURES)),
        as_columns(agreement["pairs"], tuple(agreement["pairs"][0])),
        f"Edges that all find: {', '.join(agreement['shared']) or 'none'}",
    ]
    return Printout(content={**found, **clock}, text="\n\n".join(text))


def reason(options: argparse.Namespace) -> Printout:
    """The measures of a reasoner at one checkpoint, or through training."""
    from apps.reasoning import measured_steps, reasoner_task, reasoning_of, reasoning_through
    from workbench.training.checkpoints import load

    if options.checkpoint != "all":
        return _analyse(options, "reasoning", reasoning_of, {"n": options.n})
    run = load(options.run, runs=options.runs)
    reasoner_task(run)
    told, total = count(1), len(measured_steps(run))
    with share_bar(f"reason {options.run}") as on_progress:

        def through(run: Run, step: int | None, *, n: int) -> Result:
            return reasoning_through(run, n=n, on_step=lambda: on_progress(next(told) / total))

        once = argparse.Namespace(**{**vars(options), "checkpoint": None})
        printout = _analyse(once, "reasoning_history", through, {"n": options.n})
    # As text the last checkpoint's rows: those of all are for programs.
    last = [row for row in printout.content["rows"] if row["step"] in (None, run.checkpoint().step)]
    return replace(printout, text=as_lines(scalars(printout.content)) + "\n\n" + as_columns(last, tuple(last[0])))


def decompile(options: argparse.Namespace) -> Printout:
    """A Transformer Program as a Python module."""
    from apps.programs import decompile_run
    from workbench.training.checkpoints import load

    with stopwatch() as clock:
        found = decompile_run(load(options.run, runs=options.runs), _step(options.checkpoint), budget=options.budget)
        write_atomic(options.out, found.text.encode())
    content = {"run": options.run, "out": str(options.out), **found.summary(), **clock}
    return Printout(content=content, text=as_lines(content))


def trace(options: argparse.Namespace) -> Printout:
    """Path merging in a search run, at one checkpoint or all."""
    from apps.tracing import COLUMNS, printed_rows, traces_of

    arguments = {name: getattr(options, name) for name in ("n", "lookahead", "seed")}
    with share_bar(f"trace {options.run}") as on_progress:
        printout = _analyse(options, "path_traces", partial(traces_of, on_progress=on_progress), arguments)
    if options.checkpoint == "all":
        return printout
    content = printout.content
    parts = [as_columns(printed_rows(content), COLUMNS)]
    if content["causal"]:
        conditions = content["causal"]["conditions"]
        parts.append(as_columns(conditions, tuple(conditions[0])))
        parts.append(as_lines({name: value for name, value in content["causal"].items() if name != "conditions"}))
    last = {name: content[name] for name in ("step", "skipped", "seconds_per_input", "seconds")}
    return replace(printout, text="\n\n".join([*parts, as_lines(last)]))


def scorecard(options: argparse.Namespace) -> Printout:
    """The score card."""
    from circuits.scorecard import scorecard as make_card

    with stopwatch() as clock, share_bar("scorecard") as on_progress:
        card = make_card(
            finders=_listed(options.methods),
            circuits=_listed(options.circuits),
            ablations=_listed(options.ablations),
            on_progress=on_progress,
        )
    if options.out is not None:
        for table in card.tables():
            write_atomic(options.out / f"{table.name}.csv", table.csv().encode())
    text = "\n\n".join(table.frame.to_string(index=False, float_format="{:.3f}".format) for table in card.tables())
    return Printout(content={**card.summary(), **clock}, text=text)


def bench(options: argparse.Namespace) -> Printout:
    """Benchmarks, one after another."""
    from apps.benchmarks import BENCHMARKS, run_benchmark

    found = [run_benchmark(name, repeats=options.repeats).summary() for name in options.names or BENCHMARKS]
    columns = ("name", "ratio", "ratio_interval", "gate", "met", "agreement", "gemm_share", "n", "peer")
    met = all(each["met"] for each in found)
    return Printout(content={"benchmarks": found, "met": met}, text=as_columns(found, columns))


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
    """The report of a run."""
    from apps.report import report_run
    from workbench.training.checkpoints import load

    run = load(options.run, runs=options.runs)
    out = options.out or Path(f"report-{run.folder.path.name}")
    written = report_run(run, out)
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


def _analyse(
    options: argparse.Namespace,
    name: str,
    compute: Callable[..., Result],
    arguments: Mapping[str, Any],
    on_progress: Callable[[float], None] | None = None,
) -> Printout:
    """An analysis at one checkpoint or all; one that tells its progress is told here whom."""
    from apps.analyses import kept
    from workbench.training.checkpoints import load

    run = load(options.run, runs=options.runs)

    def telling(done: int, total: int) -> Callable[..., Result]:
        tell = on_progress
        return compute if tell is None else partial(compute, on_progress=lambda share: tell((done + share) / total))

    if options.checkpoint == "all":
        total = len(run.checkpoints)
        with stopwatch() as clock:
            found = [
                kept(run, name, telling(done, total), each.step, arguments) for done, each in enumerate(run.checkpoints)
            ]
        content = {"run": run.reference, "checkpoints": found, **clock}
        return Printout(content=content, text="\n\n".join(as_lines(scalars(each)) for each in found))
    with stopwatch() as clock:
        found_one = kept(run, name, telling(0, 1), _step(options.checkpoint), arguments)
    rows = next((found_one[name] for name in ROWS if found_one.get(name)), None)
    text = as_lines(scalars(found_one)) + ("\n\n" + as_columns(rows, tuple(rows[0])) if rows else "")
    return Printout(content={**found_one, **clock}, text=text)


def _export_circuit(options: argparse.Namespace, arguments: Mapping[str, Any]) -> None:
    """Write the circuit that is kept of a checkpoint into a file of the format that its name asks for."""
    from apps.analyses import key_of
    from circuits.exchange import load_circuit, save_circuit
    from workbench.training.checkpoints import load

    run = load(options.run, runs=options.runs)
    kept = run.folder.results / key_of(run, "circuit", _step(options.checkpoint), arguments)
    save_circuit(options.out, load_circuit(kept / "circuit.json"))


def _listed(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _positions(names: str | None) -> tuple[int, ...] | None:
    if names is None:
        return None
    listed = _listed(names) or []
    if not listed or not all(name.isdecimal() for name in listed):
        raise WorkbenchError(f"--positions takes numbers from 0, comma-separated, got {names!r}.")
    return tuple(map(int, listed))


def _step(checkpoint: str | None) -> int | None:
    if checkpoint is None:
        return None
    if not checkpoint.isdecimal():
        raise WorkbenchError(f"--checkpoint takes a step or 'all', got {checkpoint!r}.")
    return int(checkpoint)


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
    """A row for each run and for each of the gallery; one that cannot be read says so in its row."""
    from workbench.training.checkpoints import load

    rows = []
    for name in [*run_names(root), *(f"gallery:{name}" for name in gallery_names())]:
        try:
            rows.append(describe_run(load(name, runs=root)))
        except WorkbenchError as error:
            rows.append(dict.fromkeys(RUN_COLUMNS) | {"run": name, "status": f"unreadable: {error}"})
    return rows


def accuracies(run: Run) -> dict[str, float]:
    """The last accuracy on each split that is measured; where there are OOD facts, test's goes by `id` too."""
    last, measured = run.log.rows[-1], run.task.measured
    found = {f"{split}_accuracy": last[f"{split}_accuracy"] for split in measured}
    has_ood = any("ood" in split for split in measured)
    return {**found, **({"id_accuracy": found["test_accuracy"]} if has_ood else {})}


def describe_run(run: Run) -> dict[str, Any]:
    """A run in one row."""
    last = run.log.rows[-1] if run.log.rows else {}
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


def _no_runs(options: argparse.Namespace) -> str:
    return "No runs yet. Train one: `workbench train modular-smoke`."
