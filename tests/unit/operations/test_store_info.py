"""What a store says of itself, and what a disk stands on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        yield store


def test_a_store_counts_what_is_in_it(store: onionskin.Store) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, bytes(3 * BLOCK).replace(b"\0", b"x"))
        web.snapshot("a")
    store.clone("web", "a", "other")
    about = store.store_info()
    assert (about.path, about.volumes, about.snapshots) == (str(store.path), 2, 1)
    assert about.bytes_held == 4 * BLOCK and about.map_bytes > 0
    assert (about.pending_work, about.bytes_freed_by_work, about.bytes_freed_by_repair) == (0, 0, 0)
    assert (about.unfinished_base_merges, about.read_only, about.reserve_bytes) == (0, False, 8 << 20)


def test_what_a_reader_keeps_from_being_freed_is_said_to_come_back_when_the_work_is_done(
    store: onionskin.Store,
) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, b"x" * 5 * BLOCK)
        web.snapshot("a")
        web.write(0, b"y" * 2 * BLOCK)
        with store.open("web", snapshot="a"):
            web.merge("a")
            store.finish_work()
            about = store.store_info()
            held = about.bytes_held
            assert about.pending_work > 0 and about.bytes_freed_by_work >= 2 * BLOCK
        store.finish_work()
    store.check(repair=True)
    after = store.store_info()
    assert after.pending_work == after.bytes_freed_by_work == 0
    assert held - after.bytes_held >= 2 * BLOCK


def test_files_that_nothing_names_are_said_to_come_back_by_a_repair(store: onionskin.Store) -> None:
    store.create("web", size="1M").close()
    for directory, suffix in (("segments", "seg"), ("layers", "map")):
        (store.path / directory / f"{'a' * 32}.{suffix}").write_bytes(b"x" * BLOCK)
        (store.path / directory / f"not an id.{suffix}").write_bytes(b"x" * BLOCK)
    assert store.store_info().bytes_freed_by_repair == 2 * BLOCK
    store.check(repair=True)
    assert store.store_info().bytes_freed_by_repair == 0


def test_a_map_that_was_made_beforehand_is_no_file_without_a_name(store: onionskin.Store) -> None:
    with store.create("web", size="1M") as web:
        for name in "abc":
            web.write(0, b"x" * BLOCK)
            web.snapshot(name)
        store.finish_work()
        assert store.store_info().bytes_freed_by_repair == 0


def test_a_chain_has_each_layer_with_what_it_holds_down_to_the_base(store: onionskin.Store, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 8 * BLOCK)
    with store.create("golden", base=base, size="1M") as golden:
        golden.write(0, b"x" * 2 * BLOCK)
        golden.snapshot("clean")
    store.clone("golden", "clean", "test")
    with store.open("test") as test:
        test.write(0, b"y" * BLOCK)
        test.resize("2M")
    found = [(one.kind, one.name, one.size_bytes, one.bytes_held, one.format) for one in store.chain("test")]
    layers = [("head", "test", 2 << 20, BLOCK, None), ("snapshot", "golden@clean", 1 << 20, 2 * BLOCK, None)]
    assert found == [*layers, ("base", str(base), 8 * BLOCK, 8 * BLOCK, "raw")]
    assert [one.kind for one in store.chain("golden", "clean")] == ["snapshot", "base"]
    base.unlink()
    assert store.chain("test")[-1].bytes_held is None
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.chain("test", "clean")
