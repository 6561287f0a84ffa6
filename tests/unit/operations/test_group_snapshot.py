"""Snapshots of several volumes at one instant: all or none, and exactly cut."""

import errno
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.catalog import Catalog
from onionskin.kernels import _volume
from onionskin.operations import seal
from onionskin.operations.seal import Sealing
from onionskin.storage.open_head import OpenHead

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


Make = Callable[..., list[onionskin.Volume]]


@pytest.fixture
def make(store: onionskin.Store) -> Iterator[Make]:
    """Make volumes, each with its name at its begin; they are closed at the end."""
    kept: list[onionskin.Volume] = []

    def make(*names: str) -> list[onionskin.Volume]:
        volumes = [store.create(name, size=16 * BLOCK) for name in names]
        kept.extend(volumes)
        for name, volume in zip(names, volumes, strict=True):
            volume.write(0, name.encode())
        return volumes

    yield make
    for volume in kept:
        volume.close()


def counter(store: onionskin.Store, name: str, snapshot: str) -> int:
    with store.open(name, snapshot=snapshot) as view:
        return int.from_bytes(view.read(BLOCK, 8), "little")


@contextmanager
def stamping(volumes: list[onionskin.Volume]) -> Iterator[None]:
    """Stamp a counter on each volume in turn, each after the one before was answered."""
    stop, begun = threading.Event(), threading.Event()

    def stamp() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for volume in volumes:
                volume.write(BLOCK, number.to_bytes(8, "little"))
            begun.set()

    thread = threading.Thread(target=stamp)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def cut_again_and_again(store: onionskin.Store, make: Make, cuts: int) -> None:
    volumes = make("a", "b")
    with stamping(volumes):
        for number in range(cuts):
            store.snapshot_group({"a": f"s{number}", "b": f"s{number}"})
            ahead = counter(store, "a", f"s{number}") - counter(store, "b", f"s{number}")
            assert ahead in (0, 1)
            for volume in volumes:
                volume.merge(f"s{number}")


def test_no_volume_is_ahead_in_a_cut_of_two(store: onionskin.Store, make: Make) -> None:
    cut_again_and_again(store, make, 15)


@pytest.mark.slow
def test_no_volume_is_ahead_in_many_cuts_of_two(store: onionskin.Store, make: Make) -> None:
    cut_again_and_again(store, make, 150)


@pytest.mark.soak
def test_no_volume_is_ahead_in_a_thousand_cuts_of_two(store: onionskin.Store, make: Make) -> None:
    cut_again_and_again(store, make, 1000)


def test_no_write_comes_between_the_cuts_of_two_volumes(
    store: onionskin.Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = make("a", "b")
    cut_heads = _volume.cut_heads

    def cut_and_write(paths: list[_volume.DataPath], names: list[str]) -> None:
        cut_heads(paths, names)
        for volume in volumes:
            volume.write(BLOCK, (7).to_bytes(8, "little"))

    monkeypatch.setattr(seal, "cut_heads", cut_and_write)
    store.snapshot_group({"a": "s", "b": "s"})
    assert [counter(store, name, "s") for name in ("a", "b")] == [0, 0]


def test_a_volume_that_nobody_holds_is_opened_for_the_group(store: onionskin.Store, make: Make) -> None:
    volumes = make("web", "db")
    volumes[1].close()
    taken = store.snapshot_group({"web": "before", "db": None}, note="both")
    assert list(taken) == ["web", "db"]
    assert taken["web"].name == "before"
    assert {snapshot.note for snapshot in taken.values()} == {"both"}
    assert taken["db"].name.endswith("Z")
    assert store.info("db").holder is None
    for name, snapshot in taken.items():
        with store.open(name, snapshot=snapshot.name) as view:
            assert view.read(0, len(name)) == name.encode()


def test_a_volume_that_another_handle_holds_is_named_and_nothing_is_taken(store: onionskin.Store, make: Make) -> None:
    volumes = make("web", "db")
    volumes[1].close()
    with onionskin.Store(store.path) as other, other.open("db"), pytest.raises(onionskin.StateError, match="db"):
        store.snapshot_group({"web": "s", "db": "s"})
    assert store.snapshots("web") == []
    store.snapshot_group({"web": "s", "db": "s"})


def test_volumes_whose_names_are_swapped_before_they_are_opened_are_not_taken_for_each_other(
    store: onionskin.Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for volume in make("web", "db"):
        volume.close()
    real = store._open_to_cut
    swaps = [("web", "other"), ("db", "web"), ("other", "db")]

    def open_to_cut(name: str) -> OpenHead:
        while swaps:
            store.rename(*swaps.pop(0))
        return real(name)

    monkeypatch.setattr(store, "_open_to_cut", open_to_cut)
    with pytest.raises(onionskin.StateError, match="was renamed meanwhile"):
        store.snapshot_group({"web": "s", "db": "s"})
    assert [store.snapshots(name) for name in ("web", "db")] == [[], []]
    assert list(store.snapshot_group({"web": "s", "db": "s"})) == ["web", "db"]


def test_a_name_that_is_taken_in_one_volume_is_given_to_none(store: onionskin.Store, make: Make) -> None:
    volumes = make("web", "db")
    volumes[1].snapshot("s")
    with pytest.raises(onionskin.SnapshotExistsError, match="db"):
        store.snapshot_group({"web": "s", "db": "s"})
    assert store.snapshots("web") == []


def test_names_that_are_no_mapping_are_refused(store: onionskin.Store, make: Make) -> None:
    make("web")
    with pytest.raises(TypeError, match="mapping"):
        store.snapshot_group(["web"])  # type: ignore[arg-type]


def test_nothing_is_done_for_no_volume(store: onionskin.Store) -> None:
    assert store.snapshot_group({}) == {}


Fail = Callable[[pytest.MonkeyPatch, str, BaseException], None]


def fail_in_begin(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    fail_for_one(monkeypatch, "begin_heads", name, error)


def fail_in_sync(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    fail_for_one(monkeypatch, "sync_heads", name, error)


def fail_for_one(monkeypatch: pytest.MonkeyPatch, step: str, name: str, error: BaseException) -> None:
    """Have a step of the data path fail for one volume, and be done for the others."""
    real: Callable[..., list[Any]] = getattr(seal, step)
    paths_of = seal._paths

    def name_them(sealings: Sequence[Sealing]) -> list[_volume.DataPath]:
        names[:] = [sealing.volume.row.name for sealing in sealings]
        return paths_of(sealings)

    def fail(paths: list[_volume.DataPath], *more: list[Any]) -> list[Any]:
        at = names.index(name)
        ended = real(without(paths, at), *(without(values, at) for values in more))
        if not isinstance(error, Exception):
            raise error
        return [*ended[:at], error, *ended[at:]]

    names: list[str] = []
    monkeypatch.setattr(seal, "_paths", name_them)
    monkeypatch.setattr(seal, step, fail)


def without(values: list[Any], at: int) -> list[Any]:
    return [*values[:at], *values[at + 1 :]]


def fail_in_cut(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(paths: object, names: object) -> None:
        raise error

    monkeypatch.setattr(seal, "cut_heads", fail)


def fail_in_rows(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(self: Catalog, *row: object) -> None:
        raise error

    monkeypatch.setattr(Catalog, "take_lock_bytes", fail)


@pytest.mark.parametrize("failed", ["web", "db"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("fail", [fail_in_begin, fail_in_cut, fail_in_sync, fail_in_rows])
def test_all_volumes_go_on_where_a_step_fails_for_one(
    store: onionskin.Store, make: Make, fail: Fail, error: BaseException, failed: str
) -> None:
    volumes = make("web", "db", "log")
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, failed, error)
        with pytest.raises(type(error)):
            store.snapshot_group(dict.fromkeys(("web", "db", "log"), "s"))
    for volume in volumes:
        assert volume.snapshots == []
        volume.write(BLOCK, b"after")
        volume.flush()
        assert volume.read(0, len(volume.name)) == volume.name.encode()
    store.snapshot_group(dict.fromkeys(("web", "db", "log"), "s"))
    for volume in volumes:
        volume.close()
    for name in ("web", "db", "log"):
        with store.open(name) as volume:
            assert volume.read(BLOCK, 5) == b"after"
            assert [snapshot.name for snapshot in volume.snapshots] == ["s"]
    assert [problem for problem in store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("step", ["begin_heads", "sync_heads"])
def test_of_a_group_only_the_volume_whose_sync_failed_takes_no_more_writes(
    store: onionskin.Store, make: Make, step: str
) -> None:
    """As after a failed sync: what is durable of that one is not known before it is opened again."""
    volumes = {volume.name: volume for volume in make("web", "db", "log")}
    real: Callable[..., list[Any]] = getattr(seal, step)

    def poison(paths: list[_volume.DataPath], *more: list[Any]) -> list[Any]:
        volumes["db"]._path.poison()
        return real(paths, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, step, poison)
        with pytest.raises(onionskin.StateError, match=r"volume 'db'.*open it again"):
            store.snapshot_group(dict.fromkeys(volumes, "s"))
    for name in ("web", "log"):
        volumes[name].write(BLOCK, b"after")
        volumes[name].flush()
        assert volumes[name].snapshots == []
    with pytest.raises(onionskin.StateError, match="open it again"):
        volumes["db"].write(BLOCK, b"after")
    with pytest.raises(onionskin.StateError, match="open it again"):
        store.snapshot_group(dict.fromkeys(volumes, "s"))
    volumes["db"].close()
    with store.open("db") as db:
        assert db[:2] == b"db" and db.snapshots == []
        store.snapshot_group(dict.fromkeys(volumes, "s"))
    assert [len(store.snapshots(name)) for name in volumes] == [1, 1, 1]
    assert [problem for problem in store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("step", ["begin_heads", "sync_heads"])
def test_an_error_of_one_of_several_says_whose_it_is(store: onionskin.Store, make: Make, step: str) -> None:
    make("web", "db")
    with pytest.MonkeyPatch.context() as patch:
        fail_for_one(patch, step, "db", OSError(errno.ENOSPC, "No space left"))
        with pytest.raises(OSError, match="volume 'db': No space left"):
            store.snapshot_group({"web": "s", "db": "s"})


def test_two_groups_at_once_in_opposite_order_both_end(store: onionskin.Store, make: Make) -> None:
    make("a", "b", "c")
    failed: list[BaseException] = []

    def take(names: tuple[str, ...], mark: str) -> None:
        try:
            for number in range(10):
                store.snapshot_group(dict.fromkeys(names, f"{mark}{number}"))
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=take, args=(names, mark))
        for names, mark in ((("a", "b", "c"), "x"), (("c", "b", "a"), "y"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert {len(store.snapshots(name)) for name in "abc"} == {20}


@pytest.mark.parametrize("seed", range(3))
def test_groups_read_as_a_plain_model_says(store: onionskin.Store, make: Make, seed: int) -> None:
    draw = random.Random(seed)
    volumes = {volume.name: volume for volume in make("a", "b", "c")}
    now = {name: bytearray(volume.read(0, 16 * BLOCK)) for name, volume in volumes.items()}
    then: dict[tuple[str, str], bytes] = {}
    for number in range(60):
        if draw.random() < 0.7:
            name, block = draw.choice("abc"), draw.randrange(16)
            volumes[name].write(block * BLOCK, bytes([number + 1]) * BLOCK)
            now[name][block * BLOCK : (block + 1) * BLOCK] = bytes([number + 1]) * BLOCK
        else:
            names = draw.sample("abc", draw.randint(1, 3))
            store.snapshot_group(dict.fromkeys(names, f"s{number}"))
            then |= {(name, f"s{number}"): bytes(now[name]) for name in names}
    for (name, snapshot), expected in then.items():
        with store.open(name, snapshot=snapshot) as view:
            assert view.read(0, 16 * BLOCK) == expected
    assert store.check() == []


def test_a_thread_that_outlives_the_main_one_takes_a_group(store: onionskin.Store, make: Make) -> None:
    for volume in make("web", "db", "log"):
        volume.close()
    program = """
import sys, threading, onionskin

def take():
    threading.main_thread().join()
    with onionskin.Store(sys.argv[1]) as store:
        store.snapshot_group(dict.fromkeys(("web", "db", "log"), "s"))

threading.Thread(target=take).start()
"""
    subprocess.run([sys.executable, "-c", program, store.path], check=True, timeout=300)
    assert [snapshot.name for name in ("web", "db", "log") for snapshot in store.snapshots(name)] == ["s"] * 3
