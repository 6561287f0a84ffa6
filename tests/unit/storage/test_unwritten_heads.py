"""Forks that nothing was written to: they are read through the view that they share, and opened by their first write."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.listing import found_in

import onionskin
from onionskin.storage.open_head import OpenHead

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=64 * BLOCK) as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("clean")
        store.fork("web@clean", count=4, pattern="job-{n}")
        yield store


def head_of(volume: onionskin.Volume) -> OpenHead:
    assert isinstance(volume._opened, OpenHead)
    return volume._opened


def is_unwritten(volume: onionskin.Volume) -> bool:
    return head_of(volume).is_unwritten


def test_forks_of_a_snapshot_share_one_data_path_until_one_is_written(store: onionskin.Store) -> None:
    with store.open("job-1") as one, store.open("job-2") as two:
        assert one._path is two._path
        assert one.read(0, 2) == b"aa" and is_unwritten(one)
        assert one.write(0, b"b") == 1
        assert not is_unwritten(one) and is_unwritten(two)
        assert (one[:2], two[:2]) == (b"ba", b"aa")
    with store.open("job-1") as again:
        assert again[:2] == b"ba" and not is_unwritten(again)


def test_reading_flushing_and_closing_a_fork_opens_no_head(store: onionskin.Store) -> None:
    fork = store.open("job-1")
    assert fork.writable and (fork.size_bytes, fork.block_size, fork.wipe) == (64 * BLOCK, BLOCK, "release")
    assert bytes(fork.read_blocks([0])[0, :1]) == b"a"
    fork.flush()
    assert is_unwritten(fork)
    fork.close()
    assert fork.closed
    for call in (lambda: fork.read(0, 1), lambda: fork.write(0, b"b"), fork.flush, lambda: fork.snapshot("late")):
        with pytest.raises(onionskin.StateError, match="closed"):
            call()
    assert first_byte(store, "job-1") == b"a"


def first_byte(store: onionskin.Store, name: str) -> bytes:
    with store.open(name, mode="r") as volume:
        return volume[:1]


def test_every_way_to_change_a_fork_opens_its_head(store: onionskin.Store) -> None:
    ways = {
        "zero": lambda volume: volume.zero(0, BLOCK),
        "trim": lambda volume: volume.trim(0, BLOCK),
        "write_blocks": lambda volume: volume.write_blocks([0], b"\0" * BLOCK),
        "resize": lambda volume: volume.resize(65 * BLOCK),
        "snapshot": lambda volume: volume.snapshot("own"),
    }
    names = store.fork("web@clean", names=list(ways))
    for name in names:
        with store.open(name) as fork:
            assert is_unwritten(fork)
            ways[name](fork)
            assert not is_unwritten(fork)
        with store.open(name) as again:
            assert again[:1] == (b"a" if name in ("resize", "snapshot") else b"\0")
            assert again.size_bytes == BLOCK * (65 if name == "resize" else 64)


def test_a_fork_has_no_array_of_its_pages_before_its_first_write_either(store: onionskin.Store) -> None:
    with store.open("job-1") as fork, pytest.raises(onionskin.StateError):
        fork.view(0, BLOCK)


def test_an_open_fork_is_held_before_its_first_write(store: onionskin.Store) -> None:
    with store.open("job-1"), onionskin.Store(store.path) as other:
        with pytest.raises(onionskin.StateError, match="open for writing"):
            other.open("job-1")
        with pytest.raises(onionskin.StateError, match="open for writing"):
            other.delete("job-1")


def test_what_lies_below_a_fork_may_be_changed_before_its_first_write(store: onionskin.Store) -> None:
    """The head is opened by what the catalog says at its first write, not by what it said when the fork was opened."""
    with store.open("job-1") as fork:
        store.delete("job-2", "job-3", "job-4")
        with onionskin.Store(store.path) as other, other.open("web") as web:
            web.write(0, b"c" * BLOCK)
            web.merge("clean")
            web.snapshot("later")
        store.rename("job-1", "task")
        assert fork[:1] == b"a" and is_unwritten(fork)
        fork.write(BLOCK, b"d")
        assert (fork[:1], fork[BLOCK : BLOCK + 1], fork.name) == (b"a", b"d", "task")
    assert store.check() == []
    assert first_byte(store, "task") == b"a" and first_byte(store, "web") == b"c"


def test_the_files_below_a_fork_are_kept_before_its_first_write(store: onionskin.Store) -> None:
    (segment,) = (path for path, status in found_in(store.path / "segments") if status.st_size > BLOCK)
    with store.open("job-1") as fork, onionskin.Store(store.path) as other:
        other.delete("job-2", "job-3", "job-4")
        (layer,) = (row for row in other._opened.catalog.chain(head_of(fork).head) if row.sealed)
        (row,) = (row for row in other._opened.catalog.segments_of_layer(layer.id) if row.role == "sealed")
        with other._opened.locks.exclusive(row.lock_byte) as alone:
            assert not alone
        assert fork[:1] == b"a"
    assert segment.exists()


def test_threads_that_write_first_at_once_open_one_head_and_lose_nothing(store: onionskin.Store) -> None:
    with store.open("job-1") as fork:
        ready = threading.Barrier(8)
        failed: list[BaseException] = []

        def write(number: int) -> None:
            try:
                ready.wait()
                fork.write(number * BLOCK, bytes([number]) * BLOCK)
                assert fork[number * BLOCK : (number + 1) * BLOCK] == bytes([number]) * BLOCK
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
    with store.open("job-1") as again:
        assert [again.read(number * BLOCK, 1)[0] for number in range(8)] == list(range(8))


WAYS_TO_WRITE: list[Callable[[onionskin.Volume], object]] = [
    lambda volume: volume.write(0, b"b"),
    lambda volume: volume.zero(BLOCK, BLOCK),
]


@pytest.mark.parametrize("write", WAYS_TO_WRITE, ids=["write", "zero"])
def test_a_first_write_goes_on_where_another_thread_opened_the_head_meanwhile(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, write: Callable[[onionskin.Volume], object]
) -> None:
    with store.open("job-1") as fork:
        head = head_of(fork)
        begin_writing = head.begin_writing

        def begin_late() -> bool:
            begin_writing()  # the other thread
            return begin_writing()

        monkeypatch.setattr(head, "begin_writing", begin_late)
        write(fork)
        monkeypatch.undo()
        assert fork.head_changed


class ToldGuard:
    """The guard of a head, which tells when another thread is about to wait for it."""

    def __init__(self, head: OpenHead) -> None:
        self._guard = head.guard
        self._thread = threading.get_ident()
        self.is_wanted = threading.Event()

    def acquire(self, *given: Any, **named: Any) -> bool:
        if threading.get_ident() != self._thread:
            self.is_wanted.set()
        return self._guard.acquire(*given, **named)

    def release(self) -> None:
        self._guard.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def test_a_first_write_waits_for_no_operation_that_opened_the_head_meanwhile(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine that is cut, the operation waits until its writes were answered: both would wait for each other."""
    with store.open("job-1") as fork:
        head = head_of(fork)
        guard = ToldGuard(head)
        is_written = threading.Event()
        open_head = head._unwritten.open_head  # type: ignore[union-attr]

        def write() -> None:
            fork.write(0, b"b")
            is_written.set()

        def open_when_a_write_waits(head: OpenHead) -> Any:
            threading.Thread(target=write, daemon=True).start()
            assert guard.is_wanted.wait(300)
            return open_head(head)

        monkeypatch.setattr(head, "guard", guard)
        monkeypatch.setattr(head, "_unwritten", head._unwritten._replace(open_head=open_when_a_write_waits))  # type: ignore[union-attr]
        with head.operation():
            assert is_written.wait(60)
        assert fork.read(0, 1) == b"b"


def test_a_base_that_changed_is_seen_by_the_opening_of_a_fork_though_another_one_is_open(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"b" * 16 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", base=base) as web:
            web.snapshot("clean")
        store.fork("web@clean", names=["job-1", "job-2", "job-3"])
        with store.open("job-1"):
            with store.open("job-2") as second:
                assert is_unwritten(second)
            base.write_bytes(b"x" * 17 * BLOCK)
            with pytest.raises(onionskin.ChainError, match="has changed"):
                store.open("job-3")


def test_the_usage_of_forks_opens_no_head(store: onionskin.Store) -> None:
    with store.open("job-1") as fork:
        store.usage_of_forks("web@clean")
        assert is_unwritten(fork)


def test_a_fork_whose_head_was_left_unflushed_by_a_kill_is_opened_at_once(store: onionskin.Store) -> None:
    row = store._opened.catalog.volume("job-1")
    store._opened.layout.dirty_file(row.id).write_bytes(b"\0" * 8192)  # whatever is in it, somebody wrote to the head
    with store.open("job-1") as fork:
        assert not is_unwritten(fork)


def test_a_volume_that_stands_on_its_own_snapshot_is_opened_at_once(store: onionskin.Store) -> None:
    with store.open("web") as web:
        assert not is_unwritten(web)


def test_a_first_write_that_cannot_open_the_head_changes_nothing_and_may_be_tried_again(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = store._opened
    with store.open("job-1") as fork:
        with monkeypatch.context() as patch:
            patch.setattr(opened, "open_layer", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space")))
            with pytest.raises(OSError, match="no space"):
                fork.write(0, b"b")
        assert is_unwritten(fork) and fork[:1] == b"a"
        fork.write(0, b"b")
        assert fork[:1] == b"b"
    assert first_byte(store, "job-1") == b"b"


def test_the_background_frees_what_others_dropped_while_forks_are_unwritten(store: onionskin.Store) -> None:
    """It borrows locks of heads that are written; one that is unwritten has none, and is not opened for it."""
    with store.open("job-1") as fork, store.open("job-2") as other:
        other.write(0, b"b" * BLOCK)
        other.snapshot("mine")
        other.trim(0, BLOCK)
        other.flush()
        other.discard("mine")
        store.finish_work()
        assert is_unwritten(fork) and fork[:1] == b"a"


@pytest.mark.parametrize("is_written", [False, True])
def test_what_waited_for_the_files_of_the_view_is_freed_when_it_is_given_back(
    store: onionskin.Store, is_written: bool
) -> None:
    catalog = store._opened.catalog
    with store.open("job-1") as fork:
        (layer,) = (row for row in catalog.chain(head_of(fork).head) if row.sealed)
        (row,) = (row for row in catalog.segments_of_layer(layer.id) if row.role == "sealed")
        store._opened.change(lambda: catalog.add_work("scrub", row.id, row.lock_byte, "release"))
        store._opened.wake()
        store.finish_work()
        assert catalog.has_reclaims()
        if is_written:
            fork.write(0, b"b")
    store.finish_work()
    assert not catalog.has_reclaims()


def test_a_fork_that_is_dropped_open_keeps_no_files(store: onionskin.Store) -> None:
    catalog = store._opened.catalog
    fork = store.open("job-1")
    (layer,) = (row for row in catalog.chain(head_of(fork).head) if row.sealed)
    (row,) = (row for row in catalog.segments_of_layer(layer.id) if row.role == "sealed")
    del fork
    gc.collect()
    store._opened.change(lambda: catalog.add_work("scrub", row.id, row.lock_byte, "release"))
    store._opened.wake()
    store.finish_work()
    assert not catalog.has_reclaims()


def test_a_view_goes_on_when_one_fork_of_two_is_dropped_open(store: onionskin.Store) -> None:
    with store.open("job-1") as stays:
        store.open("job-2").read(0, 1)
        gc.collect()
        with store.open("job-2") as again:
            assert again._path is stays._path and stays[:1] == b"a"
    with store.open("job-3") as later:
        assert later[:1] == b"a"
