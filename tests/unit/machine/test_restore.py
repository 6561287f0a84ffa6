"""Going back to a snapshot of a machine, and starting from one, with a stand-in for the hypervisor."""

import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.stand_in import LENGTH, PAGES, RECORDED, StandIn, attach

import onionskin
from onionskin.base.dtypes import PAGE_RUN
from onionskin.errors import FormatError, SnapshotNotFoundError, StateError
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import capture, preload, restore
from onionskin.machine import running as running_module
from onionskin.machine.hypervisor import Recorded
from onionskin.machine.monitor import MonitorTimeout
from onionskin.machine.preload import RefusedError
from onionskin.machine.ram import GuestRam
from onionskin.machine.record import make_directory
from onionskin.machine.running import Running
from onionskin.operations import machine_tree, machines, restart, snapshots
from onionskin.operations.machine_snapshots import MachineCut


def snapshot(running: Running, process: StandIn, name: str, pages: dict[int, int]) -> bytes:
    """Write pages and the disks, take a snapshot, and return what RAM held."""
    for page, byte in pages.items():
        process.write(page, byte)
    for disk in ("web", "data"):
        with running.store.open(disk) as volume:
            volume.write(0, name.encode())
    process.devices = name
    capture.snapshot(running, name)
    return process.whole()


def is_at(running: Running, process: StandIn, name: str, ram: bytes) -> bool:
    """Whether RAM, devices and disks are those of a snapshot."""
    disks = []
    for disk in ("web", "data"):
        with running.store.open(disk) as volume:
            disks.append(volume.read(0, len(name)))
    return process.whole() == ram and process.devices == name and disks == [name.encode()] * 2


def test_a_machine_goes_back_and_forth_between_snapshots(running: Running, process: StandIn) -> None:
    rams = {}
    for number, name in enumerate(("a", "b", "c")):
        rams[name] = snapshot(running, process, name, dict.fromkeys(range(number, PAGES, 3 + number), number + 1))
    for name in ("a", "c", "b", "b", "a", "c"):
        for page in range(0, PAGES, 7):
            process.write(page, 200)
        restore.revert(running, name)
        assert not process.is_paused and is_at(running, process, name, rams[name])
    process.write(1, 77)
    capture.snapshot(running, "d")  # what was put back is not stored again
    restore.revert(running, "a")
    restore.revert(running, "d")
    assert process.read(1) == 77 and process.whole()[2 * PAGE_BYTES :] == rams["c"][2 * PAGE_BYTES :]


def damage(store: onionskin.Store, text: bytes) -> None:
    """Change a byte of the one place in the segments of the store that has this."""
    segments = (store.path / "segments").iterdir()
    places = [(path, at) for path in segments if (at := path.read_bytes().find(text)) >= 0]
    ((path, at),) = places
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([text[0] ^ 1]))


def test_damaged_device_state_is_found_before_anything_is_put_back(running: Running, process: StandIn) -> None:
    ram = snapshot(running, process, "whole", {3: 7})
    process.devices = "damaged devices"
    capture.snapshot(running, "damaged")
    now = snapshot(running, process, "now", {5: 9})
    damage(running.store, b"damaged devices")
    with pytest.raises(FormatError, match=r"state of the devices in the RAM volume 'lab\.ram' is damaged"):
        restore.revert(running, "damaged")
    assert not running.is_broken and not process.is_paused
    assert is_at(running, process, "now", now)
    restore.revert(running, "whole")
    assert is_at(running, process, "whole", ram)


def test_device_state_without_a_checksum_is_loaded_as_it_is(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "crc32_of", lambda state: "")  # as an older onionskin took it
    process.devices = "old devices"
    capture.snapshot(running, "old")
    damage(running.store, b"old devices")
    restore.revert(running, "old")
    assert process.devices == "nld devices"


def test_a_revert_that_finds_no_room_in_memory_changes_nothing(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {3: 7})
    now = snapshot(running, process, "b", {300: 8})
    # Where the file itself is on tmpfs, the first touch of a hole has filled it, also under a private mapping.
    hole = ["--punch-hole", "--offset", str(300 * PAGE_BYTES), "--length", str(PAGE_BYTES)]
    subprocess.run(["fallocate", *hole, process.ram_file], check=True)
    with monkeypatch.context() as patched:
        patched.setattr(running_module, "is_on_tmpfs", lambda descriptor: True)
        full = SimpleNamespace(f_blocks=1000, f_bavail=(1 << 20) // PAGE_BYTES, f_frsize=PAGE_BYTES)
        patched.setattr(running_module.os, "fstatvfs", lambda descriptor: full)
        with pytest.raises(StateError, match=r"has 1 MiB left, and .* takes up to 1 MiB there; .* nothing was changed"):
            restore.revert(running, "a")  # page 300 is in a hole of the file
    assert not running.is_broken and not process.is_paused
    assert is_at(running, process, "b", now)
    restore.revert(running, "a")
    assert is_at(running, process, "a", ram)


@pytest.mark.parametrize("is_older", [False, True], ids=["library", "older library"])
def test_a_machine_goes_back_from_the_ram_file_of_a_snapshot_once_that_is_made(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch, is_older: bool
) -> None:
    """Its process writes that over its memory, if the library can that was in it when it started."""
    ram = snapshot(running, process, "a", dict.fromkeys(range(1, PAGES, 3), 7))
    running.files.finish()
    if is_older:
        monkeypatch.setattr(preload, "_FILL", 99)  # what it does not know
    put_back: list[str] = []

    def note(how: str) -> None:
        call = getattr(GuestRam, how)

        def noted(self: GuestRam, *given: Any) -> None:
            call(self, *given)
            put_back.append(how)

        monkeypatch.setattr(GuestRam, how, noted)

    for how in ("fill", "put_back_from"):
        note(how)
    for page in range(0, PAGES, 2):
        process.write(page, 200)
    restore.revert(running, "a")
    assert is_at(running, process, "a", ram) and put_back == ["put_back_from" if is_older else "fill"]
    process.write(3, 1)
    capture.snapshot(running, "b")
    restore.revert(running, "a")
    assert is_at(running, process, "a", ram)


def refuse_to_forget(pages: object) -> None:
    raise RefusedError(22, "the memory is locked")


@pytest.mark.parametrize("is_dropped", [True, False])
def test_a_machine_that_was_started_from_a_snapshot_drops_what_it_wrote_or_has_it_written_over(
    store: onionskin.Store,
    running: Running,
    process: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_dropped: bool,
) -> None:
    ram = snapshot(running, process, "a", dict.fromkeys(range(0, PAGES, 2), 5))
    machine = running.machine
    running.close()
    running.ram_volume.close()
    with restore.Prepared(store, restore.find_fit(store, machine, "a", RECORDED)) as prepared:
        again = StandIn(tmp_path / "second", prepared.ram_file.path)
        prepared.read_state()
        again.load_state(prepared.state.path)
        restarted = attach(store, again, tmp_path / "second", mapped=prepared.saved.layer)
    try:
        if not is_dropped:
            monkeypatch.setattr(again._preload, "forget", refuse_to_forget)
        file_before = again.ram_file.read_bytes()
        assert again.whole() == ram and again.devices == "a"
        for page in range(0, PAGES, 5):
            again.write(page, 9)
        restore.revert(restarted, "a")
        assert again.whole() == ram
        # What was dropped reads as the file: nothing was copied.
        assert (len(again.tracker.private(swapped=False)) == 0) == is_dropped
        again.write(0, 1)
        assert capture.snapshot(restarted, "b").bytes_stored == PAGE_BYTES
        assert again.ram_file.read_bytes() == file_before
        with again.ram_file.open("r+b") as file:
            file.write(b"something else")
        with pytest.raises(StateError, match=r"somebody wrote to .*nothing was taken"):
            capture.snapshot(restarted, "c")
        again.write(1, 77)
        with pytest.raises(StateError, match=r"somebody wrote to .*nothing was changed"):
            restore.revert(restarted, "b")
        assert again.read(1) == 77 and not again.is_paused
    finally:
        restarted.close()
        again.close()


def test_a_paused_machine_stays_paused(running: Running, process: StandIn) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    process.pause()
    restore.revert(running, "a")
    assert process.is_paused and is_at(running, process, "a", ram)


def test_a_snapshot_that_cannot_run_here_is_refused_before_anything_is_touched(
    running: Running, process: StandIn
) -> None:
    snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    before = process.whole()
    running.recorded = replace(RECORDED, cpu_model="qemu64")
    with pytest.raises(StateError, match="CPU model"):
        restore.revert(running, "a")
    with pytest.raises(SnapshotNotFoundError):
        restore.revert(running, "none")
    assert process.whole() == before and not process.is_paused and not running.is_broken
    with pytest.raises(StateError, match="CPU model"):
        restore.find_fit(running.store, running.machine, "a", running.recorded)


def test_a_machine_that_runs_with_a_disk_of_another_size_is_not_put_back_in_place(
    running: Running, process: StandIn
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    with running.store.open("data") as volume:
        process.sizes = [volume.size_bytes, volume.size_bytes * 2]
    with pytest.raises(StateError, match=r"disk 'data' had .*stop the machine"):
        restore.revert(running, "a")
    assert not process.is_paused and is_at(running, process, "a", ram)


def test_a_snapshot_is_not_dropped_while_a_machine_is_put_back_to_it(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    opened, load = running.store._opened, process.load_state
    make_directory(opened.layout.root, running.machine.id)
    monkeypatch.setattr(machines, "KEPT_SECONDS", 0.0)
    refused: list[str] = []

    def drop_and_load(path: Path) -> None:
        for drop in (machine_tree.merge, partial(machine_tree.discard, recursive=True, held=None)):
            with pytest.raises(StateError) as error:
                drop(opened, running.name, ["a"])
            refused.append(str(error.value))
        load(path)

    monkeypatch.setattr(process, "load_state", drop_and_load)
    restore.revert(running, "a")
    assert [text.startswith("another process has put the machine back") for text in refused] == [True] * 2
    assert is_at(running, process, "a", ram)


def test_a_machine_is_not_put_back_while_snapshots_of_it_are_dropped(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    before = process.whole()
    opened = running.store._opened
    make_directory(opened.layout.root, running.machine.id)
    monkeypatch.setattr(machines, "KEPT_SECONDS", 0.0)
    with (
        machines.snapshots_kept(opened, running.machine.id, to_drop=True),
        pytest.raises(StateError, match="nothing was changed"),
    ):
        restore.revert(running, "a")
    assert process.whole() == before and not process.is_paused and not running.is_broken


def test_a_machine_whose_devices_were_changed_while_it_ran_is_not_put_back_in_place(
    running: Running, process: StandIn
) -> None:
    snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    before = process.whole()
    process.plugged_now.append("hot (virtio-rng-pci)")
    with pytest.raises(StateError, match=r"has hot .* in addition.*nothing was changed"):
        restore.revert(running, "a")
    assert process.whole() == before and not process.is_paused and not running.is_broken


def test_a_machine_that_somebody_else_lets_go_on_in_a_revert_is_stopped_until_it_is_put_back(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    with monkeypatch.context() as patched:

        def load(path: Path) -> None:
            process.reported.append("RESUME")
            process.resume()

        patched.setattr(process, "load_state", load)
        with pytest.raises(StateError, match=r"stays stopped; revert it again.*let the machine go on"):
            restore.revert(running, "a")
    assert process.is_paused and running.is_broken
    restore.revert(running, "a")
    assert not process.is_paused and not running.is_broken and is_at(running, process, "a", ram)


def test_it_is_looked_when_the_disks_are_back_whether_somebody_else_let_the_machine_go_on(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(running, process, "a", {1: 1})
    is_loaded, are_back = threading.Event(), threading.Event()
    put_back, renew, refuse = (
        machine_tree.RevertInPlace.put_disks_back, restore.renew_generation, running_module.Stop.refuse_went_on,
    )  # fmt: skip
    found: list[bool] = []

    def put_back_late(*given: Any) -> None:
        assert is_loaded.wait(300)
        put_back(*given)
        are_back.set()

    def renew_and_say_so(*given: Any) -> None:
        renew(*given)
        is_loaded.set()

    def look(stop: running_module.Stop, what: str) -> None:
        found.append(are_back.is_set())
        refuse(stop, what)

    monkeypatch.setattr(machine_tree.RevertInPlace, "put_disks_back", put_back_late)
    monkeypatch.setattr(restore, "renew_generation", renew_and_say_so)
    monkeypatch.setattr(running_module.Stop, "refuse_went_on", look)
    restore.revert(running, "a")
    assert found == [True]


def test_memory_that_may_be_dropped_later_is_not_written_over(running: Running) -> None:
    def drop(pages: object, preload: object) -> None:
        raise TimeoutError("timed out")

    ram, pages = SimpleNamespace(drop=drop), running.guest_ram.unsaved_runs
    with pytest.raises(TimeoutError):  # else what the guest writes from then on would be dropped too
        restore._is_done(running, lambda: ram.drop(pages, None), "")


def test_what_failed_is_said_also_where_the_machine_does_not_answer_when_it_is_to_go_on() -> None:
    def refuse(command: str) -> None:
        raise MonitorTimeout(f"did not answer {command!r}")

    process = SimpleNamespace(
        watch=lambda stands: None,
        is_paused=False,
        pause=lambda runs: refuse("stop"),
        resume=lambda: refuse("cont"),
    )
    with pytest.raises(MonitorTimeout, match="'stop'"), running_module.stopped(process):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(("silent", "told"), [("stop", ["stop"]), ("cont", ["stop", "cont"])])
def test_a_machine_that_does_not_answer_is_not_waited_for_again_and_again(silent: str, told: list[str]) -> None:
    asked: list[str] = []

    def ask(command: str) -> None:
        asked.append(command)
        if command == silent:
            raise MonitorTimeout(f"did not answer {command!r}")

    process = SimpleNamespace(
        watch=lambda stands: SimpleNamespace(stands=True),
        is_paused=False,
        pause=lambda runs: ask("stop"),
        resume=lambda: ask("cont"),
    )
    with pytest.raises(MonitorTimeout, match=silent), running_module.stopped(process):  # type: ignore[arg-type]
        pass
    assert asked == told


def test_the_ram_volume_is_made_ready_while_the_devices_are_loaded_and_put_back_behind_that(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    snapshot(running, process, "b", {1: 2})
    opened = running.ram_volume._opened.to_write()
    before = opened.head
    is_ready, load, wait = threading.Event(), process.load_state, restore._VolumesGoingBack._wait

    def load_when_ready(path: Path) -> None:
        assert is_ready.wait(300)
        assert opened.head == opened.store.catalog.head_of(opened.row) == before
        load(path)

    def ready(volumes: restore._VolumesGoingBack) -> None:
        is_ready.set()
        wait(volumes)

    monkeypatch.setattr(restore._VolumesGoingBack, "_wait", ready)
    process.load_state = load_when_ready  # type: ignore[method-assign]
    restore.revert(running, "a")
    assert opened.head != before and is_at(running, process, "a", ram)


def test_a_guest_that_goes_back_is_stopped_before_its_hypervisor_is_asked_and_goes_on_behind_that(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hypervisor answers late while its guest runs, and the guest waits for it."""
    snapshot(running, process, "a", {1: 1})
    asked = []

    def note(name: str) -> None:
        call = getattr(process, name)

        def noted(*given: object, **named: object) -> object:
            asked.append(name)
            return call(*given, **named)

        monkeypatch.setattr(process, name, noted)

    @contextmanager
    def loading(path: Path) -> Iterator[Callable[[], None]]:
        asked.append("opens the state")
        yield lambda: process.load_state(path)
        asked.append("lets go of it")

    for name in ("pause", "plugged", "disk_bytes", "load_state", "resume"):
        note(name)
    monkeypatch.setattr(process, "loading", loading)
    restore.revert(running, "a")
    assert asked[0] == "pause" and asked[-2:] == ["lets go of it", "resume"]
    assert sorted(asked[1:-2]) == ["disk_bytes", "load_state", "opens the state", "plugged"]


def test_the_state_is_opened_while_the_machine_is_looked_at_and_let_go_of_where_that_refuses_the_revert(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    is_open, note_written, resume = threading.Event(), GuestRam.note_written, process.resume
    steps: list[str] = []

    @contextmanager
    def loading(path: Path) -> Iterator[Callable[[], None]]:
        steps.append("opened")
        is_open.set()
        try:
            yield lambda: process.load_state(path)
        finally:
            steps.append("let go of")

    def look(ram: GuestRam, **how: bool) -> object:
        assert is_open.wait(300)
        return note_written(ram, **how)

    def resume_and_say_so() -> None:
        steps.append("goes on")
        resume()

    monkeypatch.setattr(process, "loading", loading)
    monkeypatch.setattr(process, "resume", resume_and_say_so)
    monkeypatch.setattr(GuestRam, "note_written", look)
    process.plugged_now.append("hot (virtio-rng-pci)")
    with pytest.raises(StateError, match="has hot"):
        restore.revert(running, "a")
    assert steps == ["opened", "let go of", "goes on"] and is_at(running, process, "a", ram)
    process.plugged_now.pop()
    restore.revert(running, "a")
    assert steps == ["opened", "let go of", "goes on"] * 2


def test_a_hypervisor_that_does_not_answer_is_not_asked_to_open_the_state_too(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(running, process, "a", {1: 1})
    opened: list[Path] = []

    def refuse() -> list[int]:
        raise MonitorTimeout("did not answer")

    monkeypatch.setattr(process, "disk_bytes", refuse)
    monkeypatch.setattr(process, "loading", opened.append)
    with pytest.raises(MonitorTimeout):
        restore.revert(running, "a")
    assert not opened and not process.is_paused and not running.is_broken


def test_who_notes_that_a_guest_is_back_does_so_when_that_is_durable_and_before_it_goes_on(
    running: Running, process: StandIn
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    found: list[tuple[bool, ...]] = []

    def to_note(recorded: Recorded, is_frozen: bool) -> Callable[[], None]:
        found.append((process.is_paused, running.is_broken))
        return note

    def note() -> None:
        with onionskin.Store(running.store.path) as other:
            row = machines.find(other._opened.catalog, running.name)
            found.append((process.is_paused, running.is_broken, row.resumes == machines.BOOTS))

    restore.revert(running, "a", to_note=to_note)
    assert found == [(True, True), (True, False, True)]
    assert not process.is_paused and is_at(running, process, "a", ram)


@pytest.mark.parametrize(("room_bytes", "rests"), [((1 << 30) - 4096, False), (1 << 30, True)])
def test_the_background_rests_behind_a_revert_unless_room_may_be_missed_meanwhile(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch, room_bytes: int, rests: bool
) -> None:
    snapshot(running, process, "a", {1: 1})
    found: list[float] = []
    monkeypatch.setattr(running.store._opened, "rest", found.append)
    free = SimpleNamespace(f_bavail=room_bytes // 4096, f_frsize=4096)
    monkeypatch.setattr(snapshots, "os", SimpleNamespace(statvfs=lambda path: free))
    restore.revert(running, "a")
    assert bool(found) is rests


@pytest.mark.parametrize("fails", [False, True])
def test_a_guest_goes_on_while_the_ram_volume_lets_go_of_what_it_was(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    snapshot(running, process, "b", {1: 2})
    goes_on, resume, resolve = threading.Event(), process.resume, restart._Restart.resolve

    def resume_and_say_so() -> None:
        resume()
        goes_on.set()

    def resolve_when_it_goes_on(one: restart._Restart) -> None:
        if one.volume is running.ram_volume._opened and not goes_on.is_set():
            assert goes_on.wait(300)
            if fails:
                raise OSError(5, "cannot be closed")
        resolve(one)

    monkeypatch.setattr(restart._Restart, "resolve", resolve_when_it_goes_on)
    process.resume = resume_and_say_so  # type: ignore[method-assign]
    restore.revert(running, "a")
    assert not running.is_broken and is_at(running, process, "a", ram)
    monkeypatch.undo()
    process.write(1, 3)
    capture.snapshot(running, "c")  # the volume is opened again, if it has to be
    restore.revert(running, "a")
    assert is_at(running, process, "a", ram)


def test_a_machine_goes_on_as_it_was_where_no_thread_can_be_started_for_a_revert(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    before = process.whole()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StateError, match=r"can't start new thread; nothing was changed"):
            restore.revert(running, "a")
    assert process.whole() == before and not process.is_paused and not running.is_broken
    restore.revert(running, "a")
    assert process.read(1) == 1


def test_a_machine_whose_last_note_fails_stays_stopped_until_it_is_put_back(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    snapshot(running, process, "b", {1: 2})

    def fail(catalog: object, machine: bytes) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(machines, "write_running", fail)
    with pytest.raises(StateError, match="stays stopped"):
        restore.revert(running, "a")
    assert process.is_paused and machines.beginning(running.store._opened, "lab").is_reverting
    monkeypatch.undo()
    restore.revert(running, "a")
    assert not process.is_paused and is_at(running, process, "a", ram)
    assert machines.beginning(running.store._opened, "lab").ram is None  # the guest may have written


def test_a_machine_between_two_states_stays_stopped_until_it_is_put_back(running: Running, process: StandIn) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)
    process.fails_at = "load_state"
    with pytest.raises(StateError, match="stays stopped"):
        restore.revert(running, "a")
    assert process.is_paused and running.is_broken
    restore.revert(running, "a")
    assert not process.is_paused and not running.is_broken and is_at(running, process, "a", ram)


@pytest.mark.parametrize("step", ["load_state", "put_disks_back", "put_ram_back"])
def test_a_machine_whose_revert_failed_goes_back_to_another_snapshot_with_every_page(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its RAM is already as the first snapshot has it, and the RAM volume is not."""
    snapshot(running, process, "a", {5: 1})
    ram = snapshot(running, process, "b", {5: 2})
    snapshot(running, process, "c", {6: 3})

    def fail(*_: object) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(*(StandIn, step, fail) if step == "load_state" else (machine_tree.RevertInPlace, step, fail))
        with pytest.raises(StateError, match="stays stopped"):
            restore.revert(running, "a")
    restore.revert(running, "b")
    assert not running.is_broken and is_at(running, process, "b", ram)


def test_what_loading_the_devices_wrote_over_ram_is_put_right(running: Running, process: StandIn) -> None:
    """It resets the machine, which copies ROMs over RAM. The generation id is written on purpose."""
    ram = snapshot(running, process, "a", dict.fromkeys(range(20), 3))
    load = process.load_state

    def load_and_reset(path: Path) -> None:
        load(path)
        for page in (2, 3, 500):
            process.write(page, 250)

    process.load_state = load_and_reset  # type: ignore[method-assign]
    restore.revert(running, "a")
    assert process.whole() == ram


def test_the_generation_id_that_the_hypervisor_wrote_stays(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {4: 3})
    generation = uuid.UUID(running.identity.generation).bytes_le
    load = process.load_state

    def load_and_tell(path: Path) -> None:
        load(path)
        data = bytearray(ram[4 * PAGE_BYTES : 5 * PAGE_BYTES])
        data[40:56] = generation
        process.tracker.write(np.array([(4 * PAGE_BYTES, 5 * PAGE_BYTES)], PAGE_RUN), np.frombuffer(data, np.uint8))

    process.load_state = load_and_tell  # type: ignore[method-assign]
    restore.revert(running, "a")
    found = process.whole()
    assert found[4 * PAGE_BYTES + 40 :][:16] == generation
    assert capture.snapshot(running, "b").bytes_stored == PAGE_BYTES  # the page is not lost for the next one


@pytest.mark.parametrize("page", [PAGES - 1, PAGES - 200])
def test_a_guest_that_goes_back_finds_another_generation_id_each_time(
    running: Running, process: StandIn, page: int
) -> None:
    """The hypervisor writes the id that it was started with, as it loads the devices."""
    start = page * PAGE_BYTES
    own = bytes(40) + uuid.UUID(running.identity.generation).bytes_le
    whole = np.frombuffer(own.ljust(PAGE_BYTES, b"\0"), np.uint8)
    load, run = process.load_state, np.array([(start, start + PAGE_BYTES)], PAGE_RUN)
    process.tracker.write(run, whole)
    ram = snapshot(running, process, "a", {4: 3})

    def load_and_tell(path: Path) -> None:
        load(path)
        process.tracker.write(run, whole)

    process.load_state = load_and_tell  # type: ignore[method-assign]
    told = {running.generation}
    for _ in range(2):
        restore.revert(running, "a")
        found = process.whole()
        assert found[start + 40 :][:16] == uuid.UUID(running.generation).bytes_le
        assert found[:start] == ram[:start] and not any(found[start + 56 : start + PAGE_BYTES])
        told.add(running.generation)
    assert len(told) == 3
    assert capture.snapshot(running, "b").bytes_stored == PAGE_BYTES
    restore.revert(running, "a")
    told.add(running.generation)
    restore.revert(running, "b")
    assert running.generation not in told


def test_the_generation_id_that_the_hypervisor_wrote_is_renewed_and_no_copy_of_its_page(
    running: Running, process: StandIn
) -> None:
    own = bytes(40) + uuid.UUID(running.identity.generation).bytes_le
    whole = np.frombuffer(own.ljust(PAGE_BYTES, b"\0"), np.uint8)
    of_the_guest, told = PAGES - 9, PAGES - 3
    runs = {page: np.array([(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)], PAGE_RUN) for page in (of_the_guest, told)}
    load = process.load_state
    for run in runs.values():
        process.tracker.write(run, whole)
    ram = snapshot(running, process, "a", {4: 3})

    def load_and_tell(path: Path) -> None:
        load(path)
        process.tracker.write(runs[told], whole)

    process.load_state = load_and_tell  # type: ignore[method-assign]
    restore.revert(running, "a")
    found = process.whole()
    assert found[: told * PAGE_BYTES] == ram[: told * PAGE_BYTES]
    assert found[told * PAGE_BYTES + 40 :][:16] == uuid.UUID(running.generation).bytes_le != own[40:]


def test_without_tracking_what_differs_is_written_back(store: onionskin.Store, empty: Path, tmp_path: Path) -> None:
    process = StandIn(tmp_path / "run", empty, is_tracked=False)
    try:
        running = attach(store, process, tmp_path / "run")
        rams = {name: snapshot(running, process, name, {at: at for at in pages}) for name, pages in
                {"a": range(1, 9), "b": range(5, 50)}.items()}  # fmt: skip
        process.write(900, 1)
        for name in ("a", "b"):
            restore.revert(running, name)
            assert is_at(running, process, name, rams[name])
        running.close()
    finally:
        process.close()


def test_a_snapshot_without_ram_is_refused(store: onionskin.Store, running: Running, process: StandIn) -> None:
    running.files.finish()
    running.ram_volume.close()
    store._snapshot_machine_off("lab", "off")
    with pytest.raises(StateError, match="has no RAM"):
        restore.find_saved(store, running.machine, "off")
    assert len(process.whole()) == LENGTH


def test_a_snapshot_that_failed_at_its_commit_hides_nothing_from_a_revert(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = snapshot(running, process, "a", {1: 1})
    process.write(1, 2)

    def fail(*args: object, **how: object) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(MachineCut, "commit", fail)
        with pytest.raises(OSError, match="no room"):
            capture.snapshot(running, "lost")
    restore.revert(running, "a")
    assert is_at(running, process, "a", ram)
