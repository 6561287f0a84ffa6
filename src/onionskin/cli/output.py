"""What commands print: JSON for programs, aligned text for people, progress on a terminal.

JSON keys are those that docs/cli.md lists; times are ISO 8601 in UTC, sizes are bytes. Text goes to stdout,
progress to stderr, and only where stderr is a terminal. rich takes as long to import as all the rest, so it
is imported only where a progress bar is drawn.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from onionskin.errors import StateError
from onionskin.sizes import format_size

Progress = Callable[[int, int], None]
Draw = Callable[[], str]

STATES = {0: "hole", 1: "data", 2: "zero"}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def show(as_json: bool, value: Any, draw: Draw) -> None:
    """Print ``value`` as JSON, or what ``draw`` makes of it for people."""
    text = as_json_text(value) if as_json else printable(draw())
    if text:
        click.echo(text)


def as_json_text(value: Any) -> str:
    """Write a value as JSON; all of it ASCII, so that no locale can spoil it."""
    return json.dumps(value, indent=2)


def as_json_line(value: Any) -> str:
    """Write a value as JSON on one line, for who reads lines."""
    return json.dumps(value)


def printable(text: str) -> str:
    """Replace what the encoding of stdout lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def cell(text: str) -> str:
    """Make one line of a text that came from elsewhere, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Align columns; those whose headings ``right`` names (blanks between them) hold numbers."""
    if not rows:
        return ""
    to_right = [heading in right.split() for heading in headings]
    cells = [list(headings), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = []
    for row in cells:
        columns = zip(row, widths, to_right, strict=True)
        aligned = (value.rjust(width) if flush else value.ljust(width) for value, width, flush in columns)
        lines.append("  ".join(aligned).rstrip())
    lines[0] = click.style(lines[0], bold=True)
    return "\n".join(lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Align labels and values, one pair a line; pairs without a value are left out."""
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label.ljust(width)}  {cell(value)}" for label, value in pairs if value)


def size(size_bytes: int | None) -> str:
    """Write a size for people; none is a dash."""
    return "-" if size_bytes is None else format_size(size_bytes)


def when(time: datetime | None) -> str:
    """Write a time for people, in the local time zone."""
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def timestamp(time: datetime | None) -> str | None:
    """Write a time for programs."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def progress(title: str, as_json: bool) -> Iterator[Progress | None]:
    """Give a callback that draws a bar, or None where nobody watches."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar("{task.description}", *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(cell(title)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def confirm_loss(question: str, loss: str, *, yes: bool) -> None:
    """Ask on a terminal before changes are lost; elsewhere want --yes.

    Raises
    ------
    StateError
        Nobody can be asked and ``yes`` is false. ``loss`` says what would be lost.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StateError(f"{loss}; give --yes to drop them, or take a snapshot first")
    click.confirm(cell(question), err=True, abort=True)
