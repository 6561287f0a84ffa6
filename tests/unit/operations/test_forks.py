"""Forks: many volumes from one state, made in one transaction, and dropped again."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.listing import files_with
from support.older_stores import make_older

import onionskin
from onionskin import images
from onionskin import store as store_module
from onionskin.catalog import Catalog, LabelRow, LayerRow
from onionskin.catalog.tree import unnamed_of
from onionskin.operations import forks, hidden_blocks, volumes
from onionskin.operations.fold import SEGMENTS_OPEN
from onionskin.operations.hidden_blocks import free_hidden
from onionskin.operations.new_map import compact_map
from onionskin.storage import locks

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=64 * BLOCK) as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("clean")
        yield store


def rows(store: onionskin.Store) -> dict[str, int]:
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        return {
            table: catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("layers", "segments", "volumes", "snapshots", "lineage", "labels")
        }


def files(store: onionskin.Store) -> int:
    store.finish_work()
    return sum(1 for directory in ("layers", "segments", "volumes") for _ in (store.path / directory).iterdir())


def first_byte(store: onionskin.Store, name: str) -> bytes:
    with store.open(name, mode="r") as volume:
        return volume[:1]


def expire_now(store: onionskin.Store, *names: str) -> None:
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        for name in names:
            catalog.execute("UPDATE volumes SET expires_ns = 1 WHERE name = ?", (name,))
        catalog.commit()


# ---- of a snapshot ----


def test_forks_read_as_the_snapshot_and_write_apart(store: onionskin.Store) -> None:
    assert store.fork("web@clean", names=["b", "a"]) == ["b", "a"]
    with store.open("a") as a:
        a.write(0, b"x")
    assert [first_byte(store, name) for name in ("a", "b", "web")] == [b"x", b"a", b"a"]
    assert store.check() == []


def test_numbers_go_on_from_the_greatest(store: onionskin.Store) -> None:
    store.fork("web@clean", names=["job-9", "job-10", "job-x", "job-2b", "jobs-99"])
    assert store.fork("web@clean", count=2, pattern="job-{n}") == ["job-11", "job-12"]
    assert store.fork("web", "clean", pattern="job-{n:04}") == ["job-0013"]
    assert store.fork("web@clean", count=2) == ["web-1", "web-2"]
    assert store.fork("web@clean", pattern="a*[{n}]?") == ["a*[1]?"]
    assert store.fork("web@clean", pattern="a*[{n}]?") == ["a*[2]?"]


def test_numbers_go_on_behind_names_that_are_shorter_and_longer_than_those_of_the_pattern(
    store: onionskin.Store,
) -> None:
    store.fork(
        "web@clean", names=["j", "job-7", "job-12", "job-x", "job-" + "9" * 19, "a-name-that-is-longer-than-all-others"]
    )
    assert store.fork("web@clean", count=2, pattern="job-{n}") == ["job-13", "job-14"]
    assert store.fork("web@clean", count=1, pattern="a-pattern-that-is-longer-than-all-names-{n}") == [
        "a-pattern-that-is-longer-than-all-names-1"
    ]


def test_numbers_that_are_used_up_are_refused_and_not_said_to_be_taken(store: onionskin.Store) -> None:
    greatest = "9" * 18
    store.fork("web@clean", names=[f"job-{int(greatest) - 1}"])
    with pytest.raises(onionskin.StateError, match="numbers"):
        store.fork("web@clean", count=2, pattern="job-{n}")
    assert store.fork("web@clean", pattern="job-{n}") == [f"job-{greatest}"]
    for _ in range(2):
        with pytest.raises(onionskin.StateError, match="numbers"):
            store.fork("web@clean", pattern="job-{n}")


def test_numbers_that_are_used_up_are_refused_for_a_group_too(store: onionskin.Store) -> None:
    store.fork("web@clean", names=[f"job-{10**18 - 2}-web"])
    with pytest.raises(onionskin.StateError, match="numbers"):
        store.fork_group({"web": "clean"}, count=2, pattern="job-{n}-{source}")
    assert len(store) == 2


def test_a_name_that_is_taken_fails_the_whole_call(store: onionskin.Store) -> None:
    before = rows(store)
    with pytest.raises(onionskin.VolumeExistsError, match="'web'"):
        store.fork("web@clean", names=["a", "web", "b"])
    assert rows(store) == before


@pytest.mark.parametrize(
    "pattern",
    [
        "job",
        "{n}{n}",
        "{n.__class__}",
        "{0}",
        "{}",
        "{n!r}",
        "{n:>3}",
        "{n:099}",
        "{n:{n}}",
        "{source.x}-{n}",
        "{n",
        "a/{n}",
        "\udc80{n}",
    ],
)
def test_a_pattern_is_no_format_string(store: onionskin.Store, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|name"):
        store.fork("web@clean", pattern=pattern)


def test_braces_stand_for_themselves_where_they_are_doubled(store: onionskin.Store) -> None:
    assert store.fork("web@clean", pattern="{{{source}}}-{n}") == ["{web}-1"]


def test_what_does_not_say_which_forks_is_refused(store: onionskin.Store) -> None:
    for wrong in ({"count": 0}, {"names": []}, {"names": ["a", "a"]}, {"names": ["a"], "count": 2}, {"lifetime": "1y"}):
        with pytest.raises(ValueError):
            store.fork("web@clean", **wrong)
    for wrong in ({"names": "ab"}, {"count": True}, {"lifetime": b"2h"}, {"labels": {"a": 1}}):
        with pytest.raises(TypeError):
            store.fork("web@clean", **wrong)
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.fork("web@gone")
    with pytest.raises(ValueError, match="VOLUME@SNAPSHOT"):
        store.fork("web@clean", "clean")


def test_a_clone_is_the_fork_of_one_by_either_way_of_naming(store: onionskin.Store) -> None:
    store.clone("web@clean", "a")
    store.clone("web", "clean", "b", wipe="zero")
    assert store.forks_of("web@clean") == ["a", "b"] and store.info("b").wipe == "zero"
    with pytest.raises(TypeError, match="new name"):
        store.clone("web", "clean")


def test_dropping_the_name_under_a_hundred_forks_copies_nothing(store: onionskin.Store) -> None:
    names = store.fork("web@clean", count=100)
    before = files(store)
    with store.open("web") as web:
        web.merge("clean")
        assert files(store) <= before + 2  # the lock of web, and what it has not flushed
    assert first_byte(store, names[7]) == b"a" and store.check() == []


# ---- keys ----


def test_a_call_under_a_key_is_done_once(store: onionskin.Store) -> None:
    names = store.fork("web@clean", count=2, idempotency_key="run 7")
    assert store.fork("web@clean", count=2, idempotency_key="run 7") == names
    with onionskin.Store(store.path) as again:
        assert again.fork("web@clean", count=2, idempotency_key="run 7") == names
    with pytest.raises(onionskin.StateError, match="another fork"):
        store.fork("web@clean", count=3, idempotency_key="run 7")
    assert len(store) == 3


@pytest.mark.parametrize("boot", ["this", "another", "none"])
def test_a_key_is_free_again_behind_a_day(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    with monkeypatch.context() as before:
        if boot != "this":
            before.setattr(forks, "_boot_id", lambda: "another" if boot == "another" else "")
        store.fork("web@clean", idempotency_key="k")
    later(monkeypatch, forks.KEY_NANOSECONDS + 1)
    assert store.fork("web@clean", count=2, idempotency_key="k") == ["web-2", "web-3"]


def later(monkeypatch: pytest.MonkeyPatch, nanoseconds: int, *, only_date: bool = False) -> None:
    """Have it be later, by both clocks or by the one that tells the date alone."""
    now_ns, since_boot_ns = time.time_ns() + nanoseconds, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    since_boot_ns += 0 if only_date else nanoseconds
    monkeypatch.setattr(forks.time, "time_ns", lambda: now_ns)
    monkeypatch.setattr(forks.time, "clock_gettime_ns", lambda clock: since_boot_ns)


def test_no_key_is_forgotten_while_the_clock_is_days_ahead(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@clean", idempotency_key="k")
    with monkeypatch.context() as ahead:
        later(ahead, 2 * forks.KEY_NANOSECONDS, only_date=True)
        assert store.fork("web@clean", idempotency_key="k") == ["web-1"]
        assert store.fork("web@clean", idempotency_key="another") == ["web-2"]
    assert store.fork("web@clean", idempotency_key="k") == ["web-1"]
    later(monkeypatch, 4 * forks.KEY_NANOSECONDS)
    store.fork("web@clean", idempotency_key="later")
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        assert catalog.execute("SELECT key FROM fork_calls").fetchall() == [("later",)]


def test_a_key_that_an_older_onionskin_noted_gives_its_names(store: onionskin.Store) -> None:
    store.fork("web@clean", count=2, idempotency_key="k")
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        catalog.execute("""UPDATE fork_calls SET names = '["web-1", "web-2"]'""")
        catalog.commit()
    assert store.fork("web@clean", count=2, idempotency_key="k") == ["web-1", "web-2"]


def test_a_key_that_was_used_while_the_clock_was_far_ahead_is_no_trouble_for_years(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call still makes nothing again."""
    then_ns = time.time_ns() + 1000 * forks.KEY_NANOSECONDS
    with monkeypatch.context() as ahead:
        ahead.setattr(forks.time, "time_ns", lambda: then_ns)
        ahead.setattr(forks, "_boot_id", lambda: "the one before")
        store.fork("web@clean", idempotency_key="k")
    assert store.fork("web@clean", idempotency_key="k") == ["web-1"]
    assert store.fork("web@clean", count=2, idempotency_key="k") == ["web-2", "web-3"]
    with pytest.raises(onionskin.StateError, match="another fork"):
        store.fork("web@clean", idempotency_key="k")


def test_a_key_is_any_text_that_prints_on_a_line(store: onionskin.Store) -> None:
    store.fork("web@clean", idempotency_key="https://ci/run/7@2 again")
    for wrong in ("", "two\nlines", "x" * 300, "\ud800"):
        with pytest.raises(ValueError, match="key"):
            store.fork("web@clean", idempotency_key=wrong)
    with pytest.raises(TypeError, match="key"):
        store.fork("web@clean", idempotency_key=7)


def test_a_key_is_free_again_behind_a_day_though_the_clock_is_set_back_meanwhile(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(forks, "_boot_id", lambda: "the one before")
        store.fork("web@clean", idempotency_key="k")
    now_ns = time.time_ns()
    times = [now_ns + 2 * forks.KEY_NANOSECONDS]
    monkeypatch.setattr(forks.time, "time_ns", lambda: times.pop() if times else now_ns)
    assert store.fork("web@clean", count=2, idempotency_key="k") == ["web-2", "web-3"]
    assert store.fork("web@clean", count=2, idempotency_key="k") == ["web-2", "web-3"]


@pytest.mark.parametrize(
    "names",
    [
        "nothing",
        "77",
        '["a", 7]',
        "{}",
        '{"names": "ab"}',
        '{"names": ["a"], "ids": []}',
        '{"names": ["a"], "boot": "b"}',
        pytest.param("[" * 200_000, id="deep"),
    ],
)
def test_names_under_a_key_that_are_damaged_are_refused(store: onionskin.Store, names: str) -> None:
    store.fork("web@clean", idempotency_key="k")
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        catalog.execute("UPDATE fork_calls SET names = ?", (names,))
        catalog.commit()
    with pytest.raises(onionskin.FormatError, match="key 'k'"):
        store.fork("web@clean", idempotency_key="k")


def test_a_group_that_names_a_disk_twice_is_told_so(store: onionskin.Store) -> None:
    with pytest.raises(ValueError, match="named twice"):
        store.fork_group({"web": None, "web@clean": None}, pattern="{n}-{source}")


def test_a_group_under_a_key_is_the_same_in_any_order(store: onionskin.Store) -> None:
    store.create("db", size="1M").close()
    made = store.fork_group({"web": "clean", "db": None}, count=2, idempotency_key="k")
    assert store.fork_group({"db": None, "web": "clean"}, count=2, idempotency_key="k") == made
    again = store.fork_group({"db": None, "web@clean": None}, count=2, idempotency_key="k")
    assert again == {"db": made["db"], "web@clean": made["web"]}
    with pytest.raises(onionskin.StateError, match="key"):
        store.fork_group({"db": None, "web": None}, count=2, idempotency_key="k")


def test_a_cut_under_a_key_is_done_once(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"b")
        names = store.fork("web", idempotency_key="k")
        web.write(0, b"c")
        assert store.fork("web", idempotency_key="k") == names
    assert first_byte(store, names[0]) == b"b"


def test_a_key_that_was_used_while_the_head_was_sealed_leaves_the_head(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.open("web") as web:
        web.write(0, b"b")
        names = store.fork("web", idempotency_key="k")
        web.write(0, b"c")
        before = rows(store)
        real, asked = forks.made_before, []

        def late(*arguments: object) -> list[str] | None:
            asked.append(1)
            return None if len(asked) <= 2 else real(*arguments)  # before the head is sealed it is asked twice

        monkeypatch.setattr(forks, "made_before", late)
        assert store.fork("web", idempotency_key="k") == names
        assert rows(store) == before
        web.write(BLOCK, b"d")
        web.flush()
        assert web[:1] == b"c"
    assert store.check() == []


# ---- of a disk as it is now ----


def test_a_fork_of_an_open_disk_has_what_was_written_before(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"b" * BLOCK)
        names = store.fork("web", count=2)
        web.write(0, b"c" * BLOCK)
        assert web[:1] == b"c"
    assert [first_byte(store, name) for name in names] == [b"b", b"b"]
    assert [row.name for row in store.snapshots("web")] == ["clean"] and store.check() == []


def test_a_fork_of_an_open_disk_whose_name_is_taken_seals_nothing(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(BLOCK, b"b")
        segments = len(store._opened.catalog.segments_of_layer(web._opened.head))
        for _ in range(3):
            with pytest.raises(onionskin.VolumeExistsError):
                store.fork("web", names=["new", "web"])
        assert web._opened.path.has_spare
        assert len(store._opened.catalog.segments_of_layer(web._opened.head)) == segments


def test_a_volume_that_takes_the_name_of_its_fork_meanwhile_is_not_found_by_its_old_one(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.open("web") as web:
        web.write(BLOCK, b"b")
        flush = forks.flush
        monkeypatch.setattr(forks, "flush", lambda volume: (flush(volume), store.rename("web", "new")))
        with pytest.raises(onionskin.VolumeNotFoundError):
            store.fork("web", names=["new"])


def test_a_fork_of_a_closed_disk_has_what_was_written_last(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"b" * BLOCK)
    (name,) = store.fork("web")
    assert first_byte(store, name) == b"b" and store.info("web").holder is None and store.check() == []


@pytest.mark.parametrize("is_open", [True, False])
def test_a_head_that_nothing_was_written_to_is_not_sealed_again(store: onionskin.Store, is_open: bool) -> None:
    with store.open("web") as web:
        web.write(0, b"b")
        store.fork("web")
        if not is_open:
            web.close()
        before = rows(store)["layers"]
        names = store.fork("web", count=3)
        assert rows(store)["layers"] == before + 3
    assert first_byte(store, names[2]) == b"b" and store.check() == []


def test_a_resized_head_is_cut_with_its_size(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.resize(128 * BLOCK)
        (name,) = store.fork("web")
    assert store.info(name).size_bytes == 128 * BLOCK


def test_a_fork_of_what_nobody_wrote_stands_on_its_base_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"z" * BLOCK)
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", base=tmp_path / "base.raw").close()
        (name,) = store.fork("web")
        assert first_byte(store, name) == b"z" and store.info(name).base and store.check() == []


def test_a_disk_that_another_handle_holds_is_not_cut(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onionskin.store._CUT_WAIT_SECONDS", 0)
    with onionskin.Store(store.path) as other, other.open("web"):
        with pytest.raises(onionskin.StateError, match="web@SNAPSHOT"):
            store.fork("web")
        assert store.fork("web@clean") == ["web-1"]


def test_what_hides_a_block_between_the_look_and_the_fork_is_noticed(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what the empty head stood on may have lost the block, since all that stood on it hid it."""
    with store.open("web") as web:
        web.write(0, b"b")
        store.fork("web")
        real, seen = forks._below, []

        def changed(*arguments: object) -> list[object]:
            seen.append(1)
            return real(*arguments) if len(seen) == 1 else []

        monkeypatch.setattr(forks, "_below", changed)
        before = rows(store)["layers"]
        (name,) = store.fork("web")
        assert rows(store)["layers"] >= before + 2 and len(seen) == 2
    assert first_byte(store, name) == b"b" and store.check() == []


@pytest.fixture
def wiped(tmp_path: Path) -> Iterator[tuple[onionskin.Store, onionskin.Volume, onionskin.Volume]]:
    """A disk of policy `zero` with an empty head, and its fork, which hides the block that the layer under both has."""
    with onionskin.Store(tmp_path / "wiped") as store, store.create("web", size=64 * BLOCK, wipe="zero") as web:
        web.write(0, b"b" * BLOCK)
        (name,) = store.fork("web", names=["over"])
        with store.open(name) as over:
            over.write(0, b"o" * BLOCK)
            over.flush()
            yield store, web, over


def free_below(over: onionskin.Volume) -> None:
    """Give up what all that stands on the layer below a fork hides of it."""
    head = over._opened.to_write()
    free_hidden(head, unnamed_of(head.store.catalog, over._opened.row.id))


def write_durably(web: onionskin.Volume) -> None:
    """Write a block, and have it in the row of the head that there is something, without which it counts for empty."""
    web.write(0, b"c" * BLOCK)
    compact_map(web._opened.to_write())


def when_found_empty(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Have something happen just after the head that is forked was found empty."""
    real, seen = forks._below, []

    def found(*arguments: Any) -> list[LayerRow]:
        layers = real(*arguments)
        seen.append(1)
        if len(seen) == 1:
            then()
        return layers

    monkeypatch.setattr(forks, "_below", found)


def test_a_block_that_was_given_up_since_the_head_was_found_empty_is_not_missing_in_the_fork(
    wiped: tuple[onionskin.Store, onionskin.Volume, onionskin.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, web, over = wiped

    def hide() -> None:
        write_durably(web)
        free_below(over)

    when_found_empty(monkeypatch, hide)
    assert [first_byte(store, name) for name in store.fork("web")] == [b"c"]
    assert (web[:1], over[:1]) == (b"c", b"o") and not [one for one in store.check() if one.severity == "error"]


def test_a_block_that_a_fork_has_come_to_read_is_not_given_up(
    wiped: tuple[onionskin.Store, onionskin.Volume, onionskin.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was hidden by all when the maps were read, and the fork committed before what was found was."""
    store, web, over = wiped
    found, forked = threading.Event(), threading.Event()
    write_map = hidden_blocks.write_map

    def wait(*arguments: Any) -> tuple[int, int, int]:
        found.set()
        assert forked.wait(300)
        return write_map(*arguments)

    monkeypatch.setattr(hidden_blocks, "write_map", wait)
    giving_up = threading.Thread(target=free_below, args=(over,))

    def hide() -> None:
        write_durably(web)
        giving_up.start()
        assert found.wait(300)

    when_found_empty(monkeypatch, hide)
    names = store.fork("web")
    forked.set()
    giving_up.join()
    assert [first_byte(store, name) for name in names] == [b"b"]
    assert (web[:1], over[:1]) == (b"c", b"o") and not [one for one in store.check() if one.severity == "error"]


def rounds(store: onionskin.Store, count: int, *, write: bool) -> None:
    with store.open("web") as web:
        web.write(BLOCK, b"x" * BLOCK)
        web.flush()
        (name,) = store.fork("web")
        store.delete(name)
        before, count_before = rows(store), files(store)
        for number in range(count):
            if write:
                web.write(number % 64 * BLOCK, number.to_bytes(8, "little"))
            (name,) = store.fork("web")
            store.delete(name)
        after = rows(store)
        # The head inherits what it is folded with: segments without a block go together, once so many are open.
        assert after | {"segments": 0} == before | {"segments": 0} and after["segments"] <= SEGMENTS_OPEN + 8
        assert files(store) <= count_before + SEGMENTS_OPEN + 8
    assert store.check() == []


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.slow
def test_rounds_of_fork_and_delete_leave_the_chain_as_long_as_it_was(store: onionskin.Store, write: bool) -> None:
    rounds(store, 100, write=write)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_rounds_of_fork_and_delete_leave_the_chain_as_long_as_it_was(store: onionskin.Store) -> None:
    rounds(store, 10_000, write=True)


def test_rounds_with_a_closed_disk_leave_the_chain_as_long_as_it_was(store: onionskin.Store) -> None:
    before = rows(store)
    for _ in range(20):
        store.delete(*store.fork("web", count=2))
    store.open("web").close()
    assert rows(store) == before and store.check() == []


# ---- deleting ----


def test_several_volumes_go_in_one_transaction_or_none(store: onionskin.Store) -> None:
    names = store.fork("web@clean", count=3)
    with store.open(names[2]), pytest.raises(onionskin.StateError, match="web-3"):
        store.delete(*names)
    with pytest.raises(onionskin.VolumeNotFoundError):
        store.delete(*names, "gone")
    assert list(store) == ["web", *names]
    store.delete(*names, names[0])
    assert list(store) == ["web"] and store.check() == []


def test_a_volume_goes_together_with_those_that_stand_on_it(store: onionskin.Store) -> None:
    names = store.fork("web@clean", count=2)
    with pytest.raises(onionskin.StateError, match="web-2"):
        store.delete("web", names[0], recursive=True)
    assert store.delete("web", *names, recursive=True) >= BLOCK
    assert list(store) == [] and rows(store) == dict.fromkeys(rows(store), 0) and files(store) == 0


def test_a_hold_keeps_all_that_was_to_be_deleted(store: onionskin.Store) -> None:
    (name,) = store.fork("web@clean")
    store.hold("web", "clean", "backup")
    with pytest.raises(onionskin.StateError, match="backup"):
        store.delete(name, "web", recursive=True)
    assert len(store) == 2


def test_deleting_says_how_much_goes(store: onionskin.Store) -> None:
    (name,) = store.fork("web@clean")
    assert store.delete(name) == 0
    (name,) = store.fork("web@clean")
    with store.open(name) as fork:
        fork.write(0, b"x" * 16 * BLOCK)
    assert store.delete(name) >= 16 * BLOCK
    with pytest.raises(TypeError):
        store.delete()


def test_deleting_many_takes_as_many_calls_of_sqlite_as_deleting_few(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def __getattr__(self, name: str) -> Any:
            if name in ("execute", "executemany"):
                calls.append(name)
            return getattr(self._connection, name)

    calls: list[str] = []
    few, many = store.fork("web@clean", count=20), store.fork("web@clean", count=200, labels={"a": "b"})
    files(store)
    catalog, counts = store._opened.catalog, []
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_connection", Counted(catalog._connection))
        for names in (few, many):
            calls.clear()
            volumes.delete(store._opened, names, recursive=False)
            counts.append(len(calls))
    assert counts[0] == counts[1]
    store._opened.wake()
    assert list(store) == ["web"] and files(store) and store.check() == []


def test_the_files_of_many_that_were_deleted_go_with_the_background(store: onionskin.Store) -> None:
    before = set(store._opened.layout.volumes.iterdir())
    names = store.fork("web@clean", count=20)
    for name in names:
        store.open(name).close()
    store.delete(*names)
    store._opened.finish_work()
    assert set(store._opened.layout.volumes.iterdir()) == before
    assert store.check() == []


@pytest.mark.parametrize("mode", ["w", "r"])
def test_what_was_dropped_under_an_open_fork_is_freed_when_that_closes(store: onionskin.Store, mode: Any) -> None:
    with store.open("web") as web:
        web.write(0, b"b" * BLOCK)
        web.snapshot("later")
    store.fork("web@later", names=["job"])
    with store.open("job") as job:
        job.write(BLOCK, b"c" * BLOCK)
    with store.open("job", mode=mode):
        with store.open("web") as web:
            web.merge("clean")
        store.finish_work()
        assert "pending work: map" in [problem.what for problem in store.check()]  # that handle reads it
    store.finish_work()
    assert store.check() == []


def test_what_was_hidden_under_a_head_that_is_read_is_wiped_when_that_closes(tmp_path: Path) -> None:
    secret = b"never to be found again!" * 64
    with onionskin.Store(tmp_path / "zero") as store:
        with store.create("web", size=64 * BLOCK, wipe="zero") as web:
            for name, data in (("clean", secret), ("later", b"b" * BLOCK)):
                web.write(0, data)
                web.snapshot(name)
        store.fork("web@later", names=["job"])
        with store.open("job", mode="r"):
            with store.open("web") as web:
                web.merge("clean")
            assert files_with(store.path / "segments", secret)
        assert not files_with(store.path / "segments", secret)


def test_what_others_dropped_under_a_head_that_is_read_is_left_to_them(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"b" * BLOCK)
        web.snapshot("later")
    store.fork("web@later", names=["job"])
    with onionskin.Store(store.path) as other:
        with other.open("job", mode="r"):
            with store.open("web") as web:
                web.merge("clean")
            store.finish_work()
        other.finish_work()
        assert "pending work: map" in [problem.what for problem in other.check()]


def test_what_stands_on_each_other_goes_together_and_what_it_stood_on_is_said(store: onionskin.Store) -> None:
    (low,) = store.fork("web@clean", names=["low"])
    with store.open(low) as disk:
        disk.write(0, b"l")
        store.fork("low", names=["mid"])
    with store.open("mid") as disk:
        disk.write(0, b"m")
        store.fork("mid", names=["top", "other"])
    before = rows(store)["layers"]
    (clean,) = store._opened.catalog.snapshots()
    assert volumes.delete(store._opened, ["low", "other", "mid", "top"], recursive=True)[1] == [clean.layer]
    store._opened.wake()
    assert rows(store)["layers"] == before - 6 and files(store) and store.check() == []


def test_with_policy_zero_what_only_the_cut_kept_is_wiped_with_its_last_fork(tmp_path: Path) -> None:
    secret = b"SECRET-OF-MINE--" * 256
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1M", wipe="zero") as web:
        web.write(0, secret)
        names = store.fork("web", count=2)
        web.write(0, bytes(BLOCK))
        web.flush()
        store.delete(*names)
        store.finish_work()
        assert files_with(tmp_path / "store" / "segments", secret[:16]) == []


@pytest.mark.parametrize("count", [1, 37, 38, 39, 77, 101])
def test_each_fork_has_its_rows_however_many_go_into_one_statement(tmp_path: Path, count: int) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            web.write(0, b"x" * BLOCK)
            web.snapshot("clean")
        names = store.fork("web@clean", count=count, labels={"of": "web"})
        assert names == [f"web-{number}" for number in range(1, count + 1)]
        for name in names:
            with store.open(name) as fork:
                assert fork[:BLOCK] == b"x" * BLOCK
                fork.write(BLOCK, name.encode().ljust(BLOCK))
        assert [info.name for info in store.volumes(labels={"of": "web"})] == sorted(names)
        for name in names:
            assert [one.snapshot for one in store.lineage(name)] == ["clean"]
        assert store.check() == []


# ---- lineage ----


def test_lineage_goes_up_to_the_first(store: onionskin.Store) -> None:
    store.fork("web@clean", names=["job"])
    store.fork("job", names=["sub"])
    store.rename("web", "golden")
    found = store.lineage("sub")
    assert [(one.name, one.snapshot) for one in found] == [("job", None), ("golden", "clean")]
    assert all(one.dropped is None for one in found) and found[0].created >= found[1].created
    assert store.lineage("golden") == [] and store.forks_of("golden") == ["job"] and store.forks_of("job") == ["sub"]


def test_a_dropped_ancestor_stays_as_long_as_something_descends_from_it(store: onionskin.Store) -> None:
    store.fork("web", names=["job"])
    store.fork("job", names=["sub"])
    store.delete("job")
    found = store.lineage("sub")
    assert [one.name for one in found] == ["job", "web"] and found[0].dropped is not None
    assert store.forks_of("web") == [] and rows(store)["lineage"] == 3
    store.delete("sub")
    assert rows(store)["lineage"] == 1


def test_a_snapshot_that_was_renamed_knows_its_forks(store: onionskin.Store) -> None:
    store.clone("web", "clean", "a")
    store.rename_snapshot("web", "clean", "installed")
    assert store.forks_of("web@installed") == ["a"]


def test_the_empty_fork_of_a_snapshot_is_the_parent_of_its_own_forks(store: onionskin.Store) -> None:
    store.clone("web", "clean", "a")
    store.fork("a", names=["b"])
    assert [(one.name, one.snapshot) for one in store.lineage("b")] == [("a", None), ("web", "clean")]


def test_what_is_imported_comes_from_nothing(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * BLOCK)
    images.import_image(store, tmp_path / "disk.raw", "imported")
    assert store.lineage("imported") == [] and rows(store)["lineage"] == 2
    store.fork("imported", names=["f"])
    assert [one.name for one in store.lineage("f")] == ["imported"]


def test_an_older_store_learns_where_its_clones_come_from(store: onionskin.Store) -> None:
    store.clone("web", "clean", "a")
    with store.open("a") as a:
        a.snapshot("done")
    store.close()
    make_older(store.path, 3)
    with onionskin.Store(store.path) as again:
        assert [(one.name, one.snapshot) for one in again.lineage("a")] == [("web", "clean")]
        assert again.forks_of("web@clean") == ["a"] and again.info("a").expires is None and again.check() == []


# ---- lifetime and labels ----


@pytest.mark.parametrize("lifetime", ["2h", 7200, 7200.0, timedelta(hours=2)])
def test_a_fork_says_until_when_it_lives(store: onionskin.Store, lifetime: str | float | timedelta) -> None:
    store.fork("web@clean", names=["a"], lifetime=lifetime)
    (info,) = [info for info in store.volumes() if info.name == "a"]
    assert info == store.info("a") and info.expires is not None
    assert timedelta(minutes=119) < info.expires - datetime.now(UTC) <= timedelta(hours=2)
    assert store.info("web").expires is None and store.expire() == [] and "a" in store


def test_only_asking_for_it_drops_what_is_over(store: onionskin.Store) -> None:
    names = store.fork("web@clean", count=3, lifetime="1s")
    expire_now(store, *names[:2])
    store.open("web").close()
    assert len(store) == 4
    assert store.expire() == names[:2] and store.expire() == []
    assert list(store) == ["web", "web-3"] and store.check() == []


def test_what_is_open_or_has_snapshots_or_forks_stays_beyond_its_lifetime(store: onionskin.Store) -> None:
    names = store.fork("web@clean", names=["open", "kept", "parent", "plain"], lifetime="1s")
    with store.open("kept") as kept:
        kept.snapshot("failed")
    store.fork("parent", names=["child"])
    expire_now(store, *names)
    with store.open("open"):
        assert store.expire() == ["plain"]
    assert store.expire() == ["open"]
    store.delete("child")
    assert store.expire() == ["parent"] and list(store) == ["kept", "web"]


def test_one_that_cannot_be_locked_keeps_no_other_beyond_its_lifetime(
    store: onionskin.Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.fork("web@clean", names=["a", "b", "c"], lifetime="1h")
    layout = store._opened.layout
    Path(layout.volume_lock(store._opened.catalog.volume("b").id)).mkdir()
    expire_now(store, "a", "b", "c")
    assert store.expire(dry_run=True) == ["a", "c"]
    assert store.expire() == ["a", "c"]
    assert store.expire() == []
    (said,) = [record.getMessage() for record in caplog.records if "lifetime" in record.getMessage()]
    assert "'b'" in said
    assert "not a regular file" in said


def test_labels_find_volumes(store: onionskin.Store) -> None:
    store.fork("web@clean", names=["a", "b"], labels={"task": "42", "who": "me"})
    store.fork("web@clean", names=["c"], labels={"task": "43"})
    assert [info.name for info in store.volumes(labels={"task": "42"})] == ["a", "b"]
    assert store.volumes(labels={"task": "42", "who": "you"}) == []
    assert store.info("c").labels == {"task": "43"} and store.info("web").labels == {}
    store.delete("a", "b", "c")
    assert rows(store)["labels"] == 0
    for wrong in ({"": "1"}, {"a=b": "1"}, {"a": "two\nlines"}):
        with pytest.raises(ValueError):
            store.fork("web@clean", labels=wrong)


# ---- for a while ----


def test_a_temporary_fork_is_open_and_goes(store: onionskin.Store) -> None:
    with store.temporary("web@clean") as disk:
        disk.write(0, b"x")
        disk.snapshot("s")
        name = disk.name
        assert name in store
    assert list(store) == ["web"] and store.check() == []


def test_a_temporary_fork_goes_whatever_happens_in_the_block(store: onionskin.Store) -> None:
    with pytest.raises(KeyError), store.temporary("web@clean", name="t") as disk:
        store.rename("t", "u")
        disk.close()
        raise KeyError
    with store.temporary("web") as disk:
        disk.close()
        store.delete(disk.name)
    assert list(store) == ["web"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_process_that_leaves_the_block_drops_no_temporary_fork_of_its_parent(store: onionskin.Store) -> None:
    child = None
    try:
        with store.temporary("web@clean", name="t") as disk:
            disk.write(0, b"b")
            child = os.fork()
            if child:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert "t" in store and disk[:1] == b"b"
    except BaseException:
        if child == 0:
            os._exit(1)
        raise
    if child == 0:
        os._exit(0)
    assert "t" not in store


def test_a_temporary_fork_whose_name_went_to_another_volume_is_dropped_and_the_other_one_stays(
    store: onionskin.Store,
) -> None:
    with store.temporary("web@clean", name="t"):
        store.rename("t", "u")
        store.create("t", size="1M").close()
    assert sorted(store) == ["t", "web"]


def test_a_temporary_fork_is_opened_though_its_name_went_to_another_volume_before(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = store._fork

    def fork_and_rename(wanted: forks.Wanted) -> list[str]:
        names = fork(wanted)
        store.rename(names[0], "u")
        store.create(names[0], size="2M").close()
        return names

    monkeypatch.setattr(store, "_fork", fork_and_rename)
    with store.temporary("web@clean", name="t") as disk:
        assert disk.name == "u"
    assert sorted(store) == ["t", "web"]


@pytest.mark.parametrize("when", ["opened", "dropped"])
def test_a_temporary_fork_waits_for_who_holds_it_for_a_moment(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As `expire` does where its lifetime is over, and a group snapshot that another process takes of it."""
    open_, lock = store.open, locks.locked_to_remove
    tried: list[str] = []

    def is_first(call: str) -> bool:
        tried.append(call)
        return tried.count(call) == 1

    @contextmanager
    def locked(layout: Any, ids: Any) -> Iterator[None]:
        with lock(layout, ids) if when == "dropped" and is_first("drop") else nullcontext(), lock(layout, ids):
            yield

    def opened(name: str) -> onionskin.Volume:
        holder = lock(store._opened.layout, {store._opened.catalog.volume(name).id: name})
        with holder if when == "opened" and is_first("open") else nullcontext():
            return open_(name)

    monkeypatch.setattr(store, "open", opened)
    monkeypatch.setattr(volumes, "locked_to_remove", locked)
    monkeypatch.setattr(volumes, "_MOMENT_SECONDS", 300.0)
    monkeypatch.setattr(store_module, "_CUT_WAIT_SECONDS", 300.0)
    with store.temporary("web@clean", name="t") as disk:
        disk.write(0, b"t")
    assert list(store) == ["web"] and len(tried) == 2


def test_a_temporary_fork_that_another_one_drops_at_its_end_is_gone(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = locks.locked_to_remove

    @contextmanager
    def dropped(layout: Any, ids: Any) -> Iterator[None]:
        monkeypatch.setattr(volumes, "locked_to_remove", lock)
        with onionskin.Store(store.path) as other:
            expire_now(store, "t")
            assert other.expire() == ["t"]
        raise onionskin.StateError("it is being dropped")
        yield

    with store.temporary("web@clean", name="t", lifetime="1h"):
        monkeypatch.setattr(volumes, "locked_to_remove", dropped)
    assert list(store) == ["web"]


def test_a_fork_that_waits_for_a_held_disk_keeps_no_fork_of_another_one_waiting(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("held", "free"):
        store.create(name, size=64 * BLOCK).close()
    waits, goes_on = threading.Event(), threading.Event()
    lock = onionskin.Store._lock_to_cut

    def wait(self: onionskin.Store, wanted: forks.Wanted) -> Any:
        if wanted.volume == "held":
            waits.set()
            goes_on.wait()
        return lock(self, wanted)

    monkeypatch.setattr(onionskin.Store, "_lock_to_cut", wait)
    one = threading.Thread(target=store.fork, args=("held",))
    other = threading.Thread(target=store.fork, args=("free",))
    one.start()
    waits.wait()
    other.start()
    other.join(300)
    is_waiting = other.is_alive()
    goes_on.set()
    one.join()
    other.join()
    assert not is_waiting


def test_labels_of_many_forks_are_written_in_the_order_of_their_table(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[LabelRow] = []
    insert_all = Catalog.insert_all

    def note(catalog: Catalog, rows: Any) -> None:
        kept = list(rows)
        written.extend(row for row in kept if isinstance(row, LabelRow))
        insert_all(catalog, kept)

    monkeypatch.setattr(Catalog, "insert_all", note)
    store.fork("web@clean", count=20, labels={"b": "1", "a": "2"})
    assert [(row.volume, row.key) for row in written] == sorted((row.volume, row.key) for row in written)
    assert len(written) == 40


_FORK_WITHOUT_FILES = """
import os, resource, sys
import onionskin

with onionskin.Store(sys.argv[1]) as store:
    store.fork("web@clean", count=1000)
    store._opened.finish_work()
    store._opened.rest(3600)  # the background has files of its own to open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))  # without that of this look
    names = store.fork("web@clean", count=1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(len(names))
"""


def test_many_forks_among_many_volumes_open_no_file(store: onionskin.Store, tmp_path: Path) -> None:
    store.close()
    command = [sys.executable, "-c", _FORK_WITHOUT_FILES, str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stdout) == (0, "1000\n"), run.stderr
