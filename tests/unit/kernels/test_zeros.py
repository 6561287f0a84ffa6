"""Runs of zero blocks, and of blocks that two buffers have in common, against loops over blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onionskin.kernels._copy import split_same, split_zeros


@given(
    blocks=st.lists(st.booleans(), max_size=12),
    tail=st.integers(0, 63),
    tail_is_zero=st.booleans(),
    block_size=st.sampled_from([8, 64]),
)
def test_runs_are_those_that_a_loop_over_blocks_finds(
    blocks: list[bool], tail: int, tail_is_zero: bool, block_size: int
) -> None:
    tail %= block_size
    data = np.zeros(len(blocks) * block_size + tail, dtype=np.uint8)
    for index, is_zero in enumerate(blocks):
        if not is_zero:
            data[index * block_size + block_size - 1] = 1
    if tail and not tail_is_zero:
        data[-1] = 1
    expected: list[tuple[int, int, bool]] = []
    for start in range(0, len(data), block_size):
        stop = min(start + block_size, len(data))
        is_zero = not data[start:stop].any()
        if expected and expected[-1][2] == is_zero:
            expected[-1] = (expected[-1][0], stop, is_zero)
        else:
            expected.append((start, stop, is_zero))
    assert split_zeros(data, block_size) == expected


@given(blocks=st.lists(st.booleans(), max_size=12), tail=st.integers(0, 63), block_size=st.sampled_from([1, 8, 64]))
def test_runs_of_two_buffers_are_those_that_a_loop_over_blocks_finds(
    blocks: list[bool], tail: int, block_size: int
) -> None:
    a = bytes(range(1, 65)) * (len(blocks) + 1)
    a = a[: len(blocks) * block_size + tail % block_size]
    b = bytearray(a)
    for index, is_same in enumerate(blocks):
        if not is_same:
            b[index * block_size + block_size - 1] ^= 1
    expected: list[tuple[int, int, bool]] = []
    for start in range(0, len(a), block_size):
        stop = min(start + block_size, len(a))
        is_same = a[start:stop] == b[start:stop]
        if expected and expected[-1][2] == is_same:
            expected[-1] = (expected[-1][0], stop, is_same)
        else:
            expected.append((start, stop, is_same))
    assert split_same(a, b, block_size) == expected


def test_only_buffers_of_one_length_are_compared() -> None:
    with pytest.raises(ValueError, match="4 bytes are compared with 5"):
        split_same(bytes(4), bytes(5), 1)
    with pytest.raises(ValueError, match="blocks of 0 bytes"):
        split_same(b"a", b"a", 0)
