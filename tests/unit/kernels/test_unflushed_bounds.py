"""Whoever never flushes fills neither the disk nor the memory: the volume flushes by itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.listing import found_in

import onionskin

BLOCK = 4096
MIB = 1 << 20
FREED_BYTES_MAX = 32 * MIB  # that wait to be given back
RECORDS_MAX = 1 << 18
RECORD_BYTES = 24  # in the log of the head


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


def allocated_bytes(store: onionskin.Store) -> int:
    return sum(status.st_blocks * 512 for _, status in found_in(Path(store.path, "segments")))


def test_a_disk_that_is_written_and_trimmed_and_never_flushed_takes_no_more_than_what_may_wait(
    store: onionskin.Store,
) -> None:
    with store.create("web", size=MIB) as web:
        for _ in range(3 * FREED_BYTES_MAX // MIB):
            web.write(0, b"x" * MIB)
            web.trim(0, MIB)
            assert allocated_bytes(store) <= FREED_BYTES_MAX + 2 * MIB


def test_a_disk_that_is_trimmed_and_never_flushed_keeps_no_more_records_than_may_wait(
    store: onionskin.Store, tmp_path: Path
) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(2 * (RECORDS_MAX + 2) * BLOCK)
    with store.create("web", base=base) as web:
        for number in range(RECORDS_MAX + 2):  # every second block, so that no record joins another one
            web.trim(2 * number * BLOCK, BLOCK)
        (log,) = Path(store.path, "layers").iterdir()
        assert log.stat().st_size > RECORDS_MAX * RECORD_BYTES
