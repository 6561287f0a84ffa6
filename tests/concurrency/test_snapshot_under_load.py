"""Snapshots while other threads write and read: each is a point in time."""

import threading
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096
WRITERS = 3
SNAPSHOTS = 25


def stamp(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def number_of(block: bytes) -> int:
    number = int.from_bytes(block[:8], "little")
    assert block == stamp(number), "a block is torn between two writes"
    return number


class Writer(threading.Thread):
    """Writes 1, 2, 3... to its own block; `acknowledged` follows each write, `begun` goes before it."""

    def __init__(self, volume: onionskin.Volume, index: int) -> None:
        super().__init__()
        self.volume, self.index = volume, index
        self.begun = self.acknowledged = 0
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.begun += 1
                self.volume.write(self.index * BLOCK, stamp(self.begun))
                self.acknowledged = self.begun
        except BaseException as error:
            self.failure = error


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_a_snapshot_holds_what_was_acknowledged_before_and_nothing_that_began_after(tmp_path: Path, wipe: str) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=64 * BLOCK, wipe=wipe) as web:
        writers = [Writer(web, index) for index in range(WRITERS)]
        for writer in writers:
            writer.start()
        bounds = []
        for number in range(SNAPSHOTS):
            least = [writer.acknowledged for writer in writers]
            web.snapshot(f"s{number}")
            bounds.append((least, [writer.begun for writer in writers]))
            if number % 5 == 4:
                web.merge(f"s{number - 2}")
        for writer in writers:
            writer.stop.set()
            writer.join()
            assert writer.failure is None
        for number, (least, most) in enumerate(bounds):
            if number % 5 == 2:
                continue
            with store.open("web", snapshot=f"s{number}") as view:
                for writer in writers:
                    seen = number_of(view.read(writer.index * BLOCK, BLOCK))
                    assert least[writer.index] <= seen <= most[writer.index]
        for writer in writers:
            assert number_of(web.read(writer.index * BLOCK, BLOCK)) == writer.acknowledged


def test_readers_never_see_another_blocks_data_while_slots_are_reused(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=256 * BLOCK) as web:
        stop = threading.Event()
        wrong: list[tuple[int, int]] = []

        def mark(block: int) -> bytes:
            return (block + 1).to_bytes(8, "little") * (BLOCK // 8)

        def read() -> None:
            while not stop.is_set():
                for block in range(0, 256, 7):
                    found = web.read(block * BLOCK, BLOCK)
                    if found not in (bytes(BLOCK), mark(block)):
                        wrong.append((block, int.from_bytes(found[:8], "little")))

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(15):
            for block in range(256):
                web.write(block * BLOCK, mark(block))
            web.trim(0, 256 * BLOCK)
            web.flush()
        stop.set()
        for reader in readers:
            reader.join()
        assert wrong == []


def test_reads_go_on_while_the_disk_is_reverted(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=16 * BLOCK) as web:
        web.write(0, stamp(1))
        web.snapshot("one")
        web.write(0, stamp(2))
        web.snapshot("two")
        stop = threading.Event()
        seen: set[int] = set()
        failures: list[BaseException] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    seen.add(number_of(web.read(0, BLOCK)))
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(10):
            web.revert("one")
            web.revert("two")
        stop.set()
        reader.join()
        assert not failures
        assert seen <= {1, 2}
