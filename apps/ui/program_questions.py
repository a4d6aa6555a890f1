"""What the page Program asks of a run: its module, the variables of a typed sequence, and what one of them causes."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st
import torch

from apps.programs import read_off_run, sequences_of
from apps.ui import state
from circuits.decompile.decompiled import Decompiled, ReadOff, shorten
from circuits.decompile.python import Names
from circuits.decompile.ranges import Ranges, find_ranges
from workbench.instrument.passes import run as run_model
from workbench.instrument.trace import Patch, Value
from workbench.models.discrete import DiscreteProgram
from workbench.models.interpreter import run_program
from workbench.models.program import TransformerProgram, variable_site
from workbench.models.program_config import ProgramConfig
from workbench.tasks.sequences import Sequences
from workbench.training.checkpoints import Run

CHECKED = 20_000
"""Sequences that a module is run on before it is shown: seconds. `workbench decompile` runs it on all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A program that the page shows."""

    run: Run
    task: Sequences
    model: TransformerProgram
    program: DiscreteProgram
    names: Names
    ranges: Ranges


def is_program(run: Run) -> bool:
    """Whether a run learnt a Transformer Program of sequences."""
    return isinstance(run.recipe.model, ProgramConfig) and isinstance(run.task, Sequences)


def open_program(run: Run, step: int) -> Opened:
    """The program at a step."""
    task, model = sequences_of(run), run.program(step)
    program = model.discrete_program(tuple(task.vocab))
    ranges = find_ranges(program, range(len(task.inputs)))
    return Opened(run=run, task=task, model=model, program=program, names=Names(program, ranges), ranges=ranges)


@st.cache_data(max_entries=32, show_spinner="Writing the module, and checking it …")
def module_of(reference: str, step: int, sha256: str, budget: float) -> Decompiled:
    """The run's module at a step; the hash stands for its weights."""
    return shorten(_read_off(reference, step, sha256), budget)


@st.cache_resource(max_entries=4, show_spinner="Reading the program off the model …")
def _read_off(reference: str, step: int, sha256: str) -> ReadOff:
    """What modules of every budget are made of."""
    return read_off_run(state.open_run(reference), step, most=CHECKED)


def variables(opened: Opened, text: str) -> pd.DataFrame:
    """Every variable at every position of a typed sequence, a row each."""
    tokens = _tokens(opened, text)
    categorical, numerical = run_program(opened.program, tokens.numpy())
    labels = [f"{place}: {opened.task.vocab[token]}" for place, token in enumerate(tokens[0].tolist())]
    rows = {
        name: [opened.names.value(place, int(value)).strip('"') for value in categorical[0, :, place]]
        for place, name in enumerate(opened.names.categorical)
    }
    rows |= {
        name: [str(value) for value in numerical[0, :, place]] for place, name in enumerate(opened.names.numerical)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(labels))


def answers(opened: Opened, text: str, change: tuple[int, int, int] | None = None) -> pd.DataFrame:
    """What the model says at each letter, beside what is right; with a variable changed at a position, beside that too.

    Args:
        opened: the program.
        text: the sequence.
        change: a categorical variable, a position, and the value that it is given there.
    """
    batch, tokens = opened.task.prompt(text), _tokens(opened, text)
    read = batch.read[0].nonzero()[:, 0]
    rows = {"right": batch.targets[0, read], "program": run_model(opened.model, tokens).logits[0, read].argmax(1)}
    if change is not None:
        variable, position, value = change
        one_hot = torch.eye(opened.model.config.cardinality, dtype=torch.float64)[value]
        site = variable_site(opened.model.config, variable)
        patch = Patch(site=site, source=Value(one_hot), positions=[position])
        rows["changed"] = run_model(opened.model, tokens, patches=[patch]).logits[0, read].argmax(1)
    words = {name: [opened.task.vocab[token] for token in found.tolist()] for name, found in rows.items()}
    letters = [f"{place}: {opened.task.vocab[int(tokens[0, place])]}" for place in read.tolist()]
    return pd.DataFrame.from_dict(words, orient="index", columns=pd.Index(letters))


def _tokens(opened: Opened, text: str) -> torch.Tensor:
    """The prompt without its padding."""
    tokens = opened.task.prompt(text).tokens
    return tokens[:, tokens[0] != opened.task.pad_token]
