"""Opening a head's log beside what the catalog knows of it, opening it to read only, and files that are none of a store."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onionskin.errors import FormatError, StateError
from onionskin.kernels._volume import DataPath

BLOCK = 4096
Known = tuple[int, int, int]


class Head:
    """One head over nothing, and what its log had when it was last closed."""

    def __init__(self, root: Path) -> None:
        self.segments, self.layers = root / "segments", root / "layers"
        self.segments.mkdir()
        self.layers.mkdir()
        self.map_id, self.own, self.spare, self.next_map = (os.urandom(16) for _ in range(4))
        self.map = self.layers / f"{self.map_id.hex()}.map"
        self.segment = self.segments / f"{self.own.hex()}.seg"

    def empty(self, *, writable: bool, size_bytes: int = 64 * BLOCK) -> DataPath:
        return DataPath(
            block_size=BLOCK, size_bytes=size_bytes, segments_directory=self.segments, layers_directory=self.layers,
            wipe_zero=False, writable=writable,
        )  # fmt: skip

    def open(self, known: Known = (0, 0, 0)) -> DataPath:
        path = self.empty(writable=True)
        path.open_head(map_path=self.map, map_id=self.map_id, inherited=[], own=self.own, spare=self.spare, known=known)
        path.free_own_slots()
        return path

    def open_to_read(self, known: Known = (0, 0, 0)) -> DataPath:
        path = self.empty(writable=False)
        path.open_head_to_read(map_path=self.map, map_id=self.map_id, inherited=[], own=self.own, known=known)
        return path

    def write(self, frames: int) -> Known:
        """Write a frame a flush. Returns what a clean close writes down."""
        path = self.open()
        for turn in range(frames):
            path.write(turn * BLOCK, b"%d" % turn * BLOCK)
            path.flush()
        sealed = path.seal(map_path=self.layers / "none.map", map_id=self.next_map)
        path.seal_abort()
        path.close()
        return sealed.map_length, sealed.map_frames, sealed.map_crc

    def files(self) -> dict[str, tuple[bytes, int]]:
        found = [*self.segments.iterdir(), *self.layers.iterdir()]
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def head(tmp_path: Path) -> Head:
    return Head(tmp_path)


def remove(path: Path, length: int) -> None:
    path.unlink()


def empty(path: Path, length: int) -> None:
    os.truncate(path, 0)


def only_the_header(path: Path, length: int) -> None:
    os.truncate(path, BLOCK)


def cut_the_last_frame(path: Path, length: int) -> None:
    os.truncate(path, length - 8)


def lose_the_last_frame(path: Path, length: int) -> None:
    os.truncate(path, length - 56 - 24)


def flip_a_bit_of_the_last_frame(path: Path, length: int) -> None:
    data = bytearray(path.read_bytes())
    data[length - 10] ^= 1
    path.write_bytes(data)


def zero_the_header(path: Path, length: int) -> None:
    data = bytearray(path.read_bytes())
    data[:BLOCK] = bytes(BLOCK)
    path.write_bytes(data)


DAMAGES = [
    remove, empty, only_the_header, cut_the_last_frame, lose_the_last_frame, flip_a_bit_of_the_last_frame, zero_the_header,
]  # fmt: skip


@pytest.mark.parametrize("to_read", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_that_is_not_what_the_catalog_knows_is_damage_and_stays_as_it_is(
    head: Head, damage: Callable[[Path, int], None], to_read: bool
) -> None:
    known = head.write(3)
    damage(head.map, known[0])
    before = head.files()
    with pytest.raises(FormatError, match=head.map.name):
        (head.open_to_read if to_read else head.open)(known)
    assert head.files() == before


def test_a_log_that_goes_on_behind_what_is_known_is_good_and_a_torn_frame_there_is_cut(head: Head) -> None:
    known = head.write(3)
    path = head.open(known)
    path.write(9 * BLOCK, b"9" * BLOCK)
    path.flush()
    path.close()
    with head.map.open("r+b") as file:
        file.seek(known[0] + 32 + 24 + 24)  # behind one more frame
        file.write(b"\x55" * 40)
    path = head.open(known)
    assert path.read(9 * BLOCK, 1) + path.read(2 * BLOCK, 1) == b"92"
    path.close()


@pytest.mark.parametrize("known", [(4096 + 80, 1, 7), (4096 + 88, 1, 0), (4096 + 80, 2, 0)])
def test_a_point_that_the_log_does_not_pass_is_damage(head: Head, known: Known) -> None:
    head.write(3)
    with pytest.raises(FormatError, match="checksum"):
        head.open(known)


def test_where_nothing_is_known_a_missing_log_is_an_empty_one(head: Head) -> None:
    head.write(2)
    head.map.unlink()
    path = head.open()
    assert path.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
    path.close()


def test_a_head_that_is_opened_to_read_shows_what_is_durable_and_changes_no_file(head: Head) -> None:
    known = head.write(3)
    with head.map.open("r+b") as file:
        file.seek(known[0])
        file.write(b"OFRM torn")
    before = head.files()
    path = head.open_to_read(known)
    assert path.read(0, 3 * BLOCK) == b"0" * BLOCK + b"1" * BLOCK + b"2" * BLOCK
    assert bytes(path.view(BLOCK, 2 * BLOCK)) == b"1" * BLOCK + b"2" * BLOCK
    for change in (lambda: path.write(0, b"x"), path.flush, lambda: path.resize(BLOCK)):
        with pytest.raises(StateError):
            change()
    path.close()
    assert head.files() == before
    assert not (head.segments / f"{head.spare.hex()}.seg").exists()


def test_a_head_that_never_wrote_is_read_without_its_files(head: Head) -> None:
    path = head.open_to_read()
    assert path.read(0, 64 * BLOCK) == bytes(64 * BLOCK)
    path.close()
    assert head.files() == {}


def test_a_head_that_grew_is_read_in_its_whole_size(head: Head) -> None:
    path = head.open()
    path.resize(3 << 30)
    path.write((3 << 30) - BLOCK, b"e" * BLOCK)
    path.flush()
    path.close()
    for opened in (head.open_to_read(), head.open()):
        assert opened.size_bytes == 3 << 30
        assert opened.read((3 << 30) - BLOCK, BLOCK) == b"e" * BLOCK
        opened.close()


def test_a_disk_grows_under_its_readers(head: Head) -> None:
    path = head.open()
    for turn in range(1, 200):
        path.resize(turn * 5 << 20)
        at = (turn * 5 << 20) - BLOCK
        path.write(at, b"%d" % (turn % 10) * BLOCK)
        assert path.read(at, BLOCK) == b"%d" % (turn % 10) * BLOCK
        assert path.read(BLOCK, BLOCK) == bytes(BLOCK)
    path.resize(BLOCK)
    path.resize(1 << 40)
    assert path.read((5 << 20) - BLOCK, BLOCK) == bytes(BLOCK)
    path.close()


@pytest.mark.parametrize("which", ["map", "segment"])
@pytest.mark.parametrize("to_read", [False, True])
def test_no_file_is_opened_through_a_symbolic_link(head: Head, tmp_path: Path, which: str, to_read: bool) -> None:
    head.write(1)
    path = getattr(head, which)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=rf"{path.name}.*symbolic link"):
        (head.open_to_read if to_read else head.open)()


def test_a_pipe_in_the_place_of_a_map_is_refused_and_not_waited_for(head: Head) -> None:
    os.mkfifo(head.map)
    with pytest.raises(FormatError, match="no regular file"):
        head.open()


def peak_kib() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


@pytest.mark.parametrize("to_read", [False, True])
def test_a_sparse_map_costs_memory_for_what_is_in_it(head: Head, to_read: bool) -> None:
    head.write(1)
    os.truncate(head.map, 3 << 30)
    before = peak_kib()
    path = (head.open_to_read if to_read else head.open)()
    assert path.read(0, 1) == b"0"
    path.close()
    assert peak_kib() - before < 64 << 10


def test_a_map_with_data_behind_a_hole_that_no_crash_leaves_is_damage_and_is_not_cut(head: Head) -> None:
    head.write(1)
    with head.map.open("r+b") as file:
        file.seek(3 << 30)
        file.write(b"x")
    before = peak_kib()
    with pytest.raises(FormatError, match=head.map.name):
        head.open()
    assert head.map.stat().st_size == (3 << 30) + 1
    assert peak_kib() - before < 64 << 10


FAULT = """
import faulthandler, os, sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_opening_a_head import Head
head = Head(Path({root!r}))
head.write(3)
path = head.open()
path.read(0, 1)
faulthandler.enable()
os.truncate(head.segment, 4096)
for _ in range(2):
    try:
        path.read(0, 1)
    except OSError as error:
        assert error.errno == 5 and error.filename == str(head.segment), error
    else:
        sys.exit("no error")
print("alive")
"""


def test_faulthandler_does_not_take_the_guard_away(tmp_path: Path) -> None:
    program = FAULT.format(folder=str(Path(__file__).parent), root=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "alive\n"


def test_the_guard_that_was_replaced_is_back_at_the_next_opening(tmp_path: Path) -> None:
    program = FAULT.replace(
        "faulthandler.enable()", "import signal; signal.signal(7, signal.SIG_DFL); head.open_to_read()"
    )
    program = program.format(folder=str(Path(__file__).parent), root=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_a_fault_that_is_nobodys_still_ends_the_process_with_its_signal(tmp_path: Path) -> None:
    fault = """
import mmap
with open(head.segment) as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
head.empty(writable=False)  # so that the guard stands over faulthandler, which stands over the guard
os.truncate(head.segment, 0)
mapped[0]
for _ in range(2):"""
    program = FAULT.replace("\nfor _ in range(2):", fault)
    program = program.format(folder=str(Path(__file__).parent), root=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == -7
    assert "Bus error" in run.stderr
