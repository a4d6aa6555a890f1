"""Every page opens on each shipped run at the first click: no error or warning, nothing wider than its window."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from apps.ui.state import FIRST_CHOICE

PAGES = ("Runs", "Train", "Dynamics", "Explore", "Circuit", "Report")
REASONERS = ("composition", "composition-shared", "comparison")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with nothing in it, as everybody begins."""
    return tmp_path_factory.mktemp("empty")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "width"),
    [("gallery:modular", 1440), ("gallery:modular", 800), *((f"gallery:{name}", 1440) for name in REASONERS)],
)
def test_pages_open_on_the_gallery(
    reference: str, width: int, empty: Path, server_on: Callable, open_page: Callable
) -> None:
    page: Page = open_page(server_on(empty))
    page.set_viewport_size({"width": width, "height": 1000})
    # Without a run in the address the first one is opened.
    page.goto("/" if reference == FIRST_CHOICE else f"/?run={reference}")
    for name in PAGES:
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=120_000)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        expect(page.get_by_test_id("stAlertContentError")).to_have_count(0)
        if name != "Train":
            expect(page.get_by_role("combobox", name="Run", exact=True)).to_have_value(reference)
        main = page.get_by_test_id("stMain")
        assert main.evaluate("main => main.scrollWidth <= main.clientWidth"), f"{name} scrolls sideways at {width} px"
