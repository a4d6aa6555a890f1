"""`workbench sweep`: plans the runs, trains those that are not finished, and tells when each setting generalised."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.printing import Printout, as_columns, share_bar, stopwatch
from workbench.runtime import WorkbenchError
from workbench.training.landmarks import SweepResult, sweep_result


def sweep(options: argparse.Namespace) -> Printout:
    """Train what a sweep lacks; its exit code is 1 if a run failed."""
    from workbench.training.engines import train_members
    from workbench.training.recipes import find_recipe
    from workbench.training.sweeps import members_to_train, plan_sweep, read_alternatives, read_seeds, read_variants

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
        failed = train_members(
            left,
            runs=options.runs,
            engine=options.engine,
            workers=options.workers,
            address=options.address,
            on_progress=on_progress,
        )
    result = sweep_result([each.run(options.runs) for each in members], [each.setting for each in members])
    if options.out is not None:
        _write(options.out, result)
    content = {**result.summary(), "trained": len(left) - len(failed), "failed": failed, **clock}
    rows = setting_rows(result)
    lines = [as_columns(rows, tuple(rows[0])), *(f"Failed: {name}: {reason}" for name, reason in failed.items())]
    return Printout(content=content, text="\n".join(lines), exit_code=1 if failed else 0)


def setting_rows(result: SweepResult) -> list[dict[str, str]]:
    """The settings as people read them: counts, medians with their ranges, rates and means with their intervals."""
    return [_setting_row(row) for row in result.settings.to_dict("records")]


def _setting_row(row: Mapping[Any, Any]) -> dict[str, str]:
    places = {
        "memorised at": "step_memorised",
        "generalised at": "step_generalised",
        "after seconds": "seconds_generalised",
    }
    accuracies = [name for name in row if name.endswith("_accuracy")]
    return {
        "setting": row["setting"],
        "seeds": str(row["n"]),
        "ended": str(row["ended"]),
        "memorised": str(row["memorised"]),
        "generalised": str(row["generalised"]),
        "rate": _with_ends(row, "generalised_rate", "low", "high", ".2f"),
        **{name: _with_ends(row, key, "least", "most", "g") for name, key in places.items()},
        **{key.replace("_", " "): _with_ends(row, key, "low", "high", ".3f") for key in accuracies},
    }


def _with_ends(row: Mapping[Any, Any], key: str, low: str, high: str, form: str) -> str:
    """A value and what it lies between; one run has no interval."""
    value, ends = row[key], (row[f"{key}_{low}"], row[f"{key}_{high}"])
    if value is None:
        return "-"
    known = all(end == end for end in ends)
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if known else "")


def _write(out: Path, result: SweepResult) -> None:
    from apps.static_figures import draw_static
    from apps.table_files import has_picture, write_figures, write_tables
    from workbench.figures import figure

    figures = {table.name: figure(table) for table in result.tables() if has_picture(table)}
    write_tables(out, result.tables())
    write_figures(out, figures, draw_static({name: drawn.to_plotly_json() for name, drawn in figures.items()}).svg)
