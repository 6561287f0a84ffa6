"""Guest RAM without a guest: a child process maps a file, as QEMU does, and the preload library maps it privately."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.forbid_calls import PROCESS_MADVISE, forbid

import onionskin
from onionskin.base.dtypes import PAGE_RUN
from onionskin.kernels import _ram
from onionskin.kernels._ram import PAGE_BYTES, PageTracker
from onionskin.machine.preload import Preload, RefusedError, library
from onionskin.machine.ram import GuestRam, blocks_of, build_file, pieces_of, runs_of, runs_of_numbers

PAGES = 4096
LENGTH = PAGES * PAGE_BYTES


class Child:
    """The process whose memory it is."""

    def __init__(self, directory: Path, ram: Path, before: Callable[[], None] | None = None) -> None:
        self.ram = ram
        socket = directory / "preload"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("machine_memory.py"), ram],
            env={
                **os.environ,
                "LD_PRELOAD": str(library()),
                "ONIONSKIN_RAM": str(ram),
                "ONIONSKIN_PRELOAD": str(socket),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )
        assert self._answer() == "ready"
        self.preload = Preload(socket)

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def _say(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def write(self, page: int, byte: int) -> None:
        assert self._say(f"{page * PAGE_BYTES} {byte}") == "done"

    def read(self, page: int) -> int:
        return int(self._say(f"read {page * PAGE_BYTES}"))

    def close(self) -> None:
        self.preload.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    ram = tmp_path / "ram"
    ram.write_bytes(b"\1" * PAGE_BYTES)
    os.truncate(ram, LENGTH)
    child = Child(tmp_path, ram)
    try:
        yield child
    finally:
        child.close()


def tracked(child: Child) -> tuple[PageTracker, GuestRam]:
    where = child.preload.where()
    tracker = PageTracker(child.process.pid, where.start, where.length)
    ram = GuestRam(tracker, where.length)
    ram.add_private(swapped=True)
    child.preload.arm()
    ram.add_private(swapped=False)
    return tracker, ram


def pages_of(runs: np.ndarray) -> list[int]:
    return blocks_of(runs).tolist()


def test_what_is_written_stays_out_of_the_file(child: Child) -> None:
    before = child.ram.read_bytes()
    child.write(0, 7)
    child.write(9, 8)
    assert child.preload.where().is_private
    assert child.read(0) == 7 and child.ram.read_bytes() == before


def test_an_ordinary_user_has_writes_noted_also_those_of_the_kernel(child: Child) -> None:
    """A system that lets such a user have no answers to faults in the kernel lets him have the others."""
    if os.geteuid() == 0:
        assert child._say("user 65534") == "done"
    with tracked(child)[0] as tracker:
        assert pages_of(tracker.written(protect=True)) == []
        child.write(3, 8)
        for page in (0, 9):  # one that the file has, and one that is a hole in it
            assert child._say(f"receive {page * PAGE_BYTES}") == "4096"
        assert pages_of(tracker.written(protect=True)) == [0, 3, 9]
        assert child._say(f"receive {9 * PAGE_BYTES}") == "4096"
        assert pages_of(tracker.written(protect=True)) == [9]
    assert child.ram.read_bytes()[:1] == b"\1" and child.read(0) == 5


def test_the_process_cannot_take_pages_out_of_the_file_that_others_map(child: Child) -> None:
    """QEMU does so for a balloon of the guest, as it takes the mapping for a shared one."""
    before = child.ram.read_bytes()
    assert child._say("punch 0") == str(errno.EOPNOTSUPP)
    assert child.ram.read_bytes() == before and child.read(0) == 1


def test_each_write_is_found_once_and_nothing_else(child: Child) -> None:
    tracker, _ = tracked(child)
    assert pages_of(tracker.written(protect=True)) == []
    for page in (3, 4, 5, 4095):
        child.write(page, 1)
    child.read(100)
    assert pages_of(tracker.written(protect=False)) == [3, 4, 5, 4095]
    assert pages_of(tracker.written(protect=True)) == [3, 4, 5, 4095]
    assert pages_of(tracker.written(protect=True)) == []
    child.write(4, 2)
    assert pages_of(tracker.written(protect=True)) == [4]


def test_what_was_written_before_writes_are_noted_is_unsaved(child: Child) -> None:
    child.write(11, 1)
    _, ram = tracked(child)
    assert ram.unsaved_pages == 1


def test_a_snapshot_has_what_the_machine_had_and_a_round_that_came_to_nothing_loses_nothing(
    child: Child, tmp_path: Path
) -> None:
    _, ram = tracked(child)
    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in (1, 2, 2000):
            child.write(page, 1)
        ram.collect()
        child.write(2, 2)
        child.write(2000, 0)
        ram.collect()  # the scan that came to nothing: what it found stays unsaved
        child.write(3, 3)
        ram.collect()
        assert ram.unsaved_pages == 4
        assert ram.save(volume) == 3 * PAGE_BYTES
        volume.snapshot("a")
        ram.forget_saved()
        assert [volume.read(page * PAGE_BYTES, 1)[0] for page in (1, 2, 3, 2000)] == [1, 2, 3, 0]
        child.write(3, 4)
        assert ram.collect() == 1
        assert ram.save(volume) == PAGE_BYTES


def test_what_is_streamed_while_the_machine_runs_is_collected_again_after_a_snapshot_that_came_to_nothing(
    child: Child, tmp_path: Path
) -> None:
    _, ram = tracked(child)
    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in range(1, 1500):
            child.write(page, 1 + page % 250)
        assert ram.stream(volume) == 1499
        assert [volume.read(page * PAGE_BYTES, 1)[0] for page in (1, 700, 1499)] == [2, 201, 250]
        child.write(1, 77)
        assert ram.collect() == 1 and ram.save(volume) == 1499 * PAGE_BYTES
        volume.zero(0, LENGTH)  # it is lost
        ram.collect_again()
        assert ram.unsaved_pages == 1499 and ram.collect() == 1499
        assert ram.save(volume) == 1499 * PAGE_BYTES
        assert [volume.read(page * PAGE_BYTES, 1)[0] for page in (1, 700, 1499)] == [77, 201, 250]


def test_a_piece_of_ram_is_read_while_the_one_before_is_written_and_no_write_in_between_is_lost(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, ram = tracked(child)
    reads, save = [threading.Event() for _ in range(3)], ram._save_pages
    numbers_of_pieces: list[int] = []

    def read(runs: np.ndarray, to: np.ndarray) -> None:
        tracker.read(runs, to)
        next(one for one in reads if not one.is_set()).set()

    def save_and_write(volume: onionskin.Volume, numbers: np.ndarray, pages: np.ndarray) -> None:
        if not numbers_of_pieces:
            assert reads[1].wait(300), "the next piece is not read before this one is written"
            child.write(10, 77)  # of this piece
            child.write(2000, 78)  # of the next one
        numbers_of_pieces.append(len(numbers))
        save(volume, numbers, pages)

    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in range(1, 3001):
            child.write(page, 1 + page % 250)
        monkeypatch.setattr(ram, "_tracker", SimpleNamespace(read=read, written=tracker.written, close=tracker.close))
        monkeypatch.setattr(ram, "_save_pages", save_and_write)
        assert ram.stream(volume) == 3000 and numbers_of_pieces == [1024, 1024, 952]
        assert [volume.read(page * PAGE_BYTES, 1)[0] for page in (10, 2000, 2049)] == [11, 1, 50]
        monkeypatch.setattr(ram, "_tracker", tracker)
        assert ram.collect() == 2
        ram.save(volume)
        assert [volume.read(page * PAGE_BYTES, 1)[0] for page in (10, 2000, 2049)] == [77, 78, 50]


def test_pieces_of_ram_that_could_not_be_written_are_collected_for_the_next_snapshot(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ram = tracked(child)

    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in range(1, 3001):
            child.write(page, 1 + page % 250)
        monkeypatch.setattr(ram, "_save_pages", save)
        with pytest.raises(OSError, match="no room"):
            ram.stream(volume)
        monkeypatch.undo()
        ram.collect_again()
        assert ram.stream(volume) == 3000 and volume.read(3000 * PAGE_BYTES, 1)[0] == 1


def test_a_page_that_is_zero_again_before_the_snapshot_takes_no_room(child: Child, tmp_path: Path) -> None:
    _, ram = tracked(child)
    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in (5, 6):
            child.write(page, 9)
        ram.stream(volume)
        child.write(6, 0)
        ram.collect()
        assert ram.save(volume) == PAGE_BYTES
        assert volume.read(5 * PAGE_BYTES, 2 * PAGE_BYTES) == b"\t" * PAGE_BYTES + bytes(PAGE_BYTES)


FILLED_RUNS = {
    "single pages": [(at, at + 3) for at in range(1, 4000, 5)],
    "a long run": [(1, 700), (PAGES - 1, PAGES)],
    "more than are taken at once": [(at, at + 1) for at in range(0, PAGES, 2)],
    "nothing": [],
}


@pytest.mark.parametrize("how", ["from outside", "inside"])
@pytest.mark.parametrize("pages", FILLED_RUNS.values(), ids=FILLED_RUNS.keys())
def test_pages_are_written_from_a_file_and_no_others(
    child: Child, tmp_path: Path, how: str, pages: list[tuple[int, int]]
) -> None:
    tracker, _ = tracked(child)

    def write(runs: NDArray[Any], file: int) -> None:
        if how == "inside":
            child.preload.fill(runs, file)
        else:
            tracker.write_from(runs, file)

    content = np.random.default_rng(2).integers(1, 255, LENGTH, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    runs = np.array([(PAGE_BYTES * start, PAGE_BYTES * end) for start, end in pages], PAGE_RUN)
    before = np.empty(LENGTH, np.uint8)
    tracker.read(np.array([(0, LENGTH)], PAGE_RUN), before)
    with (tmp_path / "file").open("rb") as file:
        write(runs, file.fileno())
    for start, end in runs.tolist():
        before[start:end] = content[start:end]
    after = np.empty(LENGTH, np.uint8)
    tracker.read(np.array([(0, LENGTH)], PAGE_RUN), after)
    assert np.array_equal(before, after)
    written = set(pages_of(tracker.written(protect=True)))
    assert written == {page for start, end in pages for page in range(start, end)}
    os.truncate(tmp_path / "file", LENGTH // 2)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError) if pages else nullcontext():
        write(runs, file.fileno())
    assert child.preload.where().length == LENGTH


def test_nothing_is_written_from_a_file_outside_of_the_memory_nor_without_the_file(
    child: Child, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes([7]) * LENGTH)
    first = (0, PAGE_BYTES)
    with (tmp_path / "file").open("rb") as file:
        for run in ((0, LENGTH + PAGE_BYTES), (PAGE_BYTES, 0), (1, PAGE_BYTES + 1)):
            with pytest.raises(RefusedError, match="cannot write a file to its memory"):
                child.preload.fill(np.array([first, run], PAGE_RUN), file.fileno())
        with pytest.raises(RefusedError, match="Bad file descriptor"):
            child.preload.fill(np.array([first], PAGE_RUN), None)  # type: ignore[arg-type]
        assert child.read(0) == 1
        opened = os.listdir(f"/proc/{child.process.pid}/fd")
        child.preload.fill(np.array([first], PAGE_RUN), file.fileno())
        child.preload.where()
        assert child.read(0) == 7 and os.listdir(f"/proc/{child.process.pid}/fd") == opened


@pytest.mark.parametrize("numbers", [[], [5], [5, 6, 7], [0, 2, 3, 9], [1, 2, 8, 9]])
def test_numbers_of_pages_are_runs_of_them(numbers: list[int]) -> None:
    given = np.array(numbers, np.int64)
    runs = runs_of_numbers(given)
    assert blocks_of(runs).tolist() == numbers
    assert len(runs) == len([page for page in numbers if page - 1 not in numbers])


def test_what_is_only_looked_at_is_found_again(child: Child) -> None:
    _, ram = tracked(child)
    child.write(3, 9)
    assert pages_of(ram.note_written(again=True)) == pages_of(ram.note_written()) == [3]
    assert pages_of(ram.note_written()) == []


def test_a_machine_goes_back_to_a_snapshot_and_its_writes_are_noted_again(child: Child, tmp_path: Path) -> None:
    tracker, ram = tracked(child)
    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH) as volume:
        for page in range(0, 3000, 3):
            child.write(page, 1 + page % 200)
        ram.collect()
        ram.save(volume)
        volume.snapshot("a")
        ram.forget_saved()
        for page in range(0, 3000, 5):
            child.write(page, 250)
        ram.collect()
        with store.open("ram", snapshot="a") as view:
            ram.put_back(runs_of(ram._unsaved), view)
            whole = np.empty(LENGTH, np.uint8)
            tracker.read(np.array([(0, LENGTH)], PAGE_RUN), whole)
            assert whole[PAGE_BYTES:].tobytes() == view.read(0, LENGTH)[PAGE_BYTES:]
        assert ram.collect() == 0
        child.write(5, 1)
        assert ram.collect() == 1


def test_pages_that_are_forgotten_read_as_the_file_and_are_noted_again(child: Child) -> None:
    tracker, _ = tracked(child)
    child.write(0, 9)
    child.write(1, 9)
    child.preload.forget(np.array([(0, PAGE_BYTES)], PAGE_RUN))
    assert (child.read(0), child.read(1)) == (1, 9)
    tracker.written(protect=True)
    child.write(0, 3)
    assert pages_of(tracker.written(protect=True)) == [0]


@pytest.mark.parametrize("before", [None, partial(forbid, PROCESS_MADVISE)], ids=["at once", "one by one"])
def test_more_runs_than_one_call_takes_are_forgotten_and_nothing_between_them(
    tmp_path: Path, before: Callable[[], None] | None
) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes([1]) * LENGTH)
    child = Child(tmp_path, ram, before)
    try:
        tracker, _ = tracked(child)
        for page in range(3000):
            child.write(page, 9)
        runs = np.array([(PAGE_BYTES * at, PAGE_BYTES * (at + 1)) for at in range(0, 3000, 2)], PAGE_RUN)
        child.preload.forget(runs)
        whole = np.empty(LENGTH, np.uint8)
        tracker.read(np.array([(0, LENGTH)], PAGE_RUN), whole)
        assert whole[::PAGE_BYTES].tolist() == [1, 9] * 1500 + [1] * (PAGES - 3000)
    finally:
        child.close()


def test_of_runs_one_of_which_is_outside_of_the_memory_none_is_forgotten(child: Child) -> None:
    child.write(0, 9)
    with pytest.raises(OSError, match="cannot put its memory back"):
        child.preload.forget(np.array([(0, PAGE_BYTES), (0, LENGTH + PAGE_BYTES)], PAGE_RUN))
    assert child.read(0) == 9


@pytest.mark.parametrize("run", [(0, LENGTH + PAGE_BYTES), (PAGE_BYTES, 0), (1, PAGE_BYTES + 1)])
def test_a_run_outside_of_the_memory_is_refused(child: Child, run: tuple[int, int]) -> None:
    with pytest.raises(OSError, match="cannot put its memory back"):
        child.preload.forget(np.array([run], PAGE_RUN))
    assert child.preload.where().length == LENGTH


def test_a_process_that_ended_is_an_error(child: Child) -> None:
    tracker, _ = tracked(child)
    child.process.kill()
    child.process.wait()
    with pytest.raises(OSError):
        tracker.read(np.array([(0, PAGE_BYTES)], PAGE_RUN), np.empty(PAGE_BYTES, np.uint8))


def test_a_file_is_built_from_a_snapshot_sparse_and_for_its_owner(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("ram", size=LENGTH + (1 << 20)) as volume:
        volume.write(5 * PAGE_BYTES, b"x" * PAGE_BYTES)
        volume.write(LENGTH, b"state")
        volume.snapshot("a")
        with store.open("ram", snapshot="a") as view:
            build_file(view, tmp_path / "file", LENGTH)
            assert (tmp_path / "file").read_bytes() == view.read(0, LENGTH)
    found = (tmp_path / "file").stat()
    assert found.st_mode & 0o777 == 0o600 and found.st_blocks * 512 <= 3 * PAGE_BYTES


def test_pages_are_told_apart() -> None:
    pages = np.zeros(6 * PAGE_BYTES + PAGE_BYTES, np.uint8)
    start = -pages.ctypes.data % PAGE_BYTES
    pages = pages[start : start + 6 * PAGE_BYTES]
    parent = np.empty(7 * PAGE_BYTES, np.uint8)
    start = -parent.ctypes.data % PAGE_BYTES
    parent = parent[start : start + 6 * PAGE_BYTES]
    parent[:] = pages
    pages[PAGE_BYTES - 1] = 1  # the last byte of a page counts
    pages[2 * PAGE_BYTES] = 2
    parent[3 * PAGE_BYTES + 77] = 3
    pages[4 * PAGE_BYTES :] = parent[4 * PAGE_BYTES :] = 5
    assert _ram.classify(pages).tolist() == [_ram.DATA, _ram.ZERO, _ram.DATA, _ram.ZERO, _ram.DATA, _ram.DATA]
    kinds = [_ram.DATA, _ram.SAME, _ram.DATA, _ram.ZERO, _ram.SAME, _ram.SAME]
    assert _ram.classify(pages, parent).tolist() == kinds


def test_runs_are_cut_into_pieces_that_are_all_of_them() -> None:
    runs = np.array([(0, 4096), (8192, 8192 + (30 << 20)), (40 << 20, (40 << 20) + 4096)], PAGE_RUN)
    pieces = list(pieces_of(runs))
    assert np.concatenate([blocks_of(piece) for piece in pieces]).tolist() == blocks_of(runs).tolist()
    assert all(int((piece["end"] - piece["start"]).sum()) <= 8 << 20 for piece in pieces)


def test_a_tracker_that_two_threads_close_closes_its_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = PageTracker(os.getpid(), 0, PAGE_BYTES)
    closed: list[int] = []
    close, here = os.close, threading.current_thread()

    def close_and_meet_another(descriptor: int) -> None:
        if threading.current_thread() is here:  # others of this process close what is theirs
            closed.append(descriptor)
            if len(closed) == 1:
                tracker.close()  # as another thread may at this point
        close(descriptor)

    monkeypatch.setattr(os, "close", close_and_meet_another)
    tracker.close()
    monkeypatch.undo()
    assert len(closed) == 1
