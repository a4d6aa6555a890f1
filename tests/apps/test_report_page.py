"""Page Report: a report is built from the page, read there, and taken away whole."""

import io
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from apps.ui import jobs
from apps.ui.views import report
from workbench.store import write_json


def test_everything_is_zipped_under_the_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "tables").mkdir(parents=True)
    (folder / "report.html").write_text("<html>")
    (folder / "tables" / "loss.csv").write_text("step,loss\n")
    archive = zipfile.ZipFile(io.BytesIO(report.zipped(folder)))
    assert archive.namelist() == ["mine/report.html", "mine/tables/loss.csv"]
    assert archive.read("mine/tables/loss.csv") == b"step,loss\n"


def test_reports_lie_outside_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    assert report.report_folder("gallery:small") == tmp_path / ".reports" / "gallery_small"


@pytest.mark.parametrize(("seconds", "text"), [(3, "just now"), (61, "1 min 01 s ago")])
def test_moments(seconds: float, text: str) -> None:
    assert report.ago(seconds) == text


@pytest.mark.parametrize(
    ("lacking", "says"), [(None, "(3 of them also as SVG)"), ("no Chromium", "(no SVG: no Chromium)")]
)
def test_what_was_written_is_counted(lacking: str | None, says: str, tmp_path: Path) -> None:
    job = jobs.Job(path=tmp_path, arguments=("report", "small"), subject="small", started=0.0, group=1)
    assert report.counts(job) == ""
    written = {"figures": 3, "tables": 5, "static_figures": 3, "static_figures_missing": lacking}
    write_json(tmp_path / "output", written)
    assert report.counts(job) == f"3 figures {says}, 5 tables."


@pytest.fixture(scope="module")
def playground(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(runs_folder / "small", folder / "small")
    return folder


@pytest.mark.browser
@pytest.mark.slow
def test_a_report_is_built_and_taken_away(
    playground: Path, server_on: Callable, open_page: Callable, tmp_path: Path
) -> None:
    page: Page = open_page(server_on(playground))
    page.goto("/report?run=small")
    page.get_by_role("button", name="Build", exact=True).click()
    expect(page.get_by_text(re.compile("Building, for"))).to_be_visible()
    expect(page.get_by_role("button", name="Build", exact=True)).to_be_disabled()
    expect(page.get_by_text(re.compile(r"Built in .*\d+ figures"))).to_be_visible(timeout=180_000)
    # The preview is the page itself.
    inside = page.frame_locator("iframe[title='Report of small']")
    expect(inside.get_by_role("heading", level=1)).to_be_visible()
    with page.expect_download() as caught:
        page.get_by_role("button", name="Everything (ZIP)").click()
    caught.value.save_as(tmp_path / "all.zip")
    names = zipfile.ZipFile(tmp_path / "all.zip").namelist()
    assert {"small/report.html", "small/manifest.json", "small/references.bib"} <= set(names)
    with page.expect_download() as caught:
        page.get_by_role("button", name="Page (HTML)").click()
    caught.value.save_as(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == (playground / ".reports" / "small" / "report.html").read_bytes()


@pytest.mark.browser
@pytest.mark.slow
def test_building_is_cancelled_and_leaves_nothing(playground: Path, server_on: Callable, open_page: Callable) -> None:
    shutil.copytree(playground / "small", playground / "stopped")
    page: Page = open_page(server_on(playground))
    page.goto("/report?run=stopped")
    page.get_by_role("button", name="Build", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    [job] = [job for job in jobs.list_jobs(playground, "report") if job.subject == "stopped"]
    assert job.status == "cancelled"
    left = playground / ".reports"
    assert not left.exists() or not [path for path in left.iterdir() if path.name != "small"]
