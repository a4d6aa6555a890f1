"""A circuit as a file: what the page Circuit gives away, and what somebody brings to compare with."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import streamlit as st

from apps.ui.circuit_questions import FEW, KEPT, Question, found
from circuits.circuit import Circuit, Terms
from circuits.exchange import Foreign, load_circuit, save_circuit
from workbench.models.known import Ablation
from workbench.runtime import WorkbenchError


@st.cache_data(max_entries=KEPT, show_spinner=False)
def exported(question: Question, size: int | None, suffix: str) -> bytes:
    """The circuit as a file.

    Raises:
        WorkbenchError: the format cannot hold it.
    """
    held = found(question)
    assert held is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"circuit{suffix}"
        save_circuit(path, held.at(size))
        return path.read_bytes()


def names_its_terms(name: str, content: bytes) -> bool:
    """Whether a circuit's file is the workbench's own, which says under what its numbers hold."""
    if name.endswith(".pt"):
        return False
    try:
        return "format" in json.loads(content)
    except (ValueError, TypeError):
        # What is wrong with it is said where it is read.
        return True


@st.cache_resource(max_entries=FEW, show_spinner=False)
def uploaded(question: Question, name: str, content: bytes, terms: tuple[Ablation, str] | None) -> Circuit:
    """The circuit in a file that somebody brought.

    Args:
        question: about whose graph it must be.
        name: the file's.
        content: the file's.
        terms: ablation and metric under which it holds, where it does not say so itself.

    Raises:
        WorkbenchError: it is damaged, or belongs to another graph.
    """
    held = found(question)
    assert held is not None
    foreign = None
    if terms is not None:
        mine = held.circuit.terms
        own = Terms(ablation=terms[0], metric=terms[1], unit=mine.unit, better=mine.better, n=0)
        # Which edges it keeps is all that is read of it.
        foreign = Foreign(terms=own, change_of=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(content)
        try:
            return load_circuit(path, held.circuit.graph, foreign=foreign)
        except WorkbenchError as error:
            raise WorkbenchError(str(error).replace(f"{folder}/", "")) from error
