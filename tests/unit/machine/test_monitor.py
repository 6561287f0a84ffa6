"""The connection to QEMU's monitor, against a program that says what QEMU would."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onionskin.base.waiting import within
from onionskin.machine.monitor import Monitor, MonitorError, MonitorTimeout

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}


class Qemu:
    """Answers on a socket. `silent` is not answered; `refused` is refused; the rest returns nothing."""

    def __init__(self, path: Path) -> None:
        self.heard: list[str] = []
        self.job_error: str | None = "it failed"
        self._news = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.connection, _ = self._listener.accept()
        except OSError:
            return
        self.say(GREETING)
        text = ""
        while part := self._received():
            text += part
            while text:
                try:
                    request, end = json.JSONDecoder().raw_decode(text)  # nothing stands between two
                except ValueError:
                    break
                text = text[end:].lstrip()
                self._answer(request)

    def _received(self) -> str:
        assert self.connection is not None
        try:
            return self.connection.recv(65536).decode()
        except OSError:
            return ""

    def _answer(self, request: dict[str, Any]) -> None:
        command = request["execute"]
        with self._news:
            self.heard.append(command)
            self._news.notify_all()
        if command == "silent":
            self._silent = request
            return
        reply: dict[str, Any] = {"return": {}}
        if command == "refused":
            reply = {"error": {"class": "GenericError", "desc": "not now"}}
        if command == "start-job":
            self._job = request["arguments"]["job-id"]
            status = {"id": self._job, "status": "concluded"}
            self.say({"event": "JOB_STATUS_CHANGE", "data": status, "timestamp": {"seconds": 1, "microseconds": 1}})
        if command == "query-jobs":
            error = {"error": self.job_error} if self.job_error else {}
            reply = {"return": [{"id": self._job, "status": "concluded", "type": "x"} | error]}
        self.say(reply | ({"id": request["id"]} if "id" in request else {}))

    def answer_late(self) -> None:
        """Answer what it was silent to."""
        self.say({"return": {}, "id": self._silent["id"]})

    def wait_for(self, command: str) -> None:
        """Return once it has heard a command."""
        with self._news:
            assert self._news.wait_for(lambda: command in self.heard, 300)

    def end_after(self, command: str) -> None:
        """End once it has heard a command."""
        self.wait_for(command)
        assert self.connection is not None
        self.connection.shutdown(socket.SHUT_RDWR)

    def say(self, value: dict[str, Any]) -> None:
        assert self.connection is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # the monitor may go at any time
            self.connection.sendall(json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        for one in (self._listener, self.connection):
            if one is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def qemu(path: Path) -> Iterator[Qemu]:
    made = Qemu(path)
    yield made
    made.close()


def test_a_command_that_is_not_answered_ends_with_an_error_in_time(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        with pytest.raises(MonitorTimeout, match=r"did not answer 'silent' within 0\.1 s"):
            monitor.execute("silent", seconds=0.1)
        monitor.execute("next")  # and the connection goes on
    assert qemu.heard == ["qmp_capabilities", "silent", "next"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_command_is_waited_for_as_long_as_who_it_waits_for_is_at_it(qemu: Qemu, path: Path, ends_well: bool) -> None:
    looks = []

    def is_at_it() -> bool:
        looks.append(len(looks))
        if len(looks) == 2 and ends_well:
            qemu.answer_late()
        return len(looks) < 2 or ends_well

    with Monitor(path, "lab") as monitor:
        if ends_well:
            assert monitor.execute("silent", seconds=0.01, seconds_max=600, is_at_it=is_at_it) == {}
        else:
            with pytest.raises(MonitorTimeout, match="did not answer 'silent'"):
                monitor.execute("silent", seconds=0.01, seconds_max=600, is_at_it=is_at_it)
            assert len(looks) == 2
        monitor.execute("next")


def test_a_qemu_that_was_stopped_is_not_waited_for_longer_though_its_disks_are_served(
    qemu: Qemu, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def is_at_it() -> bool:
        looks.append(len(looks))
        return len(looks) < 3  # so that this ends where it is asked all the same

    with Monitor(path, "lab") as monitor:
        monkeypatch.setattr("onionskin.machine.monitor.is_stopped", lambda pid: pid == monitor.pid)
        with pytest.raises(MonitorTimeout, match="was stopped"):
            monitor.execute("silent", seconds=0.01, seconds_max=600, is_at_it=is_at_it)
    assert looks == []


@pytest.mark.parametrize(
    ("stands", "events", "went_on", "was_reset"),
    [
        (True, ["RESUME"], True, False),
        (False, ["RESET", "STOP"], False, False),
        (False, ["STOP", "RESET", "STOP"], False, True),
        (False, ["STOP", "RESUME", "STOP"], True, False),
    ],
)
def test_what_disturbs_a_machine_that_stands_still_is_known_before_the_next_answer(
    qemu: Qemu, path: Path, stands: bool, events: list[str], went_on: bool, was_reset: bool
) -> None:
    with Monitor(path, "lab") as monitor:
        standstill = monitor.watch(stands=stands)
        for event in events:
            qemu.say({"event": event, "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}})
        monitor.execute("next")
        assert (standstill.went_on, standstill.was_reset) == (went_on, was_reset)


def test_who_does_not_answer_as_it_was_stopped_is_named_with_what_lets_it_go_on(
    qemu: Qemu, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onionskin.machine.monitor.is_stopped", lambda pid: pid == os.getpid())
    said = f"its process {os.getpid()} was stopped .kill -CONT lets it go on"
    with Monitor(path, "lab") as monitor, pytest.raises(MonitorTimeout, match=said):
        monitor.execute("silent", seconds=0.1)


def test_a_command_that_is_refused_says_so_in_the_words_of_qemu(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor, pytest.raises(MonitorError, match="refused 'refused': not now"):
        monitor.execute("refused")


def test_commands_that_are_asked_for_together_wait_for_no_answer_in_between(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        with pytest.raises(MonitorTimeout, match="did not answer 'silent'"):
            monitor.execute_all([("silent", None), ("second", {"a": 1})], seconds=0.1)
        qemu.wait_for("second")
        assert monitor.execute_all([("third", None), ("fourth", None)]) == [{}, {}]
    assert qemu.heard == ["qmp_capabilities", "silent", "second", "third", "fourth"]


def test_others_are_asked_while_an_answer_is_waited_for_later(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        wait = monitor.ask_all([("silent", None), ("second", None)])
        qemu.wait_for("second")
        assert monitor.execute("third") == {}
        qemu.answer_late()
        assert wait() == [{}, {}]
        wait = monitor.ask_all([("refused", None)])
        qemu.wait_for("refused")
        monitor.execute("fourth")  # its answer comes behind that
    with pytest.raises(MonitorError, match="refused 'refused'"):
        wait()


def test_the_first_refusal_of_several_commands_is_raised_when_all_were_answered(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor, pytest.raises(MonitorError, match="refused 'refused': not now"):
        monitor.execute_all([("first", None), ("refused", None), ("last", None)])
    assert qemu.heard == ["qmp_capabilities", "first", "refused", "last"]


def test_a_job_that_failed_raises_its_error_and_is_dismissed(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        with pytest.raises(MonitorError, match="start-job: it failed"):
            monitor.run_job("start-job", {})
        monitor.execute("next")
    assert "job-dismiss" in qemu.heard


def test_events_are_given_and_an_error_of_who_hears_them_ends_nothing(qemu: Qemu, path: Path) -> None:
    heard: list[str] = []
    came = threading.Event()

    def hear(name: str, data: dict[str, Any]) -> None:
        heard.append(name)
        if name == "STOP":
            raise ValueError("a fault of the listener")
        came.set()

    with Monitor(path, "lab", on_event=hear):
        for name in ("STOP", "RESUME"):
            qemu.say({"event": name, "timestamp": {"seconds": 1, "microseconds": 1}})
        assert came.wait(300)
    assert heard == ["STOP", "RESUME"]


def test_an_end_of_qemu_is_an_error_of_the_command_under_way(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        ending = threading.Thread(target=qemu.end_after, args=("silent",))
        ending.start()
        with pytest.raises(MonitorError, match=r"has it ended\? 'onionskin machine status' says so"):
            monitor.execute("silent", seconds=300)
        ending.join()


def test_a_command_behind_the_end_of_qemu_is_refused_in_words_of_this_program(qemu: Qemu, path: Path) -> None:
    with Monitor(path, "lab") as monitor:
        ending = threading.Thread(target=qemu.end_after, args=("silent",))
        ending.start()
        for _ in range(2):  # the second one finds a library that has not disconnected yet
            with pytest.raises(MonitorError, match=r"has it ended\? 'onionskin machine status' says so") as raised:
                monitor.execute("silent", seconds=300)
        ending.join()
    assert "QMPClient" not in str(raised.value)


def test_a_closed_connection_refuses_commands_and_may_be_closed_again(qemu: Qemu, path: Path) -> None:
    monitor = Monitor(path, "lab")
    monitor.request("later")
    monitor.close()
    monitor.close()
    monitor.request("later")
    with pytest.raises(MonitorError, match="was closed"):
        monitor.execute("next")


def test_closing_while_another_thread_waits_ends_that_wait(qemu: Qemu, path: Path) -> None:
    monitor = Monitor(path, "lab")
    failed: list[MonitorError] = []

    def wait() -> None:
        try:
            monitor.execute("silent", seconds=300)
        except MonitorError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    qemu.wait_for("silent")
    monitor.close()
    thread.join(250)
    assert not thread.is_alive() and failed


@pytest.mark.parametrize(
    "said",
    [
        b"no JSON\xff\n",
        b"[" * 100_000 + b"\n",
        b"1" * 5000 + b"\n",
        b'{"return": {}, "id": [1]}\n',
        b'{"event": "JOB_STATUS_CHANGE", "data": 5}\n',
        b"x" * (11 << 20),  # more than a line may have
    ],
    ids=["no JSON", "deep", "a long number", "a list for an id", "an event without its data", "no end"],
)
def test_what_no_qemu_says_is_an_error_of_the_command_and_leaves_no_thread(qemu: Qemu, path: Path, said: bytes) -> None:
    monitor = Monitor(path, "lab")

    def say() -> None:
        qemu.wait_for("silent")
        assert qemu.connection is not None
        with suppress(BrokenPipeError, ConnectionResetError):
            qemu.connection.sendall(said)

    saying = threading.Thread(target=say)
    saying.start()
    with pytest.raises(MonitorError, match="Disconnected"):
        monitor.run_job("silent", {})
    saying.join()
    monitor.close()
    assert not monitor._thread.is_alive()


def test_events_that_nobody_asks_for_are_not_kept(qemu: Qemu, path: Path) -> None:
    heard: list[str] = []
    with Monitor(path, "lab", on_event=lambda event, _: heard.append(event)) as monitor:
        for _ in range(100):
            qemu.say({"event": "RESET", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}})
        monitor.execute("something")  # what came before an answer was heard before it
        assert monitor._client.events.empty()
    assert heard == ["RESET"] * 100


def test_a_machine_goes_on_as_qemu_reports_it_until_something_may_have_ended_that(qemu: Qemu, path: Path) -> None:
    def report(event: str) -> None:
        qemu.say({"event": event, "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}})
        monitor.execute("next")  # with the answer, the event is heard

    with Monitor(path, "lab") as monitor:
        assert not monitor.is_live, "nothing is known of a machine that another process let go on"
        for event in ("STOP", "SUSPEND", "SUSPEND_DISK", "SHUTDOWN", "GUEST_PANICKED"):
            report("RESUME")
            assert monitor.is_live
            report("RESET")
            assert monitor.is_live
            report(event)
            assert not monitor.is_live, event
        report("RESUME")
        qemu.end_after("next")
        assert within(300, lambda: not monitor.is_live), "of a QEMU that is gone nothing is known"


def test_what_is_to_be_asked_behind_a_job_is_asked_with_how_it_ended(qemu: Qemu, path: Path) -> None:
    qemu.job_error = None
    called: list[list[str]] = []
    with Monitor(path, "lab") as monitor:
        found = monitor.run_job(
            "start-job", {}, then=[("next", None), ("last", None)], meanwhile=lambda: called.append(list(qemu.heard))
        )
        assert found == [{}, {}] and len(called) == 1
        qemu.wait_for("job-dismiss")
    assert qemu.heard == ["qmp_capabilities", "start-job", "query-jobs", "next", "last", "job-dismiss"]


def test_what_is_asked_behind_a_job_is_asked_behind_what_is_done_meanwhile(qemu: Qemu, path: Path) -> None:
    """So what QEMU reported until then is heard with the answer."""
    qemu.job_error = None
    with Monitor(path, "lab") as monitor:

        def ask() -> None:
            for _ in range(3):  # with the first answer the end of the job is heard; what is asked then comes next
                monitor.execute("meanwhile")

        monitor.run_job("start-job", {}, meanwhile=ask)
        qemu.wait_for("job-dismiss")
    assert qemu.heard == ["qmp_capabilities", "start-job", *["meanwhile"] * 3, "query-jobs", "job-dismiss"]


def test_the_end_of_a_job_is_waited_for_where_what_is_done_meanwhile_fails(qemu: Qemu, path: Path) -> None:
    def fail() -> None:
        raise OSError("what is done meanwhile")

    qemu.job_error = None
    with Monitor(path, "lab") as monitor:
        with pytest.raises(OSError, match="what is done meanwhile"):
            monitor.run_job("start-job", {}, meanwhile=fail)
        assert "query-jobs" in qemu.heard
