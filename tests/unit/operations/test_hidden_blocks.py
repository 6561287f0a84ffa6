"""Blocks of a layer without a name that all hide which stand on it: with policy `zero` nothing of them is left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.operations import hidden_blocks, pinned

BLOCK = 4096
SIZE = 64 * BLOCK


def canary(block: int) -> bytes:
    return f"secret {block:04}!".encode()


def secrets(first: int, count: int) -> bytes:
    return b"".join(canary(block).ljust(BLOCK, b"s") for block in range(first, first + count))


def left(store: onionskin.Store) -> set[int]:
    """Return the blocks whose secrets are in a file of the store."""
    store.finish_work()
    data = b"".join(path.read_bytes() for path in store._opened.layout.segments.iterdir())
    return {block for block in range(SIZE // BLOCK) if canary(block) in data}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


def overwrite(volume: onionskin.Volume, first: int, last: int) -> None:
    volume.write(first * BLOCK, b"x" * ((last - first) * BLOCK))


def branch(web: onionskin.Volume) -> None:
    """Make a disk of 40 secrets, and two snapshots that overwrite [0, 30) and [10, 40) of them; the head is elsewhere."""
    web.snapshot("start")
    web.write(0, secrets(0, 40))
    web.snapshot("shared")
    overwrite(web, 0, 30)
    web.snapshot("one")
    web.revert("shared")
    overwrite(web, 10, 40)
    web.snapshot("two")
    web.revert("start")


def check_branches(store: onionskin.Store) -> None:
    with store.open("web", snapshot="one") as one, store.open("web", snapshot="two") as two:
        assert one.read(0, 40 * BLOCK) == b"x" * (30 * BLOCK) + secrets(30, 10)
        assert two.read(0, 40 * BLOCK) == secrets(0, 10) + b"x" * (30 * BLOCK)
    assert store.check() == []


def test_what_all_branches_hide_goes_with_the_name(store: onionskin.Store) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        branch(web)
        assert left(store) == set(range(40))
        web.merge("shared")
        assert left(store) == {*range(10), *range(30, 40)}
    check_branches(store)


def test_what_one_branch_reads_goes_with_that_branch(store: onionskin.Store) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        branch(web)
        web.merge("shared")
        web.revert("one")
        web.snapshot("three")
        web.revert("start")
        web.merge(
            "one"
        )  # a layer without a name on one without a name: what it hides counts, and so does what is above
        assert left(store) == {*range(10), *range(30, 40)}
        web.discard("two")
        assert left(store) == set(range(30, 40))
        web.discard("three")
        assert left(store) == set()


def test_what_two_layers_up_all_hide_goes(store: onionskin.Store) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        web.write(0, secrets(0, 40))
        web.snapshot("low")
        overwrite(web, 50, 60)  # hides nothing of it
        web.snapshot("fork")
        for name, first in (("one", 0), ("two", 20)):
            web.revert("fork")
            overwrite(web, first, first + 30)
            web.snapshot(name)
        web.merge("fork")
        web.merge("low")
        assert left(store) == {*range(20), *range(30, 40)}
        with store.open("web", snapshot="one") as one:
            assert one.read(30 * BLOCK, 10 * BLOCK) == secrets(30, 10)
    assert store.check() == []


def clone_of_a_merged_name(store: onionskin.Store) -> None:
    """Two heads on a layer without a name, of which the first overwrote all of the secrets, and the other none."""
    with store.create("web", size=SIZE, wipe="zero") as web:
        web.write(0, secrets(0, 40))
        web.snapshot("shared")
        store.clone("web", "shared", "other")
        overwrite(web, 0, 40)
        web.merge("shared")


def test_a_head_that_has_not_written_reads_all(store: onionskin.Store) -> None:
    clone_of_a_merged_name(store)
    with store.open("web"), store.open("other") as other:
        assert other.read(0, 40 * BLOCK) == secrets(0, 40)
    assert left(store) == set(range(40))


def test_what_heads_wrote_counts_when_one_is_opened_and_the_others_were_closed(store: onionskin.Store) -> None:
    clone_of_a_merged_name(store)
    with store.open("other") as other:
        overwrite(other, 0, 20)
    with store.open("web") as web:
        assert left(store) == set(range(20, 40))
        assert web.read(0, 40 * BLOCK) == b"x" * (40 * BLOCK)
    with store.open("other") as other:
        assert other.read(0, 40 * BLOCK) == b"x" * (20 * BLOCK) + secrets(20, 20)
        overwrite(other, 20, 40)
        other.flush()
        with store.open("web"):  # how much of the head that is open now is durable nobody else knows
            assert left(store) == set(range(20, 40))
    with store.open("other"):
        assert left(store) == set()
    assert store.check() == []


def test_a_view_reads_on_what_it_was_opened_with(store: onionskin.Store) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        branch(web)
        with store.open("web", snapshot="shared") as view:
            web.merge("shared")
            assert view.read(0, 40 * BLOCK) == secrets(0, 40)
        assert left(store) == {*range(10), *range(30, 40)}
    check_branches(store)


def test_what_is_sealed_for_a_reader_counts_without_what_was_written_since(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone_of_a_merged_name(store)
    with store.open("other") as other, monkeypatch.context() as patch:
        patch.setattr(pinned, "_fold_back", lambda volume, layer: None)  # as if it was read still
        other.write(50 * BLOCK, b"y")
        other.export(tmp_path / "image")
        overwrite(other, 0, 40)
    with store.open("web"):
        assert left(store) == set(range(40))
    with store.open("other"):
        assert left(store) == set()


def test_secrets_that_a_volume_of_another_policy_took_over_go_too(store: onionskin.Store) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        web.write(0, secrets(0, 40))
        web.snapshot("clean")
        store.clone("web", "clean", "other", wipe="release")
        web.merge("clean")
    store.delete("web")
    with store.open("other") as other:
        other.snapshot("shared")
        for name, first in (("one", 0), ("two", 10)):
            other.revert("shared")
            overwrite(other, first, first + 30)
            other.snapshot(name)
        assert left(store) == set(range(40))
        other.merge("shared")
        assert left(store) == {*range(10), *range(30, 40)}


@pytest.mark.parametrize(("layers_max", "is_looked_through"), [(1, False), (2, True)])
def test_what_stands_below_more_layers_than_an_opening_has_time_for_is_left(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, layers_max: int, is_looked_through: bool
) -> None:
    monkeypatch.setattr(hidden_blocks, "LAYERS_MAX", layers_max)
    with store.create("web", size=SIZE, wipe="zero") as web:
        branch(web)
        web.merge("shared")
        assert (left(store) == set(range(40))) is not is_looked_through
    check_branches(store)


def test_with_policy_release_nothing_is_rewritten(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.create("web", size=SIZE) as web:
        branch(web)
        monkeypatch.setattr(hidden_blocks, "without_hidden", None)
        web.merge("shared")
    check_branches(store)


def test_a_tree_that_changes_meanwhile_is_left_for_the_next_time(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.create("web", size=SIZE, wipe="zero") as web:
        branch(web)
        store.clone("web", "shared", "other")
        with store.open("other") as other:
            overwrite(other, 0, 40)
        without = hidden_blocks.without_hidden

        def while_a_clone_goes(*arguments: Any) -> dict[bytes, int]:
            store.delete("other")
            return without(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(hidden_blocks, "without_hidden", while_a_clone_goes)
            web.merge("shared")
        assert left(store) == set(range(40))
    check_branches(store)
    with store.open("web"):
        assert left(store) == {*range(10), *range(30, 40)}
    check_branches(store)
