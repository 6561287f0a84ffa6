"""A head whose snapshots fail owns no segment that its data path does not know: the layer could not be opened later."""

from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import LayerRow, SegmentRow
from onionskin.operations.seal import seal
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

BLOCK = 4096


class Refused(Exception):
    """What a transaction is given up with."""


def refuse(sealed: LayerRow, head: LayerRow) -> None:
    raise Refused


def spend_spare(web: onionskin.Volume) -> OpenHead:
    """Have a snapshot given up at its commit, behind which its spare is the old head's."""
    head = web._opened
    assert isinstance(head, OpenHead)
    web.write(BLOCK, b"b" * BLOCK)
    with head.operation(), pytest.raises(Refused):
        seal(head, also=refuse)
    assert not head.path.has_spare
    return head


def test_a_spare_that_the_data_path_was_not_told_of_is_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=8 * BLOCK) as web:
        spend_spare(web)
        change = OpenStore.change

        def interrupted(*arguments: object, **named: object) -> None:
            change(*arguments, **named)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(OpenStore, "change", interrupted)
            web.snapshot("first")
        web.write(2 * BLOCK, b"c" * BLOCK)
        web.snapshot("second")
        store.fork("web@second", names=["job"])
        assert not [found for found in store.check() if found.severity == "error"]
        with onionskin.Store(tmp_path / "store") as other, other.open("job") as job:
            assert job[BLOCK : BLOCK + 1] + job[2 * BLOCK : 2 * BLOCK + 1] == b"bc"


def test_check_names_a_sealed_layer_whose_segment_has_no_file(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=8 * BLOCK) as web:
        web.write(0, b"a" * BLOCK)
        web.snapshot("one")
        catalog = store._opened.catalog
        layer = catalog.snapshots()[0].layer
        missing = SegmentRow(bytes(range(16)), layer, "own", 0, 1 << 40)
        store._opened.change(lambda: catalog.insert(missing))
        (problem,) = [found for found in store.check() if found.severity == "error"]
        assert missing.id.hex() in problem.where
