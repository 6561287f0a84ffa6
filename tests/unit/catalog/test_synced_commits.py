"""Which commits an opening still has to make durable: those of others that nothing has synced since."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from onionskin.catalog import Catalog
from onionskin.errors import StateError


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


def drawn(catalog: Catalog) -> range:
    return catalog.draw_lock_bytes(2)


def test_lock_bytes_that_are_drawn_by_themselves_are_visible_and_synced_by_who_relies_on_them(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    seen = syncs(monkeypatch)
    commit(mine)
    assert [*drawn(mine), *drawn(others), *drawn(mine)] == [2, 3, 4, 5, 6, 7]
    assert mine.last_lock_byte() == others.last_lock_byte() == 7
    mine.sync_found()
    assert seen == ["catalog.db-wal"]


def synchronous(catalog: Catalog) -> int:
    """What SQLite does at a commit: 2 is a sync, 1 is none."""
    return int(catalog._connection.execute("PRAGMA synchronous").fetchone()[0])


def test_only_the_drawing_of_lock_bytes_is_not_synced(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = catalogs
    take = Catalog.take_lock_bytes
    found: list[int] = []

    def noted(catalog: Catalog, count: int) -> range:
        found.append(synchronous(catalog))
        return take(catalog, count)

    monkeypatch.setattr(Catalog, "take_lock_bytes", noted)
    for change in (commit, drawn, commit, drawn, drawn, commit):
        change(mine)
    assert found == [2, 1, 2, 1, 1, 2]


def test_a_commit_is_synced_also_where_a_drawing_before_it_was_interrupted(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = catalogs
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Catalog, "take_lock_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        drawn(mine)
    with mine.transaction():
        assert synchronous(mine) == 2


def test_where_a_commit_of_unknown_outcome_has_to_be_buried_a_drawing_is_synced(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = catalogs
    drawn(mine)
    mine._is_unknown = True
    drawn(mine)
    assert synchronous(mine) == 2 and not mine._is_unknown


def refuse_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next sync fail. As of the kernel's, those after it say nothing, whatever became of the pages."""
    sync = os.fdatasync

    def failing(descriptor: int) -> None:
        monkeypatch.setattr(os, "fdatasync", sync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)


def lock_byte_without_the_log(catalog: Catalog, at: Path) -> int:
    at.mkdir()
    shutil.copy(catalog.path, at)
    alone = Catalog(at / catalog.path.name, create=False)
    try:
        with alone.transaction():
            return alone.take_lock_byte()
    finally:
        alone.close()


def salts(catalog: Catalog) -> bytes:
    """Return what ties the frames of the log to its header: with other salts no frame from before counts."""
    return catalog.path.with_name(f"{catalog.path.name}-wal").read_bytes()[16:24]


def test_where_the_log_cannot_be_synced_all_is_moved_out_of_it_and_it_is_begun_anew(
    catalogs: tuple[Catalog, Catalog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    for _ in range(3):
        commit(others)
    before = salts(mine)
    refuse_a_sync(monkeypatch)
    mine.sync_found()
    assert salts(mine) != before
    assert lock_byte_without_the_log(mine, tmp_path / "alone") == 4


def test_a_log_that_cannot_be_replaced_is_not_taken_for_synced_at_the_next_try(
    catalogs: tuple[Catalog, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = catalogs
    commit(others)
    before = salts(mine)
    refuse_a_sync(monkeypatch)
    mine._connection.execute("PRAGMA busy_timeout = 0")
    with others.reading():
        others.defaults()
        commit(mine)  # so that the reader is behind
        commit_of_third(mine.path)
        with pytest.raises(StateError, match="could not be made durable"):
            mine.sync_found()
    mine.sync_found()
    assert salts(mine) != before


def commit_of_third(path: Path) -> None:
    third = Catalog(path, create=False)
    try:
        commit(third)
    finally:
        third.close()
