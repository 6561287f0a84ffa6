"""A merge into the base that was cancelled or killed goes on where it was."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
from support.older_stores import make_older

import onionskin
from onionskin.kernels._copy import CopyJob
from onionskin.operations import copy, merge_into_base

BLOCK = 4096
BLOCKS = 64
STRETCH = 8 * BLOCK
next_stretch_bytes = merge_into_base._next_stretch_bytes


class Cancelled(Exception):
    pass


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note after each eight blocks."""
    monkeypatch.setattr(merge_into_base, "FIRST_STRETCH_BYTES", STRETCH)
    monkeypatch.setattr(merge_into_base, "_next_stretch_bytes", lambda stretch_bytes, seconds: STRETCH)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each copy moved, in order."""
    moved: list[int] = []
    run_job = copy.run_job

    def counted(job: CopyJob, *arguments: object) -> None:
        run_job(job, *arguments)
        moved.append(job.bytes_done)

    monkeypatch.setattr(copy, "run_job", counted)
    return moved


@contextmanager
def cancelled_after(stretches: int) -> Iterator[None]:
    """End a merge with an exception once so many stretches are noted."""
    left = stretches
    note_done = merge_into_base._note_done

    def note(*arguments: object) -> None:
        nonlocal left
        note_done(*arguments)
        left -= 1
        if not left:
            raise Cancelled

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(merge_into_base, "_note_done", note)
        yield


@pytest.fixture
def web(tmp_path: Path) -> Iterator[onionskin.Volume]:
    """A volume of which each second pair of blocks was written, in two layers, over a base of 64 blocks."""
    (tmp_path / "base.raw").write_bytes(b"b" * BLOCKS * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=tmp_path / "base.raw") as web:
        for block in range(0, BLOCKS, 4):
            web.write(block * BLOCK, bytes([block + 1]) * 2 * BLOCK)
        web.snapshot("a")
        web.zero(8 * BLOCK, 2 * BLOCK)
        web.merge("a")
        yield web


CHANGED = BLOCKS // 2 * BLOCK


def test_a_cancelled_merge_copies_only_what_is_left(web: onionskin.Volume, copied: list[int], tmp_path: Path) -> None:
    before = web.read(0, web.size_bytes)
    with cancelled_after(3):
        web.merge_into_base()
    assert copied == [STRETCH] * 3
    copied.clear()
    web.merge_into_base()
    assert sum(copied) == CHANGED - 3 * STRETCH
    assert (tmp_path / "base.raw").read_bytes() == before == web.read(0, web.size_bytes)


def test_merging_in_another_opening_copies_only_what_is_left(
    web: onionskin.Volume, copied: list[int], tmp_path: Path
) -> None:
    before = web.read(0, web.size_bytes)
    with cancelled_after(1):
        web.merge_into_base()
    copied.clear()
    web.close()
    with web.store.open("web") as again:
        assert not copied, "an opening must not write the base"
        assert again.read(0, again.size_bytes) == before
        again.merge_into_base()
        assert sum(copied) == CHANGED - STRETCH
        assert (tmp_path / "base.raw").read_bytes() == before == again.read(0, again.size_bytes)


def test_progress_counts_on_from_where_it_was(web: onionskin.Volume) -> None:
    with cancelled_after(2):
        web.merge_into_base()
    reported: list[tuple[int, int]] = []
    web.merge_into_base(progress=lambda *done: reported.append(done))
    assert reported == sorted(reported) and {total for _, total in reported} == {CHANGED}
    assert reported[0][0] >= 2 * STRETCH and {3 * STRETCH, CHANGED} <= {done for done, _ in reported}


def test_a_base_that_was_written_to_meanwhile_is_merged_into_from_the_beginning(
    web: onionskin.Volume, copied: list[int], tmp_path: Path
) -> None:
    before = web.read(0, web.size_bytes)
    with cancelled_after(3):
        web.merge_into_base()
    base = tmp_path / "base.raw"
    with base.open("r+b") as file:
        file.write(b"b" * BLOCKS * BLOCK)
    copied.clear()
    web.close()
    with web.store.open("web") as again:
        again.merge_into_base()
        assert sum(copied) == CHANGED
    assert base.read_bytes() == before


def test_a_base_that_is_another_file_is_not_merged_into(
    web: onionskin.Volume, copied: list[int], tmp_path: Path
) -> None:
    before = web.read(0, web.size_bytes)
    with cancelled_after(3):
        web.merge_into_base()
    base, foreign = tmp_path / "base.raw", b"f" * BLOCKS * BLOCK
    base.replace(tmp_path / "old.raw")
    base.write_bytes(foreign)
    copied.clear()
    with pytest.raises(onionskin.ChainError, match="exchanged"):
        web.merge_into_base()
    assert not copied and base.read_bytes() == foreign
    assert web.read(0, web.size_bytes) == before


def test_a_base_that_was_relocated_is_merged_into_from_the_beginning(
    web: onionskin.Volume, copied: list[int], tmp_path: Path
) -> None:
    with cancelled_after(3):
        web.merge_into_base()
    web.close()
    shutil.copyfile(tmp_path / "base.raw", tmp_path / "new.raw")
    web.store.relocate("web", base=tmp_path / "new.raw", trust=True)
    copied.clear()
    with web.store.open("web") as again:
        again.merge_into_base()
    assert sum(copied) == CHANGED


def test_a_store_that_knows_no_progress_is_opened_and_learns_to(web: onionskin.Volume, copied: list[int]) -> None:
    with cancelled_after(3):
        web.merge_into_base()
    web.store.close()
    make_older(web.store.path, 1)
    copied.clear()
    with onionskin.Store(web.store.path, create=False) as store:
        with store.open("web") as again:
            again.merge_into_base()
            assert sum(copied) == CHANGED
        assert store.check() == []


@pytest.mark.parametrize("bytes_per_second", [3 << 20, 100 << 20, 10 << 30])
def test_a_stretch_takes_five_seconds_at_any_pace(bytes_per_second: int) -> None:
    stretch = merge_into_base.first_stretch_bytes(0)
    for _ in range(10):
        stretch = next_stretch_bytes(stretch, stretch / bytes_per_second)
    assert stretch == pytest.approx(5 * bytes_per_second, rel=0.01)


def test_the_first_stretch_of_a_slow_merge_takes_five_seconds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert merge_into_base.first_stretch_bytes(3 << 20) == 15 << 20


@pytest.mark.parametrize("seed", range(5))
def test_stretches_of_any_length_copy_each_byte_once(tmp_path: Path, seed: int) -> None:
    rng = numpy.random.default_rng(seed)
    size = 300 * BLOCK + 1234
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=size) as web:
        for _ in range(60):
            at = int(rng.integers(0, size // BLOCK))
            length = int(min(rng.integers(1, 9) * BLOCK, size - at * BLOCK))
            web.zero(at * BLOCK, length) if rng.random() < 0.3 else web.write(at * BLOCK, rng.bytes(length))
        web.flush()
        descriptor = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, size)
        copying = copy.StretchCopy(store._opened, web._path, descriptor, size, reflink=False, punch=True)
        at, ends = 0, []
        while at < size:
            at = copying.run(at, int(rng.integers(1, 40) * BLOCK))
            ends.append(at)
        os.close(descriptor)
        assert ends == sorted(set(ends)) and all(end % BLOCK == 0 for end in ends[:-1])
        assert (tmp_path / "copy").read_bytes() == web.read(0, size)
