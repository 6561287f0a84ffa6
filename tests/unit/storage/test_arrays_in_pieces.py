"""The array of a view is made of mappings; a process has 65,530 of them, so a range in many pieces is copied."""

from pathlib import Path

import numpy
import pytest

import onionskin

BLOCK = 4096
PIECES_MAX = 4096


def mapping_count() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


@pytest.mark.parametrize(("pieces", "is_copied"), [(PIECES_MAX // 2, False), (PIECES_MAX + 2, True)])
def test_a_range_in_more_pieces_than_may_be_mapped_is_copied(tmp_path: Path, pieces: int, is_copied: bool) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=2 * pieces * BLOCK) as web:
            blocks = numpy.arange(pieces) * 2
            web.write_blocks(blocks, numpy.full((pieces, BLOCK), 7, numpy.uint8))
            web.snapshot("scattered")
        with store.open("web", snapshot="scattered") as view:
            view.read(0, BLOCK)
            before = mapping_count()
            array = view.view(0, view.size_bytes)
            more = mapping_count() - before
            assert (more < 64) if is_copied else (more >= pieces)
            assert array.size == view.size_bytes and not array.flags.writeable
            shown = array.reshape(-1, 2, BLOCK)
            assert (shown[:, 0] == 7).all() and not shown[:, 1].any()
