"""With policy `zero` nothing is overwritten that a read may still copy from."""

import threading
from pathlib import Path

import pytest

import onionskin

SIZE = 8 << 20
READERS = 8
MERGES = 12


@pytest.mark.slow
def test_reads_beside_merges_into_the_base_see_no_wiped_byte(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"0" * SIZE)
    zeros: list[int] = []
    stop = threading.Event()
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=tmp_path / "base", wipe="zero") as web:
        web.write(0, b"A" * SIZE)

        def read() -> None:
            buffer = bytearray(SIZE)
            while not stop.is_set():
                web.readinto(0, buffer)
                zeros.append(buffer.count(0))

        readers = [threading.Thread(target=read) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(MERGES):
                web.write(0, b"A" * SIZE)
                web.merge_into_base()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    assert zeros
    assert max(zeros) == 0
