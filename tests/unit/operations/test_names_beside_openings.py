"""A name is only what a volume is called now: whoever finds a volume by it looks again once the volume is locked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import onionskin
import onionskin.store as store_module
from onionskin.operations import volumes
from onionskin.storage.locks import VolumeLock

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """Two volumes, `v` and `w`, whose first bytes are their names."""
    with onionskin.Store(tmp_path / "store") as store:
        for name in "vw":
            with store.create(name, size=SIZE) as volume:
                volume.write(0, name.encode())
        yield store


@pytest.fixture
def before_the_lock(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has another process' work done between the look-up of a name and the lock of the volume, once."""

    def arrange(work: Callable[[onionskin.Store], None]) -> None:
        waiting, locked_to_remove = [work], volumes.locked_to_remove

        def work_first() -> None:
            while waiting:
                with onionskin.Store(store.path) as other:
                    waiting.pop()(other)

        class LockAfterWork(VolumeLock):
            def __init__(self, *arguments: Any) -> None:
                work_first()
                super().__init__(*arguments)

        @contextmanager
        def locked_after_work(*arguments: Any) -> Iterator[None]:
            work_first()
            with locked_to_remove(*arguments):
                yield

        monkeypatch.setattr(store_module, "VolumeLock", LockAfterWork)
        monkeypatch.setattr(volumes, "locked_to_remove", locked_after_work)

    return arrange


def swap(other: onionskin.Store) -> None:
    other.rename("v", "t")
    other.rename("w", "v")
    other.rename("t", "w")


def make_anew(other: onionskin.Store) -> None:
    other.delete("v")
    with other.create("v", size=SIZE) as volume:
        volume.write(0, b"n")


def test_a_volume_that_is_opened_is_the_one_that_has_the_name_when_it_is_locked(
    store: onionskin.Store, before_the_lock: Callable[..., None]
) -> None:
    before_the_lock(swap)
    with store.open("v") as opened, store.open("w") as other:
        assert (opened.read(0, 1), other.read(0, 1)) == (b"w", b"v")
        assert opened._opened.head != other._opened.head
        assert opened._opened.row.id == store._opened.catalog.volume("v").id


def test_a_volume_that_was_made_anew_under_a_name_is_locked_itself(
    store: onionskin.Store, before_the_lock: Callable[..., None]
) -> None:
    before_the_lock(make_anew)
    with store.open("v") as opened:
        assert opened.read(0, 1) == b"n"
        with onionskin.Store(store.path) as other, pytest.raises(onionskin.StateError, match="is open"):
            other.open("v")


def test_a_name_that_is_gone_when_its_volume_is_locked_leaves_no_lock_file(
    store: onionskin.Store, before_the_lock: Callable[..., None]
) -> None:
    before_the_lock(lambda other: other.delete("v"))
    with pytest.raises(onionskin.VolumeNotFoundError):
        store.open("v")
    assert len(list(store._opened.layout.volumes.glob("*.lock"))) == 1


@pytest.mark.parametrize("work", [swap, make_anew])
def test_a_volume_is_deleted_with_its_own_files_whatever_had_the_name_before(
    store: onionskin.Store, before_the_lock: Callable[..., None], work: Callable[[onionskin.Store], None]
) -> None:
    before_the_lock(work)
    store.delete("v")
    assert [info.name for info in store.volumes()] == ["w"]
    with store.open("w") as left:
        assert left.read(0, 1) == (b"v" if work is swap else b"w")
    store.finish_work()
    assert store.check() == []


@pytest.fixture
def behind_the_lock(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has another process' work done once the volume is locked to be removed."""

    def arrange(work: Callable[[onionskin.Store], None]) -> None:
        waiting, locked_to_remove = [work], volumes.locked_to_remove

        @contextmanager
        def locked_then_work(*arguments: Any) -> Iterator[None]:
            with locked_to_remove(*arguments):
                while waiting:
                    with onionskin.Store(store.path) as other:
                        waiting.pop()(other)
                yield

        monkeypatch.setattr(volumes, "locked_to_remove", locked_then_work)

    return arrange


def test_a_delete_removes_what_has_the_name_when_it_is_removed(
    store: onionskin.Store, behind_the_lock: Callable[..., None]
) -> None:
    behind_the_lock(swap)
    store.delete("v")
    with store.open("w") as left:
        assert left.read(0, 1) == b"v"
    assert [info.name for info in store.volumes()] == ["w"]
    store.finish_work()
    assert store.check() == []


def test_a_delete_removes_no_volume_that_was_renamed_meanwhile(
    store: onionskin.Store, behind_the_lock: Callable[..., None]
) -> None:
    behind_the_lock(lambda other: other.rename("v", "renamed"))
    with pytest.raises(onionskin.VolumeNotFoundError, match="'v'"):
        store.delete("v")
    with store.open("renamed") as left:
        assert left.read(0, 1) == b"v"


def test_a_lock_file_that_is_removed_lets_no_second_writer_in(store: onionskin.Store) -> None:
    with store.open("v") as volume:
        store._opened.layout.volume_lock(volume._opened.row.id).unlink()
        with onionskin.Store(store.path) as other, pytest.raises(onionskin.StateError, match="is open"):
            other.open("v")
        volume.write(0, b"still mine")
    with store.open("v") as volume:
        assert volume.read(0, 10) == b"still mine"
