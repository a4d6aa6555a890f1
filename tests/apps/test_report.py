"""The report of a run: whole or not there, readable offline, safe with any name, and made again from its manifest."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from playwright.sync_api import Browser
from plotly.offline import get_plotlyjs

from apps import agreements_of_runs, report, report_sections, static_figures
from apps.claims import at_least, at_most
from apps.cli import build_parser, main
from apps.comparison import TOLERANCE, column_difference, compare_tables
from apps.evidence import Evidence, claims, gather, pairs_to_look_at
from apps.manifest import manifest_of, precision_note, read_manifest, settings_between, train_command
from apps.references import REFERENCES, references
from apps.report import build_report, check_out, report_run, rerun_report
from apps.report_page import cell_text
from apps.report_sections import sections_of
from apps.sections import Section
from apps.static_figures import NO_BROWSER, NO_KALEIDO, draw_static
from workbench.figures import figure
from workbench.runtime import WorkbenchError
from workbench.store import RunFolder, digest, read_json, write_json
from workbench.tables import Table
from workbench.training.checkpoints import Run, export, load, save_checkpoint
from workbench.training.imports import import_run
from workbench.training.recipes import modular, modular_smoke

# TransformerLens, a browser's engine or whole commands are started here: seconds each.
pytestmark = pytest.mark.slow

SVG = b"<svg></svg>"


def drawn_plainly(figures: Mapping[str, object]) -> static_figures.Drawn:
    return static_figures.Drawn(svg=dict.fromkeys(figures, SVG), missing=None)


@pytest.fixture(autouse=True)
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static figures without a browser, but in the tests that are about them."""
    monkeypatch.setattr(report, "draw_static", drawn_plainly)


@pytest.fixture(scope="module")
def small(runs_folder: Path) -> Run:
    return load("small", runs=runs_folder)


@pytest.fixture(scope="module")
def written(small: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the small run; nobody writes to it."""
    out = tmp_path_factory.mktemp("reports") / "small"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "draw_static", drawn_plainly)
        report_run(small, out)
    return out


@pytest.fixture(scope="module")
def evidence(small: Run) -> Evidence:
    """What the analyses find in the small run."""
    return gather(small)


@pytest.fixture
def manifest(small: Run) -> dict[str, Any]:
    return manifest_of(small)


def curve(name: str = "mine", *, value: float = 1.0, caption: str = "A curve.") -> Table:
    frame = pd.DataFrame({"step": [0, 10, 20], "loss": [value, 0.5, 0.25]})
    return Table(name=name, frame=frame, kind="curve", axes={"x": "step", "y": "loss"}, unit="nats", caption=caption)


def section(*tables: Table, **options: Any) -> Section:
    return Section(title="Only section", text="One paragraph.\n\nAnother.", tables=tables, **options)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# What is written ----------------------------------------------------------------------------------------------------


def test_every_table_and_figure_is_a_file(written: Path) -> None:
    here = files(written)
    tables = {Path(path).stem for path in here if path.endswith(".csv")}
    assert {f"tables/{name}.tex" for name in tables} <= here
    drawn = {Path(path).stem for path in here if path.startswith("figures/") and path.endswith(".html")}
    assert {f"figures/{name}.svg" for name in drawn} <= here
    # Tables without axes have no picture, and every other has one.
    assert drawn <= tables
    assert tables - drawn == {
        "claims",
        "fourier_summary",
        "latents_probes",
        "latents_amnesic",
        "circuit_evaluation",
        "circuit_edges",
        "history_edges",
    }
    assert {"training_loss", "progress_loss", "logit_spectrum", "control_losses", "patch_stream"} <= drawn
    assert here >= {"report.html", "manifest.json", "references.bib", "figures/plotly.min.js"}


def test_nothing_is_left_beside_the_report(written: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["small"]
    assert written.stat().st_mode & 0o777 == 0o755


def test_the_manifest_seals_every_file(written: Path, small: Run) -> None:
    manifest = read_manifest(written / "manifest.json")
    assert set(manifest["files"]) == files(written) - {"manifest.json"}
    assert all(digest((written / path).read_bytes()) == sha256 for path, sha256 in manifest["files"].items())
    assert manifest["tables"]["claims"] == manifest["files"]["tables/claims.csv"]
    assert manifest["recipe"] == json.loads(json.dumps(small.recipe.to_json()))
    assert manifest["seeds"] == {"task": 0, "init": 0, "batches": 0, "analyses": 0}
    assert manifest["checkpoints"][-1]["sha256"] == small.checkpoint().sha256
    assert manifest["environment"]["libraries"]["torch"] == torch.__version__
    assert manifest["environment"]["threads"] == torch.get_num_threads()
    assert manifest["logs"]["metrics.jsonl"] == digest((small.folder.path / "metrics.jsonl").read_bytes())
    assert sum(manifest["sections"].values(), []) == list(manifest["tables"])


def test_the_summary_counts_what_was_written(small: Run, tmp_path: Path, manifest: dict[str, Any]) -> None:
    summary = build_report("Mine", [section(curve("one"), curve("two"))], tmp_path / "out", manifest=manifest).summary()
    assert (summary["tables"], summary["figures"], summary["static_figures"]) == (2, 2, 2)
    assert summary["static_figures_missing"] is None
    assert summary["report"] == str(tmp_path / "out" / "report.html")


@pytest.mark.slow
def test_from_the_command_line(runs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["report", "small", "--runs", str(runs_folder), "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == f"{out}/report.html"
    rerun = ["rerun", f"{out}/manifest.json", "--runs", str(runs_folder), "--json"]
    assert main(rerun) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reproduced"], found["same_weights"]) == (True, True)
    assert set(found["tables"].values()) == {"identical"}
    # A number that another run would give is seen.
    table = tmp_path / "out" / "tables" / "logit_spectrum.csv"
    tamper_with(tmp_path / "out", table, table.read_text().replace("\n1,", "\n1,9", 1))
    assert main(rerun) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["reproduced"] is False
    assert "column 'coefficient' differs by" in found["tables"]["logit_spectrum"]


def tamper_with(folder: Path, table: Path, content: str) -> None:
    """Another table than was found, with a manifest that agrees with it."""
    table.write_text(content)
    manifest = read_json(folder / "manifest.json")
    manifest["tables"][table.stem] = digest(table.read_bytes())
    write_json(folder / "manifest.json", manifest)


# Whole, or as it was before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [0, 3, 7, 10])
@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails_at: int, before: bool
) -> None:
    out = tmp_path / "out"
    if before:
        build_report("Before", [section(curve("old"))], out, manifest=manifest)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WorkbenchError, match="No space left on device"):
        build_report("After", [section(curve("one"), curve("two"))], out, manifest=manifest)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents


def test_a_new_report_takes_the_place_of_the_old_one(tmp_path: Path, manifest: dict[str, Any]) -> None:
    out = tmp_path / "out"
    build_report("Before", [section(curve("old"), curve("both"))], out, manifest=manifest)
    (out / "tables" / "notes.txt").write_text("mine")
    build_report("After", [section(curve("both"), curve("new"))], out, manifest=manifest)
    assert {path for path in files(out) if path.startswith("tables/")} == {
        "tables/both.csv",
        "tables/both.tex",
        "tables/new.csv",
        "tables/new.tex",
        "tables/notes.txt",
    }
    assert "figures/old.html" not in files(out)
    assert read_json(out / "manifest.json")["title"] == "After"


def test_what_is_not_a_report_is_never_written_over(tmp_path: Path, small: Run) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(WorkbenchError, match="holds files that are not a report. Choose another --out"):
        report_run(small, tmp_path)
    with pytest.raises(WorkbenchError, match=r"thesis\.tex is a file; a report is a folder"):
        report_run(small, tmp_path / "thesis.tex")
    assert files(tmp_path) == {"thesis.tex"}
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")


def test_two_tables_of_one_name(tmp_path: Path, manifest: dict[str, Any]) -> None:
    with pytest.raises(WorkbenchError, match="Two tables of the report are called 'one'"):
        build_report("Mine", [section(curve("one")), section(curve("one"))], tmp_path / "out", manifest=manifest)
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints(small: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    write_json(folder / "recipe.json", small.recipe.to_json())
    with pytest.raises(WorkbenchError, match="has no checkpoints yet"):
        report_run(load(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The page -----------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The tags of a page, with what would be fetched and what is linked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.anchors |= {attributes["id"] or ""} if "id" in attributes else set()
        if tag == "a":
            self.links.append(attributes.get("href") or "")
        else:
            self.fetched += [attributes[name] or "" for name in ("src", "href", "data") if name in attributes]


def test_the_page_is_whole_by_itself(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Parsed(text)
    # The favicon is an empty data address, so that not even that is asked for.
    assert page.fetched == ["data:,"]
    assert text.count(get_plotlyjs()[:2000]) == 1
    assert len(text) < len(get_plotlyjs()) + 2_000_000
    assert "@import" not in text.replace(get_plotlyjs(), "")


def test_every_link_leads_somewhere(written: Path) -> None:
    page = Parsed((written / "report.html").read_text())
    assert len(page.links) > 30
    for link in page.links:
        assert link[1:] in page.anchors if link.startswith("#") else (written / link).is_file(), link


def test_every_figure_is_on_the_page_once(written: Path) -> None:
    text = (written / "report.html").read_text()
    for path in (written / "figures").glob("*.html"):
        assert text.count(f'id="figure-{path.stem}"') == 1


def test_a_figure_on_its_own_needs_only_its_neighbour(written: Path) -> None:
    page = Parsed((written / "figures" / "training_loss.html").read_text())
    assert page.fetched == ["plotly.min.js"]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_names_from_a_run_are_text(tmp_path: Path, manifest: dict[str, Any]) -> None:
    frame = pd.DataFrame({"at": [HOSTILE, "b"], HOSTILE: ["x", HOSTILE], "effect": [1.0, 2.0]})
    axes = {"x": "at", "y": HOSTILE, "value": "effect"}
    heat = Table(name="heat", frame=frame, kind="heatmap", axes=axes, unit=HOSTILE, caption=HOSTILE)
    hostile = Section(title=HOSTILE, text=HOSTILE, tables=(heat, replace(heat, name="plain", kind="table", axes={})))
    out = tmp_path / "out"
    build_report(HOSTILE, [hostile], out, manifest={**manifest, "precision": HOSTILE})
    benign = [section(curve("one"), replace(curve("two"), kind="table", axes={}))]
    build_report("Mine", benign, tmp_path / "benign", manifest=manifest)
    for name, other in (("report.html", "report.html"), ("figures/heat.html", "figures/one.html")):
        tags = [
            Parsed((folder / path).read_text()).tags for folder, path in ((out, name), (tmp_path / "benign", other))
        ]
        assert "img" not in tags[0]
        assert tags[0].count("script") == tags[1].count("script")
    assert "alert(1)&lt;/script&gt;" in (out / "report.html").read_text()


def test_long_tables_are_cut_on_the_page_and_whole_in_the_file(tmp_path: Path, manifest: dict[str, Any]) -> None:
    frame = pd.DataFrame({"row": range(100_000, 100_250)})
    long = Table(name="long", frame=frame, kind="table", axes={}, unit="", caption="")
    build_report("Mine", [section(long)], tmp_path / "out", manifest=manifest)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "The first 100 of 250 rows; all are in the CSV." in text
    assert '<td class="number">100099</td>' in text
    assert '<td class="number">100100</td>' not in text
    assert len((tmp_path / "out" / "tables" / "long.csv").read_text().splitlines()) == 251


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (False, "no"), (None, ""), (float("nan"), ""), (1 / 3, "0.3333"), (12769, "12769"), ("a", "a")],
)
def test_cells(value: object, text: str) -> None:
    assert cell_text(value) == text


def test_landmarks_stand_in_curves_over_steps_alone(tmp_path: Path, manifest: dict[str, Any]) -> None:
    other = replace(
        curve("other"), frame=curve().frame.rename(columns={"step": "layer"}), axes={"x": "layer", "y": "loss"}
    )
    marked = section(curve("steps"), other, landmarks={"memorised": 10})
    build_report("Mine", [marked], tmp_path / "out", manifest=manifest)
    assert "memorised" in (tmp_path / "out" / "figures" / "steps.html").read_text()
    assert "memorised" not in (tmp_path / "out" / "figures" / "other.html").read_text()


def test_a_table_without_rows_has_no_picture(tmp_path: Path, manifest: dict[str, Any]) -> None:
    empty = replace(curve("empty"), frame=curve().frame.head(0))
    build_report("Mine", [section(empty)], tmp_path / "out", manifest=manifest)
    assert "tables/empty.csv" in files(tmp_path / "out")
    assert "figures/empty.html" not in files(tmp_path / "out")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1440, 800])
def test_the_page_opens_offline(written: Path, browser: Browser, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 1000}, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: problems.append(request.url) if urlsplit(request.url).scheme != "file" else None)
    page.goto((written / "report.html").as_uri())
    drawn = len(list((written / "figures").glob("*.svg")))
    page.wait_for_function(f"document.querySelectorAll('.plotly-graph-div .main-svg').length >= {drawn}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    summary = page.locator("details summary").first
    summary.click()
    assert page.locator("details[open] table").first.is_visible()
    context.close()
    assert not problems


# Static figures -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_static_figures(chromium: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", chromium)
    drawn = draw_static({name: figure(curve(value=value)).to_plotly_json() for name, value in (("a", 1.0), ("b", 7.0))})
    assert drawn.missing is None
    assert set(drawn.svg) == {"a", "b"}
    for svg in drawn.svg.values():
        text = svg.decode()
        assert text.startswith("<svg")
        assert 'width="800" height="420"' in text
        assert "A curve" in text
    assert drawn.svg["a"] != drawn.svg["b"]


def test_without_a_browser_the_report_says_so(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_static", draw_static)
    monkeypatch.setenv("BROWSER_PATH", "/nonexistent/chromium")
    built = build_report("Mine", [section(curve())], tmp_path / "out", manifest=manifest)
    assert built.static_missing == NO_BROWSER
    assert built.summary()["static_figures"] == 0
    assert read_json(tmp_path / "out" / "manifest.json")["static_figures_missing"] == NO_BROWSER
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Static figures (SVG) are missing: {NO_BROWSER}." in page
    assert "as SVG" not in page
    assert not list((tmp_path / "out").rglob("*.svg"))


def test_without_kaleido(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the import system takes for a module that cannot be found.
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert draw_static({"a": {}}) == static_figures.Drawn(svg={}, missing=NO_KALEIDO)


def test_a_browser_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(figures: object) -> dict[str, bytes]:
        raise RuntimeError("it was killed")

    monkeypatch.setattr(static_figures, "_draw", die)
    assert draw_static({"a": {}}).missing == "the browser failed: RuntimeError: it was killed"


# What it says -------------------------------------------------------------------------------------------------------


def test_sections_of_a_grokked_run(small: Run, evidence: Evidence) -> None:
    sections = {each.title: each for each in sections_of(evidence)}
    assert list(sections) == [
        "Summary",
        "Training",
        "Progress measures",
        "Fourier circuit",
        "Controls",
        "Activation patching",
        "Logit lens",
        "Probes of the latents",
        "Tuned lens beside the logit lens",
        "Direct logit attribution",
        "Circuit",
        "Do the finders agree?",
        "How far the circuit finders can be believed",
        "The MLP, split by frequency",
        "The circuit through training",
    ]
    assert evidence.left_out == {}
    assert f"memorised at step {small.log.step_memorised}" in sections["Summary"].text
    assert sections["Training"].landmarks == small.log.landmarks()
    assert evidence.final is not None
    assert ", ".join(map(str, evidence.final.key_frequencies)) in sections["Summary"].text
    # How many, and how sure, is said wherever something was measured.
    n = min(64, len(small.task.examples("test")))
    assert pairs_to_look_at(small) == ("test", n)
    assert f"{n} pairs" in sections["Activation patching"].text
    assert "95 %" in sections["Activation patching"].text
    assert f"{evidence.final.n} pairs" in sections["Fourier circuit"].text
    assert f"n = {n} pairs: faithfulness" in sections["Circuit"].text
    assert "random connected circuits of" in sections["Circuit"].text
    for each in sections.values():
        assert set(each.references) <= set(REFERENCES)


def test_the_controls_are_beside_the_finding(evidence: Evidence) -> None:
    [shares, losses] = next(each for each in sections_of(evidence) if each.title == "Controls").tables
    assert evidence.final is not None
    assert evidence.shuffled is not None
    explained = shares.frame[shares.frame["part"] == "logits"].set_index("analysis")["explained"]
    assert explained["final"] == evidence.final.logits_explained
    assert explained["residues shuffled"] == evidence.shuffled.logits_explained
    assert set(losses.frame.groupby("analysis").size()) == {3}


def agreement_section(evidence: Evidence) -> Section:
    return next(each for each in sections_of(evidence) if each.title == "Do the finders agree?")


def test_finders_are_compared_at_the_size_of_the_circuit(small: Run, evidence: Evidence) -> None:
    assert evidence.circuit is not None
    assert evidence.finders is not None
    circuit, found = evidence.circuit.circuit, evidence.finders
    assert found.agreement.labels == ("exact", "eap", "eap-ig", "greedy")
    # The finder whose circuit is reported finds that circuit, and its own is what other pairs are held against.
    assert torch.equal(found.agreement.keep[2], circuit.keep)
    assert torch.equal(found.stability.circuit.keep, circuit.keep)
    assert found.significance.scores.method == "exact"
    section = agreement_section(evidence)
    assert f"each keeps {circuit.requested}, as many as the circuit above" in section.text
    assert f"{len(found.agreement.shared)} are kept by all" in section.text
    assert f"{len(found.significance.edges)} have a mean effect by exact that is not 0" in section.text
    assert "take too long" not in section.text
    names = {table.name: table.kind for table in section.tables}
    assert names["agreement_jaccard"] == names["agreement_correlation"] == "heatmap"
    assert names["stability_eap_ig"] == names["significant_edges_exact"] == "bar"
    assert found.provenance.parents == (small.checkpoint().sha256,)
    assert found.summary()["left_out"] == []


def test_finders_that_take_too_long_are_named(small: Run, evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agreements_of_runs.FINDERS, "exact", 16)
    monkeypatch.setitem(agreements_of_runs.FINDERS, "greedy", 17)
    monkeypatch.setattr(report_sections, "MOST_BARS", 5)
    found = agreements_of_runs.finders_of(small, edges=9)
    assert found.agreement.labels == ("eap", "eap-ig", "greedy")
    assert found.significance.scores.method == "eap-ig"
    section = agreement_section(replace(evidence, finders=found))
    assert "On a graph of this size exact would take too long." in section.text
    assert {table.kind for table in section.tables} == {"heatmap", "table"}


def test_what_a_run_does_not_show_is_said(evidence: Evidence) -> None:
    spoilt = replace(evidence, final=evidence.shuffled)
    failed = {claim.statement for claim in claims(spoilt) if not claim.holds}
    assert "share of the logits that the key frequencies explain" in failed
    assert "key frequencies" in failed
    [summary, *_] = sections_of(spoilt)
    assert "It does not show:" in summary.text
    assert all(statement in summary.text for statement in failed)


@pytest.mark.parametrize(("found", "most", "least"), [(0.5, True, False), (1.0, True, True), (None, False, False)])
def test_claims(found: float | None, most: bool, least: bool) -> None:
    assert at_most("x", found, 1.0).holds is most
    assert at_least("x", found, 1.0).holds is least


def test_guessing_is_what_removing_the_key_frequencies_is_held_against(small: Run, evidence: Evidence) -> None:
    claim = next(claim for claim in claims(evidence) if "guessing costs the bound" in claim.statement)
    assert claim.wanted == f"≥ {math.log(len(small.task.vocab) - 1):.4g}"


def test_a_run_that_never_memorised(small: Run, tmp_path: Path) -> None:
    """Cut short: no landmark, no control, and none of it is invented."""
    folder = tmp_path / "short"
    shutil.copytree(small.folder.path, folder)
    log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(log[:3]))
    evidence = gather(load(str(folder)))
    assert evidence.memorised is None
    [summary, training, *_] = sections_of(evidence)
    assert "never memorised and never generalised" in summary.text
    assert training.landmarks == {}
    delay = claims(evidence)[0]
    assert (delay.found, delay.holds) == (None, False)


@pytest.mark.slow
def test_a_run_that_was_not_measured_is_measured_for_its_report(small: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(small.folder.path, folder)
    (folder / "measures.jsonl").unlink()
    found = gather(load(str(folder))).progress
    assert found is not None
    rows = small.folder.lines("measures.jsonl")
    assert [row["step"] for row in found.rows] == [row["step"] for row in rows]
    np.testing.assert_allclose([row["excluded_loss"] for row in found.rows], [row["excluded_loss"] for row in rows])
    assert not (folder / "measures.jsonl").exists()


@pytest.fixture
def imported(small: Run, tmp_path: Path) -> Run:
    """The small run's model with pairs of a user's own."""
    model = tmp_path / "mine.safetensors"
    shutil.copy(small.checkpoint().path, model)
    config = {**small.recipe.model.to_json()}
    write_json(model.with_suffix(".json"), config)
    pairs = tmp_path / "pairs.csv"
    p = len(small.task.vocab) - 1
    lines = [f"{a} 5 {p},{a} 7 {p},{(a + 5) % p},{(a + 7) % p}" for a in range(10)]
    pairs.write_text("\n".join(["clean,corrupt,answer,distractor", *lines]))
    run, _ = import_run(str(model), pairs, name="mine", runs=tmp_path / "runs")
    return run


def test_an_imported_run_has_a_report_of_what_applies(imported: Run, tmp_path: Path) -> None:
    evidence = gather(imported)
    assert "needs a run on modular arithmetic" in evidence.left_out["Fourier analysis"]
    assert "cannot be split by group" in evidence.left_out["probes of the latents"]
    titles = [each.title for each in sections_of(evidence)]
    assert titles == [
        "Summary",
        "Activation patching",
        "Logit lens",
        "Direct logit attribution",
        "Circuit",
        "Do the finders agree?",
        "How far the circuit finders can be believed",
    ]
    assert evidence.patches is not None
    assert evidence.patches.n == 10
    report_run(imported, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "It came trained: there is no log." in page
    assert "Left out: Fourier analysis." in page
    assert read_json(tmp_path / "out" / "manifest.json")["commands"]["train"] is None


def test_an_analysis_that_the_run_refuses_is_left_out_with_its_reason(small: Run, tmp_path: Path) -> None:
    """All weights nought: clean and corrupt runs are the same, and nothing can be patched."""
    folder = tmp_path / "dead"
    shutil.copytree(small.folder.path, folder)
    last = small.checkpoint()
    weights = {name: torch.zeros_like(tensor) for name, tensor in last.tensors().items()}
    save_checkpoint(RunFolder(path=folder, reference="dead"), last.step, weights, ["final"], dtype=torch.float32)
    evidence = gather(load(str(folder)))
    assert evidence.patches is None
    assert "No headroom" in evidence.left_out["activation patching"]
    [summary, *_] = sections_of(evidence)
    assert "Left out: activation patching. No headroom" in summary.text


# Manifest -----------------------------------------------------------------------------------------------------------


def test_half_precision_is_said(small: Run, tmp_path: Path) -> None:
    half = RunFolder(path=tmp_path / "half", reference=str(tmp_path / "half"))
    half.path.mkdir()
    export(small, half, count=4, dtype=torch.float16)
    assert "stored in float16" in precision_note(load(half.reference))
    assert "as they were trained" in precision_note(small)


def test_the_train_command_trains_the_same_recipe(small: Run) -> None:
    command = train_command(small)
    assert command is not None
    program, *arguments = shlex.split(command)
    options = build_parser().parse_args(arguments)
    assert (program, options.command, options.recipe, options.run) == ("workbench", "train", "modular", "small")
    made = modular().override(options.set)
    assert (made.task, made.model, made.train) == (small.recipe.task, small.recipe.model, small.recipe.train)


def test_settings_between_recipes_are_what_differs() -> None:
    assert settings_between(modular(), modular()) == []
    changed = modular().override(["p=59", "train.clip_norm=1.5", 'operation="mul"', "train.batch_size=64"])
    settings = settings_between(modular(), changed)
    # The vocabulary follows the modulus and need not be said.
    assert sorted(settings) == ['task.operation="mul"', "task.p=59", "train.batch_size=64", "train.clip_norm=1.5"]
    assert modular().override(settings) == changed
    back = settings_between(changed, modular())
    assert changed.override(back) == modular()
    assert modular().override(settings_between(modular(), modular_smoke())).train == modular_smoke().train


def test_reading_what_is_no_manifest(tmp_path: Path) -> None:
    write_json(tmp_path / "other.json", {"format": 1})
    with pytest.raises(WorkbenchError, match=r"other\.json is not the manifest of a report of this version"):
        read_manifest(tmp_path / "other.json")
    with pytest.raises(WorkbenchError, match=r"Cannot read .*absent\.json"):
        read_manifest(tmp_path / "absent.json")


# Rerun --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rerun_goes_beside_the_first(written: Path, runs_folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(written, first)
    comparison = rerun_report(first / "manifest.json", runs=runs_folder)
    assert comparison.rebuilt == tmp_path / "first-rerun"
    assert comparison.reproduced
    assert comparison.versions == {}
    with pytest.raises(WorkbenchError, match="holds the report to compare with"):
        rerun_report(first / "manifest.json", first, runs=runs_folder)


@pytest.mark.slow
def test_a_rerun_on_other_weights_says_so(written: Path, small: Run, tmp_path: Path) -> None:
    """The same recipe and log, but weights that another training might have found."""
    folder = tmp_path / "runs" / "small"
    shutil.copytree(small.folder.path, folder)
    last = small.checkpoint()
    weights = {name: 1.1 * tensor for name, tensor in last.tensors().items()}
    save_checkpoint(RunFolder(path=folder, reference="small"), last.step, weights, ["final"], dtype=torch.float32)
    comparison = rerun_report(written / "manifest.json", tmp_path / "out", runs=tmp_path / "runs")
    assert not comparison.same_weights
    assert not comparison.reproduced
    by_name = {table.name: table.status for table in comparison.tables}
    assert by_name["training_loss"] == "identical"
    assert by_name["patch_stream"] == "different"


def test_a_rerun_without_its_run_says_how_to_train_it(written: Path, tmp_path: Path) -> None:
    message = r"The report's run is not here: No run 'small'.* Train it: `workbench train modular --run small --set"
    with pytest.raises(WorkbenchError, match=message):
        rerun_report(written / "manifest.json", tmp_path / "out", runs=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_rerun_on_a_run_of_another_recipe_is_refused(written: Path, small: Run, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "small"
    shutil.copytree(small.folder.path, other)
    write_json(other / "recipe.json", small.recipe.with_seed(1).to_json())
    with pytest.raises(WorkbenchError, match=r"made by another recipe; it differs in task\.seed, train\.batch_seed"):
        rerun_report(written / "manifest.json", tmp_path / "out", runs=tmp_path / "runs")


def compared(tmp_path: Path, first: str, rebuilt: str) -> tuple[str, str]:
    for name, content in (("first", first), ("rebuilt", rebuilt)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "t.csv").write_text(content)
    hashes = [{"t": digest(content.encode())} for content in (first, rebuilt)]
    [found] = compare_tables(hashes[0], tmp_path / "first", hashes[1], tmp_path / "rebuilt")
    assert found.reproduced == (found.status in ("identical", "equal"))
    return found.status, found.detail


@pytest.mark.parametrize(
    ("first", "rebuilt", "status", "detail"),
    [
        ("x,y\n1,2\n", "x,y\n1,2\n", "identical", ""),
        ("x,y\n1,200\n2,1\n", "x,y\n1,200.0002\n2,1\n", "equal", "within 1e-06 of each column's largest"),
        # A small number beside a large one is held against the large one.
        ("y\n1000\n1e-9\n", "y\n1000\n3e-9\n", "equal", "within 1e-11"),
        ("y\n200\n", "y\n201\n", "different", "column 'y' differs by 0.005"),
        ("y,z\n1,a\n", "y,z\n1,b\n", "different", "column 'z' holds other entries"),
        ("y\nTrue\n", "y\nFalse\n", "different", "holds other entries"),
        ("y\n1\n", "y\n1\n1\n", "different", "1 rows of y became 2 of y"),
        ("y\n1\n", "z\n1\n", "different", "1 rows of y became 1 of z"),
        ("x,y\n1,\n2,3\n", "x,y\n1,3\n2,3\n", "different", "column 'y' holds other entries"),
        ("x,y\n1,\n2,3\n", "x,y\n1.0000001,\n2,3\n", "equal", "within"),
        ("y\n0.5\nadd\n", "y\n0.5000001\nadd\n", "equal", "within 1e-06"),
        ("y\n0.5\nadd\n", "y\n0.5\nmul\n", "different", "holds other entries"),
        ("y\n0.5\nadd\n", "y\n0.6\nadd\n", "different", "differs by 0.17"),
        ("y\n0\n", "y\n0.0\n", "equal", "within 0e+00"),
    ],
)
def test_tables_are_compared(tmp_path: Path, first: str, rebuilt: str, status: str, detail: str) -> None:
    found = compared(tmp_path, first, rebuilt)
    assert found[0] == status
    assert detail in found[1]


def test_tables_that_are_only_in_one_report(tmp_path: Path) -> None:
    first, second = compare_tables({"old": "1"}, tmp_path, {"new": "2"}, tmp_path)
    assert (first.name, first.status, second.name, second.status) == ("old", "missing", "new", "new")
    assert not first.reproduced
    assert not second.reproduced


def test_a_first_table_that_was_changed_cannot_vouch(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("y\n1\n")
    [found] = compare_tables({"t": "another hash"}, tmp_path, {"t": digest(b"y\n1\n")}, tmp_path)
    assert (found.status, found.reproduced) == ("different", False)
    assert "only hashes could be compared" in found.detail


def test_the_tolerance_is_a_bound() -> None:
    one = pd.Series([1.0, 0.0])
    assert column_difference(one, one + TOLERANCE / 2) < TOLERANCE
    assert column_difference(one, one + TOLERANCE * 2) > TOLERANCE
    assert column_difference(pd.Series([np.inf, 1.0]), pd.Series([np.inf, 1.0])) == 0.0
    assert column_difference(pd.Series([np.inf, 1.0]), pd.Series([-np.inf, 1.0])) == math.inf


# References ---------------------------------------------------------------------------------------------------------


SEARCHES_ALONE = {"saparov2025transformers"}
GRAFTS_ALONE = {"panigrahi2023skill"}
PROGRAMS_ALONE = {"friedman2023learning", "demoura2008z3"}
REASONERS_ALONE = {
    "wang2024grokked",
    "varma2023explaining",
    "press2023measuring",
    "dehghani2019universal",
}
ACCELERATION_ALONE = {
    "bernstein2018signsgd",
    "jordan2024muon",
    "lee2024grokfast",
    "liu2025muon",
    "prieto2025grokking",
}


def test_references_are_cited_once_in_their_order(written: Path) -> None:
    text = (written / "references.bib").read_text()
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert keys[0] == "power2022grokking"
    alone = REASONERS_ALONE | SEARCHES_ALONE | PROGRAMS_ALONE | GRAFTS_ALONE | ACCELERATION_ALONE
    assert set(keys) == set(REFERENCES) - alone
    assert text.count("{") == text.count("}")
    page = (written / "report.html").read_text()
    assert all(REFERENCES[key].fields["year"] in page for key in keys)


def test_references_by_hand() -> None:
    [meng, elhage, lens] = references(["meng2022locating", "elhage2021mathematical", "nostalgebraist2020logit"])
    assert meng.line() == (
        "Kevin Meng et al. (2022). Locating and Editing Factual Associations in GPT. "
        "Advances in Neural Information Processing Systems. arXiv:2202.05262."
    )
    assert elhage.line().startswith("Nelson Elhage et al. (2021).")
    assert lens.line().startswith("nostalgebraist (2020). Interpreting GPT: The Logit Lens.")
    assert lens.bibtex().splitlines()[:2] == ["@misc{nostalgebraist2020logit,", "  author = {{nostalgebraist}},"]
    assert references(["meng2022locating", "meng2022locating"]) == (meng,)
    with pytest.raises(WorkbenchError, match="Unknown reference 'meng2022'. Did you mean 'meng2022locating'"):
        references(["meng2022"])
