"""What would destroy a base, a file of the store, or itself is refused, and nothing is made."""

import os
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        yield store


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(10 * BLOCK))
    return path


def test_a_file_of_the_store_is_no_base(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store._opened.layout.catalog)
    for path in (store._opened.layout.catalog, tmp_path / "link"):
        with pytest.raises(onionskin.ChainError, match="of the store itself"):
            store.create("web", base=path)
    assert store.volumes() == []


def test_a_disk_without_a_byte_is_refused(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="one byte"):
        store.create("web", size=0)
    with pytest.raises(ValueError, match="empty"):
        store.create("web", base=tmp_path / "empty")
    with store.create("web", size=1) as web, pytest.raises(ValueError, match="one byte"):
        web.resize(0, force=True)


def test_an_export_replaces_neither_a_base_nor_a_file_of_the_store(store: onionskin.Store, base: Path) -> None:
    before = base.stat()
    with store.create("web", base=base) as web:
        with pytest.raises(onionskin.StateError, match="base"):
            web.export(base)
        with pytest.raises(ValueError, match="store itself"):
            web.export(store._opened.layout.catalog)
    assert base.stat().st_ino == before.st_ino
    store.open("web").close()
