"""Snapshots of machines that QEMU runs: captured, put back, started from, forked. The guest is a boot sector (tick.S)."""

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.lab import MEMORY, LabMachine
from support.rounds import rounds

import onionskin
from onionskin.base.dtypes import PAGE_RUN
from onionskin.errors import StateError
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import capture, restore
from onionskin.machine.hypervisor import Configuration
from onionskin.machine.ram import GuestRam
from onionskin.machine.running import open_layer
from onionskin.operations import machines

pytestmark = pytest.mark.slow  # each starts QEMU


@pytest.fixture
def store(vms: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(vms) as store:
        yield store


@pytest.fixture
def lab(store: onionskin.Store, qemu: list[str], tmp_path: Path) -> Iterator[LabMachine]:
    """The machine lab with the disks web, which boots, and data, that runs."""
    with LabMachine.make(store, "lab", ["web", "data"], tmp_path / "lab", qemu).start() as lab:
        lab.console.wait_ticks()
        yield lab


def ram_of(lab: LabMachine, snapshot: str) -> np.ndarray:
    saved = restore.find_saved(lab.store, lab.running.machine, snapshot)
    with open_layer(lab.store, saved.volume, saved.layer) as view:
        return np.frombuffer(view.read(0, MEMORY << 20), np.uint8)


def pages_that_differ(one: np.ndarray, other: np.ndarray) -> list[int]:
    return np.flatnonzero((one != other).reshape(-1, PAGE_BYTES).any(1)).tolist()


def keep_references(lab: LabMachine) -> list[np.ndarray]:
    """Have a copy of RAM taken in each snapshot, while the machine stands still and its devices have been saved."""
    kept: list[np.ndarray] = []
    save_state = lab.process.save_state

    def save_and_keep(meanwhile: Callable[[], object]) -> list[str]:
        devices = save_state(meanwhile)
        kept.append(lab.whole())
        return devices

    lab.process.save_state = save_and_keep  # type: ignore[method-assign]
    return kept


def test_each_live_snapshot_has_every_page(lab: LabMachine) -> None:
    kept = keep_references(lab)
    for number in range(rounds(20, 100)):
        taken = capture.snapshot(lab.running, f"s{number}")
        assert taken.mode == "live" and taken.pause_seconds > 0
        assert pages_that_differ(ram_of(lab, f"s{number}"), kept[number]) == []
        lab.console.wait_ticks(1)


def test_each_revert_goes_on_at_the_next_tick(lab: LabMachine) -> None:
    capture.snapshot(lab.running, "ready")
    at = int(ram_of(lab, "ready")[9 * PAGE_BYTES :].view(np.uint32)[0])
    lab.console.wait_past(at + 1)  # lines from before the snapshot may be read behind it
    for _ in range(rounds(20, 100)):
        since = len(lab.console.ticks) - 1
        lab.console.wait_ticks(3)
        restore.revert(lab.running, "ready")
        # The guest looks at memory and disk itself, and says "wrong".
        assert lab.console.wait_back(since) in (at, at + 1)


def test_a_machine_starts_from_a_snapshot_as_often_as_one_likes(lab: LabMachine) -> None:
    capture.snapshot(lab.running, "ready")
    at = int(ram_of(lab, "ready")[9 * PAGE_BYTES :].view(np.uint32)[0])
    lab.console.wait_ticks(2)
    for _ in range(2):
        lab.stop()
        lab.store._revert_machine("lab", "ready")
        lab.start()
        lab.console.wait_ticks(2)
        assert lab.console.ticks[0] in (at, at + 1)
        lab.console.wait_ticks(3)
        restore.revert(lab.running, "ready")  # by dropping what it wrote: it runs over the snapshot's RAM file
        assert lab.console.wait_back(0) in (at, at + 1)
        lab.console.wait_ticks(1)


def test_a_disk_that_was_resized_goes_back_with_a_process_that_knows_its_size(lab: LabMachine) -> None:
    capture.snapshot(lab.running, "small")
    lab.stop()
    with lab.store.open("data") as volume:
        volume.resize("2M")
    lab.start()
    lab.console.wait_ticks(2)
    capture.snapshot(lab.running, "large")
    restore.revert(lab.running, "large")
    lab.console.wait_ticks(2)
    with pytest.raises(StateError, match="disk 'data' had 1 MiB then, and has 2 MiB"):
        restore.revert(lab.running, "small")
    lab.console.wait_ticks(2)
    lab.stop()
    lab.store._revert_machine("lab", "small")
    lab.start()
    assert lab.process.disk_bytes() == [1 << 20, 1 << 20]
    lab.console.wait_ticks(2)


def test_forks_share_one_ram_file_and_nothing_else(lab: LabMachine, tmp_path: Path) -> None:
    capture.snapshot(lab.running, "ready")
    lab.running.files.finish()
    at = int(ram_of(lab, "ready")[9 * PAGE_BYTES :].view(np.uint32)[0])
    names = lab.store.fork_machine("lab", "ready", count=2)
    forks = [LabMachine(lab.store, name, tmp_path / name).start() for name in names]
    try:
        (file,) = {fork.process.ram_file for fork in forks}
        before = hashlib.sha256(file.read_bytes()).digest()
        for fork in forks:
            fork.console.wait_ticks(3)
            assert fork.console.ticks[0] in (at, at + 1)
        lab.console.wait_ticks(1)
        assert hashlib.sha256(file.read_bytes()).digest() == before
        taken = capture.snapshot(forks[0].running, "of-a-fork")
        assert taken.bytes_stored < 1 << 20
    finally:
        for fork in forks:
            fork.stop()


def test_a_fork_of_a_fork_stores_what_changed(lab: LabMachine, tmp_path: Path) -> None:
    capture.snapshot(lab.running, "ready")
    (first,) = lab.store.fork_machine("lab", "ready", count=1)
    with LabMachine(lab.store, first, tmp_path / first).start() as fork:
        fork.console.wait_ticks(2)
        capture.snapshot(fork.running, "again")
        (second,) = lab.store.fork_machine(first, "again", count=1)
    with LabMachine(lab.store, second, tmp_path / second).start() as fork:
        fork.console.wait_ticks(2)
        kept = keep_references(fork)
        taken = capture.snapshot(fork.running, "third")
        assert pages_that_differ(ram_of(fork, "third"), kept[0]) == []
        changed = len(pages_that_differ(kept[0], ram_of_layer(fork, second))) * PAGE_BYTES
        state = restore.find_saved(fork.store, fork.running.machine, "third").state_bytes
        assert state < 1 << 20 and taken.bytes_stored - state <= changed * 1.2


def ram_of_layer(lab: LabMachine, name: str) -> np.ndarray:
    """Return the RAM that a fork began with."""
    catalog = lab.store._opened.catalog
    assert lab.running.mapped is not None
    row = catalog.volume_with_id(machines.find(catalog, name).ram)
    assert row is not None
    with open_layer(lab.store, row, lab.running.mapped) as view:
        return np.frombuffer(view.read(0, MEMORY << 20), np.uint8)


def test_a_snapshot_that_fails_leaves_the_machine_running_and_loses_no_page(
    lab: LabMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture.snapshot(lab.running, "before")
    lab.console.wait_ticks(2)

    def fail(*args: object) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(GuestRam, "save", fail)
        with pytest.raises(OSError, match="no room"):
            capture.snapshot(lab.running, "lost")
    lab.console.wait_ticks(2)
    kept = keep_references(lab)
    capture.snapshot(lab.running, "lost")
    assert pages_that_differ(ram_of(lab, "lost"), kept[0]) == []
    restore.revert(lab.running, "before")
    lab.console.wait_ticks(2)


def test_a_snapshot_is_whole_whose_machine_is_given_up_while_its_ram_is_written(
    lab: LabMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_references(lab)
    closing = threading.Thread(target=lab.running.close)
    save = GuestRam.save

    def save_while_closing(self: GuestRam, *given: object) -> int:
        closing.start()
        closing.join(0.5)  # it waits for the snapshot, however long that takes
        return save(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(GuestRam, "save", save_while_closing)
        capture.snapshot(lab.running, "whole")
    closing.join()
    assert pages_that_differ(ram_of(lab, "whole"), kept[0]) == []
    with pytest.raises(StateError, match="being ended"):
        lab.running.guest_ram.save(lab.running.ram_volume)


def test_a_snapshot_of_another_cpu_is_refused_and_nothing_is_started(lab: LabMachine) -> None:
    capture.snapshot(lab.running, "ready")
    lab.stop()
    lab.store._revert_machine("lab", "ready")
    row = machines.find(lab.store._opened.catalog, "lab")
    other = Configuration.from_json(row.configuration.replace('"cpu_model":"max"', '"cpu_model":"qemu64"'))
    lab.store._opened.change(lambda: lab.store._opened.catalog.update_machine(row.id, configuration=other.to_json()))
    with pytest.raises(StateError, match="CPU model"):
        lab.start()
    lab.store._opened.change(lambda: lab.store._opened.catalog.update_machine(row.id, configuration=row.configuration))
    lab.start()


def test_a_secret_of_ram_is_nowhere_in_the_store_once_it_was_discarded(
    vms: Path, qemu: list[str], tmp_path: Path
) -> None:
    secret = np.frombuffer(secrets.token_bytes(PAGE_BYTES), np.uint8)
    page = np.array([(2000 * PAGE_BYTES, 2001 * PAGE_BYTES)], PAGE_RUN)
    with onionskin.Store(vms) as store:
        lab = LabMachine.make(store, "lab", ["web", "data"], tmp_path / "lab", qemu, wipe="zero").start()
        lab.console.wait_ticks()
        capture.snapshot(lab.running, "before")
        ram = lab.running.guest_ram
        assert isinstance(ram, GuestRam)
        ram._tracker.write(page, secret)
        capture.snapshot(lab.running, "secret")
        lab.running.files.finish()
        assert is_in(vms, secret.tobytes())
        lab.stop()
        store._revert_machine("lab", "before")
        store._discard_machine_snapshots("lab", "secret")
        lab.running.files.sweep()
        assert not is_in(vms, secret.tobytes())
        lab.start()
        lab.console.wait_ticks()
        lab.stop()


def is_in(directory: Path, secret: bytes) -> bool:
    """Whether a part of a secret is in any file of a store that is open: its background removes files at any time."""
    for path in directory.rglob("*"):
        # Who closes a file of SQLite's gives up the locks that this process has on it.
        if path.is_file() and not path.name.startswith("catalog.db"):
            with suppress(FileNotFoundError):
                held = path.read_bytes()
                if any(secret[at : at + 64] in held for at in (0, 2048, 4032)):
                    return True
    return False
