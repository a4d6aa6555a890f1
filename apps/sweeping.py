"""`workbench sweep`: plans the runs, trains those that are not finished, and prints when each setting generalised."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.printing import Printout, as_columns, share_bar, stopwatch
from workbench.runtime import WorkbenchError
from workbench.training.engines import train_in_processes
from workbench.training.landmarks import SweepResult, sweep_result
from workbench.training.recipes import find_recipe
from workbench.training.sweeps import members_to_train, plan_sweep, read_alternatives, read_seeds, read_variants


def sweep(options: argparse.Namespace) -> Printout:
    """Train what a sweep lacks; its exit code is 1 if a run failed."""
    members = plan_sweep(
        find_recipe(options.recipe),
        seeds=read_seeds(options.seeds),
        variants=read_variants(options.variant),
        alternatives=read_alternatives(options.set),
        name=options.name,
    )
    left = members_to_train(members, options.runs)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise WorkbenchError(f"{options.out} is a file; tables and figures go into a folder. Choose another --out.")
    with stopwatch() as clock, share_bar(f"sweep {len(left)} runs") as on_progress:
        failed = train_in_processes(left, runs=options.runs, workers=options.workers, on_progress=on_progress)
    result = sweep_result([each.run(options.runs) for each in members], [each.setting for each in members])
    if options.out is not None:
        _write(options.out, result)
    content = {**result.summary(), "trained": len(left) - len(failed), "failed": failed, **clock}
    lines = [f"Failed: {name}: {reason}" for name, reason in failed.items()]
    rows = [_row(row) for row in result.summary()["settings"]]
    text = "\n".join([as_columns(rows, tuple(rows[0])), *lines])
    return Printout(content=content, text=text, exit_code=1 if failed else 0)


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    """A setting as people read it: counts, medians with their ranges, means with their intervals."""
    splits = [name.removesuffix("_accuracy") for name in row if name.endswith("_accuracy")]
    return {
        "setting": row["setting"],
        "seeds": str(row["n"]),
        "ended": str(row["ended"]),
        "memorised": str(row["memorised"]),
        "generalised": f"{row['generalised']}{_between(row, 'generalised_rate', 'low', 'high', '.2f')}",
        **{
            name: "-" if row[key] is None else f"{row[key]:g}{_between(row, key, 'least', 'most', 'g')}"
            for name, key in {
                "memorised at": "step_memorised",
                "generalised at": "step_generalised",
                "in seconds": "seconds_generalised",
            }.items()
        },
        **{
            f"{split} accuracy": "-"
            if row[key] is None
            else f"{row[key]:.3f}{_between(row, key, 'low', 'high', '.3f')}"
            for split in splits
            for key in (f"{split}_accuracy",)
        },
    }


def _between(row: Mapping[str, Any], key: str, low: str, high: str, form: str) -> str:
    ends = row[f"{key}_{low}"], row[f"{key}_{high}"]
    return "" if None in ends else f" [{ends[0]:{form}}, {ends[1]:{form}}]"


def _write(out: Path, result: SweepResult) -> None:
    from apps.static_figures import draw_static
    from apps.table_files import has_picture, write_figures, write_tables
    from workbench.figures import figure

    figures = {table.name: figure(table) for table in result.tables() if has_picture(table)}
    write_tables(out, result.tables())
    write_figures(out, figures, draw_static({name: drawn.to_plotly_json() for name, drawn in figures.items()}).svg)
