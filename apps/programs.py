"""What is said of a run that learnt a Transformer Program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.intervals import answer_scores, columns_of
from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.sequences import LARGEST_DOMAIN, Sequences
from workbench.training.checkpoints import Run

if TYPE_CHECKING:
    from circuits.decompile.decompiled import Decompiled


def by_answer(run: Run) -> dict[str, Any]:
    """The discretised model's accuracy by token and by sequence on the test split, with intervals and n.

    Empty of a run of another model.
    """
    if not isinstance(run.recipe.model, ProgramConfig):
        return {}
    test = run.task.examples("test")
    right = run.program().forward(test.tokens).argmax(2) == test.targets
    token, sequence = answer_scores(right, test.read)
    return {**columns_of("token_accuracy", token), **columns_of("sequence_accuracy", sequence), "n": len(test)}


def sequences_of(run: Run) -> Sequences:
    """The run's task, where programs are read on it.

    Raises:
        WorkbenchError: it is another.
    """
    if not isinstance(run.task, Sequences):
        raise WorkbenchError(f"Programs are read on sequences; {run.reference!r} learnt {run.task.name!r}.")
    return run.task


def decompile_run(run: Run, step: int | None, *, budget: float, most: int = LARGEST_DOMAIN) -> Decompiled:
    """The run's program as a module, at a step or at the end, checked on so many sequences.

    Raises:
        WorkbenchError: the run learnt a transformer, or another task.
    """
    from circuits.decompile.decompiled import decompile

    return decompile(run.program(step), sequences_of(run), budget=budget, most=most)
