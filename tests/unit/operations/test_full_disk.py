"""On a full disk what frees space works, what can wait does, and a volume opens."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

import onionskin
from onionskin.operations import compact_segments, fold
from onionskin.operations.compact_segments import SEGMENTS_MAX

BLOCK = 4096


def fill(directory: Path) -> None:
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    os.sync()


def test_a_merge_on_a_full_disk_drops_the_name_and_is_finished_when_there_is_room(ext4_mount) -> None:
    root = ext4_mount(48 << 20)
    with onionskin.Store(root / "store") as store:
        with store.create("web", size="64M") as web:
            web.write(0, b"old" * 10000)
            web.snapshot("a")
            web.write(0, b"new" * 10000)
            web.flush()
            fill(root)
            web.merge("a")
            assert web.snapshots == []
            assert web.read(0, 30000) == b"new" * 10000
        (root / "filler").unlink()
        with store.open("web") as web:
            assert web.read(0, 30000) == b"new" * 10000
            assert len(store._opened.catalog.chain(web._opened.head)) == 1


def write_to_temporary(store: onionskin.Store) -> None:
    with store.temporary("web@clean", name="temporary") as disk:
        disk.write(0, b"x" * (1 << 20))


def test_on_a_full_disk_forks_and_groups_are_made_whole_or_not_at_all(ext4_mount) -> None:
    root = ext4_mount(24 << 20)
    with onionskin.Store(root / "store") as store:
        with store.create("web", size="4M") as web, store.create("db", size="4M") as db:
            web.snapshot("clean")
            for _ in range(2):  # the second time the reserve is gone, too
                web.write(0, b"new" * BLOCK)
                db.write(0, b"new" * BLOCK)
                fill(root)
                for call in (
                    lambda: store.fork("web@clean", count=3000),
                    lambda: store.fork("web", count=3000, pattern="now-{n}"),
                    lambda: store.snapshot_group({"web": None, "db": None}),
                    lambda: write_to_temporary(store),
                ):
                    before = set(store), [len(store.snapshots(name)) for name in ("web", "db")]
                    with suppress(OSError):
                        call()
                        continue
                    assert (set(store), [len(store.snapshots(name)) for name in ("web", "db")]) == before
                assert "temporary" not in store
                (root / "filler").unlink()
                assert web.read(0, 3) == db.read(0, 3) == b"new"
            store.fork("web", names=["last"])
        with store.open("last") as last:
            assert last.read(0, 3) == b"new"
        assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_an_export_that_has_no_room_is_refused_before_anything_is_written(tmp_path: Path, ext4_mount) -> None:
    root = ext4_mount(16 << 20)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1G") as web:
        web.write(0, b"x" * (32 << 20))
        before = os.statvfs(root).f_bavail
        with pytest.raises(OSError, match=f"needs {32 << 20} bytes") as caught:
            web.export(root / "web.raw")
        assert caught.value.errno == 28
        assert os.statvfs(root).f_bavail == before
        assert [path.name for path in root.iterdir()] == ["lost+found"]
        web.trim(0, 28 << 20)
        web.export(root / "web.raw")
        assert (root / "web.raw").stat().st_size == 1 << 30


def test_a_flatten_that_has_no_room_is_refused_before_anything_is_written(tmp_path: Path, ext4_mount) -> None:
    root = ext4_mount(48 << 20)
    (tmp_path / "base.raw").write_bytes(b"x" * (40 << 20))
    with onionskin.Store(root / "store") as store, store.create("web", base=tmp_path / "base.raw") as web:
        head = web._opened.head
        with pytest.raises(OSError, match=f"needs {40 << 20} bytes") as caught:
            web.flatten()
        assert caught.value.errno == 28
        assert web._opened.head == head
        assert list(store._opened.layout.segments.iterdir()) == []
        web.trim(0, 20 << 20)
        web.flatten()
        assert web.read(0, 40 << 20) == bytes(20 << 20) + b"x" * (20 << 20)


def test_what_a_file_system_shares_needs_no_room(xfs_mount) -> None:
    root = xfs_mount(320 << 20)
    with onionskin.Store(root / "store") as store, store.create("web", size="1G") as web:
        web.write(0, b"x" * (100 << 20))
        web.flush()
        fill(root)
        os.truncate(root / "filler", (root / "filler").stat().st_size - (50 << 20))
        os.sync()
        assert os.statvfs(root).f_bavail < (100 << 20) // 4096
        web.export(root / "web.raw")
        with (root / "web.raw").open("rb") as image:
            assert image.read(3) == b"xxx"


def test_work_that_can_wait_does_not_keep_a_volume_from_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "the disk is full")

    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=200 * BLOCK) as web:
            for number in range(SEGMENTS_MAX + 2):
                web.write(number * BLOCK, b"x" * BLOCK)
                web.snapshot(f"s{number}")
            monkeypatch.setattr(compact_segments, "_copy_slots", full)
            for number in range(SEGMENTS_MAX + 1):
                web.merge(f"s{number}")
            monkeypatch.setattr(fold, "rewrite", full)
            web.merge(f"s{SEGMENTS_MAX + 1}")
        with store.open("web") as web:
            assert web.read(0, (SEGMENTS_MAX + 2) * BLOCK) == b"x" * (SEGMENTS_MAX + 2) * BLOCK


def test_a_lock_file_that_is_not_written_on_a_full_disk_at_first_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate, refusals = os.ftruncate, [OSError(errno.ENOSPC, "the disk is full")]

    def truncate_later(descriptor: int, length: int) -> None:
        if refusals:
            raise refusals.pop()
        truncate(descriptor, length)

    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        monkeypatch.setattr(os, "ftruncate", truncate_later)
        for _ in range(2):
            with store.open("web") as web:
                assert store.info("web").holder == os.getpid()
                web.write(0, b"x")
        assert not refusals
