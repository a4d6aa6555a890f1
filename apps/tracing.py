"""Path merging in a run on graph search: which inputs are traced, a person's own among them, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apps.searching import search_task
from circuits.path_merging import PathTrace, trace_paths
from circuits.path_traces import JUDGED, PathTraces, trace_inputs
from circuits.search_prompts import SearchPrompt
from workbench.runtime import WorkbenchError
from workbench.training.checkpoints import Run

INPUTS = 25
"""Test inputs of each lookahead, unless another number is asked for."""
COLUMNS = ("variant", "lookahead", "n", "explained", "low", "high", "explained_strict", "strict_low", "strict_high")


def traces_of(
    run: Run,
    step: int | None = None,
    *,
    n: int = INPUTS,
    lookahead: int | None = None,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
) -> PathTraces:
    """Path merging on the first test inputs of one lookahead or of each, at one checkpoint.

    Args:
        run: on graph search.
        step: checkpoint; None is the last.
        n: how many of each lookahead.
        lookahead: None is every one that fits the prompts.
        seed: of the controls.
        on_progress: told the share that is done.

    Raises:
        WorkbenchError: the run learnt something else, or a lookahead or number of inputs that there is not.
    """
    task = search_task(run, "Path merging is traced in")
    if lookahead is not None and lookahead not in task.levels:
        raise WorkbenchError(
            f"Prompts of size {task.size} have lookaheads 0 to {task.levels[-1]}, got {lookahead}. Choose one."
        )
    if not 1 <= n <= task.test_size:
        raise WorkbenchError(f"Each lookahead has 1 to {task.test_size} test inputs, got {n}. Choose fewer.")
    prompts = []
    for each in task.levels if lookahead is None else (lookahead,):
        tokens = task.examples(f"test_{each}").tokens[:n]
        prompts += [(each, SearchPrompt.read(row, task.layout)) for row in tokens]
    first = run.checkpoints[0].step
    if first != 0:
        raise WorkbenchError(
            f"The control before training needs the checkpoint of step 0; the first of {run.reference!r} is {first}."
        )
    return trace_inputs(run.model(step), run.model(first), prompts, seed=seed, on_progress=on_progress)


def trace_of(run: Run, step: int | None = None, *, graph: str) -> PathTrace:
    """Path merging on one graph of a person's own, without controls.

    Args:
        run: on graph search.
        step: checkpoint; None is the last.
        graph: edges, start and goal as one types them: `1>2 2>3 1>4 Q 1 3`.

    Raises:
        WorkbenchError: the run learnt something else, or the graph cannot be asked about.
    """
    task = search_task(run, "Path merging is traced in")
    prompt = SearchPrompt.read(task.prompt(graph).tokens[0], task.layout)
    return trace_paths(run.model(step), prompt)


def printed_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of explained shares as they are printed: by variant, the lookaheads that are judged last."""
    rows = [
        {
            **row,
            "lookahead": f"{JUDGED}+" if row["lookahead"] is None else str(row["lookahead"]),
            **{end: row[f"explained_{end}"] for end in ("low", "high")},
            **{f"strict_{end}": row[f"explained_strict_{end}"] for end in ("low", "high")},
        }
        for row in content["rows"]
    ]
    order = list(dict.fromkeys(row["variant"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["variant"]), row["lookahead"].endswith("+"), row["lookahead"]))
