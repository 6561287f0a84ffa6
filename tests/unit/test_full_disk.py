"""On a full disk what frees space works, what can wait does, and a volume opens."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

import onionskin
from onionskin import gathering, merging
from onionskin.gathering import SEGMENTS_MAX

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
            assert len(store.catalog.chain(web.head)) == 1


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
            for number in range(SEGMENTS_MAX + 1):
                web.merge(f"s{number}")
            monkeypatch.setattr(merging, "_rewrite", full)
            monkeypatch.setattr(gathering, "_copy_slots", full)
            web.merge(f"s{SEGMENTS_MAX + 1}")
        with store.open("web") as web:
            assert web.read(0, (SEGMENTS_MAX + 2) * BLOCK) == b"x" * (SEGMENTS_MAX + 2) * BLOCK
