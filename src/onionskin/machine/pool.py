"""A pool of forks that are ready: each has all its processes, and is stopped before it goes on from the snapshot.

A process of its own holds the pool (`pool_server.py`). A fork asks it for machines, gives them their names in the transaction
that makes the others, and tells their supervisors, which let the guests go on. What is said on its socket: a request
({"verb", ...}), and a reply ({"result"} or {"error"}).

What must hold: a fork never fails for the pool's sake. The connection by which machines were taken stays open until their
supervisors were told; when it closes, the pool lets go of them, and each sees from the catalog whether a fork has it.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from onionskin.base.held import held
from onionskin.base.naming import some_of
from onionskin.base.sockets import connect_if_listening
from onionskin.control import frames
from onionskin.errors import OnionskinError, StateError
from onionskin.machine import daemon
from onionskin.machine.hypervisor import Configuration
from onionskin.machine.qemu_command import refuse_same_sockets
from onionskin.machine.record import directory_of, make_directory
from onionskin.operations import machines

if TYPE_CHECKING:
    from onionskin.catalog import MachineRow, MachineSnapshotRow
    from onionskin.store import Store

WARM_MAX = 64
VERSION = 1
SOCKET_PREFIX, LOG = "pool.", "pool.log"
TAKE_SECONDS = 2.0  # that a fork waits for a pool before it does without
ANSWER_SECONDS = 30.0
FULL_SECONDS = 600.0
STOP_SECONDS = 120.0


class MachinePool:
    """Forks of a snapshot of a machine that are ready to run, so that a fork takes them. A context manager: it ends it.

    `Machine.pool` starts one, and `Machine.pools` finds those that there are. It holds nothing, so it need not be closed.

    Attributes
    ----------
    snapshot : str
        The snapshot.
    """

    def __init__(self, directory: Path, snapshot: str, id: bytes) -> None:
        self.snapshot: str = snapshot
        self._path = socket_path(directory, id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<MachinePool of {self.snapshot!r} at {self._path}>"

    @property
    def is_there(self) -> bool:
        """Whether it has not ended."""
        connection = _connect(self._path)
        if connection is not None:
            connection.close()
        return connection is not None

    def status(self) -> dict[str, Any]:
        """Say how many machines it has.

        Returns
        -------
        dict
            ``pid``, ``snapshot``, ``warm`` (how many it shall have), ``ready`` and ``starting`` (how many it has), and
            ``failure``: why the last one could not be started, or "".

        Raises
        ------
        StateError
            It has ended, or does not answer.
        """
        return dict(self._ask("status", ANSWER_SECONDS))

    def wait(self) -> None:
        """Wait until all its machines are ready.

        Raises
        ------
        StateError
            It has ended, one could not be started, or it took longer than ten minutes.
        OSError
            One could not be started: a file could not be read or written, or there is no space (ENOSPC).
        """
        self._ask("wait", FULL_SECONDS)

    def stop(self) -> None:
        """End it, and wait until its machines are gone. Those that forks took run on. One that has ended stays so.

        Raises
        ------
        StateError
            It does not answer.
        """
        try:
            self._ask("stop", STOP_SECONDS)
        except _Gone:
            if self.is_there:
                raise StateError(
                    f"the pool of snapshot {self.snapshot!r} gave no answer, and has not ended; try again"
                ) from None

    def _ask(self, verb: str, seconds: float) -> Any:
        connection = _connect(self._path)
        if connection is None:
            raise _Gone(f"there is no pool of snapshot {self.snapshot!r}; start it, with 'onionskin machine pool'")
        with connection:
            return _call(connection, {"verb": verb}, seconds)


class _Gone(StateError):
    """The pool has ended."""


def socket_path(directory: Path, snapshot: bytes) -> Path:
    """Return where the pool of a snapshot listens, in the directory of its machine."""
    return directory / f"{SOCKET_PREFIX}{snapshot.hex()}"


def _connect(path: Path) -> socket.socket | None:
    """Connect to a pool, or return None where there is none."""
    try:
        return connect_if_listening(path, seconds=TAKE_SECONDS)
    except BlockingIOError:
        raise StateError(f"the pool at {path} does not take connections; was its process stopped?") from None


def _call(connection: socket.socket, request: dict[str, Any], seconds: float) -> Any:
    connection.settimeout(seconds)
    try:
        frames.send(connection, {"version": VERSION, **request}, bytes_max=frames.REQUEST_BYTES_MAX)
        reply = frames.receive(connection, bytes_max=frames.REPLY_BYTES_MAX)
    except TimeoutError:
        raise StateError(f"the pool has not answered for {seconds:.0f} s; was its process stopped?") from None
    except ConnectionError:
        reply = None
    if reply is None:
        raise _Gone("the pool has ended")
    if "error" in reply:
        raise frames.unpack_error(reply["error"])
    return reply.get("result")


# ---- for forks ----


@held
def taken(directory: Path, snapshot: bytes, count: int) -> Iterator[list[bytes]]:
    """Take up to so many machines out of a pool, for the time of the block. Gives their ids; none, where there is no pool.

    At its end the pool lets go of them: what no fork has taken until then ends.
    """
    connection = None
    with suppress(OSError, StateError):  # whatever it is, the fork does without
        connection = _connect(socket_path(directory, snapshot))
    if connection is None:
        yield []
        return
    with connection:
        ids: list[bytes] = []
        with suppress(OSError, OnionskinError, TypeError, ValueError):
            ids = [bytes.fromhex(one) for one in _call(connection, {"verb": "take", "count": count}, TAKE_SECONDS)]
        yield ids


# ---- the process ----


def pooled(store: "Store", machine: bytes) -> "list[MachineSnapshotRow]":
    """Return the snapshots of a machine of which pools make forks, also of one that has none ready just now."""
    directory = directory_of(store._opened.layout.root, machine)
    rows = store._opened.catalog.snapshots_of_machine(machine)
    return [row for row in rows if MachinePool(directory, row.name, row.id).is_there]


def refuse_pooled(store: "Store", machine: "MachineRow", going: Container[bytes] | None = None) -> None:
    """Raise StateError where a pool makes forks of one of these snapshots of a machine; None: of any."""
    names = [f"{machine.name}@{row.name}" for row in pooled(store, machine.id) if going is None or row.id in going]
    if names:
        raise StateError(
            f"a pool makes forks of a snapshot that would go: {some_of(names)}; end it first, with 'onionskin machine pool "
            "--stop'; nothing was dropped"
        )


def what_to_hold(store: "Store", machine: bytes, snapshot: bytes, warm: int) -> dict[str, Any]:
    """Return what the process of a pool is told."""
    return {
        "store": str(store.path.absolute()),
        "trust": store._trust,
        "machine": machine.hex(),
        "snapshot": snapshot.hex(),
        "warm": warm,
    }


def start(store: "Store", machine: bytes, snapshot: str, warm: int) -> MachinePool:
    """Start a pool. Return when its machines are ready."""
    pool, directory, what = _wanted(store, machine, snapshot, warm)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            child = subprocess.Popen(
                [*_command(), json.dumps(what | {"writer": writer, "log": str(directory / LOG)})],
                stdin=subprocess.DEVNULL,
                cwd="/",
                umask=0o077,
                pass_fds=[writer],
                start_new_session=True,
                env=environment(),
            )
        finally:
            os.close(writer)
        child.wait()  # it forks, and this part ends at once
        answer = daemon._read_all(reader)
    finally:
        os.close(reader)
    try:
        value = json.loads(answer or b"")
    except ValueError:
        raise StateError(f"the pool of snapshot {snapshot!r} did not start; see {directory / LOG}") from None
    if "error" in value:
        raise frames.unpack_error(value["error"])
    return pool


def become(store: "Store", machine: bytes, snapshot: str, warm: int) -> NoReturn:
    """Replace this process by that of a pool, for a service manager. The store is closed."""
    what = _wanted(store, machine, snapshot, warm)[2]
    store.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [*_command(), json.dumps(what)], environment(keep_notify=True))


def _wanted(store: "Store", machine: bytes, snapshot: str, warm: int) -> tuple[MachinePool, Path, dict[str, Any]]:
    if not isinstance(warm, int) or isinstance(warm, bool) or not 1 <= warm <= WARM_MAX:
        raise ValueError(f"a pool has 1 to {WARM_MAX} machines, not {warm!r}")
    store._opened.catalog.refuse_read_only()
    _, id = ids_of(store, machine, snapshot)
    configuration = Configuration.from_json(machines.find(store._opened.catalog, machine).configuration)
    refuse_same_sockets([configuration] * warm)
    directory = make_directory(store._opened.layout.root, machine)
    pool = MachinePool(directory, snapshot, id)
    if pool.is_there:
        raise StateError(
            f"there is a pool of snapshot {snapshot!r} already; end it first, with 'onionskin machine pool --stop'"
        )
    return pool, directory, what_to_hold(store, machine, id, warm)


def ids_of(store: "Store", which: machines.Which, snapshot: str) -> tuple[bytes, bytes]:
    """Return the ids of a machine and of its snapshot."""
    catalog = store._opened.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        return machine.id, machines.find_snapshot(catalog, machine, snapshot).id


def _command() -> Sequence[str]:
    return (sys.executable, "-m", "onionskin.machine.pool_server")


def environment(*, keep_notify: bool = False) -> dict[str, str]:
    """Return the environment of a process that forks: threads of NumPy's library would be in the way."""
    kept = {key: value for key, value in os.environ.items() if keep_notify or key != "NOTIFY_SOCKET"}
    return kept | {"OPENBLAS_NUM_THREADS": "1"}


__all__ = ["MachinePool"]
