"""What is decided about a machine before any process of it runs."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.logs import words_of
from support.machines import snapshot_live
from support.stand_in import RECORDED

import onionskin
from onionskin.base import threads
from onionskin.control import frames
from onionskin.errors import StateError
from onionskin.machine import qemu_command, record
from onionskin.machine import supervisor as supervisor_module
from onionskin.machine.control import VERSION, ControlServer, Gone, MachineControl
from onionskin.machine.hypervisor import Configuration, Recorded
from onionskin.machine.monitor import MonitorError
from onionskin.machine.qemu import QemuHypervisor
from onionskin.machine.record import Record
from onionskin.machine.supervisor import Supervisor
from onionskin.operations import machines


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1M").close()
        yield store


def is_isolated(store: onionskin.Store, machine: onionskin.Machine) -> bool | None:
    supervisor = Supervisor(store, machine.name, print)
    try:
        return supervisor._configuration(machine._row).is_isolated
    finally:
        supervisor._ends.close()


def test_the_network_of_a_machine_reaches_something_and_that_of_a_fork_does_not(store: onionskin.Store) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M", network="user")
    lab.snapshot("off")
    (fork,) = lab.fork("off", start=False)
    (open_fork,) = lab.fork("off", start=False, network=True)
    assert is_isolated(store, lab) is False
    assert is_isolated(store, fork) is True
    assert is_isolated(store, open_fork) is False


def test_a_hypervisor_that_ends_while_its_memory_is_read_is_said_to_have_ended(store: onionskin.Store) -> None:
    store.create_machine("lab", disks=["web"], memory="1M")
    supervisor = Supervisor(store, "lab", print)
    supervisor.running = SimpleNamespace(ram_volume=SimpleNamespace(closed=False))  # type: ignore[assignment]
    with (
        pytest.raises(StateError, match=r"QEMU of machine 'lab' has ended meanwhile.*'onionskin machine status'"),
        supervisor._held(),
    ):
        raise ProcessLookupError(errno.ESRCH, "the memory of process 7: No such process")
    supervisor._ends.close()


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("pause", {}),
        ("resume", {}),
        ("stop", {"timeout": None, "force": False}),
        ("snapshot", {"name": "ready", "note": "", "mode": None, "freeze": False}),
        ("revert", {"name": "ready"}),
    ],
)
def test_nothing_is_done_for_a_caller_that_went_away_while_it_waited_for_its_turn(
    store: onionskin.Store, verb: str, arguments: dict[str, object]
) -> None:
    store.create_machine("lab", disks=["web"], memory="1M")
    supervisor = Supervisor(store, "lab", print)
    supervisor.running = SimpleNamespace(guard=threading.RLock())  # type: ignore[assignment] # it has nothing to be done with

    def has_gone() -> None:
        raise Gone

    try:
        with pytest.raises(Gone):
            getattr(supervisor, verb)(has_gone, **arguments)
    finally:
        supervisor._ends.close()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_time_to_shut_down_that_no_clock_can_wait_for_is_refused(store: onionskin.Store, seconds: float) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    with pytest.raises(ValueError, match="seconds to shut down"):
        lab.stop(seconds)


def test_a_network_without_a_name_is_refused_where_it_would_be_isolated(tmp_path: Path) -> None:
    configuration = Configuration(1 << 20, is_isolated=True, qemu_args=("-netdev", "user"))
    with pytest.raises(StateError, match="has no id="):
        qemu_command.command(
            *("qemu", configuration),
            **{"name": "lab", "machine_type": "pc", "directory": tmp_path, "ram_file": tmp_path / "ram"},
            disks=[],
            identity=qemu_command.Identity(),
        )


def test_a_missing_qmp_library_is_named_with_what_installs_it() -> None:
    code = "import sys; sys.modules['qemu'] = None; import onionskin.machine.supervisor"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StateError: machines need the Python library qemu.qmp" in ended.stderr
    assert "pip install 'onionskin[machine]'" in ended.stderr


def test_a_machine_is_not_made_with_an_argument_that_no_start_would_take(store: onionskin.Store) -> None:
    with pytest.raises(StateError, match="UEFI"):
        store.create_machine("lab", disks=["web"], memory="1M", qemu_args=["-drive", "if=pflash,file=vars"])
    assert store.machines() == []


def test_a_revert_that_a_user_of_a_disk_is_in_the_way_of_is_not_noted(store: onionskin.Store) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    lab.snapshot("off")
    lab.snapshot("later")
    with onionskin.Store(store.path) as other, other.open("web"):
        with pytest.raises(StateError, match="'web' is open"):
            lab.revert("off")
        assert (lab.info().begins, lab.info().stands_on) == ("boots", "later")


def test_a_revert_to_what_cannot_run_here_is_refused_before_anything_is_put_back(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    was = Recorded("qemu", "7.2.22", "pc-i440fx-7.2", "tcg", "max", 1 << 20, 1)
    snapshot_live(store, "lab", "ready", {}, recorded=was.to_json())
    with store.open("web") as web:
        web.write(0, b"later")
    (fork,) = lab.fork("ready", start=False)
    machines.note_running(store._opened, fork._id)
    monkeypatch.setattr(QemuHypervisor, "check", lambda *_: replace(was, cpu_model="qemu64"))
    for revert in (lambda: lab.revert("ready"), fork.revert_to_beginning):
        with pytest.raises(StateError, match="its CPU model was max, and would be qemu64"):
            revert()
    assert lab.info().begins == fork.info().begins == "boots"
    with store.open("web", mode="r") as web:
        assert web.read(0, 5) == b"later"


def test_the_same_call_to_fork_again_makes_nothing_and_starts_what_never_ran(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    snapshot_live(store, "lab", "ready", {})
    started: list[list[str]] = []

    def start(_: object, ids: list[bytes]) -> None:
        started.append([machines.find(store._opened.catalog, id).name for id in ids])
        if len(started) == 1:
            raise OSError(28, "no room")
        machines.note_running(store._opened, ids[0])

    monkeypatch.setattr("onionskin.machine.fork.start_all", start)
    with pytest.raises(OSError, match="no room"):
        lab.fork("ready", count=2, idempotency_key="task 7")
    for _ in range(3):
        assert [fork.name for fork in lab.fork("ready", count=2, idempotency_key="task 7")] == ["lab-1", "lab-2"]
    assert started == [["lab-1", "lab-2"], ["lab-1", "lab-2"], ["lab-2"]]
    with pytest.raises(StateError, match="was used for another fork"):
        lab.fork("ready", count=3, idempotency_key="task 7")
    assert len(store.machines()) == 3


@pytest.mark.parametrize(
    ("kernel", "warns"),
    [("", False), ("6.1.0-53-cloud-amd64", True), ("6.12.95+deb12-cloud-amd64", False), ("5.10.0", True)],
)
def test_forks_of_a_kernel_that_may_not_notice_are_warned_of(store: onionskin.Store, kernel: str, warns: bool) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    was = Recorded("qemu", "7.2.22", "pc-i440fx-7.2", "tcg", "max", 1 << 20, 1, guest_kernel=kernel)
    snapshot_live(store, "lab", "ready", {}, recorded=was.to_json())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        lab.fork("ready", start=False)
    said = [str(one.message) for one in warned if one.category is RuntimeWarning]
    assert len(said) == warns and all(f"Linux {kernel}" in line for line in said)


def test_a_supervisor_that_ends_before_it_is_asked_is_not_an_error(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    here, there = socket.socketpair()
    with there:
        there.sendall(frames.packed({"onionskin": "machine", "version": VERSION}))
        found = [MachineControl(here, "lab"), None]
    monkeypatch.setattr(lab, "_find", lambda: found.pop(0))
    assert lab.status()["state"] == "off"


def test_who_waits_for_a_supervisor_that_ends_is_answered_and_not_interrupted(tmp_path: Path) -> None:
    is_asked, may_end = threading.Event(), threading.Event()

    def snapshot(has_gone: Callable[[], None], **_: object) -> str:
        is_asked.set()
        may_end.wait()
        has_gone()
        return "taken"

    server = ControlServer(tmp_path / "control", {"snapshot": snapshot}, print)
    answers: list[object] = []
    control = MachineControl.find(tmp_path / "control", "lab")
    assert control is not None
    with control:
        asking = threading.Thread(
            target=lambda: answers.append(control.call("snapshot", name=None, note="", mode=None, freeze=False))
        )
        asking.start()
        is_asked.wait()
        server.close()
        may_end.set()
        asking.join()
    server.join(300)
    assert answers == ["taken"]


def test_a_caller_is_refused_whose_thread_dies_before_it_begins_and_the_next_one_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ControlServer(tmp_path / "control", {"pause": lambda has_gone: True}, print)
    with monkeypatch.context() as patched:
        patched.setattr(threads, "START_SECONDS", 0.0)
        patched.setattr(threads.SureThread, "_bootstrap", lambda self: None)
        with pytest.raises(StateError, match="could start no thread"):
            MachineControl.find(tmp_path / "control", "lab")
    control = MachineControl.find(tmp_path / "control", "lab")
    assert control is not None
    with control:
        assert control.call("pause") is True
    server.close()


def test_who_hears_nothing_any_more_is_told_that_it_may_be_done_all_the_same() -> None:
    here, there = socket.socketpair()
    with there:
        there.sendall(frames.packed({"onionskin": "machine", "version": VERSION}))
        with MachineControl(here, "lab") as control:
            here.settimeout(0.01)
            with pytest.raises(StateError, match="may do what 'snapshot' asked for then"):
                control.call("snapshot", name="a", note="", mode=None, freeze=False)


def test_who_waits_for_a_supervisor_that_says_nothing_is_told_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frames, "WORD_SECONDS", 0.01)
    monkeypatch.setattr(frames, "SILENCE_SECONDS", 0.05)
    here, there = socket.socketpair()
    with there, pytest.raises(StateError, match="has not answered"):
        MachineControl(here, "lab")
    assert words_of(caplog, "onionskin.control.client") == [
        f"waiting for process {os.getpid()}, which supervises machine 'lab': "
        "it is silent, and may hang on its disk (at most 0 s)"
    ]


def test_who_waits_for_a_supervisor_that_waits_itself_is_told_once_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frames, "ALIVE_SECONDS", 0.001)
    asked = threading.Semaphore(0)

    def who_is_stopped() -> str:
        asked.release()
        return "process 5, which serves the disks of machine 'lab'"

    def pause(has_gone: Callable[[], None]) -> bool:
        for _ in range(4):  # so three times it was sent
            asked.acquire()
        return True

    server = ControlServer(tmp_path / "control", {"pause": pause}, print, who_is_stopped=who_is_stopped)
    control = MachineControl.find(tmp_path / "control", "lab")
    assert control is not None
    with control:
        assert control.call("pause") is True
    server.close()
    assert words_of(caplog, "onionskin.machine.control") == [
        "waiting for process 5, which serves the disks of machine 'lab': it is stopped; kill -CONT lets it go on, or thawing "
        "its cgroup"
    ]


def test_what_a_caller_that_has_gone_asked_for_is_given_up(tmp_path: Path) -> None:
    is_asked, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def snapshot(has_gone: Callable[[], None], **_: object) -> str:
        is_asked.set()
        may_end.wait()
        try:
            has_gone()
        except KeyboardInterrupt:
            ended.append("given up")
            raise
        return "taken"

    server = ControlServer(tmp_path / "control", {"snapshot": snapshot}, print)
    control = MachineControl.find(tmp_path / "control", "lab")
    assert control is not None
    request = {"verb": "snapshot", "arguments": {"name": None, "note": "", "mode": None, "freeze": False}}
    frames.send(control._connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
    is_asked.wait()
    control.close()
    may_end.set()
    server.join(300)
    server.close()
    assert ended == ["given up"]


def test_a_guest_is_not_ended_because_nobody_can_look_at_its_processes(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    supervisor = Supervisor(store, "lab", said.append)
    statuses = iter([None, None, None, 0])
    ended: list[bool] = []

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    supervisor._process = SimpleNamespace(wait=lambda seconds: next(statuses))  # type: ignore[assignment]
    monkeypatch.setattr(supervisor_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(supervisor, "_wait_for_news", refuse)
    monkeypatch.setattr(supervisor, "_report", lambda status: said.append(f"ended with {status}"))
    monkeypatch.setattr(supervisor, "end", lambda: ended.append(True))
    assert supervisor.run() == 0
    supervisor._ends.close()
    assert ended == [True]
    assert said[1:] == ["ended with 0"]  # that it cannot be looked at is said once
    assert os.strerror(errno.EMFILE) in said[0]


def test_a_disk_that_has_errors_again_and_again_is_served_by_another_process(
    store: onionskin.Store,
) -> None:
    """Where a sync failed, a server takes no more writes of that disk, and another one does."""
    done = []
    supervisor = Supervisor(store, "lab", lambda line: None)
    try:
        supervisor._server = SimpleNamespace(uris=["nbd+unix:///web"], end=lambda: done.append("end"))  # type: ignore[assignment]
        supervisor._process = SimpleNamespace(status="io-error", resume=lambda: done.append("resume"))  # type: ignore[assignment]
        supervisor.running = SimpleNamespace(guard=threading.RLock(), is_broken=False)  # type: ignore[assignment]
        supervisor.record = SimpleNamespace(is_paused=False, is_standing=False)  # type: ignore[assignment]
        supervisor._is_stopped = True
        for _ in range(5):
            supervisor._look_at_guest()
    finally:
        supervisor._ends.close()
    assert done == ["resume", "resume", "end", "resume"]


def test_a_connection_to_the_hypervisor_that_ended_is_made_again_once_nobody_uses_the_machine(
    store: onionskin.Store,
) -> None:
    said: list[str] = []
    done: list[str] = []
    supervisor = Supervisor(store, "lab", said.append)
    guard = threading.RLock()
    looks = partial(threading.Thread, target=supervisor._look_at_connection)
    try:
        process = SimpleNamespace(is_disconnected=True, is_paused=True, connect_again=lambda: done.append("again"))
        supervisor._process = process  # type: ignore[assignment]
        supervisor.running = SimpleNamespace(guard=guard)  # type: ignore[assignment]
        with guard:
            (look := looks()).start()
            look.join()
        assert done == []
        supervisor._look_at_connection()
    finally:
        supervisor._ends.close()
    assert done == ["again"]
    assert supervisor._is_stopped  # it stopped while nobody heard of it
    assert "it is there again" in said[0]


def test_a_server_is_kept_that_could_not_be_looked_at_for_a_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no descriptor is left, as nobody else starts it while a hypervisor waits for it."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    said: list[str] = []
    answers = iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE)), None])

    def open_process(_: object) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    supervisor = Supervisor(store, "lab", said.append)
    monkeypatch.setattr(supervisor_module, "RESTART_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "_open_process", open_process)
    monkeypatch.setattr(supervisor, "_look_at_server", lambda: os.close(writer))
    try:
        supervisor._server = SimpleNamespace(process="one")  # type: ignore[assignment]
        supervisor._keep_served(reader)
    finally:
        supervisor._ends.close()
        os.close(reader)
    assert os.strerror(errno.EMFILE) in said[0]


@pytest.mark.parametrize(
    ("paused", "ended", "stays"),
    [
        ([False, True], [False], True),  # it ran, and is found stopped when it answers again
        ([True, True], [True, True], False),  # its guest had shut down, and nothing was touched
        ([True, True], [True, False], True),  # and it was put back by then
    ],
)
def test_a_machine_that_did_not_answer_behind_a_revert_that_failed_is_noted_as_one_that_is_to_go_on(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, paused: list[bool], ended: list[bool], stays: bool
) -> None:
    noted: dict[str, object] = {}
    is_paused, has_ended = iter(paused), iter(ended)

    class Process:
        is_paused = property(lambda self: next(is_paused))
        has_stopped_itself = property(lambda self: next(has_ended))

        def hear_all(self) -> None:
            pass

    def revert(running: SimpleNamespace, *given: object, **named: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(running, "is_broken", True)
            assert supervisor._state("paused") == "paused" and "is being put back" in supervisor._why("paused")
        assert noted == {"is_reverting": True, "is_standing": True}  # who takes it over from here lets it go on
        raise MonitorError("it did not answer when it was to go on")

    supervisor = Supervisor(store, "lab", print)
    try:
        supervisor._process = Process()  # type: ignore[assignment]
        supervisor.record = SimpleNamespace(is_paused=False)  # type: ignore[assignment]
        supervisor.running = SimpleNamespace(  # type: ignore[assignment]
            guard=threading.RLock(), is_broken=False, goes_on=True, is_frozen=False, generation="",
            recorded=SimpleNamespace(to_json=str), ram_volume=SimpleNamespace(closed=False),
        )  # fmt: skip
        monkeypatch.setattr(supervisor, "_note", lambda **what: noted.update(what))
        monkeypatch.setattr(supervisor_module.restore, "revert", revert)
        with pytest.raises(MonitorError):
            supervisor.revert(lambda: None, "ready")
        supervisor.running.is_broken = True
        assert supervisor._state("paused") == "failed" and "failed half-way" in supervisor._why("paused")
    finally:
        supervisor._ends.close()
    assert (noted["is_reverting"], noted["is_standing"]) == (False, stays)


def test_a_copy_that_was_put_where_the_store_was_is_left_alone(store: onionskin.Store, tmp_path: Path) -> None:
    """It has a machine of the same id, which may run by itself, and disks of the same names."""
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    said: list[str] = []
    served: list[str] = []
    supervisor = Supervisor(store, "lab", said.append)
    supervisor._directory = record.make_directory(store.path, lab._id)
    supervisor.record = Record(None, None, None, "{}", "{}", "g", "s", "/ram", True, None)
    store.path.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", store.path)
    of_the_copy = (record.RECORD, record.UNDER_WAY, qemu_command.EMPTY_RAM, qemu_command.QMP)
    for name in of_the_copy:
        (supervisor._directory / name).write_text("of the copy")
    with pytest.raises(StateError, match="not where it was opened"):
        supervisor._note(is_paused=True)
    supervisor._note_what_is(is_paused=False)  # that has happened already
    supervisor._process = SimpleNamespace(_said=lambda: "", wait=lambda seconds: 1)  # type: ignore[assignment]
    supervisor._ends.push(supervisor._forget)
    supervisor.running = SimpleNamespace(is_broken=False)  # type: ignore[assignment]
    supervisor._server = SimpleNamespace(  # type: ignore[assignment]
        reap=lambda: None, process=None, uris=["web"], is_given_up=False, restart=lambda: served.append("web")
    )
    supervisor._look_at_server()
    assert "not where it was opened" in supervisor._why("running")
    supervisor._report(1)
    supervisor.end()
    assert served == []
    left = {path.name: path.read_text() for path in supervisor._directory.iterdir()}
    assert left == dict.fromkeys(of_the_copy, "of the copy")


def test_a_machine_that_a_full_tmpfs_ended_says_so_from_the_room_of_its_ram(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = tmp_path / qemu_command.EMPTY_RAM
    ram.touch()
    write = record.write_json

    def write_if_there_is_room(path: Path, value: object) -> None:
        if ram.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, value)

    monkeypatch.setattr(record, "write_json", write_if_there_is_room)
    supervisor = Supervisor(store, "lab", lambda line: None)
    try:
        supervisor._directory = tmp_path
        supervisor._process = SimpleNamespace(ram_file=ram, _said=lambda: "")  # type: ignore[assignment]
        supervisor._report(-signal.SIGBUS)
    finally:
        supervisor._ends.close()
    ended = record.read_json(tmp_path / record.ENDED)
    assert isinstance(ended, dict)
    assert f"is {tmp_path} full?" in ended["said"]


class _Disconnected:
    """A hypervisor that lives, and answers once somebody has connected to it again."""

    is_there = False

    @property
    def status(self) -> str:
        if not self.is_there:
            raise MonitorError("it is being disconnected")
        return "paused"

    @property
    def is_disconnected(self) -> bool:
        return not self.is_there

    def wait(self, seconds: float) -> None:
        self.is_there = True


def test_a_hypervisor_is_asked_once_more_how_it_is_where_the_connection_to_it_was_made_again(
    store: onionskin.Store,
) -> None:
    supervisor = Supervisor(store, "lab", print)
    try:
        supervisor._process = _Disconnected()  # type: ignore[assignment]
        assert supervisor._ask_status() == "paused"
        assert os.read(supervisor._wake_reader, 2) == b"x"  # whoever connects was told to look
    finally:
        supervisor._ends.close()


class _Told:
    """A lock that says when somebody comes to it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.comes = threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.comes.set()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def test_what_two_threads_note_of_a_machine_at_once_is_all_noted(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(store, "lab", lambda line: None)
    try:
        guard = supervisor._guard = _Told()  # type: ignore[assignment]
        supervisor._directory = tmp_path
        supervisor.record = Record(None, None, None, "{}", "{}", "", "", "", False, None)
        other = threading.Thread(target=lambda: supervisor._note_what_is(is_paused=True))
        written: list[Record] = []

        def write(one: Record, _: Path) -> None:
            if not written:
                written.append(one)
                other.start()
                assert guard.comes.wait(300)
            written.append(one)

        monkeypatch.setattr(Record, "write", write)
        supervisor._note_what_is(is_frozen=True)
        other.join()
    finally:
        supervisor._ends.close()
    for one in (supervisor.record, written[-1]):
        assert (one.is_frozen, one.is_paused) == (True, True)


@pytest.mark.parametrize("meanwhile", ["", "something else is noted", "its draft goes"])
def test_what_was_written_beforehand_of_a_machine_is_noted_with_what_was_noted_since(
    store: onionskin.Store, tmp_path: Path, meanwhile: str
) -> None:
    supervisor = Supervisor(store, "lab", lambda line: None)
    try:
        supervisor._directory = tmp_path
        supervisor.record = Record(None, None, None, "{}", "{}", "", "", "", False, None, is_reverting=True)
        supervisor.record.write(tmp_path)
        supervisor.running = SimpleNamespace(generation="another")  # type: ignore[assignment]
        with supervisor._noting_back() as to_note:
            note = to_note(RECORDED, True)
            before = Record.read(tmp_path)
            assert before is not None and before.is_reverting
            if meanwhile == "something else is noted":
                supervisor._note_what_is(is_paused=True)
            elif meanwhile:
                (tmp_path / f"running.json.{os.getpid()}.next").unlink()
            note()
        found = Record.read(tmp_path)
    finally:
        supervisor._ends.close()
    assert found is not None and found == supervisor.record
    assert (found.is_reverting, found.is_frozen, found.told) == (False, True, "another")
    assert found.recorded == RECORDED.to_json() and found.is_paused is (meanwhile == "something else is noted")
    assert [path.name for path in tmp_path.glob("running.json*")] == ["running.json"]


def test_a_note_that_was_written_beforehand_and_is_not_wanted_goes(store: onionskin.Store, tmp_path: Path) -> None:
    supervisor = Supervisor(store, "lab", lambda line: None)
    try:
        supervisor._directory = tmp_path
        supervisor.record = Record(None, None, None, "{}", "{}", "", "", "", False, None, is_reverting=True)
        supervisor.running = SimpleNamespace(generation="another")  # type: ignore[assignment]
        with supervisor._noting_back() as to_note:
            to_note(RECORDED, False)
    finally:
        supervisor._ends.close()
    assert supervisor.record.is_reverting and not list(tmp_path.glob("running.json*"))


def test_a_program_that_runs_a_machine_in_the_foreground_has_its_threads_as_before(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = sys.getswitchinterval(), []

    def begin(supervisor: Supervisor, **_: object) -> None:
        during.append(sys.getswitchinterval())
        raise StateError("it cannot run here")

    machine = store.create_machine("lab", disks=["web"], memory="4M", qemu_args=["-nodefaults"])
    monkeypatch.setattr(Supervisor, "begin", begin)
    with pytest.raises(StateError):
        supervisor_module.supervise(store, machine.name, log=print, ready=lambda: None)
    assert (during, sys.getswitchinterval()) == ([pytest.approx(supervisor_module.SWITCH_SECONDS)], before)


@pytest.mark.parametrize("says_so", [True, False])
def test_who_says_that_it_begins_or_ends_a_machine_is_waited_for_as_long_as_that_takes(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    directory = record.make_directory(store._opened.layout.root, lab._id)
    has = store._open_ram(lab._row)
    monkeypatch.setattr("onionskin.machine.machine.STARTING_SECONDS", 0.0)
    looks = []

    def look(path: Path, name: str) -> None:
        looks.append(path)
        if len(looks) == 5:
            has.close()

    monkeypatch.setattr(MachineControl, "find", look)
    if says_so:
        record.note_under_way(directory)
        assert lab.state == "off"
        record.note_reachable(directory)
        assert record.who_is_under_way(directory) is None
    else:
        with pytest.raises(StateError, match="nobody can reach"):
            _ = lab.state
        has.close()


def test_what_is_noted_of_a_machine_is_removed_only_as_long_as_it_is_held(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    directory = record.make_directory(store._opened.layout.root, lab._id)
    notes = [directory / record.RECORD, directory / record.UNDER_WAY]
    hold_ram = store._hold_ram

    def hold_and_be_followed(row: object) -> SimpleNamespace:
        held = hold_ram(row)

        def close() -> None:
            held.close()
            for note in notes:
                note.write_text("{}")  # of another supervisor, which has it from here on

        return SimpleNamespace(close=close)

    def fail(*given: object, **named: object) -> None:
        raise StateError("no disks")

    monkeypatch.setattr(store, "_hold_ram", hold_and_be_followed)
    monkeypatch.setattr(supervisor_module, "DiskServer", fail)
    with pytest.raises(StateError, match="no disks"):
        Supervisor(store, "lab", print).begin()
    assert [note.read_text() for note in notes] == ["{}", "{}"]


def test_who_begins_a_machine_and_was_stopped_or_killed_is_not_waited_for(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    directory = record.make_directory(store._opened.layout.root, lab._id)
    monkeypatch.setattr("onionskin.machine.machine.STARTING_SECONDS", 0.0)
    with subprocess.Popen(["sleep", "1000"]) as other, store._open_ram(lab._row):
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: other.pid)
        record.note_under_way(directory)
        monkeypatch.setattr(os, "getpid", lambda: pid)
        assert lab._is_under_way()
        other.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(StateError, match="nobody can reach"):
            _ = lab.state
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert record.who_is_under_way(directory) is None
        with pytest.raises(StateError, match="nobody can reach"):
            _ = lab.state


def test_a_note_of_who_begins_a_machine_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", "7", '{"pid": 1}', '{"pid": "1", "ticks": 1, "boot": "a"}'):
        (tmp_path / record.UNDER_WAY).write_text(text)
        assert record.who_is_under_way(tmp_path) is None


def test_the_hypervisor_of_a_machine_begins_before_its_ram_volume_is_opened_and_after_that_is_held(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer than all that is done beside its start."""
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    ram = store._opened.catalog.volume_with_id(lab._row.ram)
    assert ram is not None
    seen = []

    class Hypervisor:
        def __init__(self, on_event: object) -> None:
            pass

        def check(self, configuration: Configuration, disks: int) -> Recorded:
            return RECORDED

        def launch(
            self, configuration: Configuration, *, beside_its_start: Callable[[], None], **given: object
        ) -> None:
            seen.append(store._open_here(ram.name) is not None)
            with onionskin.Store(store.path) as other, pytest.raises(StateError):
                other._open_ram(lab._row)
            beside_its_start()
            seen.append(store._open_here(ram.name) is not None)
            raise StateError("no hypervisor")

    monkeypatch.setattr(supervisor_module, "QemuHypervisor", Hypervisor)
    monkeypatch.setattr("onionskin.store._MOMENT_SECONDS", 0.0)
    for part in ("begin", "wait_listening", "wait_ready"):
        monkeypatch.setattr(supervisor_module.DiskServer, part, lambda server: None)
    monkeypatch.setattr(Supervisor, "_keep_served", lambda supervisor, over: None)
    with pytest.raises(StateError, match="no hypervisor"):
        Supervisor(store, "lab", print).begin()
    assert seen == [False, True]


def test_a_machine_that_is_held_is_free_again_whether_its_ram_volume_was_opened_or_not(store: onionskin.Store) -> None:
    lab = store.create_machine("lab", disks=["web"], memory="1M")
    for is_opened in (False, True):
        held = store._hold_ram(lab._row)
        if is_opened:
            assert held.open() is held.open()
        with pytest.raises(StateError), machines.kept_off(store._opened, lab._row):
            pass
        held.close()
        held.close()
        with machines.kept_off(store._opened, lab._row):
            pass


def test_a_machine_whose_hypervisor_does_not_answer_may_stand_still_though_it_was_heard_to_go_on(
    store: onionskin.Store,
) -> None:
    def hear_all() -> None:
        raise MonitorError("it does not answer")

    store.create_machine("lab", disks=["web"], memory="1M")
    supervisor = Supervisor(store, "lab", print)
    try:
        process = SimpleNamespace(is_paused=False, hear_all=hear_all)
        supervisor._process = process  # type: ignore[assignment]
        assert supervisor._may_stand()
        process.hear_all = lambda: None
        assert not supervisor._may_stand()
    finally:
        supervisor._ends.close()
