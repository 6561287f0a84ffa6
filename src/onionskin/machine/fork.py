"""Starts several machines at once: forks of a snapshot, each of which has a supervisor of its own and maps the one RAM file.

To load Python and all that a supervisor and a server of disks need takes longer than to fork a machine. So one process
loads it, makes the RAM file if it is missing, asks the hypervisor what it is, and then forks for each machine: once for its
supervisor, which first forks what will be the server of its disks. What they share stays in memory once. That process waits
for IDLE_SECONDS for the next call of the same process, and ends with it.

SPARE_SECONDS behind a call it forks a supervisor that has no machine yet, for the next call that starts one: it has what will
be its server of disks, and a QEMU that has loaded its libraries, which both wait. That takes processors and memory, but no
store, no disk and no RAM of a machine. Whoever of them waits ends with the one that it waits for.

What must hold: the process that forks has no other thread then, and no store open: each supervisor opens its own. The caller
returns when the guests of all run, or raises the first of what kept one from running; the others run then. A call is carried
out once: it is made again only where the process that forks ended before it said that it had it.
"""

import atexit
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from onionskin.base.forking import ForkableLock
from onionskin.base.sockets import UnixListener
from onionskin.control import frames
from onionskin.errors import OnionskinError, StateError
from onionskin.machine import daemon, disk_server
from onionskin.machine.hypervisor import Configuration
from onionskin.machine.qemu_command import refuse_same_sockets
from onionskin.machine.record import SUPERVISOR_LOG, make_directory, open_log
from onionskin.operations import load_all, machines

STARTS_AT_ONCE = 16
IDLE_SECONDS = 60.0
SPARE_SECONDS = 0.5  # it takes the processors that the forks of the last call need for their first steps
_HEARD, _DONE = b"heard", b"done"
_PROGRAM = "onionskin.__main__"
_OF_SERVERS = (
    _PROGRAM,
    "onionskin.cli.app",
    "onionskin.cli.serve",
    "onionskin.nbd.server",
    "onionskin.nbd.exports",
    "onionskin.aio",
)

if TYPE_CHECKING:
    from onionskin.machine.ram_files import RamFile
    from onionskin.store import Store


def start_all(store: "Store", those: Sequence[machines.Which], *, paused: bool = False) -> None:
    """Start machines that are off, all at once. Return when the guests of all run, or, with `paused`, are ready to.

    Each supervisor is told which machine it is by its id: its name may mean another one by then.

    Raises
    ------
    OnionskinError, OSError
        What kept the first of those from running that do not run.
    """
    # Before any is started: of those that begin at once, none would find another one listening.
    refuse_same_sockets(
        [Configuration.from_json(machines.find(store._opened.catalog, which).configuration) for which in those]
    )
    errors: list[Exception] = []
    for at in range(0, len(those), STARTS_AT_ONCE):
        errors += _start_some(store, those[at : at + STARTS_AT_ONCE], paused)
    if errors:
        raise errors[0]


def _start_some(store: "Store", those: Sequence[machines.Which], paused: bool) -> list[Exception]:
    """Start machines at once. Return what kept those from running that do not run."""
    with ExitStack() as stack:
        readers, writers, wanted = [], [], []
        programs: dict[str, str | None] = {}  # and the kernel of one of their machines
        for row in [machines.find(store._opened.catalog, which) for which in those]:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            readers.append(stack.enter_context(os.fdopen(reader, "rb", buffering=0)))
            writers.append(writer)
            configuration = Configuration.from_json(row.configuration)
            programs[configuration.program] = configuration.kernel
            directory = make_directory(store._opened.layout.root, row.id)
            wanted.append([row.name, str(directory / SUPERVISOR_LOG), row.id.hex()])
        try:
            _start_process(store, wanted, programs, writers, paused)
        finally:
            for writer in writers:
                os.close(writer)
        answers = [
            _failure(name, Path(log), reader.fileno()) for (name, log, _), reader in zip(wanted, readers, strict=True)
        ]
        return [error for error in answers if error is not None]


def _start_process(
    store: "Store", wanted: list[list[str]], programs: dict[str, str | None], writers: list[int], paused: bool
) -> None:
    what = {
        "store": str(store.path.absolute()),
        "machines": wanted,
        "programs": programs,
        "paused": paused,
        "trust": store._trust,
    }
    with _guard:
        if not _ask(_forking_process(), what, writers):
            _ask(_forking_process(), what, writers)


_guard = ForkableLock()  # over what follows
_there: "tuple[subprocess.Popen[bytes], socket.socket, tuple[object, ...]] | None" = None


def _ask(process: socket.socket, what: dict[str, object], writers: list[int]) -> bool:
    """Have machines started. Return False if it was not heard. Who was not started closes its pipe without an answer."""
    global _there
    heard = done = b""
    try:
        with suppress(OSError):
            socket.send_fds(process, [json.dumps(what).encode()], writers)
            heard = process.recv(16)
            done = process.recv(16) if heard else b""
    finally:
        if not done:  # or this was interrupted: the next call would take the answer of this one for its own
            _end_process()
    return bool(heard)


@atexit.register
def _end_process() -> None:
    """End the process that forks, if there is one of this process."""
    global _there
    if _there is not None:
        child, connection, (pid, *_) = _there
        connection.close()
        if pid == os.getpid():
            child.wait()
        _there = None


def _forking_process() -> socket.socket:
    """Return the connection to the process that forks, which is started where there is none for this environment."""
    global _there
    # Threads of NumPy's library would be in the way of a fork, and nothing here uses them.
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}
    key = (os.getpid(), sys.executable, sorted(environment.items()), *_inherited())
    if _there is not None and _there[2] == key and _there[0].poll() is None:
        return _there[1]
    _end_process()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        child = subprocess.Popen(
            [sys.executable, "-m", "onionskin.machine.fork", str(there.fileno())],
            stdin=subprocess.DEVNULL,
            cwd="/",
            umask=0o077,
            pass_fds=[there.fileno()],
            start_new_session=True,
            env=environment,
        )
    _there = (child, here, key)
    return here


def _inherited() -> tuple[object, ...]:
    """Return what a program hands down and may change beside its environment: who it is, its limits, and its share."""
    limits = [resource.getrlimit(getattr(resource, one)) for one in dir(resource) if one.startswith("RLIMIT_")]
    scheduled = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, os.getpriority(os.PRIO_PROCESS, 0)
    share = *scheduled, os.sched_getaffinity(0)
    try:
        group = Path("/proc/self/cgroup").read_bytes()
    except OSError:
        group = b""
    return os.getresuid(), os.getresgid(), os.getgroups(), limits, share, group


def _failure(name: str, log: Path, reader: int) -> Exception | None:
    """Wait for the answer of a supervisor. Return what kept its machine from running, if something did."""
    answer = daemon._read_all(reader)
    if answer is None:
        return StateError(f"the supervisor of machine {name!r} did not answer within {daemon.START_SECONDS:.0f} s")
    try:
        value = json.loads(answer)
    except ValueError:
        why = f"see {log}" if log.exists() else "it was killed before it wrote anything; try again"
        return StateError(f"the supervisor of machine {name!r} died; {why}")
    if "error" not in value:
        return None
    error = frames.unpack_error(value["error"])
    return error if isinstance(error, Exception) else StateError(str(error))


def main(descriptor: int) -> int:
    """Be the process that forks, as long as who started it asks for something."""
    asked = socket.socket(fileno=descriptor)
    asked.set_inheritable(False)
    with suppress(ImportError):  # those that are forked say what is missing
        load_servers()
    signal.signal(signal.SIGCHLD, _reap)
    last: dict[str, str | None] = {}
    with suppress(ConnectionError):  # who asked was killed, or gave up: there is nobody to tell
        while _is_asked(asked, last):
            text, writers, _, _ = socket.recv_fds(asked, 1 << 20, STARTS_AT_ONCE)
            if not text:
                os._exit(0)  # who started it waits for its end
            asked.send(_HEARD)
            what = json.loads(text)
            _start_machines(what, writers, asked)
            asked.send(_DONE)
            last = what["programs"]
    return 0


def _is_asked(asked: socket.socket, programs: dict[str, str | None]) -> bool:
    """Wait until something is asked for; meanwhile have a spare supervisor. Return False if nothing is for a long time."""
    poll = select.poll()
    poll.register(asked, select.POLLIN)
    if programs and _is_loaded and _spare is None and not poll.poll(SPARE_SECONDS * 1000):
        _make_spare(*next(iter(programs.items())), asked)
    return bool(poll.poll(IDLE_SECONDS * 1000))


def load_servers() -> None:
    """Load all that a server of disks needs, also what it would load once it is ready: those that are forked have it."""
    for module in _OF_SERVERS:
        importlib.import_module(module)
    load_all()


def _reap(*_: object) -> None:
    """Take note of supervisors that have ended, so that they are gone."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _start_machines(what: dict[str, Any], writers: list[int], asked: socket.socket) -> None:
    """Fork the supervisors of machines, or have the spare one be that of a single machine."""
    held = None
    if len(what["machines"]) == 1 and _knows(what["programs"]):
        if _give_spare(what, writers[0]):
            os.close(writers[0])
            return
    else:
        held = _prepare(what["store"], bytes.fromhex(what["machines"][0][2]), what["trust"])
    if threading.active_count() == 1:  # else each is said to have died, which is better than one that hangs
        for (name, log, id), writer in zip(what["machines"], writers, strict=True):
            try:
                pid = os.fork()
            except OSError as error:
                os.write(writer, json.dumps({"error": frames.pack_error(error)}).encode())
                continue
            if pid == 0:
                with suppress(OSError):
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    asked.close()
                    _forget_spare()
                    if held is not None:
                        held.close()
                others = [other for other in writers if other != writer]
                os._exit(_supervise(what, name, bytes.fromhex(id), writer, log, others))
    for writer in writers:
        os.close(writer)
    if held is not None:
        held.close()


# ---- the spare supervisor ----

_spare: socket.socket | None = None  # by which a supervisor that waits is told which machine is its


def _make_spare(program: str, kernel: str | None, asked: socket.socket) -> None:
    """Fork a supervisor that has no machine yet. Where that fails, the next call does without."""
    global _spare
    if threading.active_count() > 1:
        return
    try:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return
    try:
        pid = os.fork()
    except OSError:
        here.close()
        there.close()
        return
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            here.close()
            status = _be_spare(there, program, kernel)
        finally:
            os._exit(status)
    there.close()
    _spare = here


def _give_spare(what: dict[str, Any], writer: int) -> bool:
    """Have the spare supervisor be that of a machine. Return False where there is none, or it was killed."""
    global _spare
    spare, _spare = _spare, None
    if spare is None:
        return False
    with spare, suppress(OSError):
        socket.send_fds(spare, [json.dumps(what).encode()], [writer])
        return True
    return False


def _forget_spare() -> None:
    """Close, in a process that was forked, what leads to the spare supervisor."""
    global _spare
    if _spare is not None:
        _spare.close()
        _spare = None


def _be_spare(asked: socket.socket, program: str, kernel: str | None) -> int:
    """Wait for a machine, with all that need not know which one it is, and supervise it. Return an exit status."""
    from onionskin.machine.qemu import load_ahead

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for standard in (1, 2):  # who reads what the caller says need not wait for the end of this process
        os.dup2(nothing, standard)
    os.close(nothing)
    spawn = _spawner(asked.fileno())
    load_ahead(program, kernel)
    text, given, _, _ = socket.recv_fds(asked, 1 << 20, 1)
    asked.close()
    if not text:
        return 0  # who forked it has ended
    what = json.loads(text)
    ((name, log, id),) = what["machines"]
    return _supervise(what, name, bytes.fromhex(id), given[0], log, [], spawn=spawn)


# ---- the others ----

_is_loaded = False  # whether this process has all that supervisors need


def _knows(programs: Iterable[str]) -> bool:
    """Whether all is loaded here, and what the hypervisors are is known: a single supervisor sees to the rest by itself."""
    if not _is_loaded:
        return False
    from onionskin.machine.qemu import know

    with suppress(OSError, OnionskinError):  # the supervisor finds it too, and says so
        for program in programs:
            know(program)
    return True


def _prepare(store: str, machine: bytes, trust: bool) -> "RamFile | None":
    """Load what supervisors need, and make the RAM file. What fails here, fails in them too, and they say so."""
    global _is_loaded
    try:
        from onionskin.machine import restore, supervisor  # noqa: F401 - loaded here for all
        from onionskin.machine.qemu import QemuHypervisor
        from onionskin.machine.ram_files import RamFiles
        from onionskin.machine.running import source_of
        from onionskin.store import Store

        with Store(store, create=False, trust=trust) as opened:
            row = machines.find(opened._opened.catalog, machine)
            disks = opened._opened.catalog.disks_of_machine(row.id)
            QemuHypervisor().check(Configuration.from_json(row.configuration), len(disks))
            if machines.beginning(opened._opened, machine).ram is None:
                return None
            saved = restore.find_saved(opened, row, None)
            source = source_of(opened, saved.volume, saved.layer, saved.ram_bytes)
            held = RamFiles(opened._opened).use(source)
            _is_loaded = True
            return held
    except (OSError, OnionskinError):
        return None


def _supervise(
    what: dict[str, object],
    name: str,
    machine: bytes,
    writer: int,
    log: str,
    others: list[int],
    *,
    pool: socket.socket | None = None,
    spawn: disk_server.Spawn | None = None,
) -> int:
    """Be the supervisor of a machine, until its end. Return the exit status of the process.

    With `spawn`, it leads a session already, and what is to be its server of disks waits.
    """
    try:
        if spawn is None:
            os.setsid()
        for other in others:
            os.close(other)
        os.set_inheritable(writer, False)
        try:
            _write_to(log)
            disk_server.spawn = spawn or _spawner(writer)
        except OSError as error:
            daemon._answer(writer, {"error": frames.pack_error(error)})
            return 1
        return daemon.be_supervisor(
            *(str(what["store"]), name, writer),
            paused=bool(what["paused"]),
            trust=bool(what["trust"]),
            machine=machine,
            pool=pool,
        )
    except BaseException as error:
        with suppress(BaseException):
            daemon.log_line(f"{type(error).__name__}: {error}")
        return 1


def _spawner(waited_for: int) -> disk_server.Spawn:
    """Fork a process that becomes a server of disks when it is told to, and return what tells it. It can be called once.

    It is nobody's child, so that nobody has to wait for its end: who forked it ends at once. It closes a descriptor by which
    somebody waits for the end of this process alone.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    between = os.fork()
    if between == 0:
        status = 1
        try:
            here.close()
            os.close(waited_for)
            status = 0 if os.fork() else _become_server(there)
        finally:
            os._exit(status)
    there.close()

    def spawn(arguments: list[str], log: int) -> tuple[int, IO[bytes]] | None:
        disk_server.spawn = None  # another one is a program of its own
        output, into = os.pipe2(os.O_CLOEXEC)
        answer = b""
        try:
            with here, suppress(ConnectionError):
                socket.send_fds(here, [json.dumps(arguments).encode()], [into, log])
                answer = here.recv(64)
        finally:
            os.close(into)
            os.waitpid(between, 0)
        if not answer:  # it was killed before it opened anything
            os.close(output)
            return None
        return int(answer), os.fdopen(output, "rb", buffering=0)

    return spawn


def _become_server(asked: socket.socket) -> int:
    """Wait for what to serve, and serve it. Return an exit status."""
    what, given, _, _ = socket.recv_fds(asked, 1 << 20, 2)
    if not what:
        return 0  # the supervisor ended without it
    into, log = given
    # Before anything else: by its log it is found when the supervisor is killed now.
    for descriptor, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (into, 1), (log, 2)):
        os.dup2(descriptor, standard)
    os.setsid()
    with suppress(ConnectionError):
        asked.send(str(os.getpid()).encode())
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    try:
        sys.argv = ["onionskin", *_listening(json.loads(what))]
        importlib.import_module(_PROGRAM).main()  # which is loaded: by name, as this room knows of no command line
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        daemon.log_line(f"{type(error).__name__}: {error}")
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _listening(arguments: list[str]) -> list[str]:
    """Listen now, before the command line is read, and say so: a hypervisor that connects waits until the disks are open.

    Returns the arguments without the one that asks for it.
    """
    from onionskin.nbd import listener

    listener.beforehand = UnixListener(arguments[arguments.index("--socket") + 1])
    print(json.dumps({"listening": True}), flush=True)
    return [one for one in arguments if one != disk_server.TELL_LISTENING]


def _write_to(log: str) -> None:
    """Have what this process says added to a file."""
    descriptor = open_log(Path(log), os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
