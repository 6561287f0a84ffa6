"""Pending work of one volume that fails is no other volume's matter, and a wish to reclaim slots is over when it is
written down."""

import os
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from support.background import leave_work_to_the_test
from support.listing import files_with

import onionskin
from onionskin.catalog import LayerRow, SegmentRow, WorkRow
from onionskin.operations import check, reclaim, volumes

SIZE = 1 << 20
BLOCK = 4096
SECRET = b"CANARY00" * (BLOCK // 8)


def test_damage_in_a_volume_with_pending_work_keeps_nobody_from_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        leave_work_to_the_test(store, monkeypatch)
        with store.create("bad", size=SIZE, wipe="zero") as bad:
            bad.write(0, b"x" * 2 * BLOCK)
            bad.snapshot("a")
            bad.write(0, b"y" * BLOCK)
        store.create("good", size=SIZE, wipe="zero").close()
        (segment,) = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        with store._opened.catalog.transaction():
            store._opened.catalog.add_work("scrub", segment.id, segment.lock_byte, "zero")
        damaged = store._opened.layout.map_file(store._opened.catalog.layer(segment.layer).map_id)
    contents = bytearray(damaged.read_bytes())
    contents[BLOCK + 40] ^= 1
    damaged.write_bytes(contents)
    with onionskin.Store(tmp_path / "store") as store:
        with store.open("good") as good:
            good.write(0, b"1" * BLOCK)
            good.flush()
            good.snapshot("b")
            store.finish_work()
        assert "pending work" in caplog.text and segment.id.hex() in caplog.text
        assert any(str(damaged) in problem.where for problem in store.check() if problem.severity == "error")
        with pytest.raises(onionskin.FormatError):
            store.open("bad")


def test_what_a_flush_could_not_note_to_be_wiped_is_wiped_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_secret() -> list[Path]:
        return files_with(tmp_path / "store" / "segments", SECRET[:8])

    with (
        onionskin.Store(tmp_path / "store") as store,
        store.create("web", size=SIZE, wipe="zero") as web,
    ):
        web.write(0, SECRET)
        web.snapshot("a")
        web.write(2 * BLOCK, b"z" * BLOCK)
        web.merge("a")  # the head inherits the segment
        web.flush()
        web.trim(0, BLOCK)

        def full(*_: object) -> None:
            raise OSError(ENOSPC, "no space")

        with monkeypatch.context() as patch:
            patch.setattr(reclaim, "reclaim_slots", full)
            with pytest.raises(OSError, match="no space"):
                web.flush()
        assert with_secret()
        web.flush()
        store.finish_work()
        assert with_secret() == []


def test_no_layer_is_named_by_work_that_is_left(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE) as web:
        web.write(0, b"x" * BLOCK)
        web.snapshot("a")
        (segment,) = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        layer = store._opened.catalog.layer(segment.layer)
        with store._opened.catalog.transaction():
            store._opened.catalog.add_work("segment", segment.id, segment.lock_byte, "zero")
            store._opened.catalog.add_work("map", layer.map_id, layer.map_lock_byte, "zero")
        web.close()
        reclaim.work_soon(store._opened)
        store.finish_work()
        assert store._opened.layout.segment_file(segment.id).read_bytes()[BLOCK:] == b"x" * BLOCK
        assert store._opened.catalog.count(LayerRow, "map_id = ?", layer.map_id) == 1
        with store.open("web", snapshot="a") as view:
            assert view.read(0, BLOCK) == b"x" * BLOCK


def test_what_a_snapshot_holds_is_not_reclaimed_by_what_its_volume_wrote_over_it_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that owned the segment is sealed, and the next one written, while work on slots is about to ask for live
    slots."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE) as web:
        web.write(0, b"x" * 4 * BLOCK)
        web.snapshot("a")
        web.merge("a")  # the head inherits the segment
        leave_work_to_the_test(store, monkeypatch)
        (segment,) = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        with store._opened.catalog.transaction():
            store._opened.catalog.add_work("scrub", segment.id, segment.lock_byte, "release")
        find_path = store._opened.path_of_head

        def find_path_and_seal(layer: bytes) -> object:
            path = find_path(layer)
            if "b" not in {snapshot.name for snapshot in web.snapshots}:
                web.snapshot("b")
                web.zero(0, 3 * BLOCK)
                web.flush()
            return path

        monkeypatch.setattr(store._opened, "path_of_head", find_path_and_seal)
        reclaim.do_work(store._opened)
        reclaim.do_work(store._opened)
        assert web.read(0, 4 * BLOCK) == bytes(3 * BLOCK) + b"x" * BLOCK
        with store.open("web", snapshot="b") as view:
            assert view.read(0, 4 * BLOCK) == b"x" * 4 * BLOCK


def test_a_check_beside_a_delete_takes_no_segment_that_is_overwritten_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("gone", "left"):
            with store.create(name, size=SIZE, wipe="zero") as volume:
                volume.write(0, b"x" * BLOCK)
                volume.snapshot("a")
        look = check._segment_fault

        def delete_and_look(*arguments: Any) -> str | None:
            monkeypatch.setattr(check, "_segment_fault", look)
            with onionskin.Store(store.path) as other:
                other.delete("gone", recursive=True)
                other.finish_work()
            return look(*arguments)

        monkeypatch.setattr(check, "_segment_fault", delete_and_look)
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        assert [info.name for info in store.volumes()] == ["left"]


def test_what_is_to_be_wiped_behind_slot_work_that_is_not_forgotten_yet_is_wiped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has done the work for the map of before, and its row is still there when there is more of it."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE, wipe="zero") as web:
        web.write(0, SECRET)
        web.snapshot("a")
        web.merge("a")  # the head inherits the segment
        leave_work_to_the_test(store, monkeypatch)
        (segment,) = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        store._opened.change(lambda: reclaim.add_slot_work(store._opened, [segment.id], "release"))
        forget = reclaim._forget

        def free_more_and_forget(*work: Any, **how: bool) -> None:
            web.trim(0, len(SECRET))
            web.flush()
            forget(*work, **how)

        with monkeypatch.context() as patch:
            patch.setattr(reclaim, "_forget", free_more_and_forget)
            reclaim.do_work(store._opened)
        reclaim.do_work(store._opened)
        assert files_with(store._opened.layout.segments, SECRET[:8]) == []


def test_slot_work_that_is_noted_twice_has_the_stricter_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE) as web:
        leave_work_to_the_test(store, monkeypatch)
        web.write(0, SECRET)
        web.snapshot("a")
        (segment,) = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        for wipe in ("release", "zero", "release"):
            store._opened.change(lambda: reclaim.add_slot_work(store._opened, [segment.id], wipe))  # noqa: B023
        assert [row.wipe for row in store._opened.catalog.rows(WorkRow, "kind = 'scrub'")] == ["zero"]


def test_what_was_deleted_is_off_the_disk_when_the_background_has_ended(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        with store.create("web", size="1M", wipe="zero") as web:
            web.write(0, b"x" * 65536)
        store.delete("web")
        store.finish_work()
        layout = store._opened.layout
        assert [*layout.segments.iterdir(), *layout.layers.iterdir()] == []


def test_what_the_commit_of_another_process_freed_is_there_until_that_commit_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, do = os.fdatasync, reclaim._do

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def freed(store: Any, row: WorkRow, slots: Any, *, unlink: bool) -> bool:
        done.append(row.kind)
        return do(store, row, slots, unlink=unlink)

    with onionskin.Store(tmp_path / "store") as store, onionskin.Store(tmp_path / "store") as other:
        with store.create("web", size=SIZE) as web:
            web.write(0, b"x" * BLOCK)
        leave_work_to_the_test(store, monkeypatch)
        volumes.delete(other._opened, ["web"], recursive=False)  # as of a process that dies in its commit
        monkeypatch.setattr(os, "fdatasync", synced)
        monkeypatch.setattr(reclaim, "_do", freed)
        reclaim.do_work(store._opened)
        assert done[0] == "catalog.db-wal"
        assert "segment" in done


def test_a_segment_that_its_head_gives_up_beside_the_work_on_it_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE) as web:
        web.write(0, SECRET)
        web.flush()
        leave_work_to_the_test(store, monkeypatch)
        catalog = store._opened.catalog
        (segment,) = catalog.rows(SegmentRow, "role <> 'spare'")

        class GivingUp:
            """A data path whose head gives the segment up between the look at its row and the question."""

            def live_slots(self, id: bytes) -> bytes:
                with catalog.transaction():
                    catalog.remove_segment(id)
                raise FileNotFoundError(2, "reclaim")

        giving_up = GivingUp()
        with catalog.transaction():
            catalog.add_work("scrub", segment.id, segment.lock_byte, "release")
        with monkeypatch.context() as patched:
            patched.setattr(store._opened, "path_of_head", lambda _head: giving_up)
            assert reclaim.do_work(store._opened) == 1
        assert "pending work" not in caplog.text
        assert reclaim.do_work(store._opened) == 0, "the next look sees that the segment is gone"
        with catalog.transaction():
            catalog.insert(segment)
