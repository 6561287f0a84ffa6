"""Replacing what lies lowest under an open head: a new base, a new lowest layer, segments in which nothing is left."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onionskin.errors import FormatError, StateError
from onionskin.kernels._volume import DataPath, Sealed

BLOCK = 4096
BLOCKS = 1500  # nearly three ranges of 2 MiB

Source = tuple[str, bytes, int, int, int, list[tuple[bytes, int]]]


def block(letter: bytes, count: int = 1) -> bytes:
    return letter * BLOCK * count


class Disk:
    """A head over layers over a base, and what it must read as."""

    def __init__(self, root: Path, base: bytes = b"") -> None:
        self.root, self.segments, self.layers = root, root / "segments", root / "layers"
        self.segments.mkdir(exist_ok=True)
        self.layers.mkdir(exist_ok=True)
        self.base = root / "base.raw"
        self.base.write_bytes(base)
        self.model = bytearray(BLOCKS * BLOCK)
        self.model[: len(base)] = base
        self.below: list[Source] = []
        self.map_id, self.own, self.spare = (os.urandom(16) for _ in range(3))
        self.path = self.empty()
        if base:
            with self.base.open("rb") as file:
                self.path.set_base(file.fileno(), len(base))
        self.path.open_head(
            map_path=self.map_file(self.map_id), map_id=self.map_id, inherited=[], own=self.own, spare=self.spare
        )

    def map_file(self, map_id: bytes) -> str:
        return str(self.layers / f"{map_id.hex()}.map")

    def segment_file(self, id: bytes) -> Path:
        return self.segments / f"{id.hex()}.seg"

    def empty(self) -> DataPath:
        return DataPath(
            block_size=BLOCK, size_bytes=BLOCKS * BLOCK, segments_directory=self.segments,
            layers_directory=self.layers, wipe_zero=False, writable=True,
        )  # fmt: skip

    def write(self, at: int, data: bytes) -> None:
        self.path.write(at * BLOCK, data)
        self.model[at * BLOCK : at * BLOCK + len(data)] = data

    def zero(self, at: int, count: int) -> None:
        self.path.zero(at * BLOCK, count * BLOCK)
        self.model[at * BLOCK : (at + count) * BLOCK] = bytes(count * BLOCK)

    def seal(self) -> None:
        sealed = self.path.seal(map_path=self.map_file(self.spare), map_id=self.spare)
        self.below.append(self.source(self.map_id, sealed))
        self.map_id = self.own = self.spare
        self.spare = os.urandom(16)
        self.path.seal_commit(self.spare)

    def source(self, map_id: bytes, sealed: Sealed) -> Source:
        return (
            self.map_file(map_id), map_id, sealed.map_length, sealed.map_frames, sealed.map_crc,
            [(id, slots) for id, slots in sealed.segments if slots],
        )  # fmt: skip

    @property
    def ids_below(self) -> list[bytes]:
        return [id for source in self.below for id, _ in source[5]]

    def flat(self, contents: dict[int, bytes]) -> Source:
        """Make a layer of its own in the same directories."""
        other, map_id = self.empty(), os.urandom(16)
        other.open_head(
            map_path=self.map_file(map_id), map_id=map_id, inherited=[], own=os.urandom(16), spare=os.urandom(16)
        )
        for at, data in contents.items():
            other.write(at * BLOCK, data)
        end = os.urandom(16)
        source = self.source(map_id, other.seal(map_path=self.map_file(end), map_id=end))
        other.seal_abort()
        other.close()
        return source

    def forget_below(self) -> None:
        """What the catalog's owner does when it was told that nobody reads them any more."""
        for id in self.ids_below:
            self.segment_file(id).unlink(missing_ok=True)
        self.below = []

    def check(self) -> None:
        assert self.path.read(0, BLOCKS * BLOCK) == bytes(self.model)

    def mapped(self) -> list[str]:
        """The segments that the process has mapped and nobody can open any more."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in lines if str(self.segments) in line and "(deleted)" in line]


@pytest.fixture
def layered(tmp_path: Path) -> Iterator[Disk]:
    """A base, two layers with data, zeros and holes over it, and a head with its own."""
    disk = Disk(tmp_path, base=block(b"b", 800))
    disk.write(10, block(b"1", 20))
    disk.zero(40, 5)
    disk.seal()
    disk.write(15, block(b"2", 5))
    disk.write(700, block(b"2", 200))
    disk.seal()
    disk.write(17, block(b"h"))
    disk.zero(18, 1)
    yield disk
    disk.path.close()


def flat_of(disk: Disk) -> dict[int, bytes]:
    """What lies below the head, as a flattening copies it: zeros are left out."""
    return {
        0: block(b"b", 10), 10: block(b"1", 5), 15: block(b"2", 5), 20: block(b"1", 10), 30: block(b"b", 10),
        45: block(b"b", 655), 700: block(b"2", 200),
    }  # fmt: skip


def test_a_new_lowest_layer_takes_the_place_of_base_and_layers_and_the_head_keeps_what_it_has(layered: Disk) -> None:
    flat = layered.flat(flat_of(layered))
    layered.path.prepare_below(layer=flat, dropped=layered.ids_below)
    layered.write(16, block(b"w"))  # between the copy and the commit
    layered.zero(300, 2)
    layered.path.flush()
    assert layered.path.commit_below()
    layered.forget_below()
    layered.base.unlink()
    layered.check()
    layered.write(50, block(b"x", 3)[: BLOCK + 100])
    layered.check()
    assert layered.mapped() == []
    assert {role for _, _, role, _ in layered.path.segments()} == {"sealed", "own"}
    assert [id for _, id, role, slots in layered.path.segments() if role == "sealed" and slots] == [flat[5][0][0]]


def test_after_a_merge_into_the_base_dropped_segments_read_from_it_and_their_space_comes_back(layered: Disk) -> None:
    merged = bytearray(layered.model)
    merged[17 * BLOCK : 19 * BLOCK] = block(b"2", 2)  # the head's own is not merged
    layered.check()  # so that segments are mapped
    layered.base.write_bytes(merged)
    with layered.base.open("rb") as file:
        layered.path.prepare_below(file.fileno(), len(merged), dropped=layered.ids_below)
    assert layered.path.commit_below()
    layered.forget_below()
    layered.check()
    assert layered.mapped() == []
    assert {1, 2} & {number for number, *_ in layered.path.segments()} == set()


def test_the_base_is_what_the_descriptor_is_open_on_whatever_its_path_names_since(tmp_path: Path) -> None:
    disk = Disk(tmp_path, base=block(b"b", 8))
    with disk.base.open("rb") as file:
        disk.base.rename(tmp_path / "elsewhere")
        disk.base.write_bytes(block(b"?", 8))
        disk.path.prepare_below(file.fileno(), 8 * BLOCK)
    assert disk.path.commit_below()
    disk.check()
    disk.path.close()


def test_a_replacement_that_is_aborted_changes_nothing_and_gives_its_numbers_back(layered: Disk) -> None:
    before = layered.path.segments()
    for _ in range(3):
        layered.path.prepare_below(layer=layered.flat({0: block(b"?", 50)}), dropped=layered.ids_below)
        layered.path.abort_below()
        layered.check()
    assert layered.path.segments() == before
    layered.path.abort_below()
    with pytest.raises(StateError):
        layered.path.commit_below()


def cut_map(disk: Disk, flat: Source) -> Source:
    os.truncate(flat[0], flat[2] - 1)
    return flat


def cut_segment(disk: Disk, flat: Source) -> Source:
    os.truncate(disk.segment_file(flat[5][0][0]), 2 * BLOCK)
    return flat


def other_checksum(disk: Disk, flat: Source) -> Source:
    return (*flat[:4], flat[4] ^ 1, flat[5])


def no_segment(disk: Disk, flat: Source) -> Source:
    return (*flat[:5], [])


@pytest.mark.parametrize("damage", [cut_map, cut_segment, other_checksum, no_segment])
def test_what_is_wrong_with_a_new_layer_is_found_before_the_commit(
    layered: Disk, damage: Callable[[Disk, Source], Source]
) -> None:
    flat = damage(layered, layered.flat(flat_of(layered)))
    with pytest.raises(FormatError):
        layered.path.prepare_below(layer=flat, dropped=layered.ids_below)
    layered.check()
    layered.path.prepare_below(layer=layered.flat(flat_of(layered)), dropped=layered.ids_below)
    assert layered.path.commit_below()
    layered.check()


def test_a_base_that_is_shorter_than_it_should_be_is_refused(layered: Disk) -> None:
    with layered.base.open("rb") as file, pytest.raises(FormatError, match=r"base\.raw"):
        layered.path.prepare_below(file.fileno(), 801 * BLOCK)
    layered.check()


def test_what_the_head_needs_is_not_dropped(layered: Disk) -> None:
    for ids in ([layered.own], [layered.spare], [os.urandom(16)]):
        with pytest.raises(StateError):
            layered.path.prepare_below(dropped=ids, keep_base=True)
    layered.path.prepare_below(keep_base=True)
    with pytest.raises(StateError):
        layered.path.prepare_below(keep_base=True)
    layered.check()


def test_reads_and_writes_beside_many_replacements_see_the_disk_as_it_is(tmp_path: Path) -> None:
    disk = Disk(tmp_path, base=block(b"b", 1200))
    stop = threading.Event()
    wrong: list[int] = []
    still = [at for at in range(0, 1200, 7) if at % 3]

    def read() -> None:
        while not stop.is_set():
            wrong.extend(at for at in still if disk.path.read(at * BLOCK, BLOCK) != block(b"b"))

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for at in range(0, 1200, 3):
                disk.path.write(at * BLOCK, block(b"%d" % (turn % 10)))
                if disk.path.read(at * BLOCK, BLOCK) != block(b"%d" % (turn % 10)):
                    wrong.append(-at)
                disk.path.write(at * BLOCK + 7, b"p" * 100)

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        disk.path.write(4 * BLOCK, block(b"s"))
        disk.seal()
        if turn % 2:  # into a layer of its own, without the base
            flat = disk.flat({0: read_below(disk)})
            disk.path.prepare_below(layer=flat, dropped=disk.ids_below)
            assert disk.path.commit_below()
            disk.forget_below()
            disk.below = [flat]
            disk.base.unlink(missing_ok=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert max(number for number, *_ in disk.path.segments()) < 12
    disk.path.close()


def read_below(disk: Disk) -> bytes:
    """What lies below the head, read as a snapshot is."""
    view = DataPath(
        block_size=BLOCK, size_bytes=BLOCKS * BLOCK, segments_directory=disk.segments, layers_directory=disk.layers,
        wipe_zero=False, writable=False,
    )  # fmt: skip
    if disk.base.exists():
        with disk.base.open("rb") as file:
            view.set_base(file.fileno(), 1200 * BLOCK)
    for path, map_id, length, frames, crc, segments in disk.below:
        view.add_layer(map_path=path, map_id=map_id, length=length, frames=frames, crc=crc, segments=segments)
    view.fold_layers()
    found = view.read(0, 1200 * BLOCK)
    view.close()
    return found


def cycle(disk: Disk, at: int, letter: bytes) -> None:
    """A snapshot, and its merge into the head; what nothing needs any more is dropped."""
    disk.write(at, block(letter))
    disk.seal()
    rewritten, (lower,) = os.urandom(16), disk.below
    disk.path.rewrite_map(new_path=disk.map_file(rewritten), new_id=rewritten, lower=lower, drop_zero=True)
    disk.path.rewrite_commit()
    Path(lower[0]).unlink()
    Path(disk.map_file(disk.map_id)).unlink(missing_ok=True)
    disk.map_id = rewritten
    disk.below = []
    unused = disk.path.unused_segments()
    disk.path.prepare_below(dropped=unused, keep_base=True)
    disk.path.commit_below()
    for id in unused:
        disk.segment_file(id).unlink(missing_ok=True)


@pytest.mark.slow
def test_numbers_descriptors_files_and_mappings_stay_few_over_many_snapshots_and_merges(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for turn in range(300):
        cycle(disk, turn % 4, b"%d" % (turn % 10))
        disk.check()
        assert max(number for number, *_ in disk.path.segments()) <= 9
        assert len(os.listdir(disk.segments)) <= 6
        assert len(os.listdir(disk.layers)) <= 2
    assert len(os.listdir("/proc/self/fd")) < 100
    assert disk.mapped() == []
    disk.path.close()


def test_a_head_without_a_block_in_it_costs_no_number(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for _ in range(50):
        disk.seal()
    assert max(number for number, *_ in disk.path.segments()) <= 3
    disk.path.close()


def test_a_wish_to_reclaim_can_be_put_back(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.write(0, block(b"a", 4))
    disk.seal()
    rewritten = os.urandom(16)
    disk.path.rewrite_map(new_path=disk.map_file(rewritten), new_id=rewritten, lower=disk.below[0])
    disk.path.rewrite_commit()
    disk.write(1, block(b"c"))
    disk.path.flush()
    wanted = disk.path.reclaim_wanted()
    assert wanted == [disk.below[0][5][0][0]]
    assert disk.path.reclaim_wanted() == []
    disk.path.want_reclaim([*wanted, os.urandom(16)])
    assert disk.path.reclaim_wanted() == wanted
    disk.path.close()
