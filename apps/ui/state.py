"""What the pages share: the run that is looked at, its models, and the few things that every page offers.

What a page remembers stands in the URL: widgets are bound to it, so that a link brings back what was seen. What was
computed is cached by keys alone, the SHA-256 of a checkpoint among them: a cache can then never answer for weights that
have changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import streamlit as st

from workbench.models.transformer import Transformer
from workbench.runtime import WorkbenchError
from workbench.store import find_run, gallery_names, run_names
from workbench.tables import Table
from workbench.training.checkpoints import METRICS, Run, load

FIRST_CHOICE = "gallery:modular"
MODELS = 16
"""Models kept in memory."""


@contextlib.contextmanager
def user_errors_shown() -> Iterator[None]:
    """Show what its user can mend as one line; anything else is ours and goes on."""
    try:
        yield
    except WorkbenchError as error:
        st.error(" ".join(str(error).split()))


def references() -> list[str]:
    """All runs: the gallery's, then the user's own, newest first."""
    gallery = [f"gallery:{name}" for name in gallery_names()]
    gallery.sort(key=lambda reference: reference != FIRST_CHOICE)
    return [*gallery, *reversed(run_names())]


def choose_run(first: str | None = None) -> Run:
    """The run chosen in the sidebar, which `?run=` in the URL names; without any run the page ends here.

    Args:
        first: the run that is shown as long as none was chosen; None is the first of all.
    """
    return open_run(choose_reference(first))


def choose_reference(first: str | None = None, *, more: Sequence[str] = ()) -> str:
    """The name that is chosen: of a run, or of something else that a page can show.

    Args:
        first: as for `choose_run`.
        more: names to choose from beside those of the runs.
    """
    known = sorted([*references(), *more], key=lambda reference: reference != first)
    if not known:
        missing("There are no runs yet. Train one on the page Train, or with `workbench train modular-smoke`.")
        st.stop()
    wanted = st.session_state.get("run", st.query_params.get("run", known[0]))
    if wanted not in known:
        st.warning(f"There is no run {wanted!r} any more; this is {known[0]!r}. Choose another in the sidebar.")
        st.session_state.pop("run", None)
    _carry("run", known)
    reference = st.sidebar.selectbox("Run", known, key="run", bind="query-params")
    _remember("run", reference)
    return reference


def choose_step(run: Run) -> int:
    """The checkpoint chosen by a slider, which `?step=` in the URL names; the last one to begin with."""
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    last = run.checkpoint().step
    if len(steps) == 1:
        st.caption(f"One checkpoint, at step {last}.")
        return last
    _carry("step", steps)
    step = st.select_slider("Checkpoint (step)", steps, value=last, key="step", bind="query-params")
    _remember("step", step)
    return step


def open_run(reference: str) -> Run:
    """The run of that name, as its files are now.

    Raises:
        WorkbenchError: there is none.
    """
    folder = find_run(reference)
    return _opened(reference, str(folder.path.resolve()), fingerprint(folder.path))


def fingerprint(path: Path) -> tuple[int, ...]:
    """Changes whenever a run's recipe, log, measures, status or list of checkpoints does."""
    names = ("recipe.json", METRICS, "measures.jsonl", "status.json", "checkpoints")
    files = [path / name for name in names]
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def model_at(run: Run, step: int | None = None) -> Transformer:
    """The model at a step, or at the end, kept in memory by the hash of its weights."""
    checkpoint = run.checkpoint(step)
    return _model(run.reference, checkpoint.step, checkpoint.sha256)


def unseen_split(run: Run) -> str:
    """The split that pairs are drawn from: what training did not see, where there is any."""
    return "test" if "test" in run.task.splits else run.task.splits[-1]


def pair_count(run: Run, most: int) -> int:
    """As many pairs as that split has, up to `most`."""
    examples = run.task.examples(unseen_split(run))
    # Most prompts have a counterfactual: of a large split a few are enough to know.
    if len(run.task.contrast(examples.select(slice(2 * most)))) >= most:
        return most
    return min(most, len(run.task.contrast(examples)))


def copy_as_python(code: str) -> None:
    """Offer the code that computes what the page shows."""
    with st.expander("Copy as Python"):
        st.code(code.strip(), language="python")


def download(table: Table, *, key: str) -> None:
    """Offer a table as CSV and its figure as a page of HTML that opens offline."""
    from workbench.figures import figure

    left, right = st.columns(2)
    left.download_button(
        "Table",
        table.csv,
        f"{table.name}.csv",
        "text/csv",
        key=f"{key}_csv",
        help="As CSV",
        icon=":material/download:",
        on_click="ignore",
        width="stretch",
    )
    right.download_button(
        "Figure",
        lambda: figure(table).to_html(include_plotlyjs=True),
        f"{table.name}.html",
        "text/html",
        key=f"{key}_html",
        help="As a page of HTML that opens offline",
        icon=":material/download:",
        on_click="ignore",
        width="stretch",
    )


def missing(text: str) -> None:
    """Say what is not there and what to do about it."""
    st.info(text, icon=":material/info:")


def _carry(key: str, options: Sequence[object]) -> None:
    """Set a widget as it was on the page before, which Streamlit forgets; what this page's URL says comes first."""
    value, page = st.session_state.get(f"carried_{key}", (None, None))
    if page != _page() and value in options and key not in st.query_params:
        # The widget reads the one and leaves the other as it is until it is moved.
        st.session_state[key] = value
        st.query_params[key] = str(value)


def _remember(key: str, value: object) -> None:
    st.session_state[f"carried_{key}"] = (value, _page())


def _page() -> str:
    """Path of the page that is shown."""
    return urlsplit(st.context.url or "").path


def references_where(fits: Callable[[Run], bool]) -> list[str]:
    """The runs of which something holds, in the order of all."""
    found = []
    for reference in references():
        try:
            run = open_run(reference)
        except WorkbenchError:
            # Not a run any more; the page Runs says what it lacks.
            continue
        if fits(run):
            found.append(reference)
    return found


@st.cache_resource(max_entries=32, show_spinner=False)
def _opened(reference: str, path: str, files: tuple[int, ...]) -> Run:
    # The path tells two runs folders apart, the files an earlier state of the same run.
    return load(reference)


@st.cache_resource(max_entries=MODELS, show_spinner=False)
def _model(reference: str, step: int, sha256: str) -> Transformer:
    return open_run(reference).model(step)
