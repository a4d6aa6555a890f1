"""A section of a report: what was done, how, on how many examples, and the tables that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workbench.tables import Table


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """A heading, a text, and tables with their pictures."""

    title: str
    text: str
    """Paragraphs, an empty line between them."""
    tables: tuple[Table, ...] = ()
    landmarks: Mapping[str, int] = field(default_factory=dict)
    """Steps to mark in curves over steps."""
    references: tuple[str, ...] = ()
    """Keys of the papers that the methods come from."""
