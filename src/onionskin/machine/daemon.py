"""A supervisor in a process of its own, which stays when the command that started it has ended.

What must hold: the caller returns when the guest runs, or raises what kept it from running. The process that stays has no
terminal, no working directory, and no descriptor of its caller's.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from onionskin.control import frames
from onionskin.errors import StateError
from onionskin.machine.record import SUPERVISOR_LOG, open_log
from onionskin.nbd.systemd import notify

_ONLY_FROM, _ID = "--only-from=", "--id="
START_SECONDS = 300.0  # a RAM file of many GiB may have to be made first


def start(
    store: Path,
    name: str,
    directory: Path,
    *,
    paused: bool,
    trust: bool,
    only_from: str | None = None,
    machine: bytes | None = None,
) -> None:
    """Start the supervisor of a machine. Return when the guest runs, or, with `paused`, when it is ready to.

    With `machine`, it is the one with this id, whatever it is called by then.
    With `only_from`, only where it begins there: see `Supervisor.begin`.

    Raises
    ------
    OnionskinError, OSError
        What kept it from running.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        log = open_log(directory / SUPERVISOR_LOG, os.O_APPEND)
        try:
            flags = (["--paused"] if paused else []) + (["--trust"] if trust else [])
            flags += [] if only_from is None else [_ONLY_FROM + only_from]
            flags += [] if machine is None else [_ID + machine.hex()]
            child = subprocess.Popen(
                [sys.executable, "-m", "onionskin.machine", str(store.absolute()), name, str(writer), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                umask=0o077,
                pass_fds=[writer],
                start_new_session=True,
                env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
            )
        finally:
            os.close(log)
        os.close(writer)
        writer = -1
        child.wait()  # it forks, and this part ends at once
        answer = _read_all(reader)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if answer is None:
        raise StateError(f"the supervisor of machine {name!r} did not answer within {START_SECONDS:.0f} s")
    try:
        value = json.loads(answer)
    except ValueError:
        raise StateError(f"the supervisor of machine {name!r} died; see {directory / SUPERVISOR_LOG}") from None
    if "error" in value:
        raise frames.unpack_error(value["error"])


def _read_all(reader: int) -> bytes | None:
    """Return what comes until the other end is closed, or None where that takes too long."""
    deadline = time.monotonic() + START_SECONDS
    text = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(reader, 65536)
        if not part:
            return text
        text += part
    return None


def main(arguments: list[str]) -> int:
    """Be the supervisor: the arguments are those that `start` gives."""
    store, name, writer, *flags = arguments
    if os.fork():
        os._exit(0)
    descriptor = int(writer)
    os.set_inheritable(descriptor, False)
    only_from, machine = (
        next((flag.removeprefix(which) for flag in flags if flag.startswith(which)), None)
        for which in (_ONLY_FROM, _ID)
    )
    return be_supervisor(
        *(store, name, descriptor),
        paused="--paused" in flags,
        trust="--trust" in flags,
        only_from=only_from,
        machine=None if machine is None else bytes.fromhex(machine),
    )


def be_supervisor(
    store: str,
    name: str,
    descriptor: int,
    *,
    paused: bool,
    trust: bool,
    only_from: str | None = None,
    machine: bytes | None = None,
    pool: socket.socket | None = None,
) -> int:
    """Supervise a machine in this process until its end, and tell who reads from a pipe when its guest runs."""
    try:
        from onionskin.machine.supervisor import supervise
        from onionskin.store import Store

        opened = Store(store, create=False, trust=trust)
        status = supervise(
            *(opened, name),
            machine=machine,
            paused=paused,
            only_from=only_from,
            log=log_line,
            ready=lambda: _answer(descriptor, {"ready": True}),
            pool=pool,
        )
    except BaseException as error:
        log_line(f"{type(error).__name__}: {error}")
        _answer(descriptor, {"error": frames.pack_error(error)})
        return 1
    return 0 if status == 0 else 1


def _answer(descriptor: int, value: dict[str, object]) -> None:
    """Answer the command that started this, once."""
    try:
        os.write(descriptor, json.dumps(value).encode())
        os.close(descriptor)
    except OSError:
        return  # it was answered before, or the caller has gone


def log_line(line: str) -> None:
    """Write a line with the time to stderr, which is the log."""
    try:
        sys.stderr.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def run_in_foreground(
    store: Path, name: str, *, paused: bool, trust: bool, only_from: str | None = None, machine: bytes | None = None
) -> int:
    """Run a machine in this process, for a service manager, until it ends. Return the exit status of the hypervisor."""
    from onionskin.machine.supervisor import supervise
    from onionskin.store import Store

    try:
        opened = Store(store, create=False, trust=trust)
        return supervise(
            *(opened, name),
            machine=machine,
            paused=paused,
            only_from=only_from,
            log=log_line,
            ready=lambda: notify("READY=1"),
        )
    finally:
        notify("STOPPING=1")
