"""What a killed supervisor left that no record names: processes that it had just started, drafts, a copy of RAM in memory.

A process is recorded when it is ready, so one that was started a moment before the supervisor was killed is found by the log
in the machine's directory to which it writes its errors, which it has from its first instruction on, and by the socket there
on which it listens. It has never run the guest. Nor can anybody reach one whose directory was removed by hand: it is found by
the log that it has open still.

What must hold: only who has the machine (its RAM volume, open for writing) ends anything here, since the processes of a
machine that somebody starts just now are not recorded either.

A copy of RAM goes with its supervisor, or with whoever finds the machine. Where the directory is gone too, nobody finds that:
so each copy has a lock, which its supervisor and its hypervisor have as long as either lives, and each start that makes a
copy drops those of all machines, of whatever store, which nobody has.
"""

import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from onionskin.base.files import CANNOT_LOOK
from onionskin.base.sockets import connect_unix
from onionskin.errors import StateError
from onionskin.machine.record import CONTROL, DISKS, SERVER_LOG, ProcessId, drafts, drop_drafts

# The hypervisor first: while it ends it may write to its disks.
SOCKETS, LOGS = ("qmp", DISKS), ("qemu.log", SERVER_LOG)
END_SECONDS = 10.0
_CONNECT_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")
_SHARED_MEMORY = Path("/dev/shm")
_NAME, _LOCKED = "onionskin-", ".locked.ram"  # those of an older onionskin, which are not locked, end in .ram alone
_DELETED = " (deleted)"  # as the kernel says of a file: the directory of a machine may have been removed by hand


def copy_of_ram(directory: Path, pid: int) -> Path:
    """Return where a process keeps the RAM of a machine that writes to it, in memory."""
    return _SHARED_MEMORY / f"{_prefix(directory)}{pid}{_LOCKED}"


def make_copy(path: Path) -> int:
    """Make an empty file for a copy of RAM, and return its descriptor: as long as any process has that, the copy stays."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody found it before it was locked


def drop_forgotten_copies() -> None:
    """Drop the copies of RAM of all machines that no process has. Nobody may know of those machines any more."""
    for path in _SHARED_MEMORY.glob(f"{_NAME}*{_LOCKED}"):
        with suppress(OSError):  # somebody has it, or it is another user's
            _drop_if_forgotten(path)


def _drop_if_forgotten(path: Path) -> None:
    if not _is_ours(path.stat(follow_symlinks=False)):  # root could open those of all users
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _refuse_open(descriptor)
        now = path.stat(follow_symlinks=False)
        if _is_ours(found) and (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino):
            path.unlink()
    finally:
        os.close(descriptor)


def _is_ours(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def _refuse_open(descriptor: int) -> None:
    """Raise BlockingIOError where a process has that file open to write, or mapped, though not by what was locked.

    A program that starts QEMU may have closed what it was handed, and the supervisor may have been killed.
    """
    try:
        fcntl.fcntl(
            descriptor, fcntl.F_SETSIG, signal.SIGURG
        )  # for who opens it just now; SIGIO would end this process
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        raise
    except OSError:  # a kernel that does not know leases
        return
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def are_there(directory: Path) -> bool:
    """Whether there is anything that `end` would end, if nobody has the machine."""
    return any(True for _ in _copies(directory)) or bool(drafts(directory) or processes([directory])[directory])


def end(directory: Path, *, is_new: bool = False) -> None:
    """End the processes that were started in the directory of a machine, and drop drafts and copies of its RAM.

    The caller has the machine, and has started nothing yet. One that `is_new` never ran: no directory of it was removed.
    """
    for process in processes([directory], is_new=is_new)[directory]:
        process.end(END_SECONDS)
    drop_drafts(directory)
    _drop_sockets_of_others(directory)
    for path in _copies(directory):
        with suppress(OSError):  # another user's
            path.unlink()


def _drop_sockets_of_others(directory: Path) -> None:
    """Remove the sockets of another user's processes, which have ended: whether they do, the kernel tells that user alone.

    In the store of a group, each member may run a machine in turn.
    """
    for name in (CONTROL, *SOCKETS):
        with suppress(OSError):
            found = (directory / name).lstat()
            if stat.S_ISSOCK(found.st_mode) and found.st_uid != os.geteuid():
                (directory / name).unlink()


def end_servers(directory: Path) -> None:
    """End the servers of disks that were started in the directory of a machine, whose hypervisor runs.

    The caller has the machine, and has started none yet.
    """
    for process in processes([directory], SERVER_LOG)[directory]:
        process.end(END_SECONDS)


def processes(
    directories: Iterable[Path], only: str | None = None, *, is_new: bool = False
) -> dict[Path, list[ProcessId]]:
    """Return the hypervisors and the servers of disks that were started in directories of machines, in that order.

    With `only`, those that write to a log of that name. All processes are looked at, but for machines that are new.
    """
    found: dict[Path, list[ProcessId]] = {directory: [] for directory in directories}
    kinds = [(name, log) for name, log in zip(SOCKETS, LOGS, strict=True) if only in (None, log)]
    logs: dict[str, tuple[Path, str]] = {}
    for one in found:
        for _, log in kinds:
            if not is_new or (one / log).exists():
                path = os.path.realpath(one / log)
                logs |= {path: (one, log), path + _DELETED: (one, log)}
    writers = list(_writers(logs))
    for name, log in kinds:
        for directory, those in found.items():
            listener = _listener(directory / name)
            new = [] if listener is None else [listener]
            new += [process for path, process in writers if logs[path] == (directory, log)]
            those += [one for one in dict.fromkeys(new) if one not in those]
    return found


def _writers(logs: Iterable[str]) -> Iterator[tuple[str, ProcessId]]:
    """Find the processes whose errors go to one of these files. Who only reads a log has it elsewhere."""
    if not logs:
        return
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            path = os.readlink(f"/proc/{pid}/fd/2")  # noqa: PTH115 - a Path of each takes three times as long
            if path in logs and (one := ProcessId.of(int(pid))).is_alive:
                yield path, one


def _copies(directory: Path) -> Iterator[Path]:
    return _SHARED_MEMORY.glob(f"{_prefix(directory)}*.ram") if directory.is_dir() else iter(())


def _prefix(directory: Path) -> str:
    """Return how the names of its copies begin. A copy of a store has machines of the same id in other directories."""
    return f"{_NAME}{directory.name}.{directory.stat().st_ino:x}."


def _listener(path: Path) -> ProcessId | None:
    """Return the process that listens on a socket, or None where none does."""
    try:
        with connect_unix(path, seconds=_CONNECT_SECONDS) as connection:
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except (OSError, StateError) as error:
        if isinstance(error, OSError) and error.errno in CANNOT_LOOK:
            raise
        return None
    pid = _CREDENTIALS.unpack(found)[0]
    return ProcessId.of(pid) if pid > 0 else None
