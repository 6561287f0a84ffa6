"""A store that can only be read: everything that only reads works, and what changes it says what is in the way."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from errno import EACCES, EROFS
from pathlib import Path

import pytest
from conftest import Mount, image_of

import onionskin
from onionskin.delta import delta
from onionskin.operations.staged_volumes import stage

BLOCK = 4096
NOBODY = 65534


def make(root: Path) -> None:
    with onionskin.Store(root) as store, store.create("web", size="1M") as web:
        web.write(0, b"a" * BLOCK)
        web.snapshot("a")
        web.write(0, b"b" * BLOCK)
        web.snapshot("b")
        web.write(BLOCK, b"h" * BLOCK)
        web.flush()
        store.clone("web", "a", "clone")


def everything_that_reads(root: Path, out: Path, **more: bool) -> None:
    with onionskin.Store(root, **more) as store:
        assert store.read_only
        assert [volume.name for volume in store.volumes()] == ["clone", "web"]
        assert store.info("web").snapshots == 2
        assert [snapshot.name for snapshot in store.snapshots("web")] == ["a", "b"]
        assert store.tree()
        assert len(store.usage("web")) == 3
        assert len(store.diff("web", "a", "b")) == 1
        assert store.layering("web").chain
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        with store.open("web", snapshot="a") as view:
            assert view.read(0, 3) == b"aaa"
            view.export(out / "a.raw")
        with store.open("web", mode="r") as web, store.open("web", mode="r") as other:
            assert web.read(0, 3) == other.read(0, 3) == b"bbb"
            assert web.read(BLOCK, 3) == b"hhh"
            web.export(out / "web.raw")
        with store.open("clone", mode="r") as clone:
            assert clone.read(0, 3) == b"aaa"
        with (out / "a-b.delta").open("wb") as file:
            delta(store, "web", "a", "b", file)
    assert (out / "a.raw").read_bytes()[:BLOCK] == b"a" * BLOCK
    assert (out / "web.raw").read_bytes()[: 2 * BLOCK] == b"b" * BLOCK + b"h" * BLOCK


WRITING: list[Callable[[onionskin.Store], object]] = [
    lambda store: store.open("web"),
    lambda store: store.create("new", size="1M"),
    lambda store: store.clone("web", "a", "new"),
    lambda store: store.delete("clone"),
    lambda store: store.rename("web", "new"),
    lambda store: stage(store._opened, "new", size=BLOCK).__enter__(),
    lambda store: store.check(repair=True),
]


def nothing_that_writes(root: Path, number: int, **more: bool) -> None:
    with onionskin.Store(root, **more) as store:
        for verb in WRITING:
            with pytest.raises(OSError, match="the store is read-only") as caught:
                verb(store)
            assert caught.value.errno == number


def test_a_file_system_that_is_mounted_read_only(ext4_mount: Mount, tmp_path: Path) -> None:
    root = ext4_mount()
    make(root / "store")
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    everything_that_reads(root / "store", tmp_path)
    nothing_that_writes(root / "store", EROFS)


def crash(root: Path) -> None:
    """Leave what a process leaves that is killed: SQLite's log, and the head's records."""
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import onionskin, os; s = onionskin.Store({str(root)!r}); w = s.open('web'); w.write(0, b'b' * 4096); "
            "w.snapshot('c'); s.rename('clone', 'renamed'); w.flush(); os.kill(os.getpid(), 9)",
        ]
    )
    assert made.returncode == -9
    assert (root / "catalog.db-wal").stat().st_size


@pytest.mark.parametrize("has_index", [True, False])
def test_what_a_crash_left_in_the_log_is_read_and_said(
    ext4_mount: Mount, caplog: pytest.LogCaptureFixture, has_index: bool
) -> None:
    root = ext4_mount()
    make(root / "store")
    crash(root / "store")
    if not has_index:
        (root / "store" / "catalog.db-shm").unlink()
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    with caplog.at_level(logging.INFO, "onionskin"), onionskin.Store(root / "store") as store:
        assert [volume.name for volume in store.volumes()] == ["renamed", "web"]
        with store.open("web", snapshot="c") as view:
            assert view.read(0, 3) == b"bbb"
        with store.open("web", mode="r") as web:
            assert web.read(BLOCK, 3) == b"hhh"
    assert "log" in caplog.text


def test_a_store_of_an_older_version_is_read_from_a_copy(ext4_mount: Mount) -> None:
    root = ext4_mount()
    make(root / "store")
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    assert image_of(root).exists()
    with onionskin.Store(root / "store") as store:
        store._opened.catalog._upgrade()
        assert store._opened.catalog.volume("web")


def test_a_store_of_another_user_that_may_be_read_and_not_written(tmp_path: Path) -> None:
    """In a child that is nobody: with trust it reads all, and says what it may not do; without, it is refused."""
    root = Path("/var/tmp") / f"onionskin-test-{os.getpid()}"
    try:
        make(root)
        for directory, _, names in os.walk(root):
            Path(directory).chmod(0o755)
            for name in names:
                Path(directory, name).chmod(0o644)
        before = {path: path.lstat().st_ctime_ns for path in root.rglob("*")}
        out = root.with_name(f"{root.name}-out")
        out.mkdir()
        os.chown(out, NOBODY, NOBODY)
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                with pytest.raises(onionskin.StateError, match="belongs to user 0"):
                    onionskin.Store(root)
                everything_that_reads(root, out, trust=True)
                nothing_that_writes(root, EACCES, trust=True)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert {path: path.lstat().st_ctime_ns for path in root.rglob("*")} == before
    finally:
        for left in (root, root.with_name(f"{root.name}-out")):
            subprocess.run(["rm", "-rf", left], check=True)


def test_a_head_that_is_opened_to_be_read_changes_no_file(tmp_path: Path) -> None:
    make(tmp_path / "store")
    with onionskin.Store(tmp_path / "store") as store:
        before = {path: path.lstat() for path in sorted(store._opened.layout.root.rglob("*"))}
        for name in ("web", "clone"):
            with store.open(name, mode="r") as volume:
                assert volume.read(0, 1)
        after = {path: path.lstat() for path in sorted(store._opened.layout.root.rglob("*"))}
        for path, found in before.items():
            if not path.name.endswith("-shm"):  # the marks of SQLite's readers
                assert (after[path].st_ctime_ns, after[path].st_size) == (found.st_ctime_ns, found.st_size), path
        assert set(after) == set(before)


def test_nobody_writes_a_head_that_is_read(tmp_path: Path) -> None:
    make(tmp_path / "store")
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("web", "clone"):
            with store.open(name, mode="r"):
                for verb in (store.open, store.delete):
                    with pytest.raises(onionskin.StateError, match="open for reading"):
                        verb(name)
            with store.open(name), pytest.raises(onionskin.StateError, match="open for writing in process"):
                store.open(name, mode="r")
