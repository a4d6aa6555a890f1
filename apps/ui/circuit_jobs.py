"""Looking for a circuit: the kept one at once, else a job that is started, watched and cancelled on the page."""

from __future__ import annotations

import re

import streamlit as st

from apps.ui import circuit_questions, jobs, state
from apps.ui.circuit_questions import Found, Question
from apps.ui.jobs import Job
from apps.ui.views.train import clock

WATCH_SECONDS = 1
SMALL = 1_000
"""Up to this many edges a circuit is looked for without being asked: it takes seconds."""
SHARE = re.compile(r"(\d+) ?%")


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
        st.session_state[f"{key}_runs"] = job.running
        st.fragment(_watch, run_every=WATCH_SECONDS if job.running else None)(job.id, question, key)
    if job is None or not job.running:
        label = "Find the circuit" if job is None else "Look for it again"
        st.button(label, key=f"{key}_find", type="primary", on_click=_start, args=(question,))
    return None


def share_of(told: str) -> float | None:
    """The share of the work that is done, as a job last told it."""
    shares = SHARE.findall(told)
    return min(1.0, int(shares[-1]) / 100) if shares else None


def _start(question: Question) -> Job:
    return jobs.start(question.command, subject=question.reference)


def _watch(job_id: str, question: Question, key: str) -> None:
    """How the job stands; runs again by itself while it goes on."""
    job = jobs.find_job(job_id)
    if job.running != st.session_state[f"{key}_runs"]:
        # The whole page: the circuit can be shown now.
        st.rerun()
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        _state_of(job, question, key)


def _state_of(job: Job, question: Question, key: str) -> None:
    status = job.status
    match status:
        case "running" | "stopping":
            said = f"Looking for the circuit of step {question.step} by {question.method}, for {clock(job.seconds)}."
            share = share_of(job.tail(1))
            if share is None:
                st.markdown(f":material/hourglass_top: {said}")
            else:
                st.progress(share, said)
            label = "Cancel" if status == "running" else "Stop at once"
            st.button(label, key=f"{key}_cancel", on_click=job.cancel)
        case "finished":
            st.warning("Its result is gone. It was deleted, or another version of the workbench made it.")
        case "cancelled":
            st.markdown("Cancelled.")
        case _:
            st.error(job.tail(1) or "It vanished without a word: it was killed, or the machine was restarted.")
