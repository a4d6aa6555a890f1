"""Looking for a circuit: the kept one at once, else a job that is started, watched and cancelled on the page."""

from __future__ import annotations

import streamlit as st

from apps.ui import circuit_questions, job_panels, jobs, state
from apps.ui.circuit_questions import Found, Question
from apps.ui.jobs import Job

SMALL = 1_000
"""Up to this many edges a circuit is looked for without being asked: it takes seconds."""


def obtain(question: Question, *, key: str) -> Found | None:
    """The circuit; None while it is not there, and then the page says how that stands.

    Args:
        question: which.
        key: tells this from other circuits on the page.
    """
    held = circuit_questions.found(question)
    if held is not None:
        return held
    n_edges = circuit_questions.edge_count(question)
    job = circuit_questions.job_of(question)
    if job is None and n_edges <= SMALL:
        job = _start(question)
    if job is None:
        state.missing(f"This model has {n_edges} edges: finding a circuit may take minutes. It runs in the background.")
    else:
        job_panels.follow(job, f"Looking for the circuit of step {question.step} by {question.method}", key=key)
    if job is None or not job.running:
        label = "Find the circuit" if job is None else "Look for it again"
        st.button(label, key=f"{key}_find", type="primary", on_click=_start, args=(question,))
    return None


def _start(question: Question) -> Job:
    return jobs.start(question.command, subject=question.reference)
