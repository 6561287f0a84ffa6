"""A store whose catalog is gone: no other one is made for its files, which would then be files that no row names."""

from pathlib import Path

import pytest

import onionskin
from onionskin import FormatError, Store


def store_with_data(path: Path) -> None:
    with Store(path) as store, store.create("web", size="1M") as web:
        web.write(0, b"kept" * 1024)
        web.snapshot("a")


def take_away(path: Path) -> "dict[str, bytes]":
    """Remove the catalog, and return what puts it back."""
    files = {file.name: file.read_bytes() for file in path.glob("catalog.db*")}
    for name in files:
        (path / name).unlink()
    return files


def test_no_catalog_is_made_for_files_of_a_store_that_has_lost_its_own(tmp_path: Path) -> None:
    store_with_data(tmp_path / "store")
    files = take_away(tmp_path / "store")
    with pytest.raises(FormatError, match=r"no catalog\.db that says what they are"):
        Store(tmp_path / "store")
    for name, contents in files.items():
        (tmp_path / "store" / name).write_bytes(contents)
    with Store(tmp_path / "store") as store, store.open("web", snapshot="a") as view:
        assert view.read(0, 4) == b"kept"


def test_a_map_alone_is_a_file_of_a_store_too(tmp_path: Path) -> None:
    store_with_data(tmp_path / "store")
    take_away(tmp_path / "store")
    for segment in (tmp_path / "store" / "segments").iterdir():
        segment.unlink()
    with pytest.raises(FormatError, match="layers"):
        Store(tmp_path / "store")


def test_a_log_of_sqlite_that_was_left_is_not_laid_over_a_new_catalog(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "catalog.db-wal").write_bytes(b"7\x7f\x06\x82" + bytes(4096))
    with pytest.raises(FormatError, match=r"catalog\.db-wal"):
        Store(tmp_path / "store")


def test_a_store_is_made_where_its_directories_are_empty(tmp_path: Path) -> None:
    for name in ("layers", "segments", "volumes"):
        (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store" / "segments" / "notes.txt").write_text("of somebody else")
    with Store(tmp_path / "store") as store:
        assert list(store) == []


def test_a_store_that_another_process_makes_meanwhile_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are there when they are looked for, and its catalog was not there a moment before."""
    from onionskin.base.paths import FilePath

    exists, looks = FilePath.exists, []

    def late(path: FilePath) -> bool:
        if path.name == "catalog.db" and not looks:
            looks.append(path)
            store_with_data(tmp_path / "store")
            return False
        return exists(path)

    monkeypatch.setattr(FilePath, "exists", late)
    with onionskin.Store(tmp_path / "store") as store:
        assert list(store) == ["web"]
