"""A copy of a store that was made without its empty directories is the store."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Mount

import onionskin

BLOCK = 4096
PARTS = ("layers", "segments", "volumes")


def make(root: Path, base: Path) -> None:
    """A store whose volume has a snapshot, and of which nothing was written: of its files only the catalog counts."""
    base.write_bytes(b"b" * BLOCK)
    with onionskin.Store(root) as store, store.create("web", base=base) as web:
        web.snapshot("clean")
    for part in PARTS:
        shutil.rmtree(root / part)


def look(store: onionskin.Store) -> None:
    assert [volume.name for volume in store.volumes()] == ["web"]
    assert store.tree() and store.usage("web") and store.check() == []
    assert store.diff("web", "clean").size == 0
    with store.open("web", snapshot="clean") as view:
        assert view[:3] == b"bbb"
    with store.open("web", mode="r") as head:
        assert head[:3] == b"bbb"


def test_directories_that_are_missing_are_made(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "base")
    with onionskin.Store(tmp_path / "store") as store:
        look(store)
        assert all((tmp_path / "store" / part).stat().st_mode & 0o7777 == 0o700 for part in PARTS)
        with store.open("web") as web:
            web.write(0, b"c" * BLOCK)
        assert store.check() == []


def test_a_store_that_can_only_be_read_is_read_without_them(ext4_mount: Mount) -> None:
    root = ext4_mount()
    make(root / "store", root / "base")
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    with onionskin.Store(root / "store") as store:
        assert store.read_only
        look(store)


def test_no_directories_are_made_where_there_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(onionskin.VolumeNotFoundError):
        onionskin.Store(tmp_path / "empty", create=False)
    assert not list((tmp_path / "empty").iterdir())
