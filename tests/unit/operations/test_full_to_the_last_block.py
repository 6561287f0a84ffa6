"""A disk that is full to the last block, or a limit on files: what there is can be read, and what frees space does."""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from errno import EFBIG, ENOSPC
from pathlib import Path

import pytest

import onionskin
from onionskin.storage import reserve as reserves
from onionskin.storage.reserve import RESERVE_BYTES

MIB = 1 << 20
SYSTEMS = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


def fill(root: Path) -> None:
    """Take every block, as another program would: in a large file, then in small ones, which need inodes too."""
    with suppress(OSError), (root / "filler").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(os.statvfs(root).f_bavail * os.statvfs(root).f_frsize - MIB, 4096))
    for length in (1 << 16, 4096, 512, 1):
        with suppress(OSError), (root / f"filler-{length}").open("xb", buffering=0) as file:
            while file.write(b"x" * length) == length:
                pass
            os.fsync(file.fileno())
    for number in range(20000):
        try:
            (root / f"filler-{number}").write_bytes(b"x" * 4096)
        except OSError:
            break
    os.sync()


@pytest.fixture(params=["ext4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xfs", "btrfs"))])
def root(request: pytest.FixtureRequest) -> Path:
    """A file system with a store of a volume with two snapshots of 4 MiB each, and room for more."""
    root: Path = request.getfixturevalue(f"{request.param}_mount")(SYSTEMS[request.param])
    with onionskin.Store(root / "store") as store, store.create("web", size="1G") as web:
        for name in ("a", "b"):
            web.write(0, name.encode() * (4 * MIB))
            web.snapshot(name)
    return root


def run(*arguments: object) -> str:
    ended = subprocess.run([sys.executable, "-m", "onionskin", *map(str, arguments)], capture_output=True, text=True)
    assert ended.returncode == 0, (arguments, ended)
    return ended.stdout


@pytest.mark.slow
def test_all_that_reads_and_all_that_frees_works_in_processes_of_their_own(root: Path, tmp_path: Path) -> None:
    store = root / "store"
    fill(root)
    assert "web@a" in run("tree", store)
    run("check", store)
    run("export", f"{store}/web@a", tmp_path / "a.raw")
    run("export", f"{store}/web", tmp_path / "web.raw")
    before = os.statvfs(root).f_bavail
    run("trim", f"{store}/web", 0, "1M")
    run("merge", f"{store}/web@a")
    run("discard", f"{store}/web@b", "--yes")
    run("delete", f"{store}/web", "--recursive", "--yes")
    assert (os.statvfs(root).f_bavail - before) * os.statvfs(root).f_frsize > -9 * MIB  # the reserve is there again
    assert (store / "reserve").stat().st_blocks * 512 >= 8 * MIB
    assert (tmp_path / "a.raw").read_bytes()[: 4 * MIB] == b"a" * (4 * MIB)


def test_who_only_looks_sets_the_room_aside_again_that_it_gave_up(root: Path) -> None:
    fill(root)
    with onionskin.Store(root / "store") as store:
        assert list(store) == ["web"]
        assert not store._opened.layout.reserve.exists()
    assert store._opened.layout.reserve.stat().st_blocks * 512 >= RESERVE_BYTES - MIB


def test_a_store_that_is_open_goes_on(root: Path) -> None:
    with onionskin.Store(root / "store") as store, store.open("web") as web:
        web.write(0, b"c" * MIB)
        web.flush()
        os.sync()
        fill(root)
        web.trim(0, MIB)
        web.flush()
        web.merge("a")
        web.discard("b")
        store.create("other", size="1M").close()
        store.delete("other")
        assert web.read(0, MIB) == b"b" * MIB
    with onionskin.Store(root / "store") as store:
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        store.delete("web", recursive=True)
        store.finish_work()
        assert store._opened.layout.reserve.exists()
        assert list(store._opened.layout.segments.iterdir()) == []


@pytest.mark.slow
def test_what_there_is_can_be_read_where_even_the_reserve_is_gone(root: Path, tmp_path: Path) -> None:
    (root / "store" / "reserve").unlink()
    fill(root)
    with onionskin.Store(root / "store") as store:
        assert [volume.name for volume in store.volumes()] == ["web"]
        with store.open("web", snapshot="a") as view:
            view.export(tmp_path / "a.raw")
        with store.open("web", mode="r") as web:
            assert web.read(0, 3) == b"bbb"
    assert (tmp_path / "a.raw").read_bytes()[: 4 * MIB] == b"a" * (4 * MIB)


def test_the_reserve_is_not_set_aside_again_before_what_it_was_given_up_for_is_done(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, onionskin.Store(tmp_path / "store") as other:
        store.create("web", size="1M").close()
        seen: list[bool] = []

        def change() -> None:
            for one in (other, store):
                one._opened.reserve.make()
            seen.append(store._opened.layout.reserve.exists())
            if len(seen) == 1:
                raise OSError(ENOSPC, "full")

        store._opened.reserve.retry(change)
        assert seen == [True, False]
        assert store._opened.layout.reserve.exists()


def test_who_finds_the_reserve_given_up_by_somebody_else_tries_again_too(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        tried: list[bool] = []

        def change() -> None:
            tried.append(store._opened.layout.reserve.exists())
            if len(tried) == 1:
                store._opened.layout.reserve.unlink()
                raise OSError(ENOSPC, "full")

        store._opened.reserve.retry(change)
        assert tried == [True, False]


@pytest.mark.parametrize("lifted", [True, False])
def test_a_limit_on_the_size_of_files_is_an_error_and_loses_nothing(tmp_path: Path, lifted: bool) -> None:
    """`ulimit -f`; Python ignores the signal, and what comes is EFBIG."""
    with onionskin.Store(tmp_path / "store") as store:
        web = store.create("web", size="64M")
        web.write(0, b"a" * MIB)
        web.snapshot("a")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
        try:
            web.write(0, b"b" * MIB)
            with pytest.raises(OSError) as caught:
                web.write(4 * MIB, b"c" * (8 * MIB))
            assert caught.value.errno == EFBIG
            web.flush()
            web.write(0, b"d" * 4096)
            if not lifted:
                web.snapshot("b")
                web.merge("a")
                web.close()
                assert store.open("web").read(0, 4096) == b"d" * 4096
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if lifted:
            web.close()
        for volume in store._opened.open_handles():
            volume.close()
        with store.open("web") as again:
            assert again.read(0, 4096) == b"d" * 4096
            assert again.read(4096, MIB - 4096) == b"b" * (MIB - 4096)
        assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_a_catalog_that_meets_the_limit_says_so(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                store.rename("web", "other")
            assert caught.value.errno == EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [volume.name for volume in store.volumes()] == ["web"]
        store.rename("web", "other")


@pytest.mark.parametrize("size_bytes", [0, RESERVE_BYTES])
def test_a_reserve_without_blocks_is_set_aside_anew(tmp_path: Path, size_bytes: int) -> None:
    """A kill leaves an empty one, and a copy that keeps holes one that is a hole."""
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        reserve = store._opened.layout.reserve
        reserve.unlink()
        reserve.touch(mode=0o600)
        os.truncate(reserve, size_bytes)
        store.open("web").close()
        assert reserve.stat().st_blocks * 512 >= reserve.stat().st_size == RESERVE_BYTES


def test_a_full_disk_whose_reserve_has_no_blocks_is_looked_at_before_the_catalog_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        os.truncate(store._opened.layout.reserve, 0)
        looked: list[bool] = []
        monkeypatch.setattr(reserves, "CATALOG_ROOM_BYTES", 1 << 62)
        monkeypatch.setattr(
            reserves, "refuse_without_room", lambda *_: looked.append(store._opened.layout.reserve.exists())
        )
        store._opened.reserve.make_room_for_catalog()
        assert looked == [False]
