"""The files of the next head, made beforehand: they are used, and where they are not, they go."""

import errno
import os
from pathlib import Path

import pytest

import onionskin
from onionskin.kernels._volume import DataPath
from onionskin.operations import seal

BLOCK = 4096


def files(store: onionskin.Store) -> set[str]:
    return {path.name for kind in ("segments", "layers") for path in (store.path / kind).iterdir()}


def new_path(directory: Path) -> tuple[DataPath, list[Path]]:
    """A data path without a store, and its directories: of segments, and of maps."""
    directories = [directory / name for name in ("segments", "layers")]
    for one in directories:
        one.mkdir()
    path = DataPath(
        block_size=BLOCK,
        size_bytes=16 * BLOCK,
        segments_directory=str(directories[0]),
        layers_directory=str(directories[1]),
        wipe_zero=False,
        writable=True,
    )
    return path, directories


def prepared(store: onionskin.Store, blocks: int = 16) -> onionskin.Volume:
    """A volume whose next head has its files."""
    web = store.create("web", size=blocks * BLOCK)
    for name in ("one", "two"):
        web.write(0, name.encode())
        web.snapshot(name)
    store.finish_work()
    return web


def test_a_first_snapshot_makes_no_file_that_it_does_not_need(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=16 * BLOCK) as web:
        web.snapshot("one")
        store.finish_work()
        assert files(store) == set()


def test_the_next_head_begins_with_the_files_that_were_made_for_it(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, prepared(store) as web:
        made = files(store)
        web.snapshot("three")
        store.finish_work()
        before = files(store)  # with those for the head after it
        web.write(0, b"four")
        web.flush()
        assert files(store) == before >= made
        assert web.read(0, 4) == b"four"


def test_a_disk_that_expects_a_snapshot_has_all_files_before_its_first_one(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=16 * BLOCK) as web:
        web.write(0, b"one")
        web._opened.expect_seal()
        store.finish_work()
        made = files(store)
        web.flush()
        assert files(store) == made and len(made) == 4
        web.snapshot("one")
        store.finish_work()
        before = files(store)  # with those for the head after it
        assert len(before) == 6
        web.write(0, b"two")
        web.flush()
        assert files(store) == before > made
        assert web.read(0, 3) == b"two"
    with onionskin.Store(tmp_path / "store") as store, store.open("web") as web:
        assert web.read(0, 3) == b"two" and len(files(store)) == 4
        assert store.check() == []


def test_a_map_that_was_made_and_never_written_is_that_of_a_new_head(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=16 * BLOCK) as web:
            web._opened.expect_seal()
            store.finish_work()
            assert len(files(store)) == 3
        with store.open("web") as web:
            assert web.read(0, 3) == bytes(3)
            web.write(0, b"one")
            web.snapshot("one")
            assert web.read(0, 3) == b"one"
        assert store.check() == []


def test_a_map_is_left_to_a_seal_that_waits_for_its_outcome(tmp_path: Path) -> None:
    own, spare, map_id = (os.urandom(16) for _ in range(3))
    path, directories = new_path(tmp_path)
    path.open_head(map_path=str(directories[1] / "own.map"), map_id=map_id, inherited=[], own=own, spare=spare)
    path.write(0, b"old")
    path.seal(map_path=str(directories[1] / "next.map"), map_id=spare)
    with pytest.raises(OSError) as busy:
        path.make_map()
    assert busy.value.errno == errno.EBUSY
    path.seal_commit(os.urandom(16))
    path.make_map()
    assert (directories[1] / "next.map").exists()
    path.close()


def frames_of(web: onionskin.Volume, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Take a snapshot, with a write just before its cut, and return how often its layer was made durable."""
    cut_heads = seal.cut_heads

    def write_and_cut(paths: list[DataPath], names: list[str]) -> None:
        web.write(15 * BLOCK, b"late")
        cut_heads(paths, names)

    with monkeypatch.context() as patch:
        patch.setattr(seal, "cut_heads", write_and_cut)
        web.snapshot(name)
    catalog = web.store._opened.catalog
    sealed = catalog.layer(web._opened.head).parent
    assert sealed is not None
    return catalog.layer(sealed).map_frames


def test_what_has_room_in_the_log_is_made_durable_once_behind_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store, prepared(store) as web:
        web.snapshot("three")
        web.write(0, b"four")
        assert frames_of(web, "four", monkeypatch) == 1
        with store.open("web", snapshot="four") as view:
            assert view.read(0, 4) == b"four" and view.read(15 * BLOCK, 4) == b"late"


def test_what_has_no_room_in_the_log_yet_is_flushed_before_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a full disk refuses the snapshot while the head can go on as it is."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=16 * BLOCK) as web:
        web.write(0, b"one")  # there is no log yet
        assert frames_of(web, "one", monkeypatch) == 2
    with onionskin.Store(tmp_path / "other") as store, prepared(store, blocks=4096) as web:
        web.snapshot("three")
        for block in range(0, 2000, 2):  # no two lie side by side, so each has a record
            web.write(block * BLOCK, b"four")
        assert frames_of(web, "four", monkeypatch) == 2


def test_a_snapshot_of_a_prepared_head_in_which_nothing_was_written_leaves_no_file_behind(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with prepared(store) as web:
            for number in range(4):
                web.snapshot(f"empty {number}")
                store.finish_work()
            assert web.read(0, 3) == b"two"
        assert store.check() == []
        with store.open("web", snapshot="empty 3") as view:
            assert view.read(0, 3) == b"two"


def test_files_that_were_made_beforehand_go_at_the_next_opening(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with prepared(store):
            made = files(store)
        assert files(store) == made
        with store.open("web") as web:
            assert len(made - files(store)) == 2
            web.write(BLOCK, b"more")
            web.snapshot("three")
            web.write(BLOCK, b"most")
            web.flush()
            assert web.read(BLOCK, 4) == b"most"
        assert store.check() == []


@pytest.mark.parametrize("drop", ["revert", "delete"])
@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_files_that_were_made_beforehand_go_with_their_head(tmp_path: Path, drop: str, wipe: str) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=16 * BLOCK, wipe=wipe) as web:
            for name in ("one", "two"):
                web.snapshot(name)
            store.finish_work()
            assert len(files(store)) == 2
            if drop == "revert":
                web.revert("one")
                store.finish_work()
                assert files(store) == set()
        if drop == "delete":
            store.delete("web", recursive=True)
            store.finish_work()
            assert files(store) == set()


def test_a_head_that_could_not_be_prepared_makes_its_files_itself(tmp_path: Path) -> None:
    own, spare, map_id = (os.urandom(16) for _ in range(3))
    path, directories = new_path(tmp_path)
    path.open_head(map_path=str(directories[1] / "own.map"), map_id=map_id, inherited=[], own=own, spare=spare)
    with pytest.raises(OSError) as refused:
        path.prepare(map_path=str(tmp_path / "missing" / "next.map"), map_id=spare)
    assert refused.value.errno == errno.ENOENT
    with pytest.raises(OSError) as busy:
        path.prepare(map_path=str(directories[1] / "next.map"), map_id=os.urandom(16))
    assert busy.value.errno == errno.EBUSY
    path.write(0, b"old")
    path.seal(map_path=str(directories[1] / "next.map"), map_id=spare)
    path.seal_commit(os.urandom(16))
    path.write(0, b"new")
    path.flush()
    assert (directories[1] / "next.map").exists()
    assert path.read(0, 3) == b"new"
    path.close()
