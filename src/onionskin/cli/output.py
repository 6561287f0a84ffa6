"""The output of commands: JSON for programs, aligned text for people, progress on a terminal.

JSON keys are those that docs/cli.md lists. Times are ISO 8601 in UTC, and sizes are bytes. Text goes to stdout.
Progress goes to stderr, and only if stderr is a terminal. The import of rich takes as long as all the rest, so rich is
imported only to draw a progress bar, and what else few verbs need is imported where it is used.
"""

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO, Any

import click

from onionskin.base.fsync import sync_file
from onionskin.base.progress import Progress
from onionskin.base.sizes import format_size
from onionskin.base.states import DATA, HOLE, ZERO

Draw = Callable[[], str]

_closed: set[str] = set()  # the standard streams that were closed when the program started
_JOINERS = "\u200c\u200d"  # without them some languages cannot be written
STATES = {HOLE: "hole", DATA: "data", ZERO: "zero"}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def show(as_json: bool, value: Any, draw: Draw) -> None:
    """Print ``value`` as JSON, or as ``draw`` shows it to people."""
    text = as_json_text(value) if as_json else printable(draw())
    if text:
        echo(text)


def tell(as_json: bool, value: Any, draw: Draw) -> None:
    """Print what was done, as `show` does.

    Where no stdout was given nothing is printed, since nobody asked for it, and what was done is done: a status other than 0
    would say that it was not. What was asked for, `show` prints, and that fails there. Where printing fails, the error says
    that it is done: nobody shall do it twice.
    """
    if not is_heard():
        return
    try:
        show(as_json, value, draw)
    except OSError as error:
        if error.errno is None or error.errno == errno.EPIPE:  # who read it has gone, and wants no word
            raise
        what = f"{error.strerror}; what was asked for is done, and only this could not be said"
        raise OSError(error.errno, what, error.filename) from None


def is_heard() -> bool:
    """Whether there is a stdout to print to: none if it was closed when the program started, or opened only to read."""
    if "stdout" in _closed:
        return False
    import fcntl

    try:
        return fcntl.fcntl(sys.stdout.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except (OSError, ValueError):  # it has no descriptor, or that is gone, which printing says
        return True


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text; an error names the output as its cause."""
    name, stream = ("stderr", sys.stderr) if err else ("stdout", sys.stdout)
    with naming(name):
        if _waits(stream):
            click.echo(text, err=err, nl=nl)
            return
        whole = (text if stream.isatty() else click.unstyle(text)) + "\n" * nl
        out = StandardStream(name, stream.buffer)
        out.write(whole.encode(stream.encoding, stream.errors or "strict"))
        out.flush()


def _waits(stream: Any) -> bool:
    """Whether a write to it waits for its reader. Into a pipe that does not, click writes what fits, and the rest is lost."""
    try:
        return os.get_blocking(stream.fileno())
    except (OSError, ValueError):  # it has no descriptor, or that is gone, which printing says
        return True


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Name a stream in its errors, which have no file name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from None


class StandardStream:
    """Bytes from stdin or to stdout, or to a file that stands in for it; its errors say which of them."""

    def __init__(self, name: str, file: "IO[bytes] | None" = None) -> None:
        self.name = name
        self._file = file or (sys.stdin if name == "stdin" else sys.stdout).buffer

    def read(self, size: int = -1) -> bytes:
        """Read as a file does. It waits where there is nothing yet, so b"" is always the end."""
        with naming(self.name):
            while (data := self._file.read(size)) is None:
                self._wait()
            return data

    def write(self, data: "bytes | bytearray | memoryview[int]") -> int:
        """Write all of it. The file underneath may take less, where it has no buffer (PYTHONUNBUFFERED) or does not wait."""
        rest = memoryview(data).cast("B")
        with naming(self.name):
            while rest:
                try:
                    taken = self._file.write(rest)
                except BlockingIOError as full:
                    taken = full.characters_written
                rest = rest[taken or 0 :]
                if not taken:
                    self._wait()
        return len(data)

    def flush(self) -> None:
        """Pass on all written bytes."""
        with naming(self.name):
            while True:
                try:
                    self._file.flush()
                except BlockingIOError:
                    self._wait()
                else:
                    return

    def finish(self) -> None:
        """Pass on all written bytes. Those that went to a file or a block device are durable then, as in a file of a name."""
        self.flush()
        try:
            mode = os.fstat(self.fileno()).st_mode
        except io.UnsupportedOperation:  # a program has put an object of its own there
            return
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            with naming(self.name):
                sync_file(self.fileno())  # BARRIER: streamed file

    def _wait(self) -> None:
        """Wait until it is ready: who started us, or shares a terminal or a pipe with us, may have made it non-blocking."""
        import select

        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN if self.name == "stdin" else select.POLLOUT)
        poll.poll()

    def refuse_closed(self) -> None:
        """Raise EBADF where it is closed, or not open this way: before anything is made for it."""
        import fcntl

        wanted = os.O_RDONLY if self.name == "stdin" else os.O_WRONLY
        with naming(self.name):
            mode = fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
        if mode not in (wanted, os.O_RDWR):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)

    def fileno(self) -> int:
        """Give the descriptor."""
        return self._file.fileno()

    def tell(self) -> int:
        """Give the position in a file; a pipe has none."""
        return self._file.tell()


def open_standard_streams() -> None:
    """Replace standard streams that are closed: else a store's file would become one of them.

    A read from, or a write to, such a stream fails as it should.
    """
    for descriptor, (name, way, mode) in enumerate(
        [("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_RDONLY, "w")]
    ):
        if getattr(sys, name) is None:
            _closed.add(name)
            try:
                os.fstat(descriptor)
            except OSError:
                opened = os.open(os.devnull, way)
                if opened != descriptor:
                    os.dup2(opened, descriptor)
                    os.close(opened)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - as long as the process


def as_json_text(value: Any) -> str:
    """Write a value as JSON in ASCII, so that no locale can spoil it."""
    import json

    return json.dumps(value, indent=2)


def as_json_line(value: Any) -> str:
    """Write a value as JSON on one line, for programs that read lines."""
    import json

    return json.dumps(value)


def printable(text: str) -> str:
    """Replace characters that the encoding of stdout lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def cell(text: str) -> str:
    """Make one line of a text from elsewhere, without anything that a terminal would obey, and nothing that nobody sees."""
    if text.isprintable():
        return text
    import unicodedata

    # Blanks of other scripts, joiners and what is newer than this Python belong to words.
    return "".join(
        c if c.isprintable() or c in _JOINERS or unicodedata.category(c) in ("Zs", "Cn", "Co") else "\ufffd"
        for c in text
    )


def exact_cell(text: str) -> str:
    """Make one line of a text for programs, in which a name is exactly what it is."""
    if text.isprintable():
        return text
    from onionskin.base.naming import on_a_line

    return on_a_line(text)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Align columns; those whose headings ``right`` names (blanks between them) hold numbers."""
    if not rows:
        return ""
    to_right = [heading in right.split() for heading in headings]
    cells = [list(headings), *([cell(value) for value in row] for row in rows)]
    widths = [max(columns_of(row[column]) for row in cells) for column in range(len(headings))]
    lines = []
    for row in cells:
        columns = zip(row, widths, to_right, strict=True)
        aligned = (_padded(value, width, to_right=flush) for value, width, flush in columns)
        lines.append("  ".join(aligned).rstrip())
    lines[0] = click.style(lines[0], bold=True)
    return "\n".join(lines)


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: wide characters take two, those that combine none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1
        for c in text
    )


def _padded(text: str, width: int, *, to_right: bool) -> str:
    blanks = " " * (width - columns_of(text))
    return blanks + text if to_right else text + blanks


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Align labels and values, one pair a line; pairs without a value are left out."""
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label.ljust(width)}  {cell(value)}" for label, value in pairs if value)


def size(size_bytes: int | None) -> str:
    """Write a size for people; none is a dash."""
    return "-" if size_bytes is None else format_size(size_bytes)


def when(time: datetime | None) -> str:
    """Write a time for people, in the local time zone, with its offset."""
    return "" if time is None else time.astimezone().isoformat(" ", "seconds")


def timestamp(time: datetime | None) -> str | None:
    """Write a time for programs."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def progress(title: str, as_json: bool) -> Iterator[Progress | None]:
    """Return a callback that draws a bar, or None without a terminal."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    class VisibleCursor(Console):
        """Hides no cursor: a process that is stopped (Ctrl-Z) or killed could not show it again to the shell."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    columns = (BarColumn(), TextColumn("{task.fields[amount]}"), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar("{task.description}", *columns, console=VisibleCursor(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(cell(title)), total=None, amount="")
        yield lambda done, total: bar.update(task, completed=done, total=total or None, amount=amount(done, total))


def amount(done: int, total: int) -> str:
    """Write how much is done for people; a total of 0 is one that nobody knows."""
    return f"{format_size(done)} of {format_size(total)}" if total else format_size(done)
