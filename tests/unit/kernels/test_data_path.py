"""The data path alone, by its own verbs: what the classes above it never do, or do in another order."""

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from onionskin.errors import StateError
from onionskin.kernels._volume import DataPath

BLOCK = 4096


class Files:
    """A directory for one head, which can be opened again and again."""

    def __init__(self, root: Path) -> None:
        self.segments, self.layers = root / "segments", root / "layers"
        self.segments.mkdir()
        self.layers.mkdir()
        self.map_id, self.own, self.spare = (os.urandom(16) for _ in range(3))

    def map_file(self, map_id: bytes) -> str:
        return str(self.layers / f"{map_id.hex()}.map")

    def empty(self, *, blocks: int = 64, wipe_zero: bool = False) -> DataPath:
        return DataPath(
            block_size=BLOCK,
            size_bytes=blocks * BLOCK,
            segments_directory=self.segments,
            layers_directory=self.layers,
            wipe_zero=wipe_zero,
            writable=True,
        )

    def open(self, *, wipe_zero: bool = False) -> DataPath:
        path = self.empty(wipe_zero=wipe_zero)
        path.open_head(
            map_path=self.map_file(self.map_id), map_id=self.map_id, inherited=[], own=self.own, spare=self.spare
        )
        path.free_own_slots()
        return path

    def seal(self, path: DataPath) -> bytes:
        map_id = os.urandom(16)
        path.seal(map_path=self.map_file(map_id), map_id=map_id)
        return map_id


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def path(files: Files) -> Iterator[DataPath]:
    path = files.open()
    yield path
    path.close()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Run a call in a thread; what it raises is in the list when it has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


WAITERS = ["flush", "live_slots", "resize"]


def waiter(path: DataPath, files: Files, name: str) -> Callable[[], object]:
    return {
        "flush": path.flush,
        "live_slots": lambda: path.live_slots(files.own),
        "resize": lambda: path.resize(BLOCK),
    }[name]


@pytest.mark.parametrize("end", ["poison", "close"])
@pytest.mark.parametrize("name", WAITERS)
def test_nobody_waits_for_ever_for_a_seal_whose_outcome_is_unknown(
    files: Files, path: DataPath, name: str, end: str
) -> None:
    files.seal(path)
    thread, raised = in_thread(waiter(path, files, name))
    thread.join(0.05)
    assert thread.is_alive(), "it waits for the outcome"
    getattr(path, end)()
    thread.join(300)
    assert not thread.is_alive()
    assert isinstance(raised[0], StateError)


@pytest.mark.parametrize("name", WAITERS)
def test_a_poisoned_seal_refuses_at_once(files: Files, path: DataPath, name: str) -> None:
    files.seal(path)
    path.poison()
    thread, raised = in_thread(waiter(path, files, name))
    thread.join(300)
    assert not thread.is_alive()
    assert isinstance(raised[0], StateError)


def test_the_child_of_a_fork_waits_for_no_lock(files: Files, path: DataPath) -> None:
    """The parent resizes without pause, so that the child finds its locks held."""
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            path.resize(32 * BLOCK)
            path.resize(64 * BLOCK)

    thread, raised = in_thread(resize)
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                path.after_fork()
                refused = 0
                for call in (lambda: path.write(0, b"x"), path.flush, lambda: path.live_slots(files.own)):
                    try:
                        call()
                    except StateError:
                        refused += 1
                path.segments()
                os._exit(refused)
            assert wait_for(child) == 3
    finally:
        stop.set()
        thread.join()
    assert raised == []


def wait_for(child: int) -> int:
    """Return the exit status of a child that must end soon."""
    with open(os.pidfd_open(child)) as ended:
        if not select.select([ended], [], [], 300)[0]:
            os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # of one that hung: -9


def test_slots_of_a_segment_just_inherited_are_live_until_what_replaced_them_is_durable(files: Files) -> None:
    lower_own, lower_map = files.own, files.map_id
    path = files.open()
    path.write(0, b"a" * 2 * BLOCK)
    next_map = os.urandom(16)
    sealed = path.seal(map_path=files.map_file(next_map), map_id=next_map)
    path.seal_commit(os.urandom(16))
    source = (
        files.map_file(lower_map), lower_map, sealed.map_length, sealed.map_frames, sealed.map_crc, sealed.segments,
    )  # fmt: skip
    path.write(2 * BLOCK, b"b" * BLOCK)
    rewritten = os.urandom(16)
    path.rewrite_map(new_path=files.map_file(rewritten), new_id=rewritten, lower=source)
    path.write(0, b"c" * BLOCK)  # while the outcome of the merge is not known yet
    path.rewrite_commit()
    live = path.live_slots(lower_own)
    path.close()  # without a flush: what a crash would leave

    again = files.empty()
    again.open_head(
        map_path=files.map_file(rewritten), map_id=rewritten, inherited=sealed.segments, own=files.spare,
        spare=os.urandom(16),
    )  # fmt: skip
    number = {id: number for number, id, _, _ in again.segments()}[lower_own]
    needed = {
        (place - 4096 + at) // BLOCK
        for _, length, _, _, place in again.extents().from_source(number)
        for at in range(0, length, BLOCK)
    }
    assert needed <= {slot for first, count in struct.iter_unpack("<QQ", live) for slot in range(first, first + count)}
    assert again.read(BLOCK, BLOCK) == b"a" * BLOCK
    again.close()


def test_nothing_can_be_changed_before_a_head_is_open(files: Files) -> None:
    path = files.empty()
    id = os.urandom(16)
    calls: list[Callable[[], object]] = [
        lambda: path.write(0, b"x"),
        lambda: path.zero(0, BLOCK),
        lambda: path.write_blocks([0], bytes(BLOCK)),
        path.flush,
        lambda: path.resize(BLOCK),
        lambda: path.seal(map_path=files.map_file(id), map_id=id),
        lambda: path.rewrite_map(new_path=files.map_file(id), new_id=id),
        lambda: path.live_slots(id),
        path.map_dead_ratio,
    ]
    for call in calls:
        with pytest.raises(StateError):
            call()
    assert path.read(0, BLOCK) == bytes(BLOCK)
    assert path.segments() == []
    path.close()


@pytest.mark.parametrize("offset", [-1, 1 << 63, 1 << 64, 1 << 80])
def test_an_offset_that_no_volume_has_is_a_value_error(path: DataPath, offset: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: path.read(offset, 1),
        lambda: path.read(0, offset),
        lambda: path.readinto(offset, bytearray(1)),
        lambda: path.write(offset, b"x"),
        lambda: path.zero(offset, 1),
        lambda: path.zero(0, offset),
        lambda: path.read_blocks([offset]),
        lambda: path.write_blocks([offset], bytes(BLOCK)),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()


@pytest.mark.parametrize("indices", [[0.5], numpy.array([1.0]), [True, False], ["1"], [None]])
def test_block_indices_that_are_no_whole_numbers_are_refused(path: DataPath, indices: Any) -> None:
    with pytest.raises(TypeError):
        path.read_blocks(indices)
    with pytest.raises(TypeError):
        path.write_blocks(indices, bytes(BLOCK * len(indices)))


def test_block_indices_of_any_whole_type_and_none_at_all_are_taken(path: DataPath) -> None:
    path.write(BLOCK, b"b" * BLOCK)
    for dtype in ("u1", "i2", "<u8", ">i8"):
        assert path.read_blocks(numpy.array([1, 0], dtype=dtype))[:, 0].tolist() == [ord("b"), 0]
    assert path.read_blocks([]).shape == (0, BLOCK)
    with pytest.raises(ValueError, match="from 0"):
        path.read_blocks(numpy.array([-1]))


def test_buffers_that_cannot_take_the_bytes_are_refused(path: DataPath) -> None:
    for buffer in (bytes(4), numpy.zeros(16, "u1")[::2], memoryview(b"read-only")):
        with pytest.raises((BufferError, ValueError, TypeError)):
            path.readinto(0, buffer)
    with pytest.raises(ValueError, match="out has"):
        path.read_blocks([0, 1], out=numpy.empty((1, BLOCK), "u1"))
    with pytest.raises((BufferError, ValueError)):
        path.write(0, numpy.zeros(16, "u1")[::2])
    assert path.write(0, b"") == 0
    assert path.read(64 * BLOCK, 0) == b""


def test_each_opening_draws_a_salt_of_its_own(files: Files) -> None:
    salts = set()
    for number in range(3):
        path = files.open()
        path.write(number * BLOCK, b"x" * BLOCK)
        path.flush()
        path.close()
        frames = Path(files.map_file(files.map_id)).read_bytes()[4096:]
        last = frames.rindex((0x4D52464F).to_bytes(4, "little"))
        salts.add(frames[last + 16 : last + 24])
    assert len(salts) == 3


def test_python_goes_on_while_a_verb_waits_for_the_gate(files: Files, path: DataPath) -> None:
    """A resize to 4 TiB holds the gate for a while; who asks for it meanwhile must not hold the interpreter.

    On a busy host one may be over before anybody looks, but not each.
    """
    for _ in range(50):
        growing, _ = in_thread(lambda: path.resize(4 << 40))
        asking, _ = in_thread(lambda: path.segments())
        ticks = 0
        while growing.is_alive() and ticks < 5:
            time.sleep(0.001)
            ticks += 1
        growing.join()
        asking.join()
        if ticks == 5:
            return
        path.resize(64 * BLOCK)
    raise AssertionError("the interpreter stood still")
