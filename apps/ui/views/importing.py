"""Import: a model and counterfactual pairs of the user's own become a run, with the validator's findings beside it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import streamlit as st

from apps.ui import state
from apps.ui.links import link_to
from apps.ui.views.train import free_name
from workbench.runtime import WorkbenchError
from workbench.store import run_names

WEIGHTS = ("safetensors", "pt", "pth")
FILES = """
**Weights** are a state dict of the workbench's transformer or of a HookedTransformer, **configuration** is its fields
as JSON. **Pairs** have a header and a line for each pair; tokens are separated by spaces, and `answer` and `distractor`
are what should follow `clean` and `corrupt`:

    clean,corrupt,answer,distractor
    3 5 13,3 7 13,8,10
"""
NEXT_RUN = "next_run"
"""Where the run lies that the page chooses when it runs again."""
SOURCES = ("Upload files", "A path on this machine")


class Upload(Protocol):
    """A file that came through the browser."""

    name: str

    def getvalue(self) -> bytes:
        """Its content."""
        ...


def importing() -> None:
    """The tab."""
    st.markdown(
        "Bring a model that you trained elsewhere, and pairs of prompts that differ in one thing. Both are checked "
        "before anything is kept; then every page works on the run that they become."
    )
    with st.expander("What the files look like"):
        st.markdown(FILES)
    source = st.segmented_control("The model comes as", SOURCES, default=SOURCES[0], key="source", required=True)
    left, right = st.columns(2)
    with left:
        files, path = _model_inputs(source)
    with right:
        pairs = st.file_uploader(
            "Pairs (CSV or JSONL: clean, corrupt, answer, distractor)", ["csv", "jsonl"], key="pairs_file"
        )
        vocab = st.file_uploader("Vocabulary (one token a line; without it prompts are token ids)", key="vocab_file")
    default = free_name(proposed_name(files, path), run_names())
    name = st.text_input("Name of the run", value=default, key=f"import_name:{default}") or ""
    ready = pairs is not None and (bool(files) or bool(path))
    if st.button("Import", type="primary", disabled=not ready, help="Needs a model and pairs."):
        st.session_state.pop("imported", None)
        with state.user_errors_shown(), st.spinner("Reading, checking …"):
            with on_disk({"model": files, "pairs": [pairs], "vocab": [vocab] if vocab else []}) as saved:
                model = path or str(model_file(saved["model"]))
                st.session_state["imported"] = imported = _import(model, saved, name)
            # Once more from the top, where the new run can be chosen in the sidebar.
            st.session_state[NEXT_RUN] = imported["run"]
            st.rerun()
    if "imported" in st.session_state:
        _findings(st.session_state["imported"])
    _as_command(path or "MODEL", name)


def _model_inputs(source: str | None) -> tuple[Sequence[Upload], str]:
    if source == SOURCES[0]:
        label = "Weights (.safetensors or .pt) and their configuration (.json)"
        files = st.file_uploader(label, [*WEIGHTS, "json"], accept_multiple_files=True, key="model_files")
        return files or [], ""
    path = st.text_input(
        "Model",
        key="model_path",
        placeholder="model.safetensors, a Hugging Face folder, or my_model.py:function",
    )
    return [], (path or "").strip()


def _import(model: str, saved: Mapping[str, Sequence[Path]], name: str) -> Mapping[str, Any]:
    """Import, and what the page then shows; the run's files are all that stays."""
    # With the libraries that it reads foreign models by it takes seconds to load, and most visits do not import.
    from workbench.training.imports import import_run

    run, findings = import_run(model, saved["pairs"][0], name=name, vocab=next(iter(saved["vocab"]), None))
    return {
        "run": run.reference,
        "tables": [(table.caption, table.frame) for table in findings.tables()],
        "warnings": list(findings.warnings),
    }


def _findings(imported: Mapping[str, Any]) -> None:
    st.success(f"Imported as run {imported['run']!r}.")
    link_to("explore", f"Explore {imported['run']}", imported["run"], icon=":material/arrow_forward:")
    for warning in imported["warnings"]:
        st.warning(warning)
    for caption, frame in imported["tables"]:
        st.caption(caption)
        st.dataframe(frame, hide_index=True)


def _as_command(model: str, name: str) -> None:
    st.caption(f"As a command: `workbench import {model} --pairs PAIRS --run {name}`")


def model_file(files: Sequence[Path]) -> Path:
    """The file of weights among those uploaded, its configuration moved to where the importer looks: beside it.

    Raises:
        WorkbenchError: there is not one of each.
    """
    weights = [file for file in files if is_weights(file.name)]
    configurations = [file for file in files if not is_weights(file.name)]
    if (len(weights), len(configurations)) != (1, 1):
        raise WorkbenchError(
            "Upload one file of weights (.safetensors or .pt) with its configuration (.json); "
            f"got {len(weights)} and {len(configurations)}."
        )
    configurations[0].replace(weights[0].with_suffix(".json"))
    return weights[0]


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return Path(name).suffix.lower().removeprefix(".") in WEIGHTS


@contextmanager
def on_disk(uploads: Mapping[str, Sequence[Upload]]) -> Iterator[dict[str, list[Path]]]:
    """The uploads as files under their own names, by what they are, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="workbench-import-") as root:
        saved: dict[str, list[Path]] = {}
        for kind, files in uploads.items():
            folder = Path(root) / kind
            folder.mkdir()
            # A name is all that is taken from the browser, never a path.
            saved[kind] = [folder / Path(file.name).name for file in files]
            for path, file in zip(saved[kind], files, strict=True):
                path.write_bytes(file.getvalue())
        try:
            yield saved
        except WorkbenchError as error:
            # A person knows the file that they chose, not where it was put.
            raise WorkbenchError(re.sub(rf"{re.escape(root)}/(?:\w+/)?", "", str(error))) from error


def proposed_name(files: Sequence[Upload], path: str) -> str:
    """A name for the run, after the model's file."""
    names = [file.name for file in files if is_weights(file.name)]
    text = names[0] if names else path.rpartition(":")[0] or path
    stem = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in Path(text).stem).strip("-_")
    return stem or "my-model"
