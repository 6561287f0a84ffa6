"""Exit statuses, and the one place where an exception becomes a line on stderr and a status.

What must hold: a condition that onionskin foresees never shows a traceback; an error is one line,
``onionskin: what happened; what to do``; a reader of our output that goes away is not an error worth a word.
``ONIONSKIN_TRACEBACK=1`` in the environment shows the traceback as well, for reports of defects.
"""

import contextlib
import errno
import os
import sys
import traceback
from typing import Any

import click
from click.exceptions import Abort, Exit
from click.shell_completion import shell_complete

from onionskin.cli import output
from onionskin.errors import (
    ChainError,
    FormatError,
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
  3    no such store, volume, snapshot or file
  4    a volume, snapshot or file of that name exists
  5    not now: busy, held by another process, still in use, or --yes is wanted
  6    damage: a format, chain or digest that does not hold
  7    no space
  130  interrupted
  141  the reader of the output went away

A name is STORE/VOLUME or STORE/VOLUME@SNAPSHOT; a store is a directory. Every command takes --json.
"""

# First match wins: the order is from the particular to the general.
_STATUS_OF: list[tuple[tuple[type[BaseException], ...], int]] = [
    ((VolumeNotFoundError, SnapshotNotFoundError, FileNotFoundError), NOT_FOUND),
    ((VolumeExistsError, SnapshotExistsError, FileExistsError), EXISTS),
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
    errno.ENOENT: "check the path; only create and import make a store",
    errno.EEXIST: "choose another path, or remove it first",
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner and mode",
    errno.ENOSPC: "free space (discard or merge snapshots) and run it again",
    errno.EDQUOT: "free space under the quota and run it again",
    errno.EIO: "the medium failed; see the kernel's log, and run onionskin check",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOTDIR: "a directory is wanted there; check the path",
    errno.EISDIR: "a file is wanted there; check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EFBIG: "the file system cannot hold a file of that size",
}


def status_of(error: BaseException) -> int:
    """Give the exit status that stands for an error."""
    for classes, status in _STATUS_OF:
        if isinstance(error, classes):
            return status
    if isinstance(error, OSError) and error.errno is not None:
        return _STATUS_OF_ERRNO.get(error.errno, FAILED)
    return FAILED


def line_of(error: BaseException) -> str:
    """Say an error in one line: what happened; what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        what = error.strerror or os.strerror(error.errno)
        if error.filename is not None:
            what = f"{os.fsdecode(error.filename)}: {what}"
        advice = _ADVICE.get(error.errno)
        # A message that advises already is left as it is.
        text = f"{what}; {advice}" if advice and ";" not in what else what
    elif isinstance(error, MemoryError):
        text = "out of memory; close other programs and run it again"
    else:
        text = str(error) or type(error).__name__
    return output.cell(" ".join(text.split()))


def say(line: str) -> None:
    """Write one line of ours to stderr; a stderr that is gone is not worth failing for."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"onionskin: {line}", err=True)


class Verbs(click.Group):
    """The group of all commands, which ends the process with a documented status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in the order in which they are met, not by the alphabet."""
        return list(self.commands)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run one command line and exit; never returns."""
        instruction = os.environ.get("_ONIONSKIN_COMPLETE")
        if instruction:
            sys.exit(shell_complete(self, {}, "onionskin", "_ONIONSKIN_COMPLETE", instruction))
        for of_click in ("standalone_mode", "complete_var", "windows_expand_args"):
            extra.pop(of_click, None)
        arguments = sys.argv[1:] if args is None else list(args)
        sys.exit(self._run(arguments, extra))

    def _run(self, arguments: list[str], extra: dict[str, Any]) -> int:
        try:
            with self.make_context("onionskin", arguments, **extra) as ctx:
                self.invoke(ctx)
            sys.stdout.flush()
        except Exit as leave:
            return leave.exit_code
        except click.ClickException as wrong:
            return _usage(wrong)
        except Abort:
            say("nothing was changed")
            return FAILED
        except BrokenPipeError:
            _silence_stdout()
            return BROKEN_PIPE
        except KeyboardInterrupt:
            say("interrupted; run the command again to go on or to begin anew")
            return INTERRUPTED
        except (OnionskinError, OSError, ValueError, MemoryError) as error:
            if os.environ.get("ONIONSKIN_TRACEBACK"):
                traceback.print_exc()
            say(line_of(error))
            return status_of(error)
        return OK


def _usage(wrong: click.ClickException) -> int:
    message = output.cell(" ".join(wrong.format_message().split())).rstrip(".")
    ctx = getattr(wrong, "ctx", None)
    say(f"{message}; see {ctx.command_path if ctx is not None else 'onionskin'} --help")
    return USAGE


def _silence_stdout() -> None:
    """Keep the interpreter from flushing into the closed pipe once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
