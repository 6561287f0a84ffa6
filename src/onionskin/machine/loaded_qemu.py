"""A QEMU that has loaded its libraries, which takes a third of its start, and waits for its command line.

The preload library is in it, and holds it before its main (csrc/machine/preload.c). It knows of no machine until then.

What must hold: it ends with the process that started it, unless that told it to go on, and by then it can be found by the log
of the machine. Whatever keeps it from running the command line, is found out before it runs: QEMU is started anew then.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from onionskin.errors import StateError
from onionskin.machine.preload import library

ANSWER_SECONDS = 10.0  # one that does not answer for so long is not used
_PROGRAM_BYTES = b"\x7fELF"
_SHOWN_BYTES = 16 << 10  # room for the command line that others see (ps)
_PATH_BYTES_MAX = 4095


class LoadedQemu:
    """One such process, a child of this one. It leads a session.

    Parameters
    ----------
    program : str
        The path of a program, which is no script: those start another one.
    room : int
        Bytes of memory that it is to have by the time at which it is told what to run.

    Raises
    ------
    OSError, StateError
        It cannot be started in this way.
    """

    def __init__(self, program: str, room: int = 0) -> None:
        with open(program, "rb") as file:
            if file.read(len(_PROGRAM_BYTES)) != _PROGRAM_BYTES:
                raise StateError(f"{program} is no program of the processor, so another one runs for it")
        self._program = program
        self._file = _which(program)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with there:
                self._child = subprocess.Popen(
                    # One that the library is not in, by capabilities, ends at once.
                    [program, "-version", " " * _SHOWN_BYTES],
                    cwd="/",
                    env=os.environ
                    | {
                        "LD_PRELOAD": str(library()),
                        "ONIONSKIN_WAIT": str(there.fileno()),
                        "ONIONSKIN_ROOM": str(room),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    umask=0o077,
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            here.close()
            raise
        self._socket = here

    @property
    def pid(self) -> int:
        """The process."""
        return self._child.pid

    def run(
        self, command: Sequence[str], directory: Path, log: int, ram: Path, stand_in: Path, path: str
    ) -> "subprocess.Popen[bytes] | None":
        """Have it run a command line in a directory, as a process that is started there, once.

        Parameters
        ----------
        command : sequence of str
        directory : Path
        log : int
            A descriptor, for its output and its errors.
        ram, stand_in, path
            For the preload library: the RAM file, what stands in for it, and the library's socket in the directory.

        Returns
        -------
        Popen or None
            None: it cannot, and is gone. It has done nothing.
        """
        given: list[str | Path] = [directory, ram.absolute(), stand_in.absolute(), path, *command]
        words = [os.fsencode(one) for one in given]
        fits = max(len(words[1]), len(words[2])) <= _PATH_BYTES_MAX and b"\0" not in b"".join(words)
        try:
            is_same = command[0] == self._program and _which(self._program) == self._file
            if fits and is_same and self._hand_over(words, log) and self._let_go_on():
                self._socket.close()
                return self._child
        except OSError:  # it was killed, or the words are too many for one message
            pass
        self.end()
        return None

    def _hand_over(self, words: Sequence[bytes], log: int) -> bool:
        """Say what to run. Return whether it has that, and can be found by its log, whatever becomes of this process."""
        self._socket.settimeout(ANSWER_SECONDS)
        socket.send_fds(self._socket, [b"".join(one + b"\0" for one in words)], [log])
        return bool(self._socket.recv(1))

    def _let_go_on(self) -> bool:
        """Let it run that. Until then it ends with this process."""
        return bool(self._socket.send(b"x"))

    def end(self) -> None:
        """End it."""
        self._socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()


def _which(program: str) -> tuple[int, int, int, int]:
    """Return what tells a program from another one of its name, such as its next version."""
    found = os.stat(program)  # noqa: PTH116 - a text
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
