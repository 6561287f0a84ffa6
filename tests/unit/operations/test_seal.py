"""Sealing a head in two parts, so that several heads can be sealed in one transaction."""

from contextlib import ExitStack
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import LayerRow
from onionskin.operations.seal import Sealing, begin_seals, describe_all, write_sealed

BLOCK = 4096


@pytest.fixture
def pair(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        volumes = [store.create(name, size=16 * BLOCK) for name in ("web", "db")]
        for number, volume in enumerate(volumes):
            volume.write(0, b"%d" % number * BLOCK)
        yield volumes


def begin(stack: ExitStack, volumes: list[onionskin.Volume]) -> list[Sealing]:
    for volume in volumes:
        stack.enter_context(volume._opened.to_write().operation())
    return [stack.enter_context(begin_seals([volume._opened.to_write()]))[0] for volume in volumes]


def write_rows(sealings: list[Sealing]) -> list[LayerRow]:
    store = sealings[0].volume.store
    rows = [sealed for sealed, _ in write_sealed(store, describe_all(store, sealings))]
    for sealing in sealings:
        sealing.share_next()
    return rows


def test_several_heads_are_sealed_in_one_transaction(pair: list[onionskin.Volume]) -> None:
    catalog = pair[0].store._opened.catalog
    heads = [volume._opened.head for volume in pair]
    with ExitStack() as stack:
        begun = begin(stack, pair)
        with catalog.transaction():
            sealed = write_rows(begun)
    for sealing in begun:
        sealing.finish()
    assert [row.id for row in sealed] == heads
    for number, volume in enumerate(pair):
        assert catalog.layer(volume._opened.head).parent == heads[number]
        volume.write(BLOCK, b"after" * 100)
        volume.flush()
        volume.close()
    for number, name in enumerate(("web", "db")):
        with pair[0].store.open(name) as volume:
            assert volume.read(0, 2 * BLOCK)[:BLOCK] == b"%d" % number * BLOCK
            assert volume.read(BLOCK, 5) == b"after"
    assert pair[0].store.check() == []


def test_all_heads_go_on_as_they_were_where_their_one_transaction_fails(pair: list[onionskin.Volume]) -> None:
    catalog = pair[0].store._opened.catalog
    heads = [volume._opened.head for volume in pair]
    with pytest.raises(InterruptedError), ExitStack() as stack:
        begun = begin(stack, pair)
        with catalog.transaction():
            write_rows(begun)
            raise InterruptedError
    assert [volume._opened.head for volume in pair] == heads
    for number, volume in enumerate(pair):
        volume.write(BLOCK, b"after" * 100)
        volume.snapshot("next")
        assert volume.read(0, BLOCK) == b"%d" % number * BLOCK
    assert [problem for problem in pair[0].store.check() if problem.severity == "error"] == []
