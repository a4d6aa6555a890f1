"""The report of a run: one page that opens offline, every figure and table as files, and the manifest to make it again.

    OUT/report.html            the page, whole by itself
        figures/NAME.html      each figure for the browser, beside one plotly.min.js
        figures/NAME.svg       each figure for the paper, where kaleido and a Chromium are there
        tables/NAME.csv, .tex  each table, for programs and for the paper
        references.bib         the methods used
        manifest.json          recipe, seeds, versions, hashes, commands; written last

A report is written beside its place and moved there when all of it is done: a full disk or an interruption leaves what
was there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from apps.comparison import Comparison, compare_tables
from apps.evidence import gather
from apps.graft_pairs import pair_of_texts
from apps.graft_sections import gather_real_graft
from apps.manifest import NAME as MANIFEST
from apps.manifest import manifest_of, manifest_of_donor, read_manifest
from apps.references import references
from apps.report_page import render
from apps.report_sections import sections_of, sections_of_donor
from apps.sections import Section
from apps.static_figures import draw_static
from apps.table_files import has_picture, write_figures, write_tables
from workbench.figures import figure, with_landmarks
from workbench.runtime import WorkbenchError
from workbench.store import digest, to_json, write_atomic, write_json, writing
from workbench.tables import Table
from workbench.training.checkpoints import Run, load
from workbench.training.recipe import flat
from workbench.training.text_donors import TextDonor, donor_names, load_donor

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Report:
    """A report that was written."""

    title: str
    sections: tuple[Section, ...]
    artifacts: Mapping[str, str]
    """SHA-256 of each file by its path in the folder, the manifest's own left out."""
    folder: Path
    static_missing: str | None
    """Why there are no static figures; None where there are."""
    seconds: float

    def summary(self) -> dict[str, object]:
        """What the command line prints."""
        suffixes = [Path(path).suffix for path in self.artifacts]
        return {
            "report": str(self.folder / PAGE),
            "manifest": str(self.folder / MANIFEST),
            "sections": [section.title for section in self.sections],
            "tables": suffixes.count(".csv"),
            "figures": suffixes.count(".html") - 1,
            "static_figures": suffixes.count(".svg"),
            "static_figures_missing": self.static_missing,
            "seconds": self.seconds,
        }


def report(
    reference: str, out: Path, *, runs: Path | None = None, on_part: Callable[[str], None] = lambda part: None
) -> Report:
    """The report of a run, or of a real model's donor, by its name; `on_part` is told what is being analysed.

    Raises:
        WorkbenchError: there is none of that name, or as for `report_run`.
    """
    if reference in donor_names(runs):
        return report_donor(load_donor(reference, runs=runs), out, on_part)
    return report_run(load(reference, runs=runs), out, on_part)


def report_run(run: Run, out: Path, on_part: Callable[[str], None] = lambda part: None) -> Report:
    """Analyse a run and write its report.

    Raises:
        WorkbenchError: the run has no checkpoint, or the folder holds something else than a report.
    """
    run.checkpoint()
    check_out(out)
    sections = sections_of(gather(run, on_part))
    return build_report(f"{run.recipe.name}: {run.reference}", sections, out, manifest=manifest_of(run))


def report_donor(donor: TextDonor, out: Path, on_part: Callable[[str], None] = lambda part: None) -> Report:
    """Find a real model's usual graft, or read the kept one, and write the donor's report.

    Raises:
        WorkbenchError: base or text is not there, or as for `report_run`.
    """
    check_out(out)
    evidence = gather_real_graft(pair_of_texts(donor.recipe.base, donor), lambda share: on_part(f"graft, {share:.0%}"))
    sections = sections_of_donor(evidence, donor.story)
    return build_report(f"{donor.recipe.task}: {donor.reference}", sections, out, manifest=manifest_of_donor(donor))


def build_report(title: str, sections: Sequence[Section], out: Path, *, manifest: Mapping[str, Any]) -> Report:
    """Write a report.

    Args:
        title: of the page.
        sections: what it says; the name of each table is its file's name and must be the only one of its kind.
        out: the folder; a report that is there already is replaced.
        manifest: what it was made from, as `manifest_of` tells it; the files' hashes are added.

    Raises:
        WorkbenchError: the folder holds something else than a report, two tables share a name, or the disk refuses.
    """
    started = time.perf_counter()
    check_out(out)
    tables = _named(sections)
    figures = {name: _drawn(table, section) for name, (table, section) in tables.items() if has_picture(table)}
    static = draw_static({name: drawn.to_plotly_json() for name, drawn in figures.items()})
    with _staging(out) as folder:
        cited = references(key for section in sections for key in section.references)
        write_tables(folder, [table for table, _ in tables.values()])
        write_figures(folder, figures, static.svg)
        write_atomic(folder / "references.bib", "\n\n".join(each.bibtex() for each in cited).encode() + b"\n")
        facts = {name: manifest[name] for name in ("recipe", "seeds", "environment")}
        page = render(
            title,
            sections,
            figures,
            manifest=manifest,
            facts=to_json(facts),
            references=cited,
            static_missing=static.missing,
        )
        write_atomic(folder / PAGE, page.encode())
        artifacts = _digests(folder)
        sealed = {
            **manifest,
            "title": title,
            "sections": {section.title: [table.name for table in section.tables] for section in sections},
            "tables": {name: artifacts[f"tables/{name}.csv"] for name in tables},
            "figures": {name: digest(str(drawn.to_json()).encode()) for name, drawn in figures.items()},
            "static_figures_missing": static.missing,
            "files": artifacts,
        }
        write_json(folder / MANIFEST, sealed)
        _publish(folder, out)
    return Report(
        title=title,
        sections=tuple(sections),
        artifacts=artifacts,
        folder=out,
        static_missing=static.missing,
        seconds=round(time.perf_counter() - started, 3),
    )


def rerun_report(manifest_path: Path, out: Path | None = None, *, runs: Path | None = None) -> Comparison:
    """Rebuild the report of a manifest into a new folder, and compare every table.

    Args:
        manifest_path: the manifest of the first report.
        out: where the rebuilt one goes; None puts it beside the first.
        runs: the runs folder.

    Raises:
        WorkbenchError: the manifest is unreadable, or its run is not here or was made by another recipe.
    """
    first = read_manifest(manifest_path)
    folder = manifest_path.resolve().parent
    out = folder.with_name(f"{folder.name}-rerun") if out is None else out
    if out.resolve() == folder:
        raise WorkbenchError(f"{out} holds the report to compare with. Choose another --out.")
    reference = first["run"]["reference"]
    _check_recipe(first, _subject(first, runs))
    report(reference, out, runs=runs)
    rebuilt = read_manifest(out / MANIFEST)
    hashes = [{each["step"]: each["sha256"] for each in manifest["checkpoints"]} for manifest in (first, rebuilt)]
    return Comparison(
        run=reference,
        first=folder,
        rebuilt=out,
        same_weights=hashes[0] == hashes[1],
        versions=_differing(first["environment"], rebuilt["environment"]),
        tables=compare_tables(first["tables"], folder / "tables", rebuilt["tables"], out / "tables"),
    )


def check_out(out: Path) -> None:
    """Raise a WorkbenchError if writing a report there could overwrite something that is none."""
    if out.exists() and not out.is_dir():
        raise WorkbenchError(f"{out} is a file; a report is a folder. Choose another --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise WorkbenchError(f"{out} holds files that are not a report. Choose another --out, or empty it.")


def _subject(manifest: Mapping[str, Any], runs: Path | None) -> Run | TextDonor:
    """The run or donor that a report is of."""
    reference = manifest["run"]["reference"]
    command = manifest["commands"]["train"]
    remedy = f" Train it: `{command}`." if command else " Copy the run's folder here."
    try:
        return load_donor(reference, runs=runs) if reference in donor_names(runs) else load(reference, runs=runs)
    except WorkbenchError as error:
        raise WorkbenchError(f"The report's run is not here: {error}{remedy}") from error


def _check_recipe(manifest: Mapping[str, Any], subject: Run | TextDonor) -> None:
    recipe = subject.recipe.to_json() if isinstance(subject, Run) else asdict(subject.recipe)
    # What JSON keeps of a recipe: tuples become lists on the way.
    recipe = json.loads(json.dumps(recipe))
    if other := sorted(_differing(flat(manifest["recipe"]), flat(recipe))):
        raise WorkbenchError(
            f"Run {subject.reference!r} here was made by another recipe; it differs in {', '.join(other)}."
        )


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    first, second = flat(first), flat(second)
    names = [*first, *(name for name in second if name not in first)]
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _named(sections: Sequence[Section]) -> dict[str, tuple[Table, Section]]:
    tables: dict[str, tuple[Table, Section]] = {}
    for section in sections:
        for table in section.tables:
            if table.name in tables:
                raise WorkbenchError(f"Two tables of the report are called {table.name!r}. Give one another name.")
            tables[table.name] = (table, section)
    return tables


def _drawn(table: Table, section: Section) -> go.Figure:
    drawn = figure(table)
    over_steps = table.kind == "curve" and table.axes["x"] == "step"
    return with_landmarks(drawn, section.landmarks) if over_steps else drawn


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files}


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in, gone afterwards."""
    with writing(out):
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.resolve().parent, prefix=f".{out.name}."))
        folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Move a finished report to its place, over an earlier one; files of that one that have no successor go."""
    with writing(out):
        if not out.exists():
            folder.rename(out)
            return
        new = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        stale = _files_of(out) - set(new)
        # The manifest comes last: it stands for all the others.
        for path in sorted(new, key=lambda path: path.name == MANIFEST):
            (out / path).parent.mkdir(exist_ok=True)
            os.replace(folder / path, out / path)
        for path in stale:
            (out / path).unlink()


def _files_of(out: Path) -> set[Path]:
    """Files of an earlier report: those that its manifest lists and that lie where reports put them."""
    if not (out / MANIFEST).is_file():
        return set()
    listed = read_manifest(out / MANIFEST)["files"]
    here = (path.relative_to(out) for name in ("figures", "tables") for path in (out / name).glob("*"))
    return {path for path in here if path.as_posix() in listed}
