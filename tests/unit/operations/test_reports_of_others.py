"""What other programs were reported to do wrong, and onionskin must not: docs/bugs-of-others.md names the reports.

Only those are here that no other test holds already.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.listing import found_in

import onionskin

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "debian.raw"
    base.write_bytes(b"b" * 2 * MIB)
    return base


def state_of(store: onionskin.Store, snapshot: str, name: str = "web") -> bytes:
    with store.open(name, snapshot=snapshot) as view:
        return view.read(0, BLOCK)


def bytes_on_disk(store: onionskin.Store) -> int:
    store.finish_work()
    return sum(status.st_blocks * 512 for _, status in found_in(store._opened.layout.segments))


def errors_of(store: onionskin.Store) -> list[str]:
    return [problem.what for problem in store.check() if problem.severity == "error"]


def test_what_changed_since_a_snapshot_is_known_after_a_kill(store: onionskin.Store) -> None:
    store.create("web", size=4 * MIB).close()
    child = os.fork()
    if child == 0:
        try:
            with onionskin.Store(store.path) as own, own.open("web") as web:
                web.write(0, b"o" * BLOCK)
                web.snapshot("backed-up")
                web.write(MIB, b"n" * 3 * BLOCK)
                web.flush()
                web.write(2 * MIB, b"n" * BLOCK)  # and not flushed
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with store.open("web") as web:
        changed = web.diff("backed-up")
        assert [(int(one["offset"]), int(one["length"])) for one in changed] == [(MIB, 3 * BLOCK), (2 * MIB, BLOCK)]


def test_a_revert_keeps_the_snapshots_that_are_newer(store: onionskin.Store) -> None:
    with store.create("web", size=MIB) as web:
        for name in ("one", "two", "three"):
            web.write(0, name.encode() * 100)
            web.snapshot(name)
        web.revert("one")
        assert [snapshot.name for snapshot in web.snapshots] == ["one", "two", "three"]
        web.revert("three")
        assert web.read(0, 5) == b"three"
    assert state_of(store, "two").startswith(b"two")


def test_a_discard_of_the_newest_snapshot_keeps_the_older_ones(store: onionskin.Store) -> None:
    with store.create("web", size=MIB) as web:
        for name in ("one", "two", "three"):
            web.write(0, name.encode() * 100)
            web.snapshot(name)
        web.discard("three")
        assert [snapshot.name for snapshot in web.snapshots] == ["one", "two"]
    assert [state_of(store, name)[:3] for name in ("one", "two")] == [b"one", b"two"]
    assert errors_of(store) == []


def test_the_second_snapshot_holds_what_was_written_after_the_first(store: onionskin.Store) -> None:
    with store.create("web", size=MIB) as web:
        web.snapshot("a")
        web.write(0, b"after a")
        web.snapshot("b")
        assert web.read(0, 7) == b"after a"
    assert state_of(store, "b").startswith(b"after a")
    assert state_of(store, "a") == bytes(BLOCK)


def test_the_snapshot_right_below_the_head_goes_at_once(store: onionskin.Store) -> None:
    """And its space with it, where the head wrote all of it again."""
    with store.create("web", size=4 * MIB) as web:
        web.write(0, os.urandom(4 * MIB))
        web.snapshot("only")
        web.write(0, os.urandom(4 * MIB))
        web.merge("only")
        assert web.snapshots == []
    assert bytes_on_disk(store) < 5 * MIB


def test_a_snapshot_that_is_taken_and_dropped_after_a_reopening_leaves_the_chain_whole(store: onionskin.Store) -> None:
    with store.create("web", size=MIB) as web:
        web.write(0, b"first" * 100)
        web.snapshot("one")
    for round in range(3):
        with store.open("web") as web:
            web.write(BLOCK, b"%d" % round)
            web.snapshot("two")
            web.merge("two")
    assert errors_of(store) == []
    with store.open("web") as web:
        assert (web.read(0, 5), web.read(BLOCK, 1)) == (b"first", b"2")
    assert state_of(store, "one").startswith(b"first")


def test_no_verb_but_a_merge_into_the_base_writes_to_it_or_removes_it(store: onionskin.Store, base: Path) -> None:
    before = base.stat()
    with store.create("web", base=base) as web:
        web.write(0, b"1" * BLOCK)
        web.snapshot("one")
        web.write(0, b"2" * BLOCK)
        web.snapshot("two")
        web.revert("one")
        web.discard("two")
        web.write(0, b"3" * BLOCK)
        web.merge("one")
        web.flatten()
    store.delete("web")
    after = base.stat()
    assert base.read_bytes() == b"b" * 2 * MIB
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_clones_of_one_snapshot_never_see_what_the_others_write(store: onionskin.Store, base: Path) -> None:
    with store.create("web", base=base) as web:
        web.write(0, b"golden")
        web.snapshot("clean")
    names = [f"test-{number}" for number in range(8)]
    for name in names:
        store.clone("web", "clean", name)
    opened = [store.open(name) for name in names]
    for volume in opened:
        volume.write(0, volume.name.encode())
        volume.write(MIB, volume.name.encode() * 500)
    for volume in opened:
        assert volume.read(0, 6) == volume.name.encode()
        assert volume.read(MIB, 3000) == volume.name.encode() * 500
        volume.close()
    assert state_of(store, "clean").startswith(b"golden")


def test_a_clone_reads_the_same_when_what_it_came_from_gets_another_size(store: onionskin.Store) -> None:
    with store.create("golden", size=2 * MIB) as golden:
        golden.write(MIB, b"golden" * 1000)
        golden.snapshot("clean")
        store.clone("golden", "clean", "test")
        golden.resize(8 * MIB)
        golden.write(7 * MIB, b"more")
        golden.resize(BLOCK, force=True)
    with store.open("test") as test:
        assert test.size_bytes == 2 * MIB
        assert test.read(MIB, 6000) == b"golden" * 1000


def test_a_clone_of_a_clone_outlives_what_it_was_made_from(store: onionskin.Store, base: Path) -> None:
    with store.create("web", base=base) as web:
        web.write(0, b"data of web")
        web.snapshot("clean")
    store.clone("web", "clean", "middle")
    with store.open("middle") as middle:
        middle.write(BLOCK, b"data of the middle one")
        middle.snapshot("there")
    store.clone("middle", "there", "last")
    with pytest.raises(onionskin.StateError):
        store.delete("web", recursive=True)
    with store.open("last") as last:
        last.flatten()
    store.delete("middle", recursive=True)
    store.delete("web", recursive=True)
    base.unlink()
    with store.open("last") as last:
        assert last.read(0, 11) == b"data of web"
        assert last.read(BLOCK, 22) == b"data of the middle one"
        assert last.read(MIB, 1) == b"b"


def test_a_discard_that_is_refused_for_the_sake_of_a_clone_has_dropped_nothing(store: onionskin.Store) -> None:
    with store.create("web", size=MIB) as web:
        for name in ("one", "two", "three"):
            web.write(0, name.encode() * 100)
            web.snapshot(name)
    store.clone("web", "three", "test")
    with store.open("web") as web, pytest.raises(onionskin.StateError, match="test"):
        web.discard("one", recursive=True)
    assert [snapshot.name for snapshot in store.snapshots("web")] == ["one", "two", "three"]
    assert [state_of(store, name)[:3] for name in ("one", "two", "three")] == [b"one", b"two", b"thr"]


def test_what_is_trimmed_gives_its_space_back_to_the_file_system(store: onionskin.Store) -> None:
    with store.create("web", size=64 * MIB) as web:
        for _ in range(3):
            web.write(0, os.urandom(16 * MIB))
            web.flush()
            assert bytes_on_disk(store) >= 16 * MIB
            web.trim(0, 16 * MIB)
            web.flush()
            assert bytes_on_disk(store) < 2 * MIB


def test_what_is_written_again_and_again_takes_its_space_once(store: onionskin.Store) -> None:
    with store.create("web", size=64 * MIB) as web:
        web.snapshot("clean")
        for _ in range(40):
            web.write(0, os.urandom(2 * MIB))
            web.flush()
        assert bytes_on_disk(store) < 6 * MIB
