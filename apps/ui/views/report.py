"""Page Report: what a run's report holds, built as a process of its own, read here and taken away."""

from __future__ import annotations

import io
import shlex
import time
import zipfile
from pathlib import Path

import streamlit as st
from streamlit.components.v2.types import ComponentRenderer

from apps.report import PAGE
from apps.ui import jobs, state
from apps.ui.jobs import Job
from apps.ui.views.train import clock
from workbench.store import runs_root
from workbench.training.text_donors import donor_names

REPORTS = ".reports"
WATCH_SECONDS = 2
PREVIEW_HEIGHT = 900
PREVIEW = """
export default function ({ parentElement, data }) {
  let frame = parentElement.querySelector("iframe");
  if (!frame) {
    frame = document.createElement("iframe");
    frame.sandbox = "allow-scripts";
    frame.style = "box-sizing: border-box; width: 100%; height: 100%; border: 1px solid #d9dde2; border-radius: 8px";
    parentElement.appendChild(frame);
  }
  frame.title = data.title;
  if (frame.srcdoc !== data.page) frame.srcdoc = data.page;
}
"""
HOLDS = """
- **One page of HTML** that opens offline, with every figure and what it shows
- every **figure** as HTML and, with kaleido and a Chromium, as SVG; every **table** as CSV and LaTeX
- **BibTeX** of the methods used
- **manifest.json**: recipe, seeds, versions, hashes and commands; `workbench rerun` builds the report again from it
"""


def page() -> None:
    """The page."""
    st.title("Report")
    reference = state.choose_reference(more=donor_names())
    out = report_folder(reference)
    arguments = ["report", reference, "--out", str(out)]
    built = next((job for job in jobs.list_jobs(kind="report") if job.subject == reference), None)
    running = built is not None and built.running
    st.markdown(f"The report of **{reference}** holds:\n{HOLDS}")
    label = "Build again" if (out / PAGE).is_file() else "Build"
    if st.button(label, type="primary", disabled=running, icon=":material/description:"):
        jobs.start([*arguments, "--json"], subject=reference)
        st.rerun()
    if built is not None:
        st.session_state["report_runs"] = running
        st.fragment(_watch, run_every=WATCH_SECONDS if running else None)(built.id)
    if not running and (out / PAGE).is_file():
        _built(reference, out)
    state.copy_as_python(
        f"from pathlib import Path\n\nfrom apps.report import report\n\nreport({reference!r}, Path('report'))"
    )
    st.caption(f"As a command: `workbench {shlex.join(arguments)}`")


def _watch(job_id: str) -> None:
    """How the building goes; runs again by itself while it does."""
    job = jobs.find_job(job_id)
    if job.running != st.session_state["report_runs"]:
        # The whole page: the report can be shown now.
        st.rerun()
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        _state_of(job)


def _state_of(job: Job) -> None:
    status = job.status
    match status:
        case "running" | "stopping":
            st.spinner(show_time=False)
            st.markdown(f"Building, for {clock(job.seconds)}. {job.tail(1)}")
            label = "Cancel" if status == "running" else "Stop at once"
            st.button(label, key="cancel_report", on_click=job.cancel)
        case "finished":
            st.markdown(f"Built in {clock(job.seconds)}, {ago(time.time() - job.started - job.seconds)}. {counts(job)}")
        case "cancelled":
            st.markdown("Cancelled. Nothing of an earlier report was touched.")
        case _:
            st.error(job.tail(1) or "It vanished without a word: it was killed, or the machine was restarted.")


def _built(reference: str, out: Path) -> None:
    name = out.name
    with st.container(horizontal=True):
        st.download_button("Page (HTML)", (out / PAGE).read_bytes, f"{name}.html", "text/html", on_click="ignore")
        st.download_button("Everything (ZIP)", lambda: zipped(out), f"{name}.zip", "application/zip", on_click="ignore")
    page = (out / PAGE).read_text()
    _preview()(key="preview", data={"page": page, "title": f"Report of {reference}"}, height=PREVIEW_HEIGHT)


@st.cache_resource(show_spinner=False)
def _preview() -> ComponentRenderer:
    """A frame of its own for the report, which may run its scripts there and reach nothing outside.

    Streamlit's own frame would give it the rights of this app.
    """
    return st.components.v2.component("report_preview", js=PREVIEW)


def report_folder(reference: str) -> Path:
    """Where the page has a report written."""
    return runs_root().resolve() / REPORTS / reference.replace(":", "_")


def counts(job: Job) -> str:
    """What a job says that it wrote."""
    written = job.result
    if written is None:
        return ""
    lacking = written["static_figures_missing"]
    static = f"no SVG: {lacking}" if lacking else f"{written['static_figures']} of them also as SVG"
    return f"{written['figures']} figures ({static}), {written['tables']} tables."


def zipped(folder: Path) -> bytes:
    """Every file of a folder, under the folder's name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, Path(folder.name) / path.relative_to(folder))
    return content.getvalue()


def ago(seconds: float) -> str:
    """A moment as a person says it."""
    return "just now" if seconds < 60 else f"{clock(seconds)} ago"
