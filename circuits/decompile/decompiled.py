"""From a Transformer Program to a module that is proven to say the same, and what each saving cost."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pandas as pd
import torch

from circuits.decompile.python import Interface, emit_python
from circuits.decompile.ranges import find_ranges
from circuits.decompile.simplify import Step, find_live, prune_votes
from workbench.intervals import Estimate, answer_scores, columns_of
from workbench.models.discrete import DiscreteProgram
from workbench.models.interpreter import program_logits
from workbench.models.program import TransformerProgram
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.sequences import BEGIN, END, LARGEST_DOMAIN, Sequences

AT_ONCE = 4096
Run = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decompiled:
    """A module, and how it was checked."""

    text: str
    """Python."""
    lines: int
    lines_unsimplified: int
    """Of the module from which no accuracy was lost."""
    literals: int
    """Strings and numbers that the module spells out."""
    accuracy: Estimate
    """Share of the right answers on the test split, with its bootstrap interval over sequences."""
    sequence_accuracy: Estimate
    """Share of the test sequences whose answers are all right, with Wilson's interval."""
    agreement: float
    """Share of answers that are the model's, on the sequences that were checked."""
    checked: int
    """Sequences on which the module was found to answer like the program that it was written from."""
    exhaustive: bool
    """Whether these are all there are."""
    domain_accuracy: float | None
    """Share of the right answers on all sequences there are; None where these were not checked."""
    frontier: pd.DataFrame
    """Accuracy on the validation split by how many variables' votes were left out."""
    n: int
    """Test sequences."""
    provenance: Provenance

    def tables(self) -> Sequence[Table]:
        """The frontier."""
        return [
            Table(
                name="decompile_frontier",
                frame=self.frontier,
                kind="table",
                axes={},
                unit="fraction",
                caption=(
                    "Accuracy on the validation split after each variable whose votes were replaced by their mean, "
                    "the least missed first. Empty where no accuracy was to be lost."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """Everything but the text, as one JSON object."""
        scores = {
            **columns_of("accuracy", self.accuracy),
            **columns_of("sequence_accuracy", self.sequence_accuracy),
            "n": self.n,
        }
        sizes = {name: getattr(self, name) for name in ("lines", "lines_unsimplified", "literals")}
        proof = {name: getattr(self, name) for name in ("agreement", "exhaustive", "checked", "domain_accuracy")}
        return {**sizes, **scores, **proof}


def decompile(
    model: TransformerProgram, task: Sequences, *, budget: float = 0.0, most: int = LARGEST_DOMAIN
) -> Decompiled:
    """The module of a trained program, checked on every sequence where these are listed, else on the training split.

    Args:
        model: the trained Transformer Program.
        task: what it was trained on.
        budget: accuracy on the validation split that may be lost to a shorter module; 0 changes no answer at all.
        most: sequences that it is checked on, at random where there are more.

    Raises:
        WorkbenchError: a budget outside 0 to 1, or a module that answers differently from its program: the votes of
            two words are too close for a sum in another order.
    """
    if not 0 <= budget < 1:
        raise WorkbenchError(f"A budget is accuracy that may be lost, at least 0 and below 1, got {budget}.")
    whole = model.discrete_program(tuple(task.vocab))
    program, steps = whole, ()
    if budget:
        val = task.examples("val")
        program, steps = prune_votes(whole, val.tokens.numpy(), val.targets.numpy(), val.read.numpy(), budget=budget)
    text = _module(program, task)
    plain = text if program is whole else _module(whole, task)
    batch, exhaustive = _sequences(task, most)
    said = _answers_of(program, batch)
    whole_said = said if program is whole else _answers_of(whole, batch)
    _check(text, task, batch, said)
    read, test = batch.read.numpy(), task.examples("test")
    right = torch.from_numpy(_answers_of(program, test)) == test.targets
    accuracy, sequence_accuracy = answer_scores(right, test.read)
    return Decompiled(
        text=text,
        lines=len(text.splitlines()),
        lines_unsimplified=len(plain.splitlines()),
        literals=sum(isinstance(node, ast.Constant) for node in ast.walk(ast.parse(text))),
        accuracy=accuracy,
        sequence_accuracy=sequence_accuracy,
        agreement=float((said == whole_said)[read].mean()),
        checked=len(batch),
        exhaustive=exhaustive,
        domain_accuracy=float((said == batch.targets.numpy())[read].mean()) if exhaustive else None,
        frontier=_frontier(steps),
        n=len(test),
        provenance=model.provenance,
    )


def load_module(text: str) -> Run:
    """The function `run` of a module's text."""
    module = ModuleType("decompiled")
    exec(compile(text, "decompiled.py", "exec"), module.__dict__)  # noqa: S102 - it is what was written above
    return module.run


def _module(program: DiscreteProgram, task: Sequences) -> str:
    ranges = find_ranges(program, range(len(task.inputs)))
    interface = Interface(
        title=f"{task.function} of up to {task.longest} letters, as a program that was learnt.",
        letters=task.letters,
        begin=task.inputs.index(BEGIN),
        end=task.inputs.index(END) if END in task.inputs else None,
        longest=task.longest,
    )
    return emit_python(program, ranges, find_live(program, ranges), interface)


def _sequences(task: Sequences, most: int) -> tuple[Batch, bool]:
    """The whole domain where it is listed, else the training split, and whether it is all there is."""
    try:
        found, whole = task.examples("domain"), True
    except WorkbenchError:
        found, whole = task.examples("train"), False
    if len(found) <= most:
        return found, whole
    return found.select(torch.randperm(len(found), generator=generator(0, "decompile"))[:most].sort().values), False


def _answers_of(program: DiscreteProgram, batch: Batch) -> np.ndarray:
    tokens = batch.tokens.numpy()
    parts = [program_logits(program, tokens[at : at + AT_ONCE]).argmax(2) for at in range(0, len(tokens), AT_ONCE)]
    return np.concatenate(parts)


def _check(text: str, task: Sequences, batch: Batch, said: np.ndarray) -> None:
    run = load_module(text)
    vocab = list(task.vocab)
    for tokens, words in zip(batch.tokens.tolist(), said.tolist(), strict=True):
        letters = [vocab[token] for token in tokens if token < task.letters]
        wanted = [vocab[word] for word in words[1 : 1 + len(letters)]]
        if (found := run(letters)) != wanted:
            raise WorkbenchError(
                f"The module is not the program: for {' '.join(letters)!r} it says {' '.join(found)!r}, "
                f"the program {' '.join(wanted)!r}."
            )


def _frontier(steps: Sequence[Step]) -> pd.DataFrame:
    rows = [
        {"left out": count, "variable": step.variable, "accuracy": step.accuracy} for count, step in enumerate(steps, 1)
    ]
    return pd.DataFrame(rows, columns=["left out", "variable", "accuracy"])
