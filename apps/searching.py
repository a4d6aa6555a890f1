"""What is said of a run that searches graphs."""

from __future__ import annotations

from typing import Any

from apps.accuracies_of_runs import right_of
from workbench.intervals import share_of
from workbench.runtime import WorkbenchError
from workbench.tasks.graph_search import GraphSearch
from workbench.training.checkpoints import Run


def search_task(run: Run, what: str = "Lookaheads are measured in") -> GraphSearch:
    """The run's task, where it is graph search.

    Args:
        run: any.
        what: begins the sentence that says what needs such a run.

    Raises:
        WorkbenchError: the run learnt something else.
    """
    if not isinstance(run.task, GraphSearch):
        raise WorkbenchError(
            f"{what} runs on graph search; {run.reference!r} learnt {run.task.name!r}. Train one: "
            "`workbench train search`."
        )
    return run.task


def by_lookahead(run: Run) -> dict[str, dict[int, Any]]:
    """The last model's accuracy at each lookahead, its 95 % interval and n, and the step that solved it for good.

    Empty of a run of another task.
    """
    if not isinstance(run.task, GraphSearch):
        return {}
    model, splits = run.model(), {lookahead: f"test_{lookahead}" for lookahead in run.task.levels}
    batches = {lookahead: run.task.examples(split) for lookahead, split in splits.items()}
    shares = {lookahead: share_of(right_of(model, batch)) for lookahead, batch in batches.items()}
    return {
        "accuracy_by_lookahead": {lookahead: share.mean for lookahead, share in shares.items()},
        "interval_by_lookahead": {lookahead: [share.low, share.high] for lookahead, share in shares.items()},
        "n_by_lookahead": {lookahead: len(batch) for lookahead, batch in batches.items()},
        "step_by_lookahead": {lookahead: run.log.step_solved(split) for lookahead, split in splits.items()},
    }
