"""Which commits an opening still has to make durable: those of others that nothing has synced since."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onionskin.catalog import Catalog


@pytest.fixture
def catalogs(tmp_path: Path) -> Iterator[tuple[Catalog, Catalog]]:
    mine, others = (Catalog(tmp_path / "catalog.db", create=True) for _ in range(2))
    yield mine, others
    mine.close()
    others.close()


def commit(catalog: Catalog) -> None:
    with catalog.transaction():
        catalog.take_lock_byte()


def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the files noted that are synced from now on, otherwise than by SQLite."""
    seen: list[str] = []
    sync = os.fdatasync

    def noted(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", noted)
    return seen


def test_a_commit_of_this_connection_has_synced_all_that_it_saw(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    seen = syncs(monkeypatch)
    commit(others)
    commit(mine)
    mine.sync_found()
    assert seen == []


def test_a_later_commit_of_another_connection_is_synced_once(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    seen = syncs(monkeypatch)
    commit(mine)
    commit(others)
    mine.sync_found()
    mine.sync_found()
    assert seen == ["catalog.db-wal"]
    commit(others)
    mine.sync_found()
    assert len(seen) == 2


def test_a_transaction_that_was_given_up_has_synced_nothing(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    seen = syncs(monkeypatch)
    commit(others)
    with pytest.raises(ZeroDivisionError), mine.transaction():
        mine.take_lock_byte()
        raise ZeroDivisionError
    mine.sync_found()
    assert seen == ["catalog.db-wal"]
