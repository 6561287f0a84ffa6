"""The guest agent: a program in the guest that freezes its file systems, and tells it who it is now.

It speaks QEMU's guest agent protocol over a virtio-serial port: a line of JSON each way. Nothing says whether an agent runs
in a guest, so every call has a time limit, and an answer belongs to a call only behind the token that `_sync` asked for: also
behind a call that was not answered in time, whose answer may come later.

What must hold: a guest that may have frozen its file systems is asked to thaw them, whatever failed.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from onionskin.base.sockets import connect_if_listening
from onionskin.errors import StateError

SYNC_SECONDS = 10.0  # a guest of a busy host is slow, and one call at a time has the agent: the others wait for it
CALL_SECONDS = 10.0
FREEZE_SECONDS = 20.0
_LINE_BYTES_MAX = 1 << 20
_TEXT_MAX = 4096  # of what a guest may say, in a log or on a terminal
_RELEASE_MAX = 64  # characters that Linux has for it


def _shown(text: object) -> str:
    """Make one line of what a guest said, without anything that a terminal would obey."""
    return "".join(one if one.isprintable() else "\ufffd" for one in str(text)[:_TEXT_MAX])


class NoAgent(StateError):
    """No agent answers in the guest."""


class GuestAgent:
    """A connection to the agent of a guest. A context manager. One thread at a time may use it.

    Raises
    ------
    NoAgent
        No agent answers within `seconds`.
    """

    def __init__(self, path: Path, name: str, *, seconds: float = SYNC_SECONDS) -> None:
        self._name = name
        self._pending = b""
        self._is_behind = False  # whether the answer to an earlier call may still come
        try:
            found = connect_if_listening(path, seconds=seconds)
        except BlockingIOError:
            found = None
        if found is None:
            raise NoAgent(f"machine {name!r} has no port for a guest agent, or somebody else uses it")
        self._socket = found
        try:
            self._sync(seconds)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Further calls do nothing."""
        self._socket.close()

    def call(self, command: str, *, seconds: float = CALL_SECONDS, **arguments: Any) -> Any:
        """Have the agent run a command, and return what it returns.

        Raises
        ------
        NoAgent
            It did not answer in time. It may still run the command.
        StateError
            It refused.
        """
        deadline = time.monotonic() + seconds
        if self._is_behind:
            self._sync(seconds)
        self._is_behind = True
        self._send({"execute": command, "arguments": arguments} if arguments else {"execute": command}, deadline)
        answer = self._line(deadline)
        self._is_behind = False
        if "error" in answer:
            why = answer["error"].get("desc") if isinstance(answer["error"], dict) else answer["error"]
            raise StateError(f"the guest agent of machine {self._name!r} refused {command!r}: {_shown(why)}")
        if "return" not in answer:
            self._is_behind = True  # whatever that was, the answer may follow
            raise StateError(
                f"the guest agent of machine {self._name!r} gave an answer to {command!r} that no agent gives"
            )
        return answer["return"]

    def freeze(self) -> list[str]:
        """Freeze the guest's file systems. Return their mount points, or how many there are."""
        try:
            count = self.call("guest-fsfreeze-freeze", seconds=FREEZE_SECONDS)
        except BaseException:
            self._thaw_at_any_rate()
            raise
        try:
            # An agent answers this while its file systems are frozen only where it needs no disk for it.
            found = [str(one["mountpoint"]) for one in self.call("guest-get-fsinfo", seconds=1.0)]
        except (StateError, KeyError, TypeError):
            found = []
        if len(found) == count and sum(map(len, found)) <= _TEXT_MAX:
            return [_shown(one) for one in found]
        return [f"{count if type(count) is int else 'some'} file systems"]

    def thaw(self) -> None:
        """Thaw the guest's file systems."""
        self.call("guest-fsfreeze-thaw", seconds=FREEZE_SECONDS)

    def run(self, *command: str) -> None:
        """Run a program in the guest, and wait until it has ended well."""
        deadline = time.monotonic() + CALL_SECONDS
        started = self.call("guest-exec", path=command[0], arg=list(command[1:]))
        while not (ended := self.call("guest-exec-status", pid=started["pid"]))["exited"]:
            if time.monotonic() > deadline:
                raise NoAgent(f"{command[0]} did not end within {CALL_SECONDS:g} s in machine {self._name!r}")
            time.sleep(0.02)
        if failed := ended.get("exitcode") or ended.get("signal"):
            raise StateError(f"{_shown(' '.join(command))} ended with {_shown(failed)} in machine {self._name!r}")

    def _thaw_at_any_rate(self) -> None:
        """Ask for it without waiting: the guest may freeze only after the time that it was given."""
        try:
            self._send({"execute": "guest-fsfreeze-thaw"}, time.monotonic() + 1)
        except (OSError, StateError):
            return

    def _sync(self, seconds: float) -> None:
        """Drop what an earlier connection left unread: the agent answers with a byte 0xFF before the token."""
        deadline = time.monotonic() + seconds
        token = secrets.randbelow(1 << 31)
        self._socket.settimeout(seconds)
        try:
            self._send({"execute": "guest-sync-delimited", "arguments": {"id": token}}, deadline, lead=b"\xff")
            while self._line(deadline).get("return") != token:
                pass
        except NoAgent:
            raise NoAgent(
                f"no guest agent answers in machine {self._name!r}; install qemu-guest-agent in the guest, and start it"
            ) from None

    def _send(self, value: dict[str, Any], deadline: float, *, lead: bytes = b"") -> None:
        self._socket.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            self._socket.sendall(lead + json.dumps(value).encode() + b"\n")
        except (TimeoutError, ConnectionError):
            raise self._silent() from None

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                part = self._socket.recv(65536)
            except (TimeoutError, ConnectionError):
                raise self._silent() from None
            if not part or len(self._pending) > _LINE_BYTES_MAX or time.monotonic() > deadline:
                raise self._silent()  # it may send without end, too
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            value = json.loads(line.rpartition(b"\xff")[2])
        except (ValueError, RecursionError):
            value = None
        return value if isinstance(value, dict) else {}

    def _silent(self) -> NoAgent:
        return NoAgent(f"the guest agent of machine {self._name!r} does not answer")


def tell_identity(
    agent: GuestAgent, *, hostname: str | None, mac: str | None = None, clock_ns: int | None = None
) -> list[str]:
    """Tell a guest who and when it is now. Return what could not be done, in words.

    `mac` is the address of its one network card.
    """
    failed = []

    def attempt(what: str, step: Callable[[], object]) -> None:
        try:
            step()
        except StateError as error:
            failed.append(f"{what}: {error}")
        except (KeyError, TypeError, AttributeError):
            failed.append(f"{what}: the guest agent gave an answer that no agent gives")

    if clock_ns is not None:
        attempt("its clock", lambda: agent.call("guest-set-time", time=clock_ns))
    if hostname is not None:
        attempt("its host name", lambda: agent.run("hostname", hostname))
    if mac is not None:
        attempt("the address of its network card", lambda: _set_mac(agent, mac))
    return failed


def kernel_of(agent: GuestAgent) -> str:
    """Return the release of the guest's kernel, as its agent says it; empty where that is no Linux, or it does not say."""
    try:
        found = agent.call("guest-get-osinfo")
    except StateError:
        return ""
    release = found.get("kernel-release") if isinstance(found, dict) else None
    return _shown(release) if isinstance(release, str) and len(release) <= _RELEASE_MAX else ""


def _set_mac(agent: GuestAgent, mac: str) -> None:
    found = agent.call("guest-network-get-interfaces")
    cards = [one["name"] for one in found if one.get("hardware-address", "00:00:00:00:00:00") != "00:00:00:00:00:00"]
    if len(cards) != 1:
        raise StateError(f"it has {len(cards)} network cards")
    agent.run("ip", "link", "set", "dev", cards[0], "address", mac)
