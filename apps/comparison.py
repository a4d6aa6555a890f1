"""Whether a rebuilt report says what the first one said, table by table.

The same code on the same machine writes the same bytes. Another machine adds floats in another order, so where bytes
differ the numbers are compared, each column by its own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from workbench.store import digest

TOLERANCE = 1e-4
"""Largest difference that counts as another order of the same sums, as a share of the column's largest number."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Status = Literal["identical", "equal", "different", "missing", "new"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableComparison:
    """One table, then and now."""

    name: str
    status: Status
    detail: str
    """In words: equal within what, or what differs where."""

    @property
    def reproduced(self) -> bool:
        """Whether the table came out the same, to the tolerance."""
        return self.status in ("identical", "equal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A report and its rebuilt copy."""

    run: str
    first: Path
    rebuilt: Path
    same_weights: bool
    """Whether both looked at the very same checkpoints."""
    versions: Mapping[str, tuple[object, object]]
    """What the two were made with, where that differs."""
    tables: tuple[TableComparison, ...]

    @property
    def reproduced(self) -> bool:
        """Whether every table came out the same, to the tolerance."""
        return all(table.reproduced for table in self.tables)

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        return {
            "run": self.run,
            "reproduced": self.reproduced,
            "tolerance": TOLERANCE,
            "same_weights": self.same_weights,
            "report": str(self.rebuilt / "report.html"),
            "compared_with": str(self.first),
            "versions": {name: list(pair) for name, pair in self.versions.items()},
            "tables": {
                table.name: f"{table.status}: {table.detail}" if table.detail else table.status for table in self.tables
            },
        }


def compare_tables(
    first: Mapping[str, str], first_folder: Path, rebuilt: Mapping[str, str], rebuilt_folder: Path
) -> tuple[TableComparison, ...]:
    """Compare the tables of two reports.

    Args:
        first: SHA-256 of each table's CSV, by name, as the manifest holds them.
        first_folder: where those CSVs lie; one that has gone or changed is compared by its hash alone.
        rebuilt: the same of the rebuilt report.
        rebuilt_folder: where those lie.
    """
    names = [*first, *(name for name in rebuilt if name not in first)]
    return tuple(
        _compare(name, first.get(name), first_folder / f"{name}.csv", rebuilt.get(name), rebuilt_folder / f"{name}.csv")
        for name in names
    )


def _compare(
    name: str, first: str | None, first_file: Path, rebuilt: str | None, rebuilt_file: Path
) -> TableComparison:
    if rebuilt is None:
        return TableComparison(name=name, status="missing", detail="only in the first report")
    if first is None:
        return TableComparison(name=name, status="new", detail="only in the rebuilt report")
    if first == rebuilt:
        return TableComparison(name=name, status="identical", detail="")
    if not first_file.is_file() or digest(first_file.read_bytes()) != first:
        detail = "the first report's CSV has gone or changed, so that only hashes could be compared"
        return TableComparison(name=name, status="different", detail=detail)
    return _compare_numbers(name, pd.read_csv(first_file), pd.read_csv(rebuilt_file))


def _compare_numbers(name: str, first: pd.DataFrame, rebuilt: pd.DataFrame) -> TableComparison:
    if list(first.columns) != list(rebuilt.columns) or len(first) != len(rebuilt):
        detail = (
            f"{len(first)} rows of {', '.join(first.columns)} became {len(rebuilt)} of {', '.join(rebuilt.columns)}"
        )
        return TableComparison(name=name, status="different", detail=detail)
    differences = {column: column_difference(first[column], rebuilt[column]) for column in first.columns}
    worst = max(differences, key=lambda column: differences[column], default="")
    largest = differences.get(worst, 0.0)
    if largest <= TOLERANCE:
        # Rounded up to the power of ten that people quote.
        within = 10.0 ** math.ceil(math.log10(largest)) if largest > 0 else 0.0
        return TableComparison(name=name, status="equal", detail=f"within {within:.0e} of each column's largest number")
    how = f"differs by {largest:.2g} of its largest number" if math.isfinite(largest) else "holds other entries"
    return TableComparison(name=name, status="different", detail=f"column {worst!r} {how}")


def column_difference(first: pd.Series, rebuilt: pd.Series) -> float:
    """Largest difference as a share of the column's largest number; infinite where entries cannot be subtracted.

    In a column of numbers and words each number is held against itself.
    """
    if all(is_numeric_dtype(column) and not is_bool_dtype(column) for column in (first, rebuilt)):
        size = max(first.abs().max(), rebuilt.abs().max())
        return _largest(first.to_numpy(float), rebuilt.to_numpy(float), size)
    old, new = (pd.to_numeric(column.astype(str), errors="coerce") for column in (first, rebuilt))
    words = old.isna() | new.isna()
    if not first[words].astype(str).equals(rebuilt[words].astype(str)):
        return math.inf
    old, new = old[~words].to_numpy(float), new[~words].to_numpy(float)
    return _largest(old, new, np.maximum(np.abs(old), np.abs(new)))


def _largest(old: Numbers, new: Numbers, size: float | Numbers) -> float:
    """Largest difference as a share of the size; what is absent or infinite must be so in both."""
    differ = ~((old == new) | (np.isnan(old) & np.isnan(new)))
    shares = np.broadcast_to(size, old.shape)[differ]
    old, new = old[differ], new[differ]
    if not (np.isfinite(old) & np.isfinite(new)).all():
        return math.inf
    return float((np.abs(old - new) / shares).max(initial=0.0))
