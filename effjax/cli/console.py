"""What the commands show: results on stdout, progress and complaints on stderr."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

VERDICT_STYLES = {
    "indistinguishable": "bold green",
    "slightly worse": "yellow",
    "inconclusive": "cyan",
    "worse": "red",
    "broken": "bold red",
}


def out() -> Console:
    """Results. A pipe or a log is as wide as the table needs."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def say(text: str) -> None:
    """One line about what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def complain(error: BaseException | str) -> None:
    """The one line that an error gets: what is wrong, where, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        remedies = {28: "; free some space or choose another disk", 13: "; choose a place you may write to"}
        text = f"{where}{error.strerror}{remedies.get(error.errno or 0, '')}"
    else:
        text = str(error)
    say(f"effjax: error: {' '.join(text.splitlines()) if len(text.splitlines()) < 3 else text}")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1, title: str | None = None, gap: int = 2
) -> Table:
    """A table whose first `left` columns are text and the others numbers."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, gap, 0, 0), pad_edge=False
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", no_wrap=True, header_style="bold dim")
    for row in rows:
        made.add_row(*map(str, row))
    return made


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives `report(stage, done, total)`: a bar with the time left on a terminal, a line a stage elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        yield _lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, Any] = {}
    with bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


_QUIET = 2.0  # seconds between two lines about one stage


def _lines() -> Callable[[str, int, int], None]:
    started: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in started:
            started[stage], last[stage] = (now, done), now
            say(f"{stage} ..." if not done else f"{stage}: {done} of {total} were done before ...")
            if done < total:
                return
        begin, before = started[stage]
        if done == total:
            say(f"{stage}: {total} done in {now - begin:.1f} s")
        elif now - last[stage] >= _QUIET:
            last[stage] = now
            left = (now - begin) / (done - before) * (total - done) if done > before else None
            say(f"{stage}: {done} of {total}" + ("" if left is None else f", {left:.0f} s left"))

    return report
