"""What commands print: JSON for programs, aligned text for people, progress on a terminal.

JSON keys are those that docs/cli.md lists; times are ISO 8601 in UTC, sizes are bytes. Text goes to stdout,
progress to stderr, and only where stderr is a terminal. rich takes as long to import as all the rest, so it
is imported only where a progress bar is drawn.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from onionskin.base.progress import Progress
from onionskin.base.sizes import format_size
from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.errors import StateError

Draw = Callable[[], str]

STATES = {HOLE: "hole", DATA: "data", ZERO: "zero"}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def show(as_json: bool, value: Any, draw: Draw) -> None:
    """Print ``value`` as JSON, or what ``draw`` makes of it for people."""
    text = as_json_text(value) if as_json else printable(draw())
    if text:
        echo(text)


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text; what keeps it from being printed says that it was the output."""
    with naming("stderr" if err else "stdout"):
        click.echo(text, err=err, nl=nl)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Name a stream in the errors of it, which have no file name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from None


class StandardStream:
    """Bytes from stdin or to stdout; its errors say which of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._file = (sys.stdin if name == "stdin" else sys.stdout).buffer

    def read(self, size: int = -1) -> bytes:
        """Read as a file does."""
        with naming(self._name):
            return self._file.read(size)

    def write(self, data: "bytes | bytearray | memoryview[int]") -> int:
        """Write as a file does."""
        with naming(self._name):
            return self._file.write(data)

    def flush(self) -> None:
        """Hand all that was written over."""
        with naming(self._name):
            self._file.flush()

    def fileno(self) -> int:
        """Give the descriptor."""
        return self._file.fileno()

    def tell(self) -> int:
        """Give the position in a file; a pipe has none."""
        return self._file.tell()


def open_standard_streams() -> None:
    """Put something in place of standard streams that are closed: else a store's file would become one of them.

    What is read from, or written to, such a stream fails as it should.
    """
    for descriptor, (name, way, mode) in enumerate(
        [("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_RDONLY, "w")]
    ):
        if getattr(sys, name) is None:
            try:
                os.fstat(descriptor)
            except OSError:
                opened = os.open(os.devnull, way)
                if opened != descriptor:
                    os.dup2(opened, descriptor)
                    os.close(opened)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - as long as the process


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
