"""What is on the disk about a machine that runs: who supervises it, which processes belong to it, how it ended.

A supervisor may be killed at any instant, and its machine runs on. Whoever comes next finds the processes by what is recorded
here, and takes them over.

What must hold: a process is meant by its id, its start and the boot of this host, so no other one is taken for it. A record
is whole, or that of before. It need not survive a crash of the host: then no process is left that it could mean.
"""

import errno
import json
import os
import select
import signal
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Self

from onionskin.base import modes
from onionskin.base.files import CANNOT_LOOK
from onionskin.base.paths import FilePath
from onionskin.errors import FormatError, StateError
from onionskin.storage.locks import start_ticks

DIRECTORY = "machines"
JSON_BYTES_MAX = 1 << 20  # what is written has the user's arguments for the hypervisor, which are less
# Where a start is told from what alone, beside the ids of snapshots: what a fork was made from, and the disks without RAM.
BEGINNING, DISKS_ALONE = "beginning", "disks"
PID_END = 1 << 22  # of Linux
KILLED_SECONDS = 10.0  # to the end of a process that was killed
RECORD, ENDED, UNDER_WAY, CONTROL, DISKS, SUPERVISOR_LOG, SERVER_LOG = (
    *("running.json", "ended.json", "under-way.json", "control", "nbd"),
    *("supervisor.log", "server.log"),
)
# How the names of drafts begin: of these files (`Staged`), and of sockets before they have their names (`UnixListener`).
_DRAFTS = (f"{RECORD}.", f"{ENDED}.", f"{UNDER_WAY}.", f".{CONTROL}.", f".{DISKS}.")


def directory_of(root: str | Path, machine: bytes) -> Path:
    """Return the directory of a machine, in the store."""
    return Path(root) / DIRECTORY / machine.hex()


def make_directory(root: str | Path, machine: bytes) -> Path:
    """Make that directory, for who may use the store. The sockets in it are for the user alone who runs the machine."""
    path = directory_of(root, machine)
    is_shared = modes.is_shared(FilePath(root))
    for one in (path.parent, path):
        try:
            one.mkdir(mode=0o700)
            modes.give_directory_to_owner(one, FilePath(root))
        except FileExistsError:
            if one.is_symlink() or not one.is_dir():
                raise StateError(
                    f"{one} is no directory; remove what is there: a store keeps the files of running machines in it"
                ) from None
        if is_shared and not modes.is_shared(FilePath(one)):
            with suppress(PermissionError):  # another member's, from before it was shared
                one.chmod(0o2770)
    return path


def _share_own(descriptor: int, path: Path) -> None:
    """Let the other members of a group use a file that this user may have made just now."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        modes.share_file(descriptor, path)


@cache
def boot_id() -> str:
    """Return the id of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, which is not taken for a later one with the same number."""

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return that of a process that runs."""
        return cls(pid, start_ticks(pid), boot_id())

    @classmethod
    def checked(cls, value: dict[str, Any]) -> Self:
        """Return one that was written. Raise TypeError or KeyError where it is something else."""
        found = cls(value["pid"], value["ticks"], value["boot"])
        is_process = type(found.pid) is int and 0 < found.pid < PID_END and type(found.ticks) is int
        if not is_process or type(found.boot) is not str:
            raise TypeError("no process")
        return found

    @property
    def is_alive(self) -> bool:
        """Whether it runs. One that has ended, and was not waited for yet, does not."""
        return (
            bool(self.ticks) and self.boot == boot_id() and start_ticks(self.pid) == self.ticks and not self._is_dead()
        )

    def _is_dead(self) -> bool:
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError as error:
            if error.errno in CANNOT_LOOK:
                raise
            return True
        return text.rpartition(")")[2].split()[0] in ("Z", "X")

    def end(self, seconds: float) -> None:
        """Ask it to end, wait so long, and kill it then. On return it has given up its files, where that can be reached."""
        if not self.ticks or self.boot != boot_id():
            return
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if start_ticks(self.pid) != self.ticks:  # it is another one that the descriptor means
                    return
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                # Of one that was killed, threads may be there for a moment longer, with its files and their locks.
                for number, limit in ((signal.SIGTERM, seconds), (signal.SIGKILL, KILLED_SECONDS)):
                    if poll.poll(0):
                        return
                    signal.pidfd_send_signal(descriptor, number)
                    poll.poll(limit * 1000)
            finally:
                os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Record:
    """A machine that runs.

    Attributes
    ----------
    supervisor, hypervisor, server : ProcessId or None
        Who supervises it, runs it, and serves its disks.
    configuration, recorded : str
        JSON of what it was started with.
    generation, mac_seed : str
        Of its identity, as the process was started with it.
    ram_file : str
        What its RAM is mapped over.
    is_tracked : bool
        Whether what it writes there is noted.
    mapped : str or None
        The layer of the RAM volume that the file was made from, in hexadecimal.
    is_paused : bool
        Whether its user wants it to stand still.
    is_reverting : bool
        Whether it is being put back in place: until that has ended, RAM and disks may not agree.
    is_frozen : bool
        Whether its file systems may be frozen.
    labels : list of str
        What its hypervisor calls its disks, where that is not their names.
    told : str
        The VM generation id that the guest was told behind a revert; empty: that of its identity.
    is_waiting : bool
        Whether it waits in a pool for a fork, as far as its supervisor had heard.
    is_standing : bool
        Whether it may stand still for its supervisor alone, which is to let it go on: so does who takes it over.
    plugged : list of str or None
        The devices that the hypervisor was started with; None where that was not noted.
    """

    supervisor: ProcessId | None
    hypervisor: ProcessId | None
    server: ProcessId | None
    configuration: str
    recorded: str
    generation: str
    mac_seed: str
    ram_file: str
    is_tracked: bool
    mapped: str | None
    is_paused: bool = False
    is_reverting: bool = False
    is_frozen: bool = False
    labels: list[str] = field(default_factory=list)
    told: str = ""
    is_waiting: bool = False
    is_standing: bool = True
    plugged: list[str] | None = None

    def write(self, directory: Path) -> None:
        """Replace the record of a machine."""
        write_json(directory / RECORD, self._as_written(directory))

    def stage(self, directory: Path) -> "Staged":
        """Write what replaces the record of a machine when it is put there. One thread of a process may do so at a time."""
        return Staged(directory / RECORD, self._as_written(directory), f"{os.getpid()}.next")

    def _as_written(self, directory: Path) -> dict[str, Any]:
        return asdict(self) | {"home": _home(directory)}

    @classmethod
    def read(cls, directory: Path) -> "Record | None":
        """Return the record of a machine, or None if there is none, or if it came with a copy of the store.

        Raises
        ------
        FormatError
            It cannot be read.
        """
        path = directory / RECORD
        try:
            value: Any = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and (error.errno in CANNOT_LOOK or isinstance(error, PermissionError)):
                raise
            value = None
        try:
            if value.get("home", "") not in ("", _home(directory)):
                return None  # the processes are those of the machine in the store that was copied
            for name in ("supervisor", "hypervisor", "server"):
                if value[name] is not None:
                    value[name] = ProcessId.checked(value[name])
            return cls(**{one.name: value[one.name] for one in fields(cls) if one.name in value})
        except (TypeError, KeyError, AttributeError):
            raise FormatError(
                f"{path} cannot be read; if no QEMU of that machine runs (look with ps), remove it and start the machine"
            ) from None


def note_under_way(directory: Path) -> None:
    """Note that this process begins or ends a machine just now, for who cannot reach it. A full disk is no error."""
    with suppress(OSError):
        write_json(directory / UNDER_WAY, asdict(ProcessId.of(os.getpid())))


def note_reachable(directory: Path) -> None:
    """Note that it is reachable from here on, or has ended."""
    with suppress(OSError):
        (directory / UNDER_WAY).unlink(missing_ok=True)


def who_is_under_way(directory: Path) -> ProcessId | None:
    """Return the process that begins or ends a machine just now, or None."""
    try:
        value: Any = read_json(directory / UNDER_WAY)
        found = ProcessId.checked(value)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.is_alive else None


def _home(directory: Path) -> str:
    """Say which directory that is, on this boot of the host: a copy is another one, and one that was moved is not."""
    found = directory.stat()
    return f"{found.st_dev}:{found.st_ino}"


def read_json(path: Path) -> object:
    """Read a small file. Raise ValueError where it is large, or has something else."""
    # Of a FIFO that somebody put there, nobody waits for the other end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        text = file.read(JSON_BYTES_MAX + 1)
    if len(text) > JSON_BYTES_MAX:
        raise ValueError(f"{path} is too large")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is too deep") from None


def write_json(path: Path, value: object) -> None:
    """Replace a small file, for who may use the store."""
    staged = Staged(path, value, os.getpid())
    try:
        staged.put()
    finally:
        staged.drop()


class Staged:
    """A small file of JSON that is written, and not yet in the place of the one that it replaces.

    All that takes time is done before it is put there, or when it is dropped: ext4 would give it its blocks as it is renamed,
    and take those of the other one away.

    Parameters
    ----------
    path : Path
        That one.
    value : object
    who : int or str
        What no other draft of that file has in its name now.
    """

    def __init__(self, path: Path, value: object, who: int | str) -> None:
        self._path, self._draft = path, path.with_name(f"{path.name}.{who}")
        self._replaced, self._is_put = -1, False
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._draft, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _share_own(descriptor, path)
                text = json.dumps(value).encode()
                with suppress(OSError):  # in a sandbox
                    os.posix_fallocate(descriptor, 0, len(text))
                file.write(text)
            with suppress(OSError):  # there may be none
                self._replaced = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except BaseException:
            self.drop()
            raise

    def put(self) -> None:
        """Put it in its place."""
        self._draft.rename(self._path)
        self._is_put = True

    def drop(self) -> None:
        """Remove it, where it was not put in its place, or let go of what it replaced. Further calls do nothing."""
        replaced, self._replaced = self._replaced, -1
        if replaced >= 0:
            os.close(replaced)
        if not self._is_put:
            self._draft.unlink(missing_ok=True)


def drafts(directory: Path) -> list[Path]:
    """Return the drafts in the directory of a machine. They are of who has it, or a process that was killed left them."""
    try:
        return [directory / name for name in os.listdir(directory) if name.startswith(_DRAFTS)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def drop_drafts(directory: Path) -> None:
    """Remove those drafts. The caller has the machine, and writes nothing there meanwhile."""
    for path in drafts(directory):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def open_log(path: Path, how: int) -> int:
    """Open a log of a machine to write to it: `how` is O_APPEND or O_TRUNC. What is no file of its own is refused.

    A store that came from somewhere else may have a link there, to a file of whoever starts the machine; or a FIFO, on which
    an opening would wait for a reader, and what is started for room.

    Raises
    ------
    FileExistsError
        It is no file.
    OSError
        It cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | how, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise _no_log(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_log(path)
    _share_own(descriptor, path)
    os.set_blocking(descriptor, True)
    return descriptor


def _no_log(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "this is no file; remove it, and a log is begun in its place", str(path))


def remove_directory(directory: Path) -> None:
    """Remove what a machine that is gone left in its directory, as far as that can be done."""
    with suppress(OSError):
        if directory.is_symlink():  # what it leads to was not made by a machine
            directory.unlink()
            return
        for path in directory.iterdir():
            path.unlink(missing_ok=True)
        directory.rmdir()
