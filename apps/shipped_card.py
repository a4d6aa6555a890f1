"""The score card that ships with the package: the frozen set, measured once, so that pages and reports need not.

`python -m apps.shipped_card CARD.json` puts what `workbench scorecard --json` printed in its place.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuits.scorecard import ScoreCard, card_from_json
from circuits.truths import SET_VERSION
from workbench.runtime import WorkbenchError
from workbench.store import read_json, write_atomic

PLACE = Path(__file__).parent / "scorecard_v1.json"
DIGITS = 5


@functools.cache
def shipped_card() -> ScoreCard:
    """The card of the whole frozen set."""
    content = read_json(PLACE)
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    return card_from_json({**content, "rows": rows})


def ship(content: Mapping[str, Any], place: Path = PLACE) -> None:
    """Keep a card, numbers rounded to five digits.

    Raises:
        WorkbenchError: it is no card, or not of the whole frozen set.
    """
    card = card_from_json(content)
    if card.version != SET_VERSION:
        raise WorkbenchError(
            f"Only a card of the whole frozen set ships; this one has version {card.version}, digest "
            f"{card.digest[:12]}."
        )
    rows = [row.flat() for row in card.rows]
    columns = list(rows[0])
    kept = ("version", "digest", "n", "seconds", "provenance")
    rounded = [[_rounded(row[column]) for column in columns] for row in rows]
    lines = ",\n".join(json.dumps(row) for row in rounded)
    head = json.dumps({**{name: content[name] for name in kept}, "columns": columns})
    write_atomic(place, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())


def _rounded(value: object) -> object:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    ship(read_json(Path(sys.argv[1])))
