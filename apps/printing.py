"""How a command tells what it found: lines for people, bars while it works, and a clock.

Progress goes to standard error, so that standard output holds the result alone.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from workbench.runtime import is_main_process

if TYPE_CHECKING:
    from workbench.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Printout:
    """What a command found: for programs, and for people."""

    content: Mapping[str, Any]
    text: str
    exit_code: int = 0


def scalars(content: Mapping[str, Any]) -> dict[str, Any]:
    """What fits on a line; rows, and what holds rows, have tables of their own or are for programs."""
    return {key: value for key, value in content.items() if not _holds_rows(value)}


def _holds_rows(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_rows, value.values()))
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def as_lines(content: Mapping[str, Any]) -> str:
    """A line for each name."""
    width = max(map(len, content), default=0)
    return "\n".join(f"{key:<{width}}  {_short(value)}" for key, value in content.items())


def as_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line for each row, under a head."""
    cells = [list(names), *([_short(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds of the block, filled in at its end."""
    clock: dict[str, float] = {}
    wall, cpu = time.monotonic(), _cpu_seconds()
    yield clock
    clock["seconds"] = round(time.monotonic() - wall, 3)
    clock["cpu_seconds"] = round(_cpu_seconds() - cpu, 3)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def progress_bar(title: str, recipe: Recipe) -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """A bar on standard error with step, losses, accuracies and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # All of it fits into 80 columns, which is what a log file gets.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[latest]}"),
        TimeRemainingColumn(),
    )
    assert recipe.train is not None
    progress = Progress(*columns, console=Console(stderr=True), disable=not is_main_process())
    bar = progress.add_task(title, total=recipe.train.steps, latest="")
    with ExitStack() as stack:

        def on_progress(step: int, steps: int, row: Mapping[str, Any]) -> None:
            if not progress.live.is_started:
                # Not before: a run that is refused gets its one line and no bar.
                stack.enter_context(progress)
            latest = "  ".join(
                f"{split} {row[f'{split}_loss']:.1e} {row[f'{split}_accuracy']:6.1%}" for split in ("train", "test")
            )
            progress.update(bar, completed=step, latest=latest)

        yield on_progress


class OnShare(Protocol):
    """Told of the share that is done, and where there is more than one thing to do, what is done now."""

    def __call__(self, share: float, now: str = "") -> None:
        """Show it."""
        ...


@contextmanager
def part_line(title: str) -> Iterator[Callable[[str], None]]:
    """What is being done now, on standard error: a line that changes; in a log file a line each."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda part: console.print(f"{title}: {part}", soft_wrap=True, highlight=False)
        return
    with console.status(title) as status:
        yield lambda part: status.update(f"{title}: {part}")


@contextmanager
def share_bar(title: str) -> Iterator[OnShare]:
    """A plain bar on standard error that shows a share, from the first on; in a log file a line a per cent."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    if not console.is_terminal:
        told = -1

        def on_share(share: float, now: str = "") -> None:
            nonlocal told
            if int(100 * share) > told:
                told = int(100 * share)
                console.print(f"{title} {told} % {now}".rstrip(), soft_wrap=True, highlight=False)

        yield on_share
        return
    what = TextColumn("{task.fields[now]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        what,
        console=console,
    )
    bar = progress.add_task(title, total=1.0, now="")
    with ExitStack() as stack:

        def on_progress(share: float, now: str = "") -> None:
            if not progress.live.is_started:
                stack.enter_context(progress)
            progress.update(bar, completed=share, now=now)

        yield on_progress
