"""A handle follows its volume, and not its name."""

import os
from errno import EIO
from pathlib import Path

import pytest

import onionskin
from onionskin.operations import reclaim

BLOCK = 4096


def test_an_open_volume_that_is_renamed_goes_on_under_its_new_name(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=8 * BLOCK) as web:
        web.write(0, b"x" * BLOCK)
        web.snapshot("a")
        web.write(0, b"y" * 2 * BLOCK)
        with onionskin.Store(tmp_path / "store") as other:
            other.rename("web", "www")
            other.create("web", size=BLOCK).close()
        assert web.name == "www"
        assert [row.snapshot for row in web.usage()] == ["a", None]
        assert web.diff("a")["length"].sum() == 2 * BLOCK


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = onionskin.Store(tmp_path / "store")
    store.close()
    with pytest.raises(onionskin.StateError, match="closed"):
        store.volumes()


def test_a_volume_that_is_removed_is_reported_so_where_its_lock_cannot_be_unlinked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        (lock,) = store._opened.layout.volumes.glob("*.lock")
        with monkeypatch.context() as patch:
            patch.setattr(reclaim, "work_soon", lambda store: None)
            patch.setattr(os, "unlink", refuse)
            store.delete("web")
        assert store.volumes() == [] and lock.exists()
        reclaim.work_soon(store._opened)
        store.finish_work()
        assert not lock.exists()


def refuse(path: Path | str, **_: bool) -> None:
    raise OSError(EIO, "input/output error", str(path))
