"""A flatten drops nothing that was written while it copied."""

import threading
from pathlib import Path

import onionskin

BLOCK = 4096
COUNT = 512


def test_what_is_written_and_flushed_during_a_flatten_is_there_after_it(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * COUNT * BLOCK)
    expected = bytearray(b"b" * COUNT * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=tmp_path / "base") as web:

        def write(number: int) -> None:
            expected[number * BLOCK : (number + 1) * BLOCK] = b"%c" % number * BLOCK
            web.write(number * BLOCK, b"%c" % number * BLOCK)
            web.flush()

        def write_meanwhile(done: int, total: int) -> None:
            number = len(written)
            written.append(threading.Thread(target=write, args=(number,)))
            written[-1].start()
            written[-1].join()

        written: list[threading.Thread] = []
        write(200)
        written.clear()
        web.flatten(progress=write_meanwhile)
        assert written
        assert web.read(0, web.size_bytes) == expected
        web.write(300 * BLOCK, b"behind")
        expected[300 * BLOCK : 300 * BLOCK + 6] = b"behind"
    (tmp_path / "base").unlink()
    with onionskin.Store(tmp_path / "store") as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == expected
        assert store.check() == []


def test_writers_lose_nothing_that_they_flushed_beside_a_flatten(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * COUNT * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=tmp_path / "base") as web:
        stop = threading.Event()
        flushed: dict[int, int] = {}

        def write() -> None:
            count = 0
            while not stop.is_set():
                count += 1
                web.write(count % COUNT * BLOCK, count.to_bytes(8, "little"))
                web.flush()
                flushed[count % COUNT] = count

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(5):
                web.snapshot(f"s{number}")
                web.flatten()
        finally:
            stop.set()
            writer.join()
        found = {number: int.from_bytes(web.read(number * BLOCK, 8), "little") for number in flushed}
        assert found == flushed
