"""Policy `zero` leaves nothing of what was freed in the raw bytes of the file system that held the store."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import image_of, unmount
from support.listing import files_with

import onionskin
from onionskin.operations import copy, export, new_map, reclaim
from onionskin.storage.chain import read_chain

CANARY = b"onionskin-canary-" + os.urandom(8).hex().encode()
BLOCK = 4096
FILL = (CANARY * (BLOCK // len(CANARY) + 1))[:BLOCK] * 64


def holds_canary(image: Path) -> bool:
    with image.open("rb") as file:
        tail = b""
        while chunk := file.read(1 << 22):
            if CANARY in tail + chunk:
                return True
            tail = chunk[-len(CANARY) :]
    return False


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def trim(web: onionskin.Volume) -> None:
    web.trim(0, web.size_bytes)
    web.flush()


def revert(web: onionskin.Volume) -> None:
    web.revert("start")


def merge(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.write(0, b"z" * len(FILL))
    web.merge("middle")


def merge_then_trim(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.merge("middle")
    trim(web)


def discard(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.revert("start")
    web.discard("middle")


@pytest.mark.parametrize("free", [trim, revert, merge, merge_then_trim, discard])
@pytest.mark.parametrize("system", ["ext4", pytest.param("xfs", marks=pytest.mark.slow)])
def test_nothing_is_left_of_freed_blocks(request: pytest.FixtureRequest, system: str, free) -> None:
    root = request.getfixturevalue(f"{system}_mount")()
    with onionskin.Store(root / "store") as store, store.create("web", size="8M", wipe="zero") as web:
        web.snapshot("start")
        web.write(0, FILL)
        web.flush()
        os.sync()
        assert holds_canary(image_of(root))
        free(web)
    unmount(root)
    assert not holds_canary(image_of(root))


def test_release_leaves_it_as_documented(ext4_mount) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store, store.create("web", size="8M") as web:
        web.write(0, FILL)
        trim(web)
    unmount(root)
    assert holds_canary(image_of(root))


def test_what_a_failed_write_left_is_wiped_when_its_segment_is_sealed(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="8M", wipe="zero") as web:
        web.write(0, b"kept" * (BLOCK // 4))
        with file_size_limit(3 << 20), pytest.raises(OSError):
            web.write(2 << 20, FILL * 6)
        web.snapshot("after")
        store.finish_work()
        assert not any(holds_canary(path) for path in store._opened.layout.segments.iterdir())
        assert web.read(0, 4) == b"kept"


def test_a_torn_segment_is_wiped_and_not_cut_off(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        web = store.create("web", size="8M", wipe="zero")
        web.write(0, FILL)
        web._path.close()  # no flush: what a crash leaves
        web.close()
        store._opened.layout.dirty_file(web._opened.row.id).unlink()  # a crash of the machine, that is
        (segment,) = store._opened.layout.segments.iterdir()
        length = segment.stat().st_size
        with segment.open("r+b") as file:
            file.write(bytes(BLOCK))
        with store.open("web") as web:
            assert segment.stat().st_size == length, "blocks were given back with what they hold"
            assert not holds_canary(segment)
            web.write(0, b"again")


def test_a_file_is_wiped_when_the_operation_returns_and_unlinked_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="8M", wipe="zero") as web:
        web.snapshot("start")
        web.write(0, FILL)
        web.flush()
        (segment,) = (path for path in store._opened.layout.segments.iterdir() if holds_canary(path))
        with monkeypatch.context() as patch:
            patch.setattr(store._opened, "wake", lambda: None)  # the background, held back
            web.revert("start")
            assert not holds_canary(segment), "returned before the zeros were written"
        reclaim.work_soon(store._opened)
        store.finish_work()
        assert not segment.exists()


def test_a_map_that_is_given_up_is_wiped_before_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="64M", wipe="zero") as web:
        for name in ("one", "two"):
            web.write(0, name.encode())
            web.snapshot(name)
        web.write(BLOCK, b"head")
        web.flush()
        store.finish_work()  # it makes the files of the next head, which are no staged ones
        before = set(store._opened.layout.layers.iterdir())
        staged_files: list[int] = []

        def fail(*_: object) -> None:
            staged_files.extend(
                os.open(path, os.O_RDONLY) for path in set(store._opened.layout.layers.iterdir()) - before
            )
            raise OSError("the catalog is full")

        with monkeypatch.context() as patch:
            patch.setattr(new_map, "switch_map", fail)
            web.merge("two")  # the name is dropped; that the layers could not be joined is left to the next opening
        for staged in staged_files:
            size = os.fstat(staged).st_size
            assert size > 4096
            assert os.pread(staged, size, 0) == bytes(size)
            os.close(staged)
        assert len(staged_files) == 1
        assert web.read(0, 3) == b"two"


def test_secrets_in_a_segment_that_another_policy_took_over_are_wiped_before_their_file_goes(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="8M", wipe="zero") as web:
            web.write(0, FILL)
            web.snapshot("clean")
            store.clone("web", "clean", "other", wipe="release")
            web.merge("clean")
        store.delete("web")
        store.open("other").close()  # folds the layer that has no name any more into the head
        (path,) = files_with(store._opened.layout.segments, CANARY)
        with path.open("rb") as segment:
            store.delete("other")
            store.finish_work()
            assert not path.exists()
            assert CANARY not in segment.read()


@pytest.fixture
def takes_over(tmp_path: Path) -> Iterator[tuple[onionskin.Store, onionskin.Volume]]:
    """A volume of policy `release` that has taken secrets over from one of policy `zero`, and has a snapshot of them."""
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="8M", wipe="zero") as web:
            web.write(0, FILL)
            web.snapshot("clean")
            store.clone("web", "clean", "other", wipe="release")
            web.merge("clean")
        store.delete("web")
        store.open("other").close()  # folds the layer that has no name any more into the head
        with store.open("other") as other:
            other.snapshot("mine")
            yield store, other


def test_secrets_that_were_taken_over_and_copied_by_a_flatten_are_wiped_before_the_copy_goes(
    takes_over: tuple[onionskin.Store, onionskin.Volume],
) -> None:
    store, other = takes_over
    before = set(files_with(store._opened.layout.segments, CANARY))
    other.flatten()
    (path,) = set(files_with(store._opened.layout.segments, CANARY)) - before
    other.close()
    with path.open("rb") as segment:
        store.delete("other", recursive=True)
        store.finish_work()
        assert not path.exists()
        assert CANARY not in segment.read()


def test_secrets_that_were_taken_over_are_wiped_from_an_image_that_is_given_up(
    takes_over: tuple[onionskin.Store, onionskin.Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = takes_over
    staged: list[int] = []

    def fail(descriptor: int) -> None:
        staged.append(os.dup(descriptor))
        assert CANARY in os.pread(descriptor, len(FILL), 0)
        raise OSError("the disk is full")

    monkeypatch.setattr(export, "sync_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        other.export(tmp_path / "image.raw")
    assert CANARY not in os.pread(staged[0], len(FILL), 0)
    os.close(staged[0])


def test_a_copy_shares_no_blocks_with_secrets_that_were_taken_over(
    takes_over: tuple[onionskin.Store, onionskin.Volume],
) -> None:
    store, other = takes_over
    chain = read_chain(store._opened.catalog, other._opened.head)
    assert not copy.may_reflink(store._opened, chain)
