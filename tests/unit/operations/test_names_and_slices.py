"""A store is a collection of names, a volume one of bytes; both say how they are, and a store pickles as its path."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin
from onionskin.operations import staged_volumes

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        yield store


def test_a_store_knows_the_names_of_its_volumes(store: onionskin.Store) -> None:
    assert len(store) == 0 and list(store) == []
    for name in ("web", "db"):
        store.create(name, size="1M").close()
    assert len(store) == 2 and list(store) == ["db", "web"]
    assert "web" in store and "mail" not in store
    assert 3 not in store and Path("web") not in store


def test_nothing_has_a_name_that_utf_8_cannot_hold(store: onionskin.Store) -> None:
    name = os.fsdecode(b"\xff")
    assert name not in store
    with pytest.raises(onionskin.VolumeNotFoundError):
        store.open(name)
    with store.create("web", size=BLOCK) as web:
        for ask in (web.revert, web.merge, web.diff, lambda name: store.holds("web", name)):
            with pytest.raises(onionskin.SnapshotNotFoundError):
                ask(name)


def test_a_staged_volume_is_no_name_of_a_store(store: onionskin.Store) -> None:
    with staged_volumes.stage(store._opened, size=BLOCK) as staged:
        assert staged.head.row.name not in store and list(store) == [] and len(store) == 0


def test_an_open_store_without_volumes_is_true_and_a_closed_one_is_not(store: onionskin.Store) -> None:
    assert store
    store.close()
    assert not store


def test_volumes_are_opened_by_open_alone(store: onionskin.Store) -> None:
    store.create("web", size="1M").close()
    with pytest.raises(TypeError, match="not subscriptable"):
        store["web"]  # type: ignore[index]


def test_a_slice_of_a_volume_is_what_the_slice_of_its_bytes_is(store: onionskin.Store) -> None:
    data = os.urandom(3 * BLOCK + 5)
    with store.create("web", size=len(data)) as volume:
        volume.write(0, data)
        for a in (None, 0, 1, BLOCK - 1, len(data), len(data) + 9, -1, -BLOCK, -len(data) - 3):
            for b in (None, 0, 7, BLOCK + 3, len(data), 1 << 70, -1, -5, -(1 << 70)):
                assert volume[a:b] == data[a:b]
        volume.snapshot("a")
    with store.open("web", snapshot="a") as view:
        assert view[:4] == data[:4]
    with pytest.raises(onionskin.StateError, match="closed"):
        view[:4]


def test_a_volume_is_sliced_with_step_1_and_not_indexed(store: onionskin.Store) -> None:
    with store.create("web", size=BLOCK) as volume:
        with pytest.raises(ValueError, match="every 2"):
            volume[::2]
        with pytest.raises(ValueError, match="every -1"):
            volume[::-1]
        with pytest.raises(TypeError, match="by slices"):
            volume[5]  # type: ignore[index]
        with pytest.raises(TypeError, match="by slices"):
            next(iter(volume))  # type: ignore[call-overload]


def test_what_is_shown_of_a_store_and_a_volume_says_their_state(store: onionskin.Store) -> None:
    assert repr(store) == f"<Store {store.path} open>"
    with store.create("web", size=BLOCK) as volume:
        assert repr(volume) == f"<Volume {store.path}/web open>"
        volume.snapshot("a")
        with store.open("web", snapshot="a") as view:
            assert repr(view) == f"<Volume {store.path}/web@a read-only>"
    assert repr(volume).endswith("web closed>")
    store.close()
    assert repr(store) == f"<Store {store.path} closed>"


def test_a_store_pickles_as_its_path_also_where_it_is_closed(store: onionskin.Store) -> None:
    store.create("web", size=BLOCK).close()
    for _ in range(2):
        with pickle.loads(pickle.dumps(store)) as again:
            assert list(again) == ["web"] and again is not store
        store.close()


def test_a_store_of_a_relative_path_is_opened_by_a_process_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with onionskin.Store("here") as store:
        store.create("web", size=BLOCK).close()
        code = "import pickle, sys; print(list(pickle.load(sys.stdin.buffer)))"
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, cwd="/"
        )
    assert done.stdout == b"['web']\n"


def test_unpickling_makes_no_store_where_there_is_none_any_more(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        pickled = pickle.dumps(store)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(onionskin.VolumeNotFoundError):
        pickle.loads(pickled)
    assert not (tmp_path / "store").exists()


def test_a_volume_is_not_pickled(store: onionskin.Store) -> None:
    with store.create("web", size=BLOCK) as volume, pytest.raises(TypeError, match="pickle its store and its name"):
        pickle.dumps(volume)
