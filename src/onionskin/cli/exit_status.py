"""Exit statuses, and the one place where an exception becomes a line on stderr and a status.

What must hold: an error that onionskin expects never shows a traceback. An error is one line, ``onionskin: what
happened; what to do``. If the reader of the output goes away, no message is printed. ``ONIONSKIN_TRACEBACK=1`` in the
environment shows the traceback as well, for reports of defects.

The messages of the library address a caller in Python. `_IN_WORDS_OF_THE_COMMAND_LINE` turns their advice into words of
the command line.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

import click
from click.exceptions import Abort, Exit

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.errors import (
    ChainError,
    FormatError,
    MachineExistsError,
    MachineNotFoundError,
    OnionskinError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StateError,
    VerifyError,
    VolumeExistsError,
    VolumeNotFoundError,
)

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
EXISTS = 4
STATE = 5
DAMAGE = 6
NO_SPACE = 7
INTERRUPTED = 130
BROKEN_PIPE = 141

EPILOG = """\b
Exit statuses:
  0    done
  1    another error, or a question that was answered with no
  2    wrong usage: an unknown option, a malformed name, a range outside the volume
  3    no such store, volume, snapshot, machine or file
  4    a volume, snapshot, machine or file of that name exists
  5    not now: busy, held by another process, still in use, or --yes is wanted
  6    damage: a format, chain or digest that does not hold
  7    no space
  129  ended by SIGHUP: the terminal went away
  130  interrupted: SIGINT, which is Ctrl-C
  141  the reader of the output went away
  143  ended by SIGTERM

A name is STORE/VOLUME or STORE/VOLUME@SNAPSHOT; a store is a directory. Every command takes --json.
"""

# First match wins: the order is from the particular to the general.
_STATUS_OF: list[tuple[tuple[type[BaseException], ...], int]] = [
    ((VolumeNotFoundError, SnapshotNotFoundError, MachineNotFoundError, FileNotFoundError), NOT_FOUND),
    ((VolumeExistsError, SnapshotExistsError, MachineExistsError, FileExistsError), EXISTS),
    ((StateError,), STATE),
    ((FormatError, ChainError, VerifyError), DAMAGE),
    ((KeyboardInterrupt,), INTERRUPTED),
    ((ValueError,), USAGE),
]

_STATUS_OF_ERRNO = {
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: NO_SPACE,
    errno.EBUSY: STATE,
    errno.EAGAIN: STATE,
    errno.ETXTBSY: STATE,
}

_ADVICE = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another path, or remove it first",
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner and mode",
    errno.ENOSPC: "free space there and run it again",
    errno.EDQUOT: "free space under the quota and run it again",
    errno.EIO: "reading or writing failed below the file system; see the kernel's log, and run onionskin check",
    errno.EROFS: "mount it for writing",
    errno.ENOTDIR: "a directory is wanted there; check the path",
    errno.EISDIR: "a file is wanted there; check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files; close other programs and run it again",
    errno.EFBIG: "the file system, or a limit (ulimit -f), does not let a file be so large",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "a symbolic link leads back to itself; check the path",
    errno.ENOMEM: "close other programs, or raise the limit of memory (ulimit -v)",
    errno.ENXIO: "it is a socket, or a device that is not there; give a file, a pipe or another device",
    errno.EBADF: "it is closed, or not open that way",
}
# A file of a store that is missing, or is something else, is damage and not a path that was typed wrongly.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_FREE_SPACE_OF_STORE = "free space there (discard or merge snapshots, delete volumes) and run it again"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

# Messages of the library as patterns, and the words of a command for each. Tests check that none is missing or stale.
_IN_WORDS_OF_THE_COMMAND_LINE = [
    (r"pass (recursive|force|trust)\b", r"give --\1"),
    (r"ask for a recursive removal\b", "give --recursive"),
    (r"say that you trust it if", "give --trust if"),
    (r" \(--trust on the command line, trust=True in Python\)", " (--trust)"),
    (r"create volumes with a digest to verify them", "create --digest takes one"),
    (r"stop that, work through it \(onionskin\.connect\)", "stop that"),
    (r"; open it, or start 'onionskin serve'", "; start 'onionskin serve'"),
    (r"; open it for writing and close it, which makes", "; take a snapshot of it, which makes"),
    (r"close (it|the volume) and open it again", "run it again"),
    (r"close the store, mend the disk, and open it again", "mend the disk, and run it again"),
    (r"; open the volume again", "; run it again"),
    (r"or say that it is the disk: format raw", "or give --format raw to take its bytes for the disk"),
    (r"import its bytes as they are with format raw", "give --format raw to take its bytes for the disk"),
    (r"\b(give|or) (cpus|memory|kernel|initrd|append)=", r"\1 --\2"),
    (r"\bgive cpu_model=", "give --cpu-model"),
    (r"\bgive machine_type=", "give --machine-type"),
]


class Ended(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does: its work is undone, or can be continued."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does. One that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for one in ours:  # a second one would interrupt the steps that undo the work
            signal.signal(one, signal.SIG_IGN)
        raise Ended(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is not _end_next_time:
                signal.signal(number, signal.SIG_DFL)


def _end_next_time(number: int, frame: FrameType | None) -> None:
    """Take no notice of a signal, but have the next one end the process at once, in case something keeps it from its end."""
    signal.signal(number, signal.SIG_DFL)


def status_of(error: BaseException) -> int:
    """Return the exit status of an error."""
    if isinstance(error, Ended):
        return 128 + error.number
    if isinstance(error, OSError) and error.errno in _MISSING and _is_in_store(error):
        return DAMAGE
    for classes, status in _STATUS_OF:
        if isinstance(error, classes):
            return status
    if isinstance(error, OSError) and error.errno is not None:
        return _STATUS_OF_ERRNO.get(error.errno, FAILED)
    return FAILED


def line_of(error: BaseException) -> str:
    """Describe an error in one line: what happened; what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        what = error.strerror or os.strerror(error.errno)
        if error.filename is not None:
            what = f"{os.fsdecode(error.filename)}: {what}"
        advice = _advice(error)
        # A message that already gives advice is left as it is.
        text = f"{what}; {advice}" if advice and "; " not in (error.strerror or "") else what
    elif isinstance(error, MemoryError):
        text = "out of memory; close other programs and run it again"
    else:
        text = str(error) or type(error).__name__
    for pattern, said in _IN_WORDS_OF_THE_COMMAND_LINE:
        text = re.sub(pattern, said, text)
    return output.cell(" ".join(text.split()))


def _advice(error: OSError) -> str | None:
    if error.errno in _NO_SPACE and _is_in_store(error):
        return _FREE_SPACE_OF_STORE
    if error.errno in _MISSING and _is_in_store(error):
        return "the store is damaged: run onionskin check, and restore the file from a copy of the store"
    return _ADVICE.get(error.errno or 0)


def _is_in_store(error: OSError) -> bool:
    """Whether an error is about a file of a store, or about one of its directories."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    from onionskin.storage.layout import CATALOG, DIRECTORIES, Layout

    path = FilePath(os.fsdecode(error.filename))
    # By its name: what was typed may be a path into a store too, and a store may lie in a directory of other things.
    is_within = path.parent.name in DIRECTORIES
    store = path.parent.parent if is_within else path.parent
    names = {*DIRECTORIES, *(file.name for file in Layout(store).files)}
    with contextlib.suppress(OSError):
        return (is_within or path.name in names) and os.path.lexists(store / CATALOG)
    return False


def say(line: str) -> None:
    """Write one line to stderr; a stderr that is gone is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"onionskin: {line}", err=True)


class Verbs(click.Group):
    """The group of all commands, which ends the process with a documented status."""

    _has_process = False  # whether it runs in a process of its own, whose signals are its own too

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in the order in which a user meets them, not by the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs under what they are for."""
        from onionskin.cli import verbs

        verbs.format_sections(self, ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one may be meant."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from onionskin.cli import verbs

            meant = verbs.suggestion(args[0], self.commands, behind=args[1] if len(args) > 1 else "")
            raise click.UsageError(f"No such command {args[0]!r}{meant}", ctx)
        found = super().resolve_command(ctx, args)
        # From here on there may be something to undo. Until here Ctrl-C ended the process as the system does it.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            self._has_process = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return found

    def _is_done(self) -> None:
        """Have signals change nothing any more, since all is done and printed: the status says that.

        So what was cut short always says so in a line.
        """
        if self._has_process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(signal.getsignal(number)):
                    signal.signal(number, _end_next_time)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run one command line and exit; never returns."""
        instruction = os.environ.get("_ONIONSKIN_COMPLETE")
        if instruction:
            from click.shell_completion import shell_complete

            from onionskin.cli import completion  # noqa: F401  it tells click of its bash

            try:
                completed: int = shell_complete(self, {}, "onionskin", "_ONIONSKIN_COMPLETE", instruction)
            except (click.ClickException, OnionskinError, OSError, ValueError, KeyboardInterrupt):
                completed = 1  # the line is not finished, and what is wrong with it is said when it is run
            sys.exit(completed)
        for of_click in ("standalone_mode", "complete_var", "windows_expand_args"):
            extra.pop(of_click, None)
        arguments = sys.argv[1:] if args is None else list(args)
        try:
            with ended_by_signals():
                status = self._run(arguments, extra)
                _give_up_streams()
                self._is_done()
        except (KeyboardInterrupt, RuntimeError) as error:
            ended = _interrupt_behind(error)
            if ended is None:
                raise
            how = f"ended by {signal.Signals(ended.number).name}" if isinstance(ended, Ended) else "interrupted"
            say(f"{how}; run the command again to go on or to begin anew")
            status = status_of(ended)
            _give_up_streams()
        sys.exit(status)

    def _run(self, arguments: list[str], extra: dict[str, Any]) -> int:
        try:
            with output.naming("stdout"):  # --help and --version print in here
                ctx = self.make_context("onionskin", arguments, **extra)
            with ctx:
                self.invoke(ctx)
            output.echo("", nl=False)  # flushes
        except Exit as leave:
            return leave.exit_code
        except click.ClickException as wrong:
            return _usage(wrong)
        except Abort:
            say("nothing was changed")
            return FAILED
        except BrokenPipeError:
            _silence(sys.stdout)
            return BROKEN_PIPE
        except (OnionskinError, OSError, ValueError, MemoryError) as error:
            if os.environ.get("ONIONSKIN_TRACEBACK"):
                import traceback

                traceback.print_exc()
            say(line_of(error))
            return status_of(error)
        return OK


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that an error is, or that it came from.

    An interrupt within `threading.Condition.wait` can lose the condition's lock, and is a RuntimeError of that then.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found


def _usage(wrong: click.ClickException) -> int:
    message = output.cell(" ".join(wrong.format_message().split())).rstrip(".")
    ctx = getattr(wrong, "ctx", None)
    if isinstance(wrong, click.NoSuchOption) and ctx is not None:
        from onionskin.cli import verbs

        options = [one for param in ctx.command.params for one in param.opts]
        if meant := verbs.option_meant(ctx.command.name, wrong.option_name, options):
            message = f"{output.cell(wrong.message).rstrip('.')}{meant}"
    say(f"{message}; see {ctx.command_path if ctx is not None else 'onionskin'} --help")
    return USAGE


def _silence(stream: TextIO) -> None:
    """Keep the interpreter from flushing into a closed or full stream once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _give_up_streams() -> None:
    """Drop output that could not be printed: it was reported. Else the interpreter would end with its own status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _silence(stream)
