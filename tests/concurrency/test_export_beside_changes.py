"""An export, and a stream, are one state of the disk that there was, whatever other threads do meanwhile."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy

import onionskin
from onionskin import delta

BLOCK = 4096
BLOCKS = 1024
EXPORTS = 12


@contextmanager
def beside(change: Callable[[int], object]) -> Iterator[None]:
    """Run a change in another thread over and over, at least once, until the block ends."""
    done = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for number in count():
                change(number)
                if done.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert failures == []


def test_an_export_beside_a_writer_holds_no_block_of_another_place(tmp_path: Path) -> None:
    """Block i only ever holds the byte i % 251 + 1, or zeros; its slot is reused by others."""
    stamps = (numpy.arange(BLOCKS) % 251 + 1).astype(numpy.uint8)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=BLOCKS * BLOCK) as web:
        web.write(0, numpy.repeat(stamps, BLOCK))
        random = numpy.random.default_rng(1)

        def change(number: int) -> None:
            web.trim(0, BLOCKS * BLOCK)
            web.flush()
            order = random.permutation(BLOCKS).astype(numpy.uint64)
            web.write_blocks(order, numpy.repeat(stamps[order], BLOCK))
            web.flush()

        with beside(change):
            for _ in range(EXPORTS):
                web.export(tmp_path / "out")
                image = numpy.fromfile(tmp_path / "out", numpy.uint8).reshape(BLOCKS, BLOCK)
                assert ((image == stamps[:, None]) | (image == 0)).all()
                assert (image == image[:, :1]).all()
    with onionskin.Store(tmp_path / "store") as store:
        assert store.check() == []


def test_an_export_of_a_head_has_all_that_was_acknowledged_before_and_nothing_half(tmp_path: Path) -> None:
    """One writer counts up in block 0, then in block 1: an instant never has block 1 ahead, nor two behind."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=2 * BLOCK) as web:
        acknowledged = [0]

        def change(number: int) -> None:
            web.write(0, number.to_bytes(8, "little"))
            web.write(BLOCK, number.to_bytes(8, "little"))
            acknowledged[0] = number

        with beside(change):
            for _ in range(EXPORTS):
                before = acknowledged[0]
                web.export(tmp_path / "out")
                image = (tmp_path / "out").read_bytes()
                first, second = (int.from_bytes(image[at : at + 8], "little") for at in (0, BLOCK))
                assert before <= second <= first <= second + 1


def test_an_export_beside_reverts_and_merges_is_a_disk_that_there_was(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=BLOCKS * BLOCK) as web:
        for name in "abc":
            web.write(0, name.encode() * BLOCKS * BLOCK)
            web.snapshot(name)

        def change(number: int) -> None:
            web.revert("abc"[number % 3])
            web.snapshot("extra")
            web.merge("extra")

        with beside(change):
            for _ in range(EXPORTS):
                web.export(tmp_path / "out")
                image = (tmp_path / "out").read_bytes()
                assert image == image[:1] * len(image)
                assert image[:1] in (b"a", b"b", b"c")
        assert store.check() == []


def test_a_stream_is_of_one_snapshot_while_its_name_goes_from_one_to_another(tmp_path: Path) -> None:
    """The note says what the disk was filled with when the snapshot was taken."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=8 * BLOCK) as web:
        web.snapshot("a")
        web.write(0, b"0" * 8 * BLOCK)
        web.snapshot("b", "0")
        web.snapshot("c")  # so that b is never the last

        def change(number: int) -> None:
            web.revert("a")
            filled = str(number % 10)
            web.discard("b", recursive=True)
            web.write(0, filled.encode() * 8 * BLOCK)
            web.snapshot("b", filled)

        with beside(change):
            for number in range(4 * EXPORTS):
                out = io.BytesIO()
                try:
                    sent = delta.delta(store, "web", "a" if number % 2 else None, "b", out)
                except onionskin.SnapshotNotFoundError:
                    continue  # there was none just then
                assert out.getvalue().count(sent.note.encode()) >= 8 * BLOCK
