"""A flattened volume reads the same and needs nothing below it."""

import os
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import LayerRow, SegmentRow
from onionskin.operations import flatten

BLOCK = 65536


@pytest.fixture
def web(tmp_path: Path):
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.write(os.urandom(5000))
        file.seek(20 * BLOCK + 777)
        file.write(os.urandom(3 * BLOCK))
    with (
        onionskin.Store(tmp_path / "store") as store,
        store.create("web", base=base, size=40 * BLOCK, block_size=BLOCK) as web,
    ):
        web.write(21 * BLOCK, os.urandom(BLOCK))
        web.zero(22 * BLOCK, BLOCK)
        web.snapshot("a")
        web.write(30 * BLOCK + 5, os.urandom(3 * BLOCK))
        yield web


def test_a_flattened_volume_reads_the_same_without_its_base(web: onionskin.Volume, tmp_path: Path) -> None:
    before = web.read(0, web.size_bytes)
    steps: list[tuple[int, int]] = []
    web.flatten(progress=lambda done, total: steps.append((done, total)))
    assert web.read(0, web.size_bytes) == before
    assert steps[-1][0] == steps[-1][1] > 0
    web.discard("a")
    web.close()
    (tmp_path / "base.raw").unlink()
    with web.store.open("web") as again:
        assert again.read(0, again.size_bytes) == before
        assert again.parent is None
    assert web.store.check() == []


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_a_disk_of_zeros_is_flattened_into_no_segment(tmp_path: Path, wipe: str) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=4 * BLOCK, wipe=wipe) as web:
            web.write(0, b"x" * BLOCK)
            web.snapshot("a")
            web.trim(0, web.size_bytes)
            web.flatten()
            web.discard("a")
            assert web.read(0, web.size_bytes) == bytes(web.size_bytes)
        store.finish_work()
        assert store.check() == []
        rows = store._opened.catalog.rows(SegmentRow)
        assert {path.stem for path in store._opened.layout.segments.iterdir()} <= {row.id.hex() for row in rows}
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == bytes(web.size_bytes)


def test_a_volume_that_stands_alone_is_not_touched_by_flatten(web: onionskin.Volume) -> None:
    web.flatten()
    head = web._opened.head
    web.flatten()
    assert web._opened.head == head


def test_a_flatten_that_fails_at_its_end_leaves_no_layer_that_nothing_reaches(
    web: onionskin.Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    before = web.read(0, web.size_bytes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flatten, "remove_unreachable_layers", fail)
        web.flatten()
    assert web.read(0, web.size_bytes) == before
    catalog = web.store._opened.catalog
    reached = {layer.id for layer in catalog.chain(web._opened.head)}
    assert {row.id for row in catalog.rows(LayerRow)} == reached
    assert web.store.check() == []


def test_flatten_costs_what_is_written_and_not_the_size_of_the_disk(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("huge", size="64T") as huge:
        huge.write((64 << 40) - 4096, b"e" * 4096)
        huge.snapshot("a")
        huge.flatten()
        assert huge.read((64 << 40) - 4096, 4) == b"eeee"


def test_a_revert_to_a_snapshot_over_a_base_that_changed_after_the_flatten_is_refused(
    web: onionskin.Volume, tmp_path: Path
) -> None:
    web.flatten()
    os.truncate(tmp_path / "base.raw", 12345)
    with pytest.raises(onionskin.ChainError, match="changed"):
        web.revert("a")
