"""Figures as SVG, where kaleido (the extra `figures`) and a Chromium are there.

Both are optional, and the browser is a process that can fail on its own: what cannot be drawn is said, never raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

WIDTH = 800
TIMEOUT = 120
"""Seconds for one figure."""
NO_KALEIDO = "kaleido is not installed; install the extra: pip install -e '.[figures]'"
NO_BROWSER = "no Chromium or Chrome was found; install one, or name it in BROWSER_PATH"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Static figures by name, or why there are none."""

    svg: Mapping[str, bytes]
    missing: str | None
    """None where all are there."""


def draw_static(figures: Mapping[str, Mapping[str, Any]]) -> Drawn:
    """Each figure, given as plotly's JSON, as SVG."""
    try:
        import kaleido  # noqa: F401
        from choreographer.errors import ChromeNotFoundError
    except ImportError:
        return Drawn(svg={}, missing=NO_KALEIDO)
    try:
        # A thread of its own: the caller may live in an event loop, as every notebook does.
        with ThreadPoolExecutor(max_workers=1) as thread:
            svg = thread.submit(asyncio.run, _draw(figures)).result()
    except ChromeNotFoundError:
        return Drawn(svg={}, missing=NO_BROWSER)
    except Exception as error:
        # Whatever a foreign process dies of, the report is worth having without it.
        return Drawn(svg={}, missing=f"the browser failed: {type(error).__name__}: {error}")
    return Drawn(svg=svg, missing=None)


async def _draw(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    from kaleido import Kaleido

    # Without MathJax, which it would fetch from the network.
    async with Kaleido(n=1, timeout=TIMEOUT, mathjax=False) as browser:
        return {
            name: await browser.calc_fig(
                figure, opts={"format": "svg", "width": WIDTH, "height": figure["layout"]["height"]}
            )
            for name, figure in figures.items()
        }
