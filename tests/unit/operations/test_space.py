"""What a volume uses, and what of it was written since its last snapshot, of one volume as of all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.operations.usage import snapshot_space

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        yield store


def blocks(count: int) -> bytes:
    return b"x" * (count * BLOCK)


def space(store: onionskin.Store) -> dict[str, tuple[int, int]]:
    """Return (used, written) of each volume in blocks; it is the same by one and by all."""
    found = {one.name: one for one in store.volumes()}
    assert {name: store.info(name) for name in found} == found
    return {name: (one.used_bytes // BLOCK, one.written_bytes // BLOCK) for name, one in found.items()}


def of_snapshots(store: onionskin.Store, name: str) -> dict[str, tuple[int, int]]:
    found = snapshot_space(store._opened, name)
    return {one.snapshot: (one.used_bytes // BLOCK, one.written_bytes // BLOCK) for one in found}


def test_what_a_snapshot_holds_is_its_volumes_also_while_clones_stand_on_it(store: onionskin.Store) -> None:
    with store.create("golden", size="1M") as volume:
        volume.write(0, blocks(8))
        volume.snapshot("clean")
    store.clone("golden", "clean", "test")
    with store.open("test") as test:
        test.write(0, blocks(3))
    assert space(store) == {"golden": (8, 0), "test": (3, 3)}
    with store.open("test") as test:
        test.snapshot("done")
        test.write(0, blocks(2))
        test.flush()
        assert space(store) == {"golden": (8, 0), "test": (5, 2)}
    assert of_snapshots(store, "test") == {"done": (2, 3)}


def test_a_layer_without_a_name_counts_to_its_volume_and_to_none_where_several_stand_on_it(
    store: onionskin.Store,
) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, blocks(4))
        web.snapshot("a")
        web.write(4 * BLOCK, blocks(2))
        web.snapshot("b")
        web.revert("a")
        web.write(8 * BLOCK, blocks(1))
        web.flush()
        assert space(store) == {"web": (7, 1)}
        web.merge("a")  # b and the head stand on its layer
        assert space(store) == {"web": (7, 5)}
    store.clone("web", "b", "clone")
    assert space(store) == {"web": (7, 5), "clone": (0, 0)}
    with store.open("web") as web:
        web.merge("b")  # the head and the clone stand on the layer of a, and only the clone on that of b
    assert space(store) == {"clone": (2, 2), "web": (1, 1)}


def test_a_snapshot_that_nothing_stands_on_gives_back_all_of_it_when_it_is_dropped(store: onionskin.Store) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, blocks(4))
        web.snapshot("a")
        web.write(4 * BLOCK, blocks(2))
        web.snapshot("b")
        web.revert("a")
        assert of_snapshots(store, "web") == {"a": (0, 4), "b": (2, 2)}
        web.merge("b")
    assert space(store) == {"web": (4, 0)}


def test_what_is_written_again_is_what_the_snapshot_before_uses(store: onionskin.Store) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, blocks(4))
        web.snapshot("a")
        web.write(0, blocks(3))
        web.snapshot("b")
        assert of_snapshots(store, "web") == {"a": (3, 4), "b": (0, 3)}
        before = space(store)["web"]
        web.merge("a")
        store.check()
        assert before == (7, 0)
    store.check(repair=True)
    assert space(store) == {"web": (4, 0)}


def test_a_volume_that_nobody_wrote_to_uses_nothing(store: onionskin.Store) -> None:
    store.create("empty", size="1M").close()
    assert space(store) == {"empty": (0, 0)}


def test_a_staged_volume_keeps_a_layer_from_counting_to_another(store: onionskin.Store) -> None:
    with store.create("web", size="1M") as web:
        web.write(0, blocks(4))
        web.snapshot("a")
    store.clone("web", "a", "staged")
    with store.open("web") as web:
        web.merge("a")
    assert space(store)["web"] == (0, 0)
    catalog = store._opened.catalog
    store._opened.change(
        lambda: catalog.update(onionskin.catalog.VolumeRow, catalog.volume("staged").id, name="@staged")
    )
    assert space(store) == {"web": (0, 0)}
