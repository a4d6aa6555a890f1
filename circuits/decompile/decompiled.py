"""From a Transformer Program to a module that is proven to say the same, and what each saving cost."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pandas as pd
import torch

from circuits.decompile.forms import Form, write_forms
from circuits.decompile.ranges import Ranges, find_ranges, observed_ranges
from circuits.decompile.simplify import find_live
from circuits.decompile.trees import plant_trees
from circuits.decompile.votes import Step, ballots, logits_of, prune_votes, round_votes
from workbench.intervals import Estimate, answer_scores, columns_of
from workbench.models.discrete import DiscreteProgram, NumericalMLP
from workbench.models.interpreter import program_logits
from workbench.models.program import TransformerProgram
from workbench.runtime import WorkbenchError, generator
from workbench.store import Provenance
from workbench.tables import Table
from workbench.tasks.base import Batch
from workbench.tasks.sequences import LARGEST_DOMAIN, Sequences

AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decompiled:
    """A module, and how it was checked."""

    forms: Mapping[Form, str]
    """Its text as readable Python, as fast Python, in RASP and as a graph of what is made of what."""
    exact: Mapping[Form, str]
    """The same of the program from which no accuracy was lost."""
    lines: int
    """Of the readable module."""
    lines_unsimplified: int
    """Of the readable module from which no accuracy was lost."""
    literals: int
    """Strings and numbers that the readable module spells out."""
    accuracy: Estimate
    """Share of the right answers on the test split, with its bootstrap interval over sequences."""
    sequence_accuracy: Estimate
    """Share of the test sequences whose answers are all right, with Wilson's interval."""
    agreement: float
    """Share of the module's answers that are the model's own, on the sequences that were checked."""
    checked: int
    """Sequences on which both modules were found to answer like the program that they were written from."""
    exhaustive: bool
    """Whether these are all there are."""
    domain_accuracy: float | None
    """Share of the right answers on all sequences there are; None where these are not listed."""
    frontier: pd.DataFrame
    """Accuracy on training and validation by how many variables' votes were left out."""
    n: int
    """Test sequences."""
    provenance: Provenance

    @property
    def text(self) -> str:
        """The readable module."""
        return self.forms["python"]

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
                    "Accuracy on training and validation after each variable whose votes were replaced by their mean, "
                    "the least missed first. Empty where no accuracy was to be lost."
                ),
            )
        ]

    def summary(self) -> dict[str, object]:
        """Everything but the texts, as one JSON object."""
        scores = {
            **columns_of("accuracy", self.accuracy),
            **columns_of("sequence_accuracy", self.sequence_accuracy),
            "n": self.n,
        }
        sizes = {name: getattr(self, name) for name in ("lines", "lines_unsimplified", "literals")}
        proof = {name: getattr(self, name) for name in ("agreement", "exhaustive", "checked", "domain_accuracy")}
        return {**sizes, **scores, **proof}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadOff:
    """A program as it was read off a model, and what it is checked on."""

    task: Sequences
    program: DiscreteProgram
    ranges: Ranges
    forms: Mapping[Form, str]
    """Its texts."""
    batch: Batch
    """Every sequence there is, or the training split."""
    listed: bool
    """Whether it is every sequence."""
    checked: np.ndarray
    """Rows of the sequences that modules are run on."""
    said: np.ndarray
    """What the model says on these."""
    provenance: Provenance


def decompile(
    model: TransformerProgram, task: Sequences, *, budget: float = 0.0, most: int = LARGEST_DOMAIN
) -> Decompiled:
    """The module of a trained program, run on every sequence where these are listed, else on the training split.

    Args:
        model: the trained Transformer Program.
        task: what it was trained on.
        budget: accuracy on training and validation that may be lost to a shorter module; 0 changes no answer at all.
        most: sequences that the module is run on, at random where there are more.

    Raises:
        WorkbenchError: a budget outside 0 to 1, or a module that answers differently from its program: the votes of
            two words are too close for a sum in another order.
    """
    _check_budget(budget)
    return shorten(read_off(model, task, most=most), budget)


@torch.no_grad()
def read_off(model: TransformerProgram, task: Sequences, *, most: int = LARGEST_DOMAIN) -> ReadOff:
    """The model's program, from which nothing is left out: what modules of any budget are made of."""
    program = model.discrete_program(tuple(task.vocab))
    batch, listed = sequences(task)
    if listed:
        # Whole numbers add up exactly, in any order; that they change no answer is seen on every sequence.
        said = _answers_of(program, batch)
        program = round_votes(program, lambda rounded: _says(rounded, batch, said)) or program
    ranges = ranges_on(program, task, batch if listed else None)
    checked = torch.randperm(len(batch), generator=generator(0, "decompile"))[:most].sort().values
    tokens = batch.tokens[checked]
    return ReadOff(
        task=task,
        program=program,
        ranges=ranges,
        forms=write_forms(program, ranges, task),
        batch=batch,
        listed=listed,
        checked=checked.numpy(),
        said=torch.cat([model(part).argmax(2) for part in tokens.split(AT_ONCE)]).numpy(),
        provenance=model.provenance,
    )


def shorten(whole: ReadOff, budget: float) -> Decompiled:
    """The module within a budget, checked.

    Raises:
        WorkbenchError: as `decompile` does.
    """
    _check_budget(budget)
    task, batch = whole.task, whole.batch
    program, ranges, steps = _simplified(whole, budget) if budget else (whole.program, whole.ranges, [])
    forms = write_forms(program, ranges, task) if budget else whole.forms
    said = _answers_of(program, batch)
    checked = batch.select(torch.from_numpy(whole.checked))
    _check(forms, task, checked, said[whole.checked])
    test = task.examples("test")
    right = torch.from_numpy(_answers_of(program, test)) == test.targets
    accuracy, sequence_accuracy = answer_scores(right, test.read)
    domain = (said == batch.targets.numpy())[batch.read.numpy()]
    return Decompiled(
        forms=forms,
        exact=whole.forms,
        lines=len(forms["python"].splitlines()),
        lines_unsimplified=len(whole.forms["python"].splitlines()),
        literals=sum(isinstance(node, ast.Constant) for node in ast.walk(ast.parse(forms["python"]))),
        accuracy=accuracy,
        sequence_accuracy=sequence_accuracy,
        agreement=float((said[whole.checked] == whole.said)[checked.read.numpy()].mean()),
        checked=len(checked),
        exhaustive=whole.listed and len(checked) == len(batch),
        domain_accuracy=float(domain.mean()) if whole.listed else None,
        frontier=_frontier(steps),
        n=len(test),
        provenance=whole.provenance,
    )


def sequences(task: Sequences) -> tuple[Batch, bool]:
    """The whole domain and True where it is listed, else the training split and False."""
    try:
        return task.examples("domain"), True
    except WorkbenchError:
        return task.examples("train"), False


def ranges_on(program: DiscreteProgram, task: Sequences, domain: Batch | None) -> Ranges:
    """What occurs on the whole domain; where there is none, what the program's text admits."""
    if domain is None:
        return find_ranges(program, range(len(task.inputs)))
    return observed_ranges(program, _parts(domain))


def load_module(text: str) -> ModuleType:
    """The module of a text: its function `run`, and `run_all` where it is the fast one."""
    module = ModuleType("decompiled")
    exec(compile(text, "decompiled.py", "exec"), module.__dict__)  # noqa: S102 - it is what was written above
    return module


def _check_budget(budget: float) -> None:
    if not 0 <= budget < 1:
        raise WorkbenchError(f"A budget is accuracy that may be lost, at least 0 and below 1, got {budget}.")


def _simplified(whole: ReadOff, budget: float) -> tuple[DiscreteProgram, Ranges, list[Step]]:
    """The program with fewer votes, short trees for what cannot be listed, and coarser votes; and what occurs in it.

    All by its accuracy on what it was trained and chosen on.
    """
    task, program, ranges = whole.task, whole.program, whole.ranges
    splits = [task.examples(name) for name in ("train", "val")]
    arrays = [
        np.concatenate([getattr(each, name).numpy() for each in splits]) for name in ("tokens", "targets", "read")
    ]

    def right(each: DiscreteProgram) -> float:
        cast = ballots(each, *arrays)
        return cast.accuracy(logits_of(each, cast))

    cast = ballots(program, *arrays)
    lowest = cast.accuracy(logits_of(program, cast)) - budget
    program, steps = prune_votes(program, cast, lowest=lowest)
    live = find_live(program, ranges).categorical
    mlps = [
        part.does
        for part in program.parts
        if isinstance(part.does, NumericalMLP) and part.writes in live and ranges.pairs[part.name] is None
    ]
    if mlps:
        program = plant_trees(program, arrays[0], mlps, lambda each: right(each) >= lowest)
        cast = ballots(program, *arrays)
        ranges = ranges_on(program, task, whole.batch if whole.listed else None)
    rounded = round_votes(program, lambda each: cast.accuracy(logits_of(each, cast)) >= lowest)
    return rounded or program, ranges, steps


def _parts(batch: Batch) -> Iterator[np.ndarray]:
    tokens = batch.tokens.numpy()
    return (tokens[at : at + AT_ONCE] for at in range(0, len(tokens), AT_ONCE))


def _answers_of(program: DiscreteProgram, batch: Batch) -> np.ndarray:
    return np.concatenate([program_logits(program, part).argmax(2) for part in _parts(batch)])


def _says(program: DiscreteProgram, batch: Batch, said: np.ndarray) -> bool:
    """Whether the program gives these answers wherever they are read."""
    read = batch.read.numpy()
    for number, part in enumerate(_parts(batch)):
        rows = slice(number * AT_ONCE, (number + 1) * AT_ONCE)
        if ((program_logits(program, part).argmax(2) != said[rows]) & read[rows]).any():
            return False
    return True


def _check(forms: Mapping[Form, str], task: Sequences, batch: Batch, said: np.ndarray) -> None:
    """Run both modules on every sequence.

    Raises:
        WorkbenchError: one says something else than the program.
    """
    vocab = list(task.vocab)
    given = [[vocab[token] for token in tokens if token < task.letters] for tokens in batch.tokens.tolist()]
    wanted = [
        [vocab[word] for word in words[1 : 1 + len(letters)]]
        for letters, words in zip(given, said.tolist(), strict=True)
    ]
    run, run_all = load_module(forms["python"]).run, load_module(forms["fast"]).run_all
    for form, answers in (("readable", map(run, given)), ("fast", run_all(given))):
        for letters, words, found in zip(given, wanted, answers, strict=True):
            if found != words:
                raise WorkbenchError(
                    f"The {form} module is not the program: for {' '.join(letters)!r} it says {' '.join(found)!r}, "
                    f"the program {' '.join(words)!r}."
                )


def _frontier(steps: Sequence[Step]) -> pd.DataFrame:
    rows = [
        {"left out": count, "variable": step.variable, "accuracy": step.accuracy} for count, step in enumerate(steps, 1)
    ]
    return pd.DataFrame(rows, columns=["left out", "variable", "accuracy"])
