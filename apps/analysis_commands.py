"""The commands that analyse a run, or several: options in, a printout back.

Heavy imports happen inside the command that needs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from apps.printing import Printout, as_columns, as_lines, scalars, share_bar, stopwatch
from workbench.runtime import WorkbenchError
from workbench.store import check_writable, write_atomic

if TYPE_CHECKING:
    from workbench.store import Result
    from workbench.training.checkpoints import Run

ENGINE_OPTIONS = ("engine", "workers", "address")
"""Options of a command whose checkpoints may be analysed apart."""
ROWS = ("cells", "minimality", "rows")
"""Lists of rows that are printed as a table, the first that a result has."""


def lens(options: argparse.Namespace) -> Printout:
    """The logit lens at one checkpoint or all, or the tuned lens beside it."""
    from apps.analyses import PAIRS, TUNED_PROMPTS, lens_of, tuned_lens_of

    name, compute, n = ("lens", lens_of, PAIRS)
    if options.kind == "tuned":
        name, compute, n = ("tuned_lens", tuned_lens_of, TUNED_PROMPTS)
    arguments = {"n": n if options.n is None else options.n, "split": options.split}
    return _analyse(options, name, compute, arguments)


def probe(options: argparse.Namespace) -> Printout:
    """Probes of the task's latents at one checkpoint or all; of a search, what it knows of reachability too."""
    from apps.probing import REACHABILITY, probes_of

    arguments = {name: getattr(options, name) for name in ("latent", "sites", "n", "split")}
    with share_bar(f"probe {options.run}") as on_progress:
        positions = _positions(options.positions)
        printout = _analyse(options, "probe", probes_of, {**arguments, "positions": positions}, on_progress)
    if REACHABILITY not in printout.content:
        return printout
    cells = printout.content[REACHABILITY]["cells"]
    return replace(printout, text=f"{printout.text}\n\n{as_columns(cells, tuple(cells[0]))}")


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


def compare(options: argparse.Namespace) -> Printout:
    """Several runs on the same examples, and by how much the others differ from the first."""
    from apps.accuracies_of_runs import accuracies_of
    from apps.analyses import kept_of_several
    from workbench.training.checkpoints import load

    runs = [load(name, runs=options.runs) for name in (options.run, *options.others)]
    with stopwatch() as clock:
        found = kept_of_several(runs, "accuracies_of_runs", accuracies_of, options.checkpoint, {})
    text = [as_columns(found["rows"], tuple(found["rows"][0])), *found["left_out"].values()]
    return Printout(content={**found, **clock}, text="\n".join(text))


def reason(options: argparse.Namespace) -> Printout:
    """The measures of a reasoner at one checkpoint, or through training."""
    from apps.analyses import kept
    from apps.reasoning import measured_steps, reasoner_task, reasoning_joined, reasoning_of, reasoning_through
    from workbench.training.checkpoints import load

    if options.checkpoint != "all":
        return _analyse(options, "reasoning", reasoning_of, {"n": options.n})
    run = load(options.run, runs=options.runs)
    reasoner_task(run)
    steps = measured_steps(run)
    told, total = count(1), len(steps)

    def through(run: Run, step: int | None, *, n: int) -> Result:
        if _analyse_apart(options, run, "reasoning", {"n": n}, steps):
            return reasoning_joined(run, [kept(run, "reasoning", reasoning_of, each, {"n": n}) for each in steps])
        with share_bar(f"reason {options.run}") as on_progress:
            return reasoning_through(run, n=n, on_step=lambda: on_progress(next(told) / total))

    once = argparse.Namespace(**{**vars(options), "checkpoint": None, **dict.fromkeys(ENGINE_OPTIONS)})
    printout = _analyse(once, "reasoning_history", through, {"n": options.n})
    # As text the last checkpoint's rows: those of all are for programs.
    last = [row for row in printout.content["rows"] if row["step"] in (None, run.checkpoint().step)]
    return replace(printout, text=as_lines(scalars(printout.content)) + "\n\n" + as_columns(last, tuple(last[0])))


def decompile(options: argparse.Namespace) -> Printout:
    """A Transformer Program in a form of one's choice, and beside a shortened one the exact one."""
    from apps.programs import decompile_run, form_of
    from workbench.training.checkpoints import load

    with stopwatch() as clock:
        # Before half a minute's work, not after it.
        form = form_of(options.out, fast=options.fast)
        check_writable(options.out)
        found = decompile_run(load(options.run, runs=options.runs), _step(options.checkpoint), budget=options.budget)
        written = {options.out: found.forms[form]}
        if options.budget:
            written[options.out.with_stem(f"{options.out.stem}_exact")] = found.exact[form]
        for file, text in written.items():
            write_atomic(file, text.encode())
    files = dict(zip(("out", "exact"), map(str, written), strict=False))
    content = {"run": options.run, **files, **found.summary(), **clock}
    return Printout(content=content, text=as_lines(content))


def prove(options: argparse.Namespace) -> Printout:
    """A Transformer Program against its task's definition, length by length."""
    from apps.programs import prove_run
    from workbench.training.checkpoints import load

    with stopwatch() as clock, share_bar(f"prove {options.run}") as on_progress:
        run = load(options.run, runs=options.runs)
        limits: dict[str, Any] = {"longest": options.longest, "timeout": options.timeout}
        found = prove_run(run, _step(options.checkpoint), **limits, on_progress=on_progress)
    rows = [asdict(each) for each in found.lengths]
    content = {"run": options.run, "proved_to": found.proved_to, "counterexample": rows[-1]["counterexample"] or None}
    text = as_lines(content) + "\n\n" + as_columns(rows, tuple(rows[0]))
    return Printout(content={**content, "lengths": rows, **clock}, text=text)


def graft(options: argparse.Namespace) -> Printout:
    """Grafts of donors, judged."""
    from apps.grafting import graft as find_and_judge

    return find_and_judge(options)


def localise(options: argparse.Namespace) -> Printout:
    """Donors of several seeds, and their grafts."""
    from apps.localising import localise as teach_and_judge

    return teach_and_judge(options)


def union(options: argparse.Namespace) -> Printout:
    """The regions of several donors in one base."""
    from apps.graft_unions import union as unite

    return unite(options)


def forget(options: argparse.Namespace) -> Printout:
    """Tasks one after the other in one base."""
    from apps.forgetting import forget as teach_in_sequence

    return teach_in_sequence(options)


def trace(options: argparse.Namespace) -> Printout:
    """Path merging in a search run, at one checkpoint or all: on test inputs, or on one graph of the user's own."""
    from apps.tracing import COLUMNS, INPUTS, printed_rows, traces_of

    if options.graph is not None:
        return _trace_graph(options)
    n = INPUTS if options.n is None else options.n
    arguments = {"n": n, "lookahead": options.lookahead, "seed": options.seed}
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


def _trace_graph(options: argparse.Namespace) -> Printout:
    """One typed graph: the verdict, and the operations that the answer hangs on."""
    from apps.tracing import trace_of

    if options.n is not None or options.lookahead is not None:
        raise WorkbenchError("--graph traces that graph alone: leave --n and --lookahead out.")
    printout = _analyse(options, "path_trace", trace_of, {"graph": options.graph})
    operations = printout.content.get("operations")
    if not operations:
        return printout
    return replace(printout, text=f"{printout.text}\n\n{as_columns(operations, tuple(operations[0]))}")


def scorecard(options: argparse.Namespace) -> Printout:
    """The score card."""
    from apps.programs import known_circuit
    from circuits.scorecard import scorecard as make_card

    names = _listed(options.circuits)
    with stopwatch() as clock, share_bar("scorecard") as on_progress:
        card = make_card(
            finders=_listed(options.methods),
            circuits=None if names is None else [known_circuit(name, runs=options.runs) for name in names],
            ablations=_listed(options.ablations),
            on_progress=on_progress,
        )
    if options.out is not None:
        for table in card.tables():
            write_atomic(options.out / f"{table.name}.csv", table.csv().encode())
    parts = [table.frame.to_string(index=False, float_format="{:.3f}".format) for table in card.tables()]
    text = "\n\n".join([*parts, *(f"{circuit}: {said}" for circuit, said in card.gradients.items())])
    return Printout(content={**card.summary(), **clock}, text=text)


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
    _analyse_apart(options, run, name, arguments, [each.step for each in run.checkpoints])

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


def _analyse_apart(
    options: argparse.Namespace, run: Run, name: str, arguments: Mapping[str, Any], steps: Sequence[int]
) -> bool:
    """Have an analysis at these checkpoints kept by the engine that is asked for, if one is; whether one was."""
    given = [f"--{name}" for name in ENGINE_OPTIONS if getattr(options, name) is not None]
    if given and options.checkpoint != "all":
        raise WorkbenchError(f"One checkpoint is analysed here: leave {', '.join(given)} out, or add --checkpoint all.")
    if given:
        from apps.analysing import analyse_apart

        analyse_apart(run, name, arguments, steps, options)
    return bool(given)


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
