"""What is said of a run that learnt a Transformer Program."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.intervals import answer_scores, columns_of
from workbench.models.program_config import ProgramConfig
from workbench.runtime import WorkbenchError, nearest
from workbench.tasks.base import Batch, Task
from workbench.tasks.entities import entity_scores
from workbench.tasks.sequences import LARGEST_DOMAIN, Sequences
from workbench.tasks.words import Words
from workbench.training.checkpoints import Run, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from circuits.decompile.decompiled import Decompiled, ReadOff
    from circuits.decompile.forms import Form
    from circuits.decompile.proof import Proof
    from workbench.models.known import KnownCircuit

PASS = 1024
"""Prompts of a pass."""
FORMS_BY_SUFFIX: dict[str, Form] = {".py": "python", ".rasp": "rasp", ".dot": "graph"}


def by_answer(run: Run) -> dict[str, Any]:
    """The discretised model's accuracy by token and by sequence on the test split, with intervals and n.

    Of names in text, how many whole ones are found, too; of all text, what its words say without a program. Empty of a
    run of another model.
    """
    if not isinstance(run.recipe.model, ProgramConfig):
        return {}
    model, test = run.program(), run.task.examples("test")
    said = torch.cat([model.forward(part).argmax(2) for part in test.tokens.split(PASS)])
    return {**_scores(run.task, said, test), "n": len(test), **_baselines(run.task, test)}


def _scores(task: Task, said: Tensor, batch: Batch) -> dict[str, float | None]:
    token, sequence = answer_scores(said == batch.targets, batch.read)
    found = {**columns_of("token_accuracy", token), **columns_of("sequence_accuracy", sequence)}
    if isinstance(task, Words) and task.corpus.each:
        names = entity_scores(said, batch.targets, batch.read, task.corpus.labels)
        found |= {
            key: value for name, each in names.items() for key, value in columns_of(f"names_{name}", each).items()
        }
    return found


def _baselines(task: Task, batch: Batch) -> dict[str, float | None]:
    if not isinstance(task, Words):
        return {}
    from workbench.tasks.word_baselines import logistic, majority

    return {
        f"{baseline.__name__}_{key}": value
        for baseline in (majority, logistic)
        for key, value in _scores(task, baseline(task, batch), batch).items()
    }


def sequences_of(run: Run) -> Sequences:
    """The run's task, where programs are read on it.

    Raises:
        WorkbenchError: it is another.
    """
    if not isinstance(run.task, Sequences):
        raise WorkbenchError(f"Programs are read on sequences; {run.reference!r} learnt {run.task.name!r}.")
    return run.task


def known_circuit(name: str, *, runs: Path | None) -> KnownCircuit:
    """A circuit of the score card's set, or that of a run which learnt a Transformer Program.

    Raises:
        WorkbenchError: it is neither.
    """
    from circuits.truths import SET, load_known

    if name in SET:
        return load_known(name)
    try:
        run = load(name, runs=runs)
    except WorkbenchError as error:
        raise WorkbenchError(f"{error} Of the known circuits: {nearest(name, SET)}") from error
    from circuits.decompile.known import known_program

    return known_program(run.program(), sequences_of(run), name=run.reference)


def form_of(file: Path, *, fast: bool) -> Form:
    """The form of a program that a file is to hold, by its ending.

    Raises:
        WorkbenchError: there is none of that ending, or none of it is fast.
    """
    if file.suffix not in FORMS_BY_SUFFIX:
        known = ", ".join(FORMS_BY_SUFFIX)
        raise WorkbenchError(f"A program is written to a file that ends in one of {known}, got {str(file)!r}.")
    if not fast:
        return FORMS_BY_SUFFIX[file.suffix]
    if file.suffix != ".py":
        raise WorkbenchError(f"Only a module can be fast: give a file that ends in .py, got {str(file)!r}.")
    return "fast"


def decompile_run(run: Run, step: int | None, *, budget: float, most: int = LARGEST_DOMAIN) -> Decompiled:
    """The run's program as a module, at a step or at the end, checked on so many sequences.

    Raises:
        WorkbenchError: the run learnt a transformer, or another task.
    """
    from circuits.decompile.decompiled import decompile

    return decompile(run.program(step), sequences_of(run), budget=budget, most=most)


def read_off_run(run: Run, step: int | None, *, most: int) -> ReadOff:
    """The run's program at a step or at the end, from which modules of several budgets are made.

    Raises:
        WorkbenchError: the run learnt a transformer, or another task.
    """
    from circuits.decompile.decompiled import read_off

    return read_off(run.program(step), sequences_of(run), most=most)


def prove_run(
    run: Run,
    step: int | None,
    *,
    longest: int | None = None,
    timeout: float = 60.0,
    on_progress: Callable[[float, str], None] | None = None,
) -> Proof:
    """The run's program against its task's definition, on all sequences of each length.

    Raises:
        WorkbenchError: the run learnt a transformer, or another task; the solver is not installed.
    """
    if find_spec("z3") is None:
        raise WorkbenchError("Proofs need the solver Z3: pip install 'interp-workbench[prove]'.")
    from circuits.decompile.proof import prove

    task, model = sequences_of(run), run.program(step)
    program = model.discrete_program(tuple(task.vocab))
    return prove(program, task, longest=longest, timeout=timeout, provenance=model.provenance, on_progress=on_progress)
