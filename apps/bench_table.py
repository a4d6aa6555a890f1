"""`workbench bench`, and the README's table of what it measured.

`python -m apps.bench_table BENCH.json …` keeps what `workbench bench --json` printed, a benchmark at a time in place of
what was kept of it, and writes the README's table anew from all that is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.printing import Printout, as_columns
from workbench.runtime import WorkbenchError
from workbench.store import read_json, write_atomic

PLACE = Path(__file__).parent / "benchmarks.json"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- from here: python -m apps.bench_table -->\n", "<!-- to here -->\n"
HEAD = ("benchmark", "peer", "ratio", "gate", "n", "share", "memory")
SHAPE = ("n_layers", "d_model", "n_ctx", "positions", "batch", "pairs", "members", "examples")
"""Conditions that are shown: those that a ratio depends on most."""
DIGITS = 4
log = logging.getLogger(__name__)
Row = Mapping[str, Any]


def bench(options: argparse.Namespace) -> Printout:
    """Benchmarks, one after another."""
    import torch

    from apps.benchmarks import ALL, run_benchmark
    from workbench.runtime import has_bfloat16

    names = options.names or [name for name in ALL if has_bfloat16(torch.device("cpu")) or "bfloat16" not in name]
    if not options.names and len(names) < len(ALL):
        log.warning("This processor has no bfloat16: %d benchmarks of it are left out.", len(ALL) - len(names))
    found = [run_benchmark(name, repeats=options.repeats).summary() for name in names]
    columns = ("name", "ratio", "ratio_interval", "gate", "met", "agreement", "gemm_share", "n", "peer")
    text = as_columns([{**dict.fromkeys(columns), **each} for each in found], columns)
    return Printout(content={"benchmarks": found, "met": all(each["met"] for each in found)}, text=text)


def keep(results: Sequence[Row], *, place: Path = PLACE, readme: Path = README) -> None:
    """Keep results, and write the README's table from all that are kept.

    Raises:
        WorkbenchError: a result did not agree with its peer's, or the README has no place for the table.
    """
    for result in results:
        if not result.get("agrees", True):
            raise WorkbenchError(f"{result['name']} found something else than its peer, so its ratio means nothing.")
    kept = {row["name"]: row for row in (kept_rows(place) if place.exists() else [])}
    kept |= {result["name"]: _rounded(result) for result in results}
    lines = ",\n".join(json.dumps(row) for row in kept.values())
    text = with_table(readme.read_text(), list(kept.values()))
    write_atomic(place, f'{{"benchmarks": [\n{lines}\n]}}\n'.encode())
    write_atomic(readme, text.encode())


def kept_rows(place: Path = PLACE) -> list[Row]:
    """What was measured last of each benchmark."""
    return read_json(place)["benchmarks"]


def with_table(readme: str, rows: Sequence[Row]) -> str:
    """The README with this table in its place.

    Raises:
        WorkbenchError: it has no such place.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise WorkbenchError(f"The README has no place for the table: a line {BEGIN.strip()!r}, then {END.strip()!r}.")
    return f"{before}{BEGIN}{table(rows)}{END}{after}"


def table(rows: Sequence[Row]) -> str:
    """A line a benchmark, in the order in which they are registered."""
    from apps.benchmarks import ALL

    order = {name: place for place, name in enumerate(ALL)}
    ordered = sorted(rows, key=lambda row: order.get(row["name"], len(order)))
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, ordered)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row["ratio_interval"]
    share, peak, conditions = row.get("gemm_share"), row.get("peak_bytes"), row.get("conditions", {})
    shape = ", ".join(f"{name} {conditions[name]}" for name in SHAPE if name in conditions)
    return (
        f"`{row['name']}`: {row['compares'].rstrip('.')}{f' ({shape})' if shape else ''}",
        row["peer"],
        f"{row['ratio']:.3g} [{low:.3g}, {high:.3g}]",
        f"{row['gate']:.2g}" if low >= row["gate"] else f"{row['gate']:.2g}, missed",
        str(row["n"]),
        f"{share:.2f}" if share else "–",
        f"{peak['ours'] / peak['peer']:.2f} of {_size(peak['peer'])}" if peak and peak["peer"] else "–",
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.3g} MiB"


def _rounded(value: Any) -> Any:
    """Floats to a few digits, wherever they stand."""
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        keep([row for path in sys.argv[1:] for row in read_json(Path(path))["benchmarks"]])
    except WorkbenchError as error:
        sys.exit(f"bench_table: {error}")
