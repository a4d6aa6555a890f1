"""Expected findings and what was found: what fails is reported like what holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.intervals import Estimate
from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """An expected finding, and what was found."""

    statement: str
    wanted: str
    found: float | None
    """None where it was never reached or not measured."""
    holds: bool
    interval: Estimate | None = None
    """Of what was found, where it is a mean over prompts."""
    n: int | None = None
    """Prompts behind it."""
    free: bool = False
    """Whether training all but builds it in: a check that nothing is broken, no finding."""


def at_least(statement: str, found: float | None, bound: float) -> Claim:
    """A claim that holds from `bound` on."""
    return Claim(statement=statement, wanted=f"≥ {bound:.4g}", found=found, holds=found is not None and found >= bound)


def at_most(statement: str, found: float | None, bound: float) -> Claim:
    """A claim that holds up to `bound`."""
    return Claim(statement=statement, wanted=f"≤ {bound:.4g}", found=found, holds=found is not None and found <= bound)


def claims_tables(found: Sequence[Claim]) -> tuple[Table, ...]:
    """The findings, one a row, and beside them what is nearly free, if any is."""
    findings = [claim for claim in found if not claim.free]
    checks = [claim for claim in found if claim.free]
    caption = (
        "What one expects of a network that has learnt an algorithm, and what this run shows. An empty cell "
        "was never reached."
    )
    tables = [_table("claims", findings, caption)]
    if checks:
        caption = "Sanity lines: nearly free by construction, they say that nothing is broken and no more."
        tables.append(_table("claims_sanity", checks, caption))
    return tuple(tables)


def _table(name: str, found: Sequence[Claim], caption: str) -> Table:
    rows = [
        {
            "finding": claim.statement,
            "expected": claim.wanted,
            "found": claim.found,
            **_interval(claim),
            "holds": claim.holds,
        }
        for claim in found
    ]
    columns = ["finding", "expected", "found", "low", "high", "n", "holds"]
    if not any(claim.n for claim in found):
        columns = [column for column in columns if column not in ("low", "high", "n")]
    # A count that is not there stays None: as a number it would make decimals of the others.
    frame = pd.DataFrame(rows, columns=columns, dtype=object).astype({"found": float, "holds": bool})
    if "n" in columns:
        frame = frame.astype({"low": float, "high": float})
        caption += " 95 % intervals over n prompts of this one run."
    return Table(name=name, frame=frame, kind="table", axes={}, unit="", caption=caption)


def _interval(claim: Claim) -> dict[str, float | int | None]:
    interval = claim.interval
    ends = (None, None) if interval is None else (interval.low, interval.high)
    return {"low": ends[0], "high": ends[1], "n": claim.n}
