"""The control socket of a machine that runs: both ends. Its frames are those of the control sockets of volumes.

On a connection, the supervisor greets first. Then requests and replies follow each other: {"verb", "arguments"} and
{"result"} or {"error"}. While a verb works, its caller hears every few seconds that the supervisor lives, and also which
process is stopped that the supervisor may wait for itself.

What must hold: only the user who runs the machine, and root, can connect. A request is bounded and checked before anything is
called. A caller that hears nothing for WORD_SECONDS says whom it waits for, and gives up after SILENCE_SECONDS. Where the
caller goes away, what it asked for is given up where that can be done (`has_gone`).
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Self

from onionskin.base.lazy import logger
from onionskin.base.sockets import (
    UnixListener,
    connect_if_listening,
    credentials_of,
    has_hung_up,
    may_be_written,
    may_connect,
)
from onionskin.base.threads import SureThread, Thread
from onionskin.control import frames
from onionskin.control.client import is_stopped, say_whom_one_waits_for, what_lets_it_go_on
from onionskin.errors import FormatError, OnionskinError, StateError

VERSION = 1
CONNECTIONS_MAX = 16
IDLE_SECONDS = 600
ACCEPT_AGAIN_SECONDS = 0.2
ARGUMENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "status": {},
    "stop": {"timeout": (int, float, NoneType), "force": (bool,)},
    "pause": {},
    "resume": {},
    "snapshot": {"name": (str, NoneType), "note": (str,), "mode": (str, NoneType), "freeze": (bool,)},
    "revert": {"name": (str,)},
    "tell": {"hostname": (str, NoneType), "clock": (bool,)},
    "adopt": {},
}
_log = logger(__name__)


class Gone(KeyboardInterrupt):
    """The caller of a verb has gone away."""


class WentAway(StateError):
    """The supervisor has closed the connection."""


class NotAsked(WentAway):
    """It had closed the connection before it was asked for anything: whoever looks again finds the machine off."""


# ---- the supervisor's end ----


class ControlServer:
    """Listens on the control socket of a machine, in threads of its own.

    Parameters
    ----------
    path : Path
    verbs : mapping
        For each verb what is called, with a function that raises `Gone` once the caller has gone, and the arguments.
    log : callable
        Takes a line.
    has_ended : callable
        Whether the machine has ended. Who connects then is turned away, and finds it off a moment later.
    who_is_stopped : callable
        Names a process that is stopped by a signal, and that a verb may wait for; "" where there is none.
    """

    def __init__(
        self,
        path: Path,
        verbs: Mapping[str, Callable[..., Any]],
        log: Callable[[str], None],
        *,
        has_ended: Callable[[], bool] = lambda: False,
        who_is_stopped: Callable[[], str] = lambda: "",
    ) -> None:
        self._has_ended = has_ended
        self._who_is_stopped = who_is_stopped
        self._verbs = verbs
        self._log = log
        self._owner = os.geteuid()
        self._guard = threading.Lock()
        self._sessions: dict[threading.Thread, socket.socket] = {}
        self._closing = threading.Event()
        self._listener = UnixListener(path)
        self._accepting = Thread(target=self._accept, name="onionskin control", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Take no more requests. What runs goes on. Further calls do nothing."""
        self._closing.set()
        with suppress(OSError):
            self._listener.socket.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._guard:
            connections = list(self._sessions.values())
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def join(self, seconds: float) -> None:
        """Wait until what ran when this was closed has sent its replies."""
        with self._guard:
            threads = list(self._sessions)
        for thread in threads:
            thread.join(seconds)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.socket.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                self._log(f"control: a connection could not be accepted: {os.strerror(error.errno or 0)}")
                self._closing.wait(ACCEPT_AGAIN_SECONDS)
                continue
            thread = SureThread(target=self._serve, args=(connection,), name="onionskin control", daemon=True)
            with self._guard:
                is_full = len(self._sessions) >= CONNECTIONS_MAX
                if not is_full:
                    self._sessions[thread] = connection
            if is_full:
                _refuse(connection, f"the machine's control socket has {CONNECTIONS_MAX} connections; try again later")
                continue
            try:
                thread.start()
            except RuntimeError:  # no thread can be started now; a later connection may succeed
                with self._guard:
                    del self._sessions[thread]
                _refuse(connection, "the supervisor of the machine could start no thread for it; try again later")

    def _serve(self, connection: socket.socket) -> None:
        try:
            pid, uid, _ = credentials_of(connection)
            if not may_connect(uid, self._owner):
                _refuse(connection, f"process {pid} of user {uid} may not use it, only user {self._owner} may")
                return
            connection.settimeout(IDLE_SECONDS)
            with connection:
                if self._has_ended():
                    return
                _send(connection, {"onionskin": "machine", "version": VERSION})
                while (request := self._next(connection)) is not None:
                    _send(connection, self._answer(connection, request))
        except (OSError, ValueError):
            pass  # the other end has gone
        finally:
            with self._guard:
                self._sessions.pop(threading.current_thread(), None)  # one that began too late is not there

    def _next(self, connection: socket.socket) -> dict[str, Any] | None:
        try:
            return frames.receive(connection, bytes_max=frames.REQUEST_BYTES_MAX)
        except OnionskinError as error:  # it is not known where the next frame begins
            _send(connection, {"error": frames.pack_error(error)})
            return None

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
        done = threading.Event()
        teller = SureThread(
            target=_say_that_we_live,
            args=(connection, done, self._who_is_stopped),
            name="onionskin control",
            daemon=True,
        )
        try:
            verb, arguments = _checked(request)
            teller.start()
            return {"result": self._verbs[verb](lambda: _raise_if_gone(connection), **arguments)}
        except BaseException as error:
            packed = frames.pack_error(error)
            self._log(f"control: {request.get('verb')}: {packed['class']}: {packed['message']}")
            return {"error": packed}
        finally:
            done.set()
            if teller.ident is not None:
                teller.join()


def _say_that_we_live(connection: socket.socket, done: threading.Event, who_is_stopped: Callable[[], str]) -> None:
    while not done.wait(frames.ALIVE_SECONDS):
        with suppress(OSError, ValueError):
            if may_be_written(connection):
                _send(connection, {"alive": True, "stopped": who_is_stopped()})


def _raise_if_gone(connection: socket.socket) -> None:
    if has_hung_up(connection):  # a supervisor that ends reads no more from it, and its caller waits
        raise Gone


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    frames.send(connection, value, bytes_max=frames.REPLY_BYTES_MAX)


def _refuse(connection: socket.socket, why: str) -> None:
    with connection, suppress(OSError):
        connection.settimeout(1)
        _send(connection, {"error": frames.pack_error(StateError(why))})


def _checked(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    verb, arguments = request.get("verb"), request.get("arguments")
    wanted = ARGUMENTS.get(verb) if isinstance(verb, str) else None
    if wanted is None or not isinstance(verb, str):
        raise ValueError(
            f"{str(verb)[:60]!r} is no verb of a machine's control socket: it is one of {', '.join(ARGUMENTS)}"
        )
    if not isinstance(arguments, dict) or set(arguments) != set(wanted):
        raise ValueError(f"{verb} takes exactly these arguments: {', '.join(wanted) or 'none'}")
    for name, kinds in wanted.items():
        if type(arguments[name]) not in kinds:
            raise ValueError(f"{verb}: {name} cannot be {str(arguments[name])[:60]!r}")
    return verb, arguments


# ---- the caller's end ----


class MachineControl:
    """A connection to the supervisor of a machine. A context manager, for one thread at a time."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._name = name
        self._asked = ""  # which verb was asked for last
        self.pid: int = credentials_of(connection)[0]
        connection.settimeout(frames.SILENCE_SECONDS)
        try:
            greeting = self._receive()
            if "error" in greeting:
                raise frames.unpack_error(greeting["error"])
            if greeting.get("onionskin") != "machine" or greeting.get("version") != VERSION:
                raise StateError(
                    f"the supervisor of machine {name!r} (process {self.pid}) is another version of onionskin; use the same"
                )
        except BaseException:
            connection.close()
            raise

    @classmethod
    def find(cls, path: Path, name: str) -> Self | None:
        """Connect to the supervisor of a machine, or return None where there is none."""
        try:
            connection = connect_if_listening(path, seconds=frames.SILENCE_SECONDS)
        except BlockingIOError:
            raise StateError(
                f"the supervisor of machine {name!r} does not take connections; it was stopped, or hangs"
            ) from None
        try:
            return None if connection is None else cls(connection, name)
        except WentAway:  # it was ending, or being killed, while it still listened
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. What was asked for, and not answered yet, may be given up. Further calls do nothing."""
        self._connection.close()

    def call(self, verb: str, **arguments: Any) -> Any:
        """Ask for a verb, and return its result, or raise its error."""
        self.ask(verb, **arguments)
        return self.answer()

    def ask(self, verb: str, **arguments: Any) -> None:
        """Ask for a verb. `answer` is to be called next."""
        self._asked = verb
        try:
            frames.send(self._connection, {"verb": verb, "arguments": arguments}, bytes_max=frames.REQUEST_BYTES_MAX)
        except TimeoutError:
            raise self._silent() from None
        except (BrokenPipeError, ConnectionResetError):
            raise NotAsked(str(self._gone())) from None

    def answer(self) -> Any:
        """Wait for the result of what was asked for, or raise its error."""
        said = ""
        try:
            while True:
                reply = self._receive()
                if "error" in reply:
                    raise frames.unpack_error(reply["error"])
                if "result" in reply:
                    return reply["result"]
                who = reply.get("stopped")
                if isinstance(who, str) and who not in ("", said):
                    said = who
                    _log.warning("waiting for %s: it is stopped; kill -CONT lets it go on, or thawing its cgroup", who)
        except (KeyboardInterrupt, FormatError):
            self.close()  # so that it is given up
            raise

    def _receive(self) -> dict[str, Any]:
        say_whom_one_waits_for(self._connection, self.pid, f"supervises machine {self._name!r}")
        try:
            reply = frames.receive(self._connection, bytes_max=frames.REPLY_BYTES_MAX)
        except TimeoutError:
            raise self._silent() from None
        if reply is None:
            raise self._gone()
        return reply

    def _silent(self) -> StateError:
        is_known = is_stopped(self.pid)
        why = (
            f"it was stopped ({what_lets_it_go_on(self.pid)} lets it go on)"
            if is_known
            else "it hangs, maybe on a disk"
        )
        # Between its last step and the answer nobody takes back what was done.
        later = f", and may do what '{self._asked}' asked for then: look, before you ask again" * bool(self._asked)
        return StateError(
            f"process {self.pid}, which supervises machine {self._name!r}, has not answered for "
            f"{frames.SILENCE_SECONDS:.0f} s; {why}{later}"
        )

    def _gone(self) -> WentAway:
        return WentAway(f"the supervisor of machine {self._name!r} went away; its log says why")
