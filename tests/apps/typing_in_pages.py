"""How a person types into a page that may just be drawing itself again."""

import contextlib

from playwright.sync_api import Locator, Page, TimeoutError, expect

PATIENCE_MILLISECONDS = 8_000


def settled(page: Page) -> None:
    """Waits until the page has been drawn: what is clicked, opened or filled before may be replaced."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def type_until(box: Locator, text: str, shown: Locator, key: str = "Enter") -> None:
    """Types until what it leads to is there: a page that is drawn again takes back what was typed."""
    for _ in range(5):
        box.fill(text)
        box.press(key)
        with contextlib.suppress(TimeoutError):
            shown.wait_for(timeout=PATIENCE_MILLISECONDS)
            return
    raise AssertionError(f"{text!r} was typed five times and did not lead to {shown}.")
