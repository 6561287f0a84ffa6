"""The map of provenance against an array: which of the layers that were laid over each other each block is of."""

from pathlib import Path

import numpy as np
import pytest
from format.reference_encoder import encode_log, hole, zero
from hypothesis import given, settings
from hypothesis import strategies as st

from onionskin.errors import FormatError, StateError
from onionskin.kernels._maplog import LOCATION_HOLE, LOCATION_ZERO, LayerMap, ProvenanceMap

BLOCK = 4096
BLOCKS = 1600  # four ranges of the index
WINDOW = 1 << 30  # blocks; see csrc/layer/provenance.c

Run = tuple[int, int, int]  # block, count, state: 0 HOLE, 1 DATA, 2 ZERO
layers = st.lists(
    st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 700), st.integers(0, 2)), max_size=12), max_size=6
)


def layer_of(runs: list[Run], block_count: int = BLOCKS) -> LayerMap:
    layer = LayerMap(block_size=BLOCK, block_count=block_count)
    segment = layer.add_segment(b"s" * 16)
    for block, count, state in runs:
        location = (LOCATION_HOLE, segment << 32 | (block * 7919) % 5000, LOCATION_ZERO)[state]
        layer.set(block, min(count, block_count - block), location)
    return layer


def whose(provenance: ProvenanceMap) -> list[tuple[int, int, int, int]]:
    extents = provenance.extents(range(provenance.laid + 1))
    return [(offset // BLOCK, length // BLOCK, layer, state) for offset, length, state, layer, _ in extents]


def expected(stack: list[list[Run]]) -> np.ndarray:
    of_all = np.zeros((2, BLOCKS), int)  # owner, state
    for owner, runs in enumerate(stack, 1):
        of_layer = np.zeros(BLOCKS, int)
        for block, count, state in runs:
            of_layer[block : block + count] = state
        of_all[0, of_layer > 0] = owner
        of_all[1, of_layer > 0] = of_layer[of_layer > 0]
    return of_all


def found(provenance: ProvenanceMap) -> np.ndarray:
    of_all = np.zeros((2, BLOCKS), int)
    for block, count, owner, state in whose(provenance):
        assert not of_all[:, block : block + count].any()
        of_all[:, block : block + count] = [[owner], [state]]
    return of_all


@settings(deadline=None)
@given(layers)
def test_each_block_is_of_the_uppermost_layer_that_has_it(stack: list[list[Run]]) -> None:
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    for runs in stack:
        provenance.lay(layer_of(runs))
    assert provenance.laid == len(stack)
    assert (found(provenance) == expected(stack)).all()


@settings(deadline=None)
@given(layers)
def test_map_files_lie_over_each_other_as_maps_do(
    tmp_path_factory: pytest.TempPathFactory, stack: list[list[Run]]
) -> None:
    directory = tmp_path_factory.mktemp("maps")
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    for number, runs in enumerate(stack):
        path, map_id = directory / str(number), bytes([number]) * 16
        length, frames, crc = layer_of(runs).write(path, map_id=map_id, wipe_zero=False, size_bytes=number * BLOCK)
        size_bytes = provenance.lay_file(path, map_id=map_id, length=length, frames=frames, crc=crc)
        assert size_bytes == number * BLOCK
    assert (found(provenance) == expected(stack)).all()


def test_the_runs_of_one_layer_that_touch_are_one_run_whatever_their_slots() -> None:
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    provenance.lay(layer_of([(0, 3, 1), (3, 5, 1), (8, 2, 2), (10, 600, 1)]))
    assert whose(provenance) == [(0, 8, 1, 1), (8, 2, 1, 2), (10, 600, 1, 1)]


@pytest.mark.parametrize("state", [1, 2])
def test_a_run_over_the_border_of_a_window_is_one_run(state: int) -> None:
    count = WINDOW + 4096
    provenance = ProvenanceMap(block_size=BLOCK, block_count=count)
    provenance.lay(layer_of([(WINDOW - 700, 1400, state), (WINDOW - 1, 1, 3 - state)], count))
    assert whose(provenance) == [
        (WINDOW - 700, 699, 1, state),
        (WINDOW - 1, 1, 1, 3 - state),
        (WINDOW, 700, 1, state),
    ]
    provenance.lay(layer_of([(WINDOW - 700, 1400, state)], count))
    assert whose(provenance) == [(WINDOW - 700, 1400, 2, state)]


def test_more_may_be_laid_after_a_look() -> None:
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    provenance.lay(layer_of([(0, 10, 1)]))
    assert whose(provenance) == [(0, 10, 1, 1)]
    provenance.lay(layer_of([(5, 10, 2)]))
    assert whose(provenance) == [(0, 5, 1, 1), (5, 10, 2, 2)]


def test_what_lies_behind_the_end_is_left_out() -> None:
    provenance = ProvenanceMap(block_size=BLOCK, block_count=8)
    provenance.lay(layer_of([(4, 100, 1), (200, 1, 1)]))
    assert whose(provenance) == [(4, 4, 1, 1)]


def test_blocks_that_a_log_gave_up_show_what_is_below(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(encode_log([[zero(0, 8), hole(2, 3)]], b"m" * 16))
    alone = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    alone.lay_file(path, map_id=b"m" * 16)
    assert whose(alone) == [(0, 2, 1, 2), (5, 3, 1, 2)]
    over = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    over.lay(layer_of([(0, 20, 1)]))
    over.lay_file(path, map_id=b"m" * 16)
    assert whose(over) == [(0, 2, 2, 2), (2, 3, 1, 1), (5, 3, 2, 2), (8, 12, 1, 1)]


def test_a_damaged_map_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map"
    length, frames, crc = layer_of([(0, 10, 1)]).write(path, map_id=b"m" * 16, wipe_zero=False, size_bytes=None)
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    with pytest.raises(FormatError, match="catalog says otherwise"):
        provenance.lay_file(path, map_id=b"m" * 16, length=length, frames=frames, crc=crc ^ 1)
    with pytest.raises(FormatError, match="is the block map"):
        provenance.lay_file(path, map_id=b"n" * 16, length=length)
    data = bytearray(path.read_bytes())
    data[4096 + 70] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged at byte"):
        provenance.lay_file(path, map_id=b"m" * 16, length=length)


def test_a_closed_map_of_owners_raises() -> None:
    provenance = ProvenanceMap(block_size=BLOCK, block_count=BLOCKS)
    provenance.close()
    provenance.close()
    with pytest.raises(StateError, match="closed"):
        provenance.extents([])
    with pytest.raises(StateError, match="closed"):
        provenance.lay(layer_of([]))
