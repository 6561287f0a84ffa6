"""What a thread does at the one moment at which another thread is in the middle of something."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.catalog import WorkRow
from onionskin.kernels._volume import DataPath
from onionskin.operations import differences, reclaim
from onionskin.operations import flush as flushing
from onionskin.operations import usage as usages
from onionskin.storage.open_head import OpenHead

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=16 * BLOCK) as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("one")
            web.write(BLOCK, b"b" * BLOCK)
            web.snapshot("two")
        yield store


def head_of(volume: onionskin.Volume) -> OpenHead:
    assert isinstance(volume._opened, OpenHead)
    return volume._opened


def before(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, do: Callable[[], object]) -> None:
    """Do something once, before a function runs that is called next."""
    original = getattr(where, name)

    def both(*arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(where, name, original)
        do()
        return original(*arguments, **keywords)

    monkeypatch.setattr(where, name, both)


def is_blocked(thread: threading.Thread) -> bool:
    """Wait until a thread waits for a lock (True), or has ended."""
    while thread.is_alive():
        if Path(f"/proc/self/task/{thread.native_id}/wchan").read_text().startswith("futex"):
            return True
    return False


# ---- a head that is being replaced ----


def test_a_revert_that_has_committed_and_has_not_ended_is_no_damage_for_whoever_looks(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    with store.open("web") as web:

        def look() -> None:
            assert web.parent is not None
            found.extend((web.parent.name, web.head_changed, len(web.layering().chain)))

        before(monkeypatch, OpenHead, "switch", look)
        web.revert("one")
    assert found == ["one", False, 2]


def test_extents_are_those_of_the_disk_that_a_revert_put_there(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.open("web") as web, monkeypatch.context() as asked:
        old = head_of(web)._path

        def revert() -> DataPath:
            asked.undo()
            web.revert("one")
            return old

        asked.setattr(OpenHead, "path", property(lambda head: revert()))
        before(monkeypatch, OpenHead, "on_path", revert)
        assert web.extents().tolist() == [(0, BLOCK, 1)]


def test_a_flush_succeeds_though_a_revert_closes_the_path_before_its_log_is_looked_at(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:  # a path with a long log, which a revert has closed since it was looked up
        def __init__(self, path: DataPath) -> None:
            self._path = path

        def __getattr__(self, name: str) -> Any:
            return getattr(self._path, name)

        def wants_compaction(self) -> bool:
            raise onionskin.StateError("info: the volume is closed; open it again")

    with store.open("web") as web:
        web.write(0, b"c" * BLOCK)
        with monkeypatch.context() as patch:
            patch.setattr(OpenHead, "path", property(lambda head: Closed(head._path)))
            web.flush()


def test_who_finds_the_new_path_of_a_volume_finds_its_new_head(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.open("web") as web:
        opened, seen = head_of(web), []
        old_path, old_head = opened._path, opened.head

        def set_and_look(head: OpenHead, name: str, value: object) -> None:
            object.__setattr__(head, name, value)
            seen.append((head._path is old_path, head.head == old_head))

        monkeypatch.setattr(OpenHead, "__setattr__", set_and_look)
        web.revert("one")
    assert (True, False) in seen and (False, True) not in seen


# ---- a name that means another volume by now ----


@pytest.mark.parametrize("where, name", [(differences, "diff"), (usages, "usage")])
def test_a_volume_compares_itself_whatever_it_is_called_by_then(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    with store.create("other", size=16 * BLOCK) as other:
        for taken in ("one", "two", "three"):
            other.snapshot(taken)

    def swap() -> None:
        for old, new in (("web", "t"), ("other", "web"), ("t", "other")):
            store.rename(old, new)

    with store.open("web") as web:
        before(monkeypatch, where, name, swap)
        if name == "diff":
            assert web.diff("one", "two").tolist() == [(BLOCK, BLOCK, 1)]
        else:
            assert [usage.snapshot for usage in web.usage()] == ["one", "two", None]


def test_a_temporary_fork_is_opened_though_its_name_means_a_volume_by_then_that_somebody_holds(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[onionskin.Volume] = []

    def take_its_name() -> None:
        store.rename("web-tmp-1", "mine")
        held.append(store.create("web-tmp-1", size=BLOCK))

    before(monkeypatch, onionskin.Store, "open", take_its_name)
    with store.temporary("web", "one") as fork:
        assert fork.name == "mine" and fork.read(0, 1) == b"a"
    held[0].close()
    assert sorted(store) == ["web", "web-tmp-1"]


# ---- a handle that is closed, or written for the first time ----


def test_a_view_that_was_just_closed_lends_its_files_to_no_array(store: onionskin.Store) -> None:
    one, two = (store.open("web", snapshot="one") for _ in range(2))
    path = one._opened._path
    one.close()
    one._opened._path = path  # which whoever makes an array has taken just before; the other view keeps it open
    with pytest.raises(onionskin.StateError, match="closed"):
        one.view(0, BLOCK)
    assert two.view(0, 1).tobytes() == b"a"
    two.close()


def test_a_view_that_is_closed_as_it_is_about_to_be_exported_is_refused(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = store.open("web", snapshot="one")
    before(monkeypatch, store._opened.views, "take", view.close)
    with pytest.raises(onionskin.StateError, match="closed"):
        view.export(tmp_path / "image.raw")
    assert not (tmp_path / "image.raw").exists()


@pytest.mark.parametrize("how", [{}, {"snapshot": "one"}, {"mode": "r"}])
def test_what_is_opened_as_the_store_is_closed_is_closed_too(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, how: dict[str, str]
) -> None:
    before(monkeypatch, store._opened, "register", store.close)
    with pytest.raises(onionskin.StateError, match="closed"):
        store.open("web", **how)
    with onionskin.Store(store.path) as again, again.open("web") as web:  # nobody holds it
        assert web.read(0, 1) == b"a" and again.check() == []


def test_work_is_done_beside_a_fork_that_is_closed_before_it_was_written(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@one", names=["fork"])
    fork = store.open("fork")
    fork.close()
    monkeypatch.setattr(store._opened, "open_handles", lambda: [fork._opened])  # read before it was closed
    with reclaim._alone(store._opened, WorkRow(1, "scrub", bytes(16), 77, "zero", 0)) as alone:
        assert alone


def test_a_volume_follows_its_disk_from_the_first_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@one", names=["fork"])
    asked: list[DataPath] = []

    def reading_path(head: OpenHead) -> DataPath:
        path = head._path
        if not asked:
            asked.append(path)
            store.fork("fork", names=["fork of it"])  # another thread, which finds the handle and opens its head
        return path

    monkeypatch.setattr(OpenHead, "reading_path", property(reading_path))
    with store.open("fork") as fork:
        assert fork.write(0, b"c") == 1 and fork.read(0, 2) == b"ca"


def test_no_write_to_a_fork_is_answered_before_all_who_read_it_are_told_of_its_path(store: onionskin.Store) -> None:
    store.fork("web@one", names=["fork"])

    class Reader:
        def told(self, path: DataPath) -> None:
            writer.start()
            waited.append(is_blocked(writer))

    waited: list[bool] = []
    reader = Reader()
    with store.open("fork") as fork:
        writer = threading.Thread(target=lambda: fork.write(BLOCK, b"d"))
        fork._opened.follow(reader.told)
        fork.write(0, b"c")
        writer.join()
        assert waited == [True] and fork.read(BLOCK, 1) == b"d"


def test_the_files_of_a_next_head_may_be_wanted_while_writers_are_held_back_for_good(store: onionskin.Store) -> None:
    web = store.open("web")
    path = head_of(web).path
    (spare,) = store._opened.catalog.spares_of(head_of(web).head)
    frozen, goes_on = threading.Event(), threading.Event()

    def prepare() -> None:
        with pytest.raises(onionskin.StateError):
            path.prepare(map_path=str(store._opened.layout.map_file(spare.id)), map_id=spare.id)

    def freeze_and_close() -> None:  # as the end of a stream that is applied
        assert path.freeze(path.log_state()[1])
        frozen.set()
        goes_on.wait()
        path.close()

    threads = [threading.Thread(target=target, daemon=True) for target in (freeze_and_close, prepare)]
    threads[0].start()
    frozen.wait()
    threads[1].start()
    assert is_blocked(threads[1])
    goes_on.set()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    web.close()


def test_a_volume_that_cannot_be_opened_when_it_is_made_is_kept_if_others_have_used_it(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: onionskin.Store, head: OpenHead) -> None:
        monkeypatch.undo()
        head.close()
        if head.row.name == "used":
            with store.open(head.row.name) as volume:
                volume.snapshot("mine")
        raise OSError(errno.EIO, "it cannot be opened")

    for name in ("used", "unused"):
        monkeypatch.setattr(onionskin.Store, "_after_open", fail)
        with pytest.raises(OSError, match="cannot be opened"):
            store.create(name, size=BLOCK)
    assert sorted(store) == ["used", "web"]
    assert [snapshot.name for snapshot in store.snapshots("used")] == ["mine"]


def test_a_fork_that_is_closed_just_before_it_would_be_flushed_keeps_nobody_from_asking_what_it_holds(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@one", names=["fork"])
    fork = store.open("fork")
    fork.write(0, b"c" * BLOCK)
    before(monkeypatch, flushing, "flush", fork.close)
    assert [usage.fork for usage in store.usage_of_forks("web")] == ["fork", None]
