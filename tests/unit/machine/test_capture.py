"""Snapshots of a machine that runs, with a stand-in for the hypervisor."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stand_in import LENGTH, PAGES, Load, StandIn, attach

import onionskin
from onionskin.base.waiting import within
from onionskin.errors import SnapshotExistsError, StateError
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import capture, restore
from onionskin.machine.ram import GuestRam, UnsavedRam
from onionskin.machine.restore import find_saved
from onionskin.machine.running import Running, StateFile, open_layer
from onionskin.operations import seal
from onionskin.operations.machine_snapshots import MachineCut
from onionskin.volume import Volume


def ram_of(running: Running, snapshot: str) -> bytes:
    """Return the RAM of a snapshot, as the store has it."""
    saved = find_saved(running.store, running.machine, snapshot)
    with open_layer(running.store, saved.volume, saved.layer) as view:
        return view.read(0, LENGTH)


def snapshots_of(running: Running) -> list[str]:
    catalog = running.store._opened.catalog
    return [row.name for row in catalog.snapshots_of_machine(running.machine.id)]


def keep_reference(process: StandIn) -> list[bytes]:
    """Have all of RAM kept each time that the machine stands still for a snapshot."""
    kept: list[bytes] = []
    process.when_stopped = lambda: kept.append(process.whole())
    return kept


def test_a_live_snapshot_has_every_page_as_it_was_when_the_machine_stood_still(
    running: Running, process: StandIn
) -> None:
    draw = random.Random(1)
    kept = keep_reference(process)
    with Load(process, lambda count: process.write(draw.randrange(PAGES), count % 256)) as load:
        for number in range(4):
            taken = capture.snapshot(running, f"s{number}")
            assert taken.mode == "live" and taken.pause_seconds > 0
            before = load.count
            assert within(300, lambda before=before: load.count > before)  # on a busy host it may get no turn for long
    for number, whole in enumerate(kept):
        assert ram_of(running, f"s{number}") == whole


def test_the_state_of_the_devices_lies_behind_the_ram(running: Running, process: StandIn) -> None:
    process.devices = "x" * 9000
    capture.snapshot(running, "long")
    process.devices = "counting"
    capture.snapshot(running, "short")
    saved = find_saved(running.store, running.machine, "short")
    with (
        open_layer(running.store, saved.volume, saved.layer) as view,
        StateFile.of(view, LENGTH, saved.state_bytes, saved.recorded.state_crc32) as state,
    ):
        assert state.path.read_text() == "counting"
        assert view.read(LENGTH, 12000) == b"counting".ljust(12000, b"\0")  # nothing is left of the longer one


def test_only_what_changed_is_stored_again(running: Running, process: StandIn) -> None:
    for page in range(100):
        process.write(page, 1)
    capture.snapshot(running, "a")
    process.write(0, 1)  # what it had already
    process.write(1, 2)
    process.write(2, 0)  # zeros take no room
    assert capture.snapshot(running, "b").bytes_stored == PAGE_BYTES
    assert ram_of(running, "b") == process.whole()


def test_disks_and_ram_are_of_one_instant(running: Running, process: StandIn) -> None:
    store = running.store
    with store.open("web") as web, store.open("data") as data:

        def count(number: int) -> None:
            """Write a number everywhere, as a guest does that counts."""
            for volume in (web, data):
                volume.write(0, number.to_bytes(8, "little"))
            process.write(7, number % 256)

        with Load(process, count):
            for number in range(5):
                capture.snapshot(running, f"s{number}")
    for number in range(5):
        counts = []
        for disk in ("web", "data"):
            with store.open(disk, snapshot=f"s{number}") as view:
                counts.append(int.from_bytes(view.read(0, 8), "little"))
        assert counts[0] == counts[1] and counts[0] % 256 == ram_of(running, f"s{number}")[7 * PAGE_BYTES]


def test_all_that_can_be_done_before_the_cut_is_done_while_the_machine_runs(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused_at = {}

    def note(module: object, name: str) -> None:
        call = getattr(module, name)

        def noted(*given: object, **how: object) -> object:
            paused_at.setdefault(name, process.is_paused)
            return call(*given, **how)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((seal, "spares_for"), (seal, "_take_lock_bytes"), (seal, "_cut"), (StateFile, "save")):
        note(module, name)
    note(UnsavedRam, "save")
    capture.snapshot(running, "a")
    assert paused_at == {"spares_for": False, "_take_lock_bytes": False, "_cut": True, "save": False}


def test_rounds_end_before_the_servers_of_disks_wait_for_a_cut(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write to the disk, which may take minutes, and a server gives a caller up that says nothing for so long."""
    steps = []
    rounds, begin = capture._rounds, capture.cut_machine

    def rounds_noted(*given: Any) -> None:
        rounds(*given)
        steps.append("rounds")

    def begin_noted(*given: Any) -> Any:
        steps.append("cut")
        return begin(*given)

    monkeypatch.setattr(capture, "_rounds", rounds_noted)
    monkeypatch.setattr(capture, "cut_machine", begin_noted)
    process.write(3, 3)
    capture.snapshot(running, "a")
    assert steps == ["rounds", "cut"]


def fail_in(module: type, name: str) -> Callable[[pytest.MonkeyPatch, StandIn], None]:
    def install(monkeypatch: pytest.MonkeyPatch, process: StandIn) -> None:
        def fail(*args: object, **how: object) -> None:
            raise OSError(28, "no room")

        monkeypatch.setattr(module, name, fail)

    return install


def fail_at(step: str) -> Callable[[pytest.MonkeyPatch, StandIn], None]:
    return lambda monkeypatch, process: setattr(process, "fails_at", step)


STEPS = {
    "prepare_state": fail_at("prepare_state"),
    "pause": fail_at("pause"),
    "save_state": fail_at("save_state"),
    "seal": fail_in(MachineCut, "seal"),
    "save": fail_in(StateFile, "save"),
    "commit": fail_in(MachineCut, "commit"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_snapshot_that_fails_leaves_nothing_and_loses_no_page(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process.write(1, 1)
    capture.snapshot(running, "before")
    process.write(1, 2)
    process.write(900, 2)
    with monkeypatch.context() as patched:
        STEPS[step](patched, process)
        with pytest.raises(OSError, match="no room"):
            capture.snapshot(running, "lost")
    assert snapshots_of(running) == ["before"] and not process.is_paused
    process.write(2, 3)
    capture.snapshot(running, "lost")  # the name is free
    assert ram_of(running, "lost") == process.whole()


def test_a_snapshot_that_is_cancelled_between_any_two_steps_leaves_nothing_and_loses_no_page(
    running: Running, process: StandIn
) -> None:
    class Gone(Exception):
        pass

    steps = 0
    while True:
        process.write(steps, 9)
        left = steps

        def go_on() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Gone

        try:
            capture.snapshot(running, "a", go_on=go_on)
            break
        except Gone:
            assert snapshots_of(running) == [] and not process.is_paused
        steps += 1
    assert steps >= 3 and ram_of(running, "a") == process.whole()


def test_a_state_that_cannot_be_given_up_does_not_spoil_the_snapshot(running: Running, process: StandIn) -> None:
    process.fails_at = "finish_state"
    capture.snapshot(running, "a")
    assert snapshots_of(running) == ["a"]


def test_the_hypervisor_lets_go_of_the_state_while_ram_is_written(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_saving, finish, save = threading.Event(), process.finish_state, GuestRam.save

    def finish_when_saving() -> None:
        assert is_saving.wait(300)
        finish()

    def saving(ram: GuestRam, volume: Volume) -> int:
        is_saving.set()
        return save(ram, volume)

    process.write(3, 3)
    monkeypatch.setattr(GuestRam, "save", saving)
    process.finish_state = finish_when_saving  # type: ignore[method-assign]
    capture.snapshot(running, "a")
    assert not process.is_paused


def test_a_snapshot_is_there_before_the_hypervisor_has_let_go_of_the_state_that_it_opened_while_ram_was_collected(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hypervisor answers late while its guest runs: neither is waited for where that can be helped."""
    is_opened, is_there, order = threading.Event(), threading.Event(), []
    prepare, rounds, finish, commit = process.prepare_state, capture._rounds, process.finish_state, MachineCut.commit

    def opens(path: Path) -> None:
        prepare(path)
        is_opened.set()

    def collects(*given: Any) -> None:
        assert is_opened.wait(300)
        rounds(*given)

    def lets_go() -> None:
        is_there.wait(300)
        order.append("let go")
        finish()

    def commits(*given: Any, **named: Any) -> Any:
        row = commit(*given, **named)
        order.append("commit")
        is_there.set()
        return row

    monkeypatch.setattr(process, "prepare_state", opens)
    monkeypatch.setattr(process, "finish_state", lets_go)
    monkeypatch.setattr(capture, "_rounds", collects)
    monkeypatch.setattr(MachineCut, "commit", commits)
    capture.snapshot(running, "a", mode="live")
    assert order == ["commit", "let go"]


def test_a_paused_machine_stays_paused(running: Running, process: StandIn) -> None:
    process.write(3, 3)
    process.pause()
    assert capture.snapshot(running, "a").pause_seconds == 0
    assert process.is_paused and ram_of(running, "a") == process.whole()


@pytest.mark.parametrize(("event", "said"), [("RESUME", "let the machine go on"), ("RESET", "was reset")])
def test_a_machine_that_somebody_else_disturbs_while_it_stands_still_is_not_taken(
    running: Running, process: StandIn, event: str, said: str
) -> None:
    process.when_stopped = lambda: process.reported.append(event)
    with pytest.raises(StateError, match=f"{said}.* while it stood still .* nothing was taken"):
        capture.snapshot(running, "a")
    assert snapshots_of(running) == [] and not process.is_paused
    process.when_stopped = lambda: None
    process.write(3, 3)
    capture.snapshot(running, "a")
    assert ram_of(running, "a") == process.whole()


def test_the_disks_of_a_machine_are_cut_before_the_last_answer_says_that_it_stood_still(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever let it go on before the cut is heard of with that answer; who does behind it disturbs nothing."""
    is_waited_for, save_state, cut = threading.Event(), process.save_state, seal.cut_heads
    wait = capture._Cutting.wait_until_cut
    cuts: list[int] = []
    cuts_when_saved: list[int] = []

    def save_and_count(meanwhile: Callable[[], object]) -> list[str]:
        devices = save_state(meanwhile)
        cuts_when_saved.append(len(cuts))
        return devices

    def cut_late(*given: Any) -> Any:
        assert is_waited_for.wait(300)
        found = cut(*given)
        cuts.append(1)
        return found

    def wait_until_cut(cutting: capture._Cutting) -> None:
        is_waited_for.set()
        wait(cutting)

    monkeypatch.setattr(process, "save_state", save_and_count)
    monkeypatch.setattr(seal, "cut_heads", cut_late)
    monkeypatch.setattr(capture._Cutting, "wait_until_cut", wait_until_cut)
    capture.snapshot(running, "a")
    assert cuts_when_saved == [1]


def test_a_machine_whose_devices_were_changed_while_it_ran_is_not_taken(running: Running, process: StandIn) -> None:
    before = process.plugged_now
    process.plugged_now = ["hot (virtio-rng-pci)"]
    with pytest.raises(StateError, match=r"has hot \(virtio-rng-pci\) in addition and has disk0 .* no more"):
        capture.snapshot(running, "a")
    assert snapshots_of(running) == [] and not process.is_paused
    process.plugged_now = before
    capture.snapshot(running, "a")


def test_a_machine_whose_ram_volume_was_lost_to_a_failed_sync_is_taken_with_every_page(
    running: Running, process: StandIn
) -> None:
    process.write(1, 1)
    capture.snapshot(running, "a")
    process.write(1, 2)
    process.write(900, 2)
    with pytest.raises(StateError, match="sync failed"):
        capture.snapshot(running, "b", go_on=running.ram_volume._opened.to_write().path.poison)
    assert snapshots_of(running) == ["a"] and not process.is_paused
    process.write(2, 3)
    capture.snapshot(running, "b")
    assert ram_of(running, "b") == process.whole()
    running.ram_volume._opened.to_write().path.poison()
    restore.revert(running, "a")
    capture.snapshot(running, "c")
    assert ram_of(running, "c") == ram_of(running, "a") == process.whole()


def test_a_taken_name_is_refused_before_the_machine_is_stopped(running: Running, process: StandIn) -> None:
    capture.snapshot(running, "a")
    process.fails_at = "pause"
    with pytest.raises(SnapshotExistsError):
        capture.snapshot(running, "a")
    assert process.fails_at == "pause"


def test_frozen_file_systems_are_thawed_whatever_happens(running: Running, process: StandIn) -> None:
    assert capture.snapshot(running, "a", freeze=True).frozen == ("/",)
    process.fails_at = "save_state"
    with pytest.raises(OSError, match="no room"):
        capture.snapshot(running, "b", freeze=True)
    assert process.devices == "as it booted, thawed, thawed"


def test_a_supervisor_that_was_killed_loses_no_page(
    store: onionskin.Store, running: Running, process: StandIn, tmp_path: Path
) -> None:
    process.write(5, 1)
    capture.snapshot(running, "a")
    process.write(6, 2)
    running.guest_ram.collect()  # what this scan returned is known to the one that dies alone
    process.write(7, 3)
    running.files.finish()
    running.ram_volume.close()
    process.guest_ram = process._tracked(process._preload) if process._preload else None
    again = attach(store, process, tmp_path / "run")
    try:
        capture.snapshot(again, "b")
        assert ram_of(again, "b") == process.whole()
    finally:
        again.close()


def test_without_tracking_a_machine_is_compared_and_only_while_it_stands_still(
    store: onionskin.Store, empty: Path, tmp_path: Path
) -> None:
    process = StandIn(tmp_path / "run", empty, is_tracked=False)
    try:
        running = attach(store, process, tmp_path / "run")
        with pytest.raises(StateError, match="use mode 'pause'"):
            capture.snapshot(running, "a", mode="live")
        for page in range(50, 60):
            process.write(page, page)
        taken_before = empty.stat().st_blocks
        assert capture.snapshot(running, "a").mode == "pause"
        assert empty.stat().st_blocks == taken_before  # no hole was filled by a look at it
        process.write(50, 0)
        process.write(51, 99)
        assert capture.snapshot(running, "b").bytes_stored == PAGE_BYTES
        assert ram_of(running, "b") == process.whole() == empty.read_bytes()
        running.close()
    finally:
        process.close()


def test_a_snapshot_of_a_machine_between_two_states_is_refused(running: Running) -> None:
    running.is_broken = True
    with pytest.raises(StateError, match="revert it again"):
        capture.snapshot(running, "a")


@pytest.mark.parametrize("mode", ["live", "pause"])
def test_a_snapshot_of_a_machine_that_was_given_up_is_refused(running: Running, process: StandIn, mode: str) -> None:
    process.write(5, 1)
    running.close()
    with pytest.raises(StateError, match="being ended"):
        capture.snapshot(running, "a", mode=mode)


def test_the_state_is_gone_from_memory_when_its_file_is_closed() -> None:
    with StateFile() as state:
        state.path.write_bytes(b"secret" * 1000)
        with state.path.open("rb") as other:
            state.close()
            assert other.read() == b""
            with suppress(OSError):  # the number of the descriptor may be another file's by now
                assert not state.path.samefile(f"/proc/self/fd/{other.fileno()}")


def test_rounds_end_where_they_get_no_shorter(running: Running, process: StandIn) -> None:
    draw = np.random.default_rng(1)
    assert isinstance(running.guest_ram, GuestRam)
    before = running.guest_ram.stream
    rounds = []

    def stream(volume: onionskin.Volume) -> int:
        for page in draw.integers(0, PAGES, 200).tolist():
            process.write(page, 1)
        rounds.append(before(volume))
        return rounds[-1]

    running.guest_ram.stream = stream  # type: ignore[method-assign]
    capture.snapshot(running, "a")
    assert len(rounds) <= capture.ROUNDS_MAX + 1
    assert ram_of(running, "a") == process.whole()


def test_a_machine_that_boots_again_has_nothing_of_the_ram_before(
    store: onionskin.Store, running: Running, process: StandIn, empty: Path, tmp_path: Path
) -> None:
    process.write(5, 1)
    capture.snapshot(running, "a")
    running.close()
    running.ram_volume.close()
    fresh = StandIn(tmp_path / "second", empty)
    try:
        booted = attach(store, fresh, tmp_path / "second")
        fresh.write(6, 2)
        capture.snapshot(booted, "b")
        assert ram_of(booted, "b") == fresh.whole()
        booted.close()
    finally:
        fresh.close()


def test_the_devices_are_looked_at_while_the_machine_stands_still(
    running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood: list[bool] = []
    plugged = process.plugged

    def look() -> list[str]:
        stood.append(process.is_paused)
        return plugged()

    monkeypatch.setattr(process, "plugged", look)
    capture.snapshot(running, "a")
    assert stood == [True]


def test_who_serves_the_disks_is_told_while_a_machine_is_long_in_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowCut:
        times = 0
        is_told = threading.Event()

        def seal(self, when_cut: Callable[[], None], when_ready: Callable[[Callable[[], None]], None]) -> None:
            when_ready(self.keep_waiting)
            when_cut()

        def keep_waiting(self) -> None:
            self.times += 1
            if self.times == 3:
                self.is_told.set()

    monkeypatch.setattr(capture, "KEEP_SECONDS", 0.001)
    cut = SlowCut()
    with capture._Cutting(cut) as cutting:  # type: ignore[arg-type]
        cutting.begin()
        assert cut.is_told.wait(300)
        cutting.cut()
        cutting.wait_until_cut()
        cutting.result()
