"""A view reads its snapshot for as long as it is open, whatever the same process does to the tree meanwhile."""

from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


@pytest.fixture(params=["release", "zero"])
def web(tmp_path: Path, request: pytest.FixtureRequest):
    with (
        onionskin.Store(tmp_path / "store") as store,
        store.create("web", size=64 * BLOCK, wipe=request.param) as web,
    ):
        yield web


def test_a_view_and_its_arrays_outlive_the_discard_of_their_snapshot(web: onionskin.Volume) -> None:
    web.snapshot("a")
    web.write(0, b"x" * 32 * BLOCK)
    web.snapshot("b")
    web.revert("a")
    with web.store.open("web", snapshot="b") as view:
        array = view.view(0, BLOCK)
        web.discard("b")
        web.store.finish_work()
        assert view.read(0, 32 * BLOCK) == b"x" * 32 * BLOCK
    assert array.tobytes() == b"x" * BLOCK


def test_a_view_outlives_a_merge_that_frees_what_was_written_again(web: onionskin.Volume) -> None:
    web.write(0, b"1" * 8 * BLOCK)
    web.snapshot("c")
    web.write(0, b"2" * 8 * BLOCK)
    with web.store.open("web", snapshot="c") as view:
        web.merge("c")
        web.store.finish_work()
        assert view.read(0, 8 * BLOCK) == b"1" * 8 * BLOCK
    assert web.read(0, 8 * BLOCK) == b"2" * 8 * BLOCK


def test_what_a_closed_view_kept_from_being_freed_is_freed_at_the_next_open(web: onionskin.Volume) -> None:
    store = web.store
    web.snapshot("a")
    web.write(0, b"x" * BLOCK)
    web.snapshot("b")
    web.revert("a")
    with store.open("web", snapshot="b"):
        web.discard("b")
        store.finish_work()
        assert len(list(store._opened.layout.segments.iterdir())) == 1
    web.close()
    store.open("web").close()
    assert list(store._opened.layout.segments.iterdir()) == []


def test_a_closed_view_says_so(web: onionskin.Volume) -> None:
    web.snapshot("a")
    view = web.store.open("web", snapshot="a")
    view.close()
    with pytest.raises(onionskin.StateError, match="closed"):
        view.view(0, 1)
