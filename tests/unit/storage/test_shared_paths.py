"""Views of one snapshot share an index, and each of them ends by itself."""

from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=8 * BLOCK) as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("clean")
        yield store


def test_two_views_of_a_snapshot_share_one_data_path(store: onionskin.Store) -> None:
    with store.open("web", snapshot="clean") as first, store.open("web", snapshot="clean") as second:
        assert first._path is second._path


def test_a_view_goes_on_when_another_of_the_same_snapshot_is_closed(store: onionskin.Store) -> None:
    first = store.open("web", snapshot="clean")
    with store.open("web", snapshot="clean") as second:
        first.close()
        with pytest.raises(onionskin.StateError, match="closed"):
            first.read(0, BLOCK)
        assert second.read(0, BLOCK) == b"a" * BLOCK


def test_the_last_view_closes_the_data_path(store: onionskin.Store) -> None:
    views = [store.open("web", snapshot="clean") for _ in range(3)]
    path = views[0]._path
    for view in views:
        assert not path.closed
        view.close()
    assert path.closed


def test_an_array_of_a_closed_view_keeps_its_segment_when_all_else_is_deleted(store: onionskin.Store) -> None:
    with store.open("web", snapshot="clean") as first, store.open("web", snapshot="clean"):
        array = first.view(0, BLOCK)
    store.delete("web", recursive=True)
    store.check(repair=True)
    assert len(list((store.path / "segments").iterdir())) == 1
    assert array.tobytes() == b"a" * BLOCK
    del array
    store.check(repair=True)
    assert list((store.path / "segments").iterdir()) == []


def test_a_view_that_is_opened_again_after_the_last_was_closed_is_made_anew(store: onionskin.Store) -> None:
    with store.open("web", snapshot="clean") as first:
        path = first._path
    with store.open("web", snapshot="clean") as second:
        assert second._path is not path
        assert second.read(0, BLOCK) == b"a" * BLOCK


def test_an_array_over_a_head_keeps_writers_from_it_also_past_close(store: onionskin.Store) -> None:
    head = store.open("web", mode="r")
    array = head.view(0, BLOCK)
    head.close()
    with pytest.raises(onionskin.StateError, match="open for reading"):
        store.open("web")
    assert bytes(array) == b"a" * BLOCK
    del array
    with store.open("web") as web:
        web.write(0, b"b" * BLOCK)
