"""How a job that a panel waits for stands: its progress, a button that cancels it, and the page again once it ends."""

from __future__ import annotations

import re

import streamlit as st

from apps.ui import jobs
from apps.ui.jobs import Job
from apps.ui.views.train import clock

WATCH_SECONDS = 1
SHARE = re.compile(r"(\d+) ?%")


def follow(job: Job, doing: str, *, key: str) -> None:
    """Show how the job stands; runs again by itself while it goes on.

    Args:
        job: the one that makes what the panel shows.
        doing: what it does, in words.
        key: tells it from other jobs on the page.
    """
    st.session_state[f"{key}_runs"] = job.running
    st.fragment(_watch, run_every=WATCH_SECONDS if job.running else None)(job.id, doing, key)


def share_of(told: str) -> float | None:
    """The share of the work that is done, as a job last told it."""
    shares = SHARE.findall(told)
    return min(1.0, int(shares[-1]) / 100) if shares else None


def _watch(job_id: str, doing: str, key: str) -> None:
    job = jobs.find_job(job_id)
    if job.running != st.session_state[f"{key}_runs"]:
        # The whole page: what was waited for can be shown now.
        st.rerun()
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        _state_of(job, doing, key)


def _state_of(job: Job, doing: str, key: str) -> None:
    status = job.status
    match status:
        case "running" | "stopping":
            said = f"{doing}, for {clock(job.seconds)}."
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
