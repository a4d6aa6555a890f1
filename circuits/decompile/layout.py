"""Python text as a formatter leaves it, at 88 columns: so that its lines can be compared with others'."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 88


def quoted(word: str) -> str:
    """A string literal."""
    return json.dumps(word, ensure_ascii=False)


def indented(text: str, levels: int = 1) -> str:
    """The text further to the right."""
    return textwrap.indent(text, "    " * levels)


def literal(head: str, items: Sequence[str], brackets: str, tail: str = "", *, indent: int = 0) -> str:
    """A list, tuple, set or dictionary behind `head`: on one line where it fits, else an item a line.

    Args:
        head: what stands before the opening bracket.
        items: their texts, which may be several lines.
        brackets: the two of them.
        tail: what stands behind the closing one.
        indent: columns that the text will be moved to the right.
    """
    comma = "," if brackets == "()" and len(items) == 1 else ""
    line = f"{head}{brackets[0]}{', '.join(items)}{comma}{brackets[1]}{tail}"
    if "\n" not in line and len(line) + indent <= WIDTH:
        return line
    return "\n".join([head + brackets[0], *(indented(item) + "," for item in items), brackets[1] + tail])


def mapping(head: str, items: Mapping[str, str], tail: str = "", *, indent: int = 0) -> str:
    """A dictionary of texts."""
    return literal(head, [f"{key}: {value}" for key, value in items.items()], "{}", tail, indent=indent)


def call(head: str, arguments: Sequence[str], tail: str = "", *, indent: int = 0) -> str:
    """A call: on one line, else its arguments on one, else an argument a line."""
    line = f"{head}({', '.join(arguments)}){tail}"
    if len(line) + indent <= WIDTH:
        return line
    inner = ", ".join(arguments)
    if len(inner) + indent + 4 <= WIDTH:
        return f"{head}(\n    {inner}\n){tail}"
    return literal(head, arguments, "()", tail, indent=indent)
