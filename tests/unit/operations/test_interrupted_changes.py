"""An interrupt that comes just before or behind a commit: the volume goes on as the catalog says, and nothing hangs."""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import Catalog, CommitUnknownError
from onionskin.operations import fold, new_map, seal
from onionskin.operations.staging import StagedFiles

BLOCK = 4096
HANG_SECONDS = 300


def ends(call: Callable[[], object]) -> None:
    """Run a call that must not wait for ever."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


@pytest.fixture(params=["before", "behind", "unknown"])
def interrupt(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Make the next transaction end in an interrupt, or in a commit of which nobody knows whether it happened."""
    transaction = Catalog.transaction

    def once(catalog: Catalog):
        monkeypatch.setattr(Catalog, "transaction", transaction)
        return _interrupted(transaction, catalog, request.param)

    return lambda: monkeypatch.setattr(Catalog, "transaction", once)


class _interrupted:
    def __init__(self, transaction, catalog: Catalog, when: str) -> None:
        self.inner, self.when = transaction(catalog), when

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, kind, value, traceback) -> None:
        if self.when == "before" and kind is None:
            kind, value, traceback = KeyboardInterrupt, KeyboardInterrupt(), None
        self.inner.__exit__(kind, value, traceback)
        raise CommitUnknownError("nobody knows") if self.when == "unknown" else KeyboardInterrupt


def snapshot(web: onionskin.Volume) -> None:
    web.snapshot("new")


def revert(web: onionskin.Volume) -> None:
    web.revert("n")


def flatten(web: onionskin.Volume) -> None:
    web.flatten()


def compact(web: onionskin.Volume) -> None:
    new_map.compact_map(web._opened.to_write())


@pytest.mark.parametrize("change", [snapshot, revert, flatten, compact])
def test_a_volume_goes_on_and_loses_nothing_after_an_interrupted(tmp_path: Path, interrupt, change) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        web = store.create("web", size=64 * BLOCK)
        web.write(0, b"o" * 8 * BLOCK)
        web.snapshot("old")
        web.write(0, b"n" * BLOCK)
        if change is revert:
            web.snapshot("n")
            web.write(0, b"x" * BLOCK)
        interrupt()
        with pytest.raises((KeyboardInterrupt, CommitUnknownError)):
            change(web)
        changed = b"n" * BLOCK
        if not web._path.poisoned:
            changed = web.read(0, BLOCK)
            web.write(BLOCK, b"w" * BLOCK)
            ends(web.flush)
        ends(web.close)
        with store.open("web") as web:
            assert web.read(0, BLOCK) in (changed, b"n" * BLOCK)
            assert web.read(2 * BLOCK, 6 * BLOCK) == b"o" * 6 * BLOCK
            web.snapshot("later")
        assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_a_group_goes_on_and_is_taken_as_a_whole_or_not_after_an_interrupted(tmp_path: Path, interrupt) -> None:
    names = ("web", "db", "log")
    with onionskin.Store(tmp_path / "store") as store:
        volumes = [store.create(name, size=64 * BLOCK) for name in names]
        for volume in volumes:
            volume.write(0, volume.name.encode())
        interrupt()
        with pytest.raises((KeyboardInterrupt, CommitUnknownError)):
            store.snapshot_group(dict.fromkeys(names, "s"))
        assert len({volume._path.poisoned for volume in volumes}) == 1
        for volume in volumes:
            if not volume._path.poisoned:
                assert volume[: len(volume.name)] == volume.name.encode()
                volume.write(BLOCK, b"w")
                ends(volume.flush)
                assert volume[BLOCK : BLOCK + 1] == b"w"
            ends(volume.close)
        taken = {len(store.snapshots(name)) for name in names}
        assert taken in ({0}, {1})
        for name in names:
            if taken == {1}:
                with store.open(name, snapshot="s") as view:
                    assert view[: len(name)] == name.encode() and view[BLOCK : BLOCK + 1] == b"\0"
            with store.open(name) as volume:
                assert volume[: len(name)] == name.encode()
        store.snapshot_group(dict.fromkeys(names, "later"))
        assert [problem for problem in store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("is_written", [True, False])
def test_forks_of_a_disk_are_all_there_or_none_after_an_interrupted(
    tmp_path: Path, interrupt, is_written: bool
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        web = store.create("web", size=64 * BLOCK)
        web.write(0, b"o")
        if not is_written:
            web.snapshot("old")
        interrupt()
        with pytest.raises((KeyboardInterrupt, CommitUnknownError)):
            store.fork("web", count=3, idempotency_key="k")
        if not web._path.poisoned:
            assert web[:1] == b"o"
            web.write(0, b"w")
            ends(web.flush)
        ends(web.close)
        made = [name for name in store if name != "web"]
        assert made in ([], ["web-1", "web-2", "web-3"])
        assert store.fork("web", count=3, idempotency_key="k") == ["web-1", "web-2", "web-3"]
        for name in made:
            with store.open(name) as fork:
                assert fork[:1] == b"o"
        assert store.forks_of("web") == ["web-1", "web-2", "web-3"]
        assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_of_several_all_go_or_none_after_an_interrupted(tmp_path: Path, interrupt) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=64 * BLOCK) as web:
            web.write(0, b"o")
            names = store.fork("web", count=3)
        interrupt()
        with pytest.raises((KeyboardInterrupt, CommitUnknownError)):
            store.delete(*names)
        left = [name for name in store if name != "web"]
        assert left in ([], names)
        if left:
            store.delete(*left)
        assert list(store) == ["web"]
        store.finish_work()
        store.open("web").close()
        assert store.check() == []


def test_a_fold_of_sealed_layers_that_is_interrupted_behind_its_commit_keeps_its_map(tmp_path: Path, interrupt) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=64 * BLOCK) as web:
        for name in "abc":
            web.write(ord(name) % 8 * BLOCK, name.encode() * BLOCK)
            web.snapshot(name)
        with pytest.MonkeyPatch.context() as patch:
            begin = fold.staged_files

            @contextmanager
            def then_interrupt(*arguments) -> Iterator[StagedFiles]:
                with begin(*arguments) as files:
                    interrupt()
                    yield files

            patch.setattr(fold, "staged_files", then_interrupt)
            with pytest.raises((KeyboardInterrupt, CommitUnknownError)):
                web.merge("b")
        assert [snapshot.name for snapshot in web.snapshots] == ["a", "c"]
        with store.open("web", snapshot="c") as view:
            assert {view.read(ord(name) % 8 * BLOCK, 1) for name in "abc"} == {b"a", b"b", b"c"}


def test_what_is_written_after_a_snapshot_that_could_not_be_committed_is_there_at_the_next_open(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=64 * BLOCK) as web, pytest.MonkeyPatch.context() as patch:
            patch.setattr(seal, "_write_layers", fail)
            with pytest.raises(OSError, match="full"):
                web.snapshot("a")
            web.write(0, b"later" * 1000)
        with store.open("web") as web:
            assert web.read(0, 5000) == b"later" * 1000
            web.snapshot("a")
            web.write(0, b"again")
        assert store.open("web", snapshot="a").read(0, 5) == b"later"
