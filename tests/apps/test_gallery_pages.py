"""Every page opens on the shipped run at the first click: no error or warning, nothing wider than its window."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

PAGES = ("Runs", "Train", "Dynamics", "Explore", "Circuit", "Report")
REFERENCE = "gallery:modular"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with nothing in it, as everybody begins."""
    return tmp_path_factory.mktemp("empty")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 800])
def test_pages_open_on_the_gallery(width: int, empty: Path, server_on: Callable, open_page: Callable) -> None:
    page: Page = open_page(server_on(empty))
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto("/")
    for name in PAGES:
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=120_000)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        expect(page.get_by_test_id("stAlertContentError")).to_have_count(0)
        if name != "Train":
            expect(page.get_by_role("combobox", name="Run", exact=True)).to_have_value(REFERENCE)
        main = page.get_by_test_id("stMain")
        assert main.evaluate("main => main.scrollWidth <= main.clientWidth"), f"{name} scrolls sideways at {width} px"
