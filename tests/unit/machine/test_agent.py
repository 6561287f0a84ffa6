"""The guest agent's protocol, against a program that says what an agent would."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onionskin.errors import StateError
from onionskin.machine.agent import GuestAgent, NoAgent, kernel_of, tell_identity


class Agent:
    """Answers each line by what `answers` says for its command; None: it is silent. `late` it answers too late."""

    def __init__(self, path: Path, answers: dict[str, Any], before: bytes = b"") -> None:
        self.heard: list[str] = []
        self.late: dict[str, Any] = {}
        self._answers = answers
        self._before = before
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        # Who asked may be gone, with an answer unread.
        with connection, suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line.rpartition(b"\xff")[2])
                command = request["execute"]
                self.heard.append(command)
                if command == "guest-sync-delimited" and command not in self._answers:
                    token = request["arguments"]["id"]
                    self._say(connection, b"\xff" + json.dumps({"return": token}).encode())
                elif command in self.late:
                    self._before = json.dumps(self.late[command]).encode() + b"\n"  # with what is answered next
                elif (answer := self._answers.get(command, {"return": {}})) is not None:
                    self._say(connection, json.dumps(answer).encode())

    def _say(self, connection: socket.socket, line: bytes) -> None:
        before, self._before = self._before, b""
        connection.sendall(before + line + b"\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[..., tuple[Agent, Path]]]:
    made: list[Agent] = []

    def make(answers: dict[str, Any] | None = None, before: bytes = b"") -> tuple[Agent, Path]:
        made.append(Agent(tmp_path / "agent", answers or {}, before))
        return made[0], tmp_path / "agent"

    yield make
    for agent in made:
        agent.close()


def test_file_systems_that_were_frozen_are_named(answering: Callable[..., tuple[Agent, Path]]) -> None:
    agent, path = answering(
        {
            "guest-fsfreeze-freeze": {"return": 2},
            "guest-get-fsinfo": {"return": [{"mountpoint": "/"}, {"mountpoint": "/data"}]},
            "guest-fsfreeze-thaw": {"return": 2},
        }
    )
    with GuestAgent(path, "lab") as guest:
        assert guest.freeze() == ["/", "/data"]
        guest.thaw()
    assert agent.heard[-1] == "guest-fsfreeze-thaw"


def test_an_agent_that_cannot_name_them_says_how_many(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-fsfreeze-freeze": {"return": 2}, "guest-get-fsinfo": {"error": {"desc": "unknown"}}})
    with GuestAgent(path, "lab") as guest:
        assert guest.freeze() == ["2 file systems"]


def test_a_freeze_that_is_not_answered_is_followed_by_a_thaw(
    answering: Callable[..., tuple[Agent, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onionskin.machine.agent.FREEZE_SECONDS", 0.1)
    agent, path = answering({"guest-fsfreeze-freeze": None})
    with GuestAgent(path, "lab") as guest, pytest.raises(NoAgent, match="does not answer"):
        guest.freeze()
    agent._thread.join()  # the connection is closed, and all that was sent has been read
    assert agent.heard[-1] == "guest-fsfreeze-thaw"


def test_what_an_earlier_connection_left_unread_is_dropped(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-ping": {"return": "mine"}}, b'{"return": "of another call"}\nhalf a li')
    with GuestAgent(path, "lab") as guest:
        assert guest.call("guest-ping") == "mine"


def test_a_guest_without_an_agent_is_said_to_have_none(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-sync-delimited": None})
    with pytest.raises(NoAgent, match="no guest agent answers in machine 'lab'; install qemu-guest-agent"):
        GuestAgent(path, "lab", seconds=0.1)


def test_a_machine_without_a_port_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(NoAgent, match="no port"):
        GuestAgent(tmp_path / "agent", "lab")


def test_what_a_guest_cannot_be_told_is_listed(answering: Callable[..., tuple[Agent, Path]]) -> None:
    agent, path = answering(
        {
            "guest-set-time": {"error": {"desc": "not allowed"}},
            "guest-exec": {"return": {"pid": 7}},
            "guest-exec-status": {"return": {"exited": True, "exitcode": 0}},
        }
    )
    with GuestAgent(path, "lab") as guest:
        failed = tell_identity(guest, hostname="fork-1", clock_ns=1)
    assert len(failed) == 1 and failed[0].startswith("its clock") and "not allowed" in failed[0]
    assert "guest-exec-status" in agent.heard


def test_a_refusal_of_an_agent_is_an_error_in_its_words(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-ping": {"error": {"desc": "not now"}}})
    with GuestAgent(path, "lab") as guest, pytest.raises(StateError, match="refused 'guest-ping': not now"):
        guest.call("guest-ping")


class Endless:
    """A connection on which lines come without end."""

    def __init__(self) -> None:
        self._lines = iter(range(1_000_000))

    def settimeout(self, seconds: float) -> None: ...

    def sendall(self, data: bytes) -> None: ...

    def close(self) -> None: ...

    def recv(self, length: int) -> bytes:
        next(self._lines)
        return b"{}\n"


def test_an_agent_that_sends_without_end_is_silent_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onionskin.machine.agent.connect_if_listening", lambda path, seconds: Endless())
    with pytest.raises(NoAgent):
        GuestAgent(Path("agent"), "lab", seconds=0.05)


@pytest.mark.parametrize("answer", [None, 7, "text", [[]], {"pid": []}, {"exited": {}}])
def test_a_guest_whose_agent_answers_something_else_is_not_told_and_that_is_listed(
    answering: Callable[..., tuple[Agent, Path]], answer: Any
) -> None:
    _, path = answering({name: {"return": answer} for name in ("guest-exec", "guest-network-get-interfaces")})
    with GuestAgent(path, "lab") as guest:
        failed = tell_identity(guest, hostname="fork-1", mac="52:54:00:00:00:01")
    assert len(failed) == 2


def test_what_a_guest_says_reaches_the_terminal_as_a_short_line(answering: Callable[..., tuple[Agent, Path]]) -> None:
    said = "\x1b[2J\n" + "x" * 100_000
    _, path = answering(
        {
            "guest-fsfreeze-freeze": {"return": 1},
            "guest-get-fsinfo": {"return": [{"mountpoint": said}]},
            "guest-ping": {"error": {"desc": said}},
            "guest-get-osinfo": {"return": {"kernel-release": said}},
        }
    )
    with GuestAgent(path, "lab") as guest:
        assert guest.freeze() == ["1 file systems"]
        assert kernel_of(guest) == ""
        with pytest.raises(StateError) as refused:
            guest.call("guest-ping")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 5000


def test_an_answer_that_is_nested_without_end_is_none(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-ping": {"return": "mine"}}, b"[" * 100_000 + b"\n")
    with GuestAgent(path, "lab") as guest:
        assert guest.call("guest-ping") == "mine"


def test_an_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_call(
    answering: Callable[..., tuple[Agent, Path]],
) -> None:
    agent, path = answering({"guest-ping": {"return": "mine"}})
    agent.late["guest-set-time"] = {"return": "late"}
    with GuestAgent(path, "lab") as guest:
        with pytest.raises(NoAgent):
            guest.call("guest-set-time", seconds=0.05)
        assert guest.call("guest-ping") == "mine"


def test_a_line_that_is_no_answer_is_not_taken_for_a_success(answering: Callable[..., tuple[Agent, Path]]) -> None:
    _, path = answering({"guest-fsfreeze-thaw": {"ready": True}})
    with GuestAgent(path, "lab") as guest, pytest.raises(StateError, match="'guest-fsfreeze-thaw' that no agent gives"):
        guest.thaw()


@pytest.mark.parametrize("ended", [{"exitcode": "\x1b[2J"}, {"signal": 9}])
def test_a_program_that_did_not_end_well_in_the_guest_is_an_error_of_one_printable_line(
    answering: Callable[..., tuple[Agent, Path]], ended: dict[str, Any]
) -> None:
    _, path = answering(
        {"guest-exec": {"return": {"pid": 7}}, "guest-exec-status": {"return": {"exited": True, **ended}}}
    )
    with GuestAgent(path, "lab") as guest, pytest.raises(StateError, match=r"hostname .* ended with") as refused:
        guest.run("hostname", "fork\x07")
    assert str(refused.value).isprintable()
