"""What a report and a page look at in a run on graph search."""

from __future__ import annotations

import re

from workbench.tables import Table
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import Run

BY_LOOKAHEAD = re.compile(r"test_(\d+)_accuracy")


def lookahead_curves(run: Run) -> Table | None:
    """Accuracy at each lookahead by step; None of a run that was not trained here."""
    assert isinstance(run.task, GraphSearch)
    frame = run.log.frame
    found = {name: match[1] for name in frame if (match := BY_LOOKAHEAD.fullmatch(name))}
    if not found:
        return None
    long = frame.rename(columns=found).melt("step", list(found.values()), "lookahead", "accuracy")
    return Table(
        name="accuracy_by_lookahead",
        frame=long,
        kind="curve",
        axes={"x": "step", "y": "accuracy", "series": "lookahead"},
        unit="fraction",
        caption=f"Accuracy on {run.task.test_size} balanced test graphs of each lookahead.",
    )
