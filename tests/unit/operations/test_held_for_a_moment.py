"""Who holds a volume for a moment is waited for: `expire` holds one as it looks whether that may be dropped."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

import onionskin
import onionskin.store as store_module
from onionskin.operations import volumes
from onionskin.storage.locks import VolumeLock, locked_to_remove


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[onionskin.Store]:
    for module in (volumes, store_module):
        monkeypatch.setattr(module, "_MOMENT_SECONDS", 300.0)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="64K") as web:
            web.write(0, b"w")
        yield store


def held_until_looked(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None
) -> AbstractContextManager[object]:
    """Hold the volume as one does who may drop it, until somebody asks for how long it is held."""
    holder = ExitStack()
    holder.enter_context(locked_to_remove(store._opened.layout, {store._opened.catalog.volume("web").id: "web"}))
    ask = volumes.is_for_a_moment

    def asked(*given: Any) -> bool:
        found = ask(*given)
        holder.close()
        then()
        return found

    for module in (volumes, store_module):
        monkeypatch.setattr(module, "is_for_a_moment", asked)
    return holder


def test_a_volume_is_deleted_behind_who_holds_it_for_a_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_until_looked(store, monkeypatch):
        store.delete("web")
    assert list(store) == []


@pytest.mark.parametrize("mode", ["w", "r"])
def test_a_volume_is_opened_behind_who_holds_it_for_a_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    with held_until_looked(store, monkeypatch), store.open("web", mode=mode) as web:
        assert web.read(0, 1) == b"w"


@pytest.mark.parametrize("act", [onionskin.Store.open, onionskin.Store.delete])
def test_a_volume_that_is_dropped_by_who_held_it_is_not_there(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, act: Callable[..., object]
) -> None:
    def drop() -> None:
        monkeypatch.undo()
        store.delete("web")

    with held_until_looked(store, monkeypatch, drop), pytest.raises(onionskin.VolumeNotFoundError):
        act(store, "web")


@pytest.mark.parametrize("mode", ["w", "r"])
def test_a_volume_that_stays_open_is_refused_at_once(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(volumes.time, "sleep", lambda _: pytest.fail("it waits for one who stays"))
    with store.open("web", mode=mode):
        with pytest.raises(onionskin.StateError, match="is open for"):
            store.open("web")
        with pytest.raises(onionskin.StateError, match="is open for"):
            store.delete("web")


def test_a_new_volume_that_cannot_be_opened_is_taken_back_behind_who_holds_it_for_a_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, held = VolumeLock.close, []

    def cannot_be_opened(row: Any, *_: Any, **__: Any) -> None:
        def close_and_let_in(lock: VolumeLock) -> None:
            close(lock)
            if not held:
                held.append(ExitStack())
                held[0].enter_context(locked_to_remove(store._opened.layout, {row.id: row.name}))

        monkeypatch.setattr(VolumeLock, "close", close_and_let_in)
        raise OSError(5, "no")

    ask = volumes.is_for_a_moment

    def asked(*given: Any) -> bool:
        found = ask(*given)
        held[0].close()
        return found

    monkeypatch.setattr(volumes, "is_for_a_moment", asked)
    monkeypatch.setattr(store, "_open_locked", cannot_be_opened)
    with pytest.raises(OSError, match="no"):
        store.create("new", size="64K")
    held[0].close()
    assert held and list(store) == ["web"]
