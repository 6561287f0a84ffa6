"""What two states of disks differ in, of one volume, across clones, and of volumes with nothing in common."""

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

import onionskin
from onionskin import delta
from onionskin.operations.differences import State, ends_of

BLOCK = 4096
BLOCKS = 8
BASE = b"b" * (5 * BLOCK) + bytes(BLOCK) + b"e" * 100


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


def pairs_of(extents: "np.ndarray") -> list[tuple[int, int, int]]:
    return [tuple(map(int, extent)) for extent in extents]


@pytest.fixture
def golden(store: onionskin.Store) -> onionskin.Store:
    """A store with golden@clean, and test-1, a clone of it that was written to."""
    with store.create("golden", size=BLOCKS * BLOCK) as disk:
        disk.write(0, b"g" * 4 * BLOCK)
        disk.snapshot("clean")
        disk.write(BLOCK, b"h" * BLOCK)
    store.clone("golden", "clean", "test-1")
    with store.open("test-1") as disk:
        disk.write(3 * BLOCK, b"t" * 2 * BLOCK)
        disk.trim(0, BLOCK)
        disk.snapshot("done")
        disk.write(7 * BLOCK, b"u" * BLOCK)
    return store


# ---- how they are named ----


def test_a_clone_is_compared_with_what_it_was_made_from(golden: onionskin.Store) -> None:
    assert pairs_of(golden.diff("golden@clean", "test-1@done")) == [(0, BLOCK, 2), (3 * BLOCK, 2 * BLOCK, 1)]
    assert pairs_of(golden.diff("golden@clean", "test-1"))[-1] == (7 * BLOCK, BLOCK, 1)


def test_all_ways_to_name_two_states_give_the_same(golden: onionskin.Store) -> None:
    assert pairs_of(golden.diff("golden", "clean")) == [(BLOCK, BLOCK, 1)]
    for call in (("golden@clean",), ("golden@clean", "golden"), ("golden", "golden@clean")):
        assert pairs_of(golden.diff(*call)) == [(BLOCK, BLOCK, 1)]
    there = pairs_of(golden.diff("golden@clean", "test-1@done"))
    assert pairs_of(golden.diff("test-1", "golden@clean", "done")) == there
    with golden.open("test-1") as disk:
        assert pairs_of(disk.diff("golden@clean", "done")) == there


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (("golden@clean", "a", "b"), "three states"),
        (("golden",), "is missing"),
        (("@clean",), "no name of a state"),
        (("golden@",), "no name of a state"),
        (("golden@a@b",), "no name of a state"),
        (("golden@clean", ""), "no name of a state"),
    ],
)
def test_what_names_no_two_states_is_refused(golden: onionskin.Store, call: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        golden.diff(*call)


def test_a_name_of_a_state_is_read_in_one_way() -> None:
    assert ends_of("web", "a", None) == (State("web", "a"), State("web"))
    assert ends_of("web@a", "db", None) == (State("web", "a"), State("db"))
    assert str(State("web", "a")) == "web@a" and str(State("web")) == "web"


def test_a_state_that_is_not_there_is_named(golden: onionskin.Store) -> None:
    with pytest.raises(onionskin.SnapshotNotFoundError, match="nothing"):
        golden.diff("golden@clean", "test-1@nothing")
    with pytest.raises(onionskin.VolumeNotFoundError, match="mail"):
        golden.diff("mail@clean", "test-1")


# ---- without anything in common ----


def test_volumes_on_one_base_differ_in_what_was_written(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(BASE)
    for name, block_size, size in (("a", BLOCK, 4 * BLOCK), ("b", 2 * BLOCK, 16 * BLOCK)):
        with store.create(name, base=tmp_path / "base", block_size=block_size, size=size) as disk:
            disk.write(2 * BLOCK, name.encode())
            disk.snapshot("s")
    assert pairs_of(store.diff("a@s", "b@s")) == [(2 * BLOCK, 2 * BLOCK, 1), (4 * BLOCK, 12 * BLOCK, 0)]


def test_behind_a_flatten_all_that_the_base_may_hold_may_differ(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(BASE)
    with store.create("web", base=tmp_path / "base", size=BLOCKS * BLOCK) as disk:
        disk.snapshot("before")
        disk.flatten()
        disk.write(0, b"x" * BLOCK)
        disk.snapshot("after")
    assert sum(length for _, length, _ in pairs_of(store.diff("web", "before", "after"))) >= len(BASE)


def test_a_stream_over_a_flatten_holds_what_differs_and_no_more(store: onionskin.Store, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(BASE)
    with store.create("web", base=tmp_path / "base", size=BLOCKS * BLOCK) as disk:
        disk.snapshot("before")
        disk.flatten()
        disk.write(BLOCK, b"x" * BLOCK)
        disk.zero(3 * BLOCK, BLOCK)
        disk.snapshot("after")
    sent = delta.delta(store, "web", "before", "after", io.BytesIO())
    assert (sent.data_bytes, sent.zero_bytes) == (BLOCK, BLOCK)


def test_a_stream_leads_from_one_volume_to_another(golden: onionskin.Store, tmp_path: Path) -> None:
    follow(golden, "golden@clean", "test-1@done", tmp_path / "there")


def test_a_stream_to_a_head_is_refused(golden: onionskin.Store) -> None:
    with pytest.raises(ValueError, match="take one first"):
        delta.delta(golden, None, "golden@clean", "test-1", io.BytesIO())


# ---- against a plain model ----


def follow(store: onionskin.Store, a: str, b: str, directory: Path) -> None:
    """Bring an empty volume of another store to a, and from there to b, and compare what both read."""
    with onionskin.Store(directory) as there:
        there.create("copy", size=BLOCK).close()
        for start, end in ((None, a), (a, b)):
            out = io.BytesIO()
            delta.delta(store, None, start, end, out)
            with there.open("copy") as copy:
                delta.apply(io.BytesIO(out.getvalue()), copy)
        assert contents(there, State("copy")) == contents(store, State.named(b))


def contents(store: onionskin.Store, state: State) -> bytes:
    with store.open(state.volume, snapshot=state.snapshot, mode="r") as disk:
        return disk[:]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "trim", "resize", "snapshot", "snapshot", "clone", "flatten", "revert"]),
        st.integers(0, 2),
        st.integers(0, BLOCKS - 1),
        st.integers(1, 4),
    ),
    max_size=18,
)


@given(STEPS, st.booleans(), st.integers(0, 999), st.integers(0, 999))
@settings(max_examples=examples(40), deadline=None)
def test_what_is_not_said_to_differ_reads_the_same_and_a_stream_leads_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]], same: bool, a: int, b: int
) -> None:
    room = tmp_path_factory.mktemp("differences")
    (room / "base").write_bytes(BASE)
    with onionskin.Store(room / "store") as store:
        store.create("v0", base=room / "base", size=BLOCKS * BLOCK - 700).close()
        store.create("v1", base=room / "base" if same else None, size=(BLOCKS - 3) * BLOCK).close()
        for number, step in enumerate(steps):
            run(store, number, *step)
        for name in list(store):
            with store.open(name) as disk:
                disk.snapshot("last")
        states = [State(name, row.name) for name in store for row in store.snapshots(name)]
        states += [State(name) for name in store]
        snapshots = [state for state in states if state.snapshot]
        start, end = snapshots[a % len(snapshots)], states[b % len(states)]
        before, after = contents(store, start), contents(store, end)
        may_differ = np.zeros(len(after), bool)
        for offset, length, _ in pairs_of(store.diff(str(start), str(end))):
            may_differ[offset : offset + length] = True
        both = min(len(before), len(after))
        differs = np.frombuffer(before[:both], np.uint8) != np.frombuffer(after[:both], np.uint8)
        assert not (differs & ~may_differ[:both]).any()
        assert not np.frombuffer(after[both:], np.uint8)[~may_differ[both:]].any()
        if end.snapshot and end.snapshot != start.snapshot:
            follow(store, str(start), str(end), room / "there")


def run(store: onionskin.Store, number: int, verb: str, which: int, at: int, count: int) -> None:
    name = list(store)[which % len(store)]
    if verb == "clone":
        if store.snapshots(name):
            store.clone(name, store.snapshots(name)[at % len(store.snapshots(name))].name, f"c{number}")
        return
    with store.open(name) as disk:
        length = max(min(count * BLOCK, disk.size_bytes - at * BLOCK), 0)
        if verb == "write" and length:
            disk.write(at * BLOCK, bytes([number + 1]) * length)
        elif verb == "trim" and length:
            disk.trim(at * BLOCK, length)
        elif verb == "resize":
            disk.resize((at + 1) * BLOCK + count, force=True)
        elif verb == "snapshot":
            disk.snapshot(f"s{number}")
        elif verb == "flatten":
            disk.flatten()
        elif verb == "revert" and disk.snapshots:
            with suppress(onionskin.StateError):
                disk.revert(disk.snapshots[at % len(disk.snapshots)].name)
