"""One file stands for the lock files of many volumes: the byte of each still keeps a second writer out."""

import errno
import gc
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.base import _names
from onionskin.base.paths import FilePath
from onionskin.storage import locks
from onionskin.storage.locks import SharedFile, VolumeLock, volume_holder

_SERVER = """
import sys, onionskin
store = onionskin.Store(sys.argv[1])
held = [store._open_to_write(name, is_one_of_many=True) for name in sys.argv[2:]]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def forks(tmp_path: Path) -> "onionskin.Store":
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            web.write(0, b"web")
            web.snapshot("clean")
        store.fork("web@clean", names=["a", "b"])
        yield store


def _lock_file(store: "onionskin.Store", name: str) -> Path:
    return Path(store._opened.layout.volume_lock(store._opened.catalog.volume(name).id))


def _held_elsewhere(store: "onionskin.Store", *names: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _SERVER, str(store.path), *names]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_volumes_share_the_file_of_their_locks_and_each_names_its_holder(forks: "onionskin.Store") -> None:
    with forks._open_to_write("a", is_one_of_many=True), forks._open_to_write("b", is_one_of_many=True):
        a, b = _lock_file(forks, "a"), _lock_file(forks, "b")
        assert a.samefile(b)
        for path in (a, b):
            holder = volume_holder(str(path))
            assert holder is not None
            assert holder.pid == os.getpid()


def test_a_second_writer_is_refused_while_the_file_is_shared(forks: "onionskin.Store") -> None:
    process = _held_elsewhere(forks, "a", "b")
    try:
        for name in ("a", "b"):
            with pytest.raises(onionskin.StateError, match=f"process {process.pid}"):
                forks.open(name)
            with pytest.raises(onionskin.StateError, match=f"process {process.pid}"):
                forks.delete(name)
    finally:
        process.communicate()


def test_one_volume_that_is_closed_leaves_the_others_locked(forks: "onionskin.Store") -> None:
    first = forks._open_to_write("a", is_one_of_many=True)
    with forks._open_to_write("b", is_one_of_many=True):
        first.close()
        assert not _lock_file(forks, "a").exists()
        forks.open("a").close()
        with pytest.raises(onionskin.StateError, match="open for writing"):
            forks.open("b")


def test_each_volume_of_a_holder_that_was_killed_can_be_opened_beside_the_others(forks: "onionskin.Store") -> None:
    process = _held_elsewhere(forks, "a", "b")
    process.kill()
    process.communicate()
    assert _lock_file(forks, "a").stat().st_nlink == 2
    with forks.open("a") as a:
        a.write(0, b"a")
        with forks.open("b") as b:  # it would be refused if the file that both had were locked for one of them
            assert b.read(0, 3) == b"web"
        assert not _lock_file(forks, "a").samefile(_lock_file(forks, "b"))


def test_a_file_that_a_volume_has_already_is_not_replaced(forks: "onionskin.Store") -> None:
    forks.open("b").close()
    before = _lock_file(forks, "b").stat().st_ino
    with forks._open_to_write("a", is_one_of_many=True), forks._open_to_write("b", is_one_of_many=True):
        assert _lock_file(forks, "b").stat().st_ino == before


def test_the_second_name_of_a_file_that_names_no_process_is_refused_and_not_written(
    forks: "onionskin.Store", tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, _lock_file(forks, "a"))
    for open_it in (lambda: forks.open("a"), lambda: forks._open_to_write("a", is_one_of_many=True)):
        with pytest.raises(onionskin.StateError, match="hard link"):
            open_it()
    assert victim.read_bytes() == b"precious"


def test_the_byte_alone_keeps_a_second_writer_out(forks: "onionskin.Store") -> None:
    with forks._open_to_write("a", is_one_of_many=True):
        _lock_file(forks, "a").unlink()
        id = forks._opened.catalog.volume("a").id
        with pytest.raises(onionskin.StateError, match="open for writing"):
            VolumeLock(forks._opened.layout, id, "a")


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_what_a_power_loss_left_of_a_shared_file_keeps_nobody_out(forks: "onionskin.Store") -> None:
    _kill(_held_elsewhere(forks, "a", "b"))
    for text in (b"", bytes(20)):  # the names were durable, and what was written was not
        with _lock_file(forks, "a").open("wb") as left:
            left.write(text)
        assert _lock_file(forks, "a").stat().st_nlink == 2
        forks.open("a").close()
        _lock_file(forks, "a").unlink()
        os.link(_lock_file(forks, "b"), _lock_file(forks, "a"))
    forks.open("b").close()


def test_a_copy_of_a_store_whose_volumes_share_a_file_is_a_store_of_its_own(
    forks: "onionskin.Store", tmp_path: Path
) -> None:
    process = _held_elsewhere(forks, "a", "b")
    try:
        forks.finish_work()  # else files come and go while they are copied
        subprocess.run(["cp", "-a", forks.path, tmp_path / "copy"], check=True)
        with onionskin.Store(tmp_path / "copy") as copy:
            assert _lock_file(copy, "a").samefile(_lock_file(copy, "b"))
            with copy.open("a") as a, copy._open_to_write("b", is_one_of_many=True) as b:
                a.write(0, b"a")
                b.write(0, b"b")
            copy.delete("b")
        with pytest.raises(onionskin.StateError, match=f"process {process.pid}"):
            forks.open("a")
    finally:
        _kill(process)


def test_check_says_nothing_of_a_shared_file_and_says_it_of_another_link(forks: "onionskin.Store") -> None:
    process = _held_elsewhere(forks, "a", "b")
    try:
        assert not list(forks.check())
    finally:
        _kill(process)
    assert not list(forks.check())
    _lock_file(forks, "a").write_text("precious")
    assert {Path(problem.where).name for problem in forks.check()} == {
        _lock_file(forks, name).name for name in ("a", "b")
    }


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_a_volume_has_a_file_of_its_own_where_there_are_no_more_names(
    forks: "onionskin.Store", monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with forks._open_to_write("a", is_one_of_many=True), forks._open_to_write("b", is_one_of_many=True):
        _are_held_by_files_of_their_own(forks)


def test_a_volume_has_a_file_of_its_own_where_each_name_has_an_inode(
    forks: "onionskin.Store", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda source, path, **_: shutil.copy(source, path))
    with forks._open_to_write("a", is_one_of_many=True), forks._open_to_write("b", is_one_of_many=True):
        _are_held_by_files_of_their_own(forks)


def _are_held_by_files_of_their_own(store: "onionskin.Store") -> None:
    a, b = _lock_file(store, "a"), _lock_file(store, "b")
    assert not a.samefile(b)
    for path in (a, b):
        holder = volume_holder(path)
        assert holder is not None
        assert holder.pid == os.getpid()


def test_a_name_that_could_not_be_removed_is_used_again(
    forks: "onionskin.Store", monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with forks._open_to_write("b", is_one_of_many=True):
        with monkeypatch.context() as broken:
            a = forks._open_to_write("a", is_one_of_many=True)
            broken.setattr(os, "unlink", fail)
            a.close()
        assert _lock_file(forks, "a").samefile(_lock_file(forks, "b"))
        with forks._open_to_write("a", is_one_of_many=True):
            assert _lock_file(forks, "a").samefile(_lock_file(forks, "b"))
        assert not _lock_file(forks, "a").exists()


def test_an_opening_that_is_interrupted_behind_the_link_leaves_no_name(
    forks: "onionskin.Store", monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def interrupt(*arguments: Any, **more: Any) -> None:
        link(*arguments, **more)
        raise KeyboardInterrupt

    with forks._open_to_write("b", is_one_of_many=True):
        monkeypatch.setattr(os, "link", interrupt)
        with pytest.raises(KeyboardInterrupt):
            forks._open_to_write("a", is_one_of_many=True)
        assert not _lock_file(forks, "a").exists()
        forks.open("a").close()


def test_the_child_of_a_fork_neither_unlocks_the_file_nor_removes_a_name(forks: "onionskin.Store") -> None:
    with forks._open_to_write("a", is_one_of_many=True) as a, forks._open_to_write("b", is_one_of_many=True):
        shared = forks._opened.shared_file
        if (child := os.fork()) == 0:
            try:
                a._opened._volume_lock.close()
                shared.remove(_lock_path_of(a))
                is_new = not shared._paths and shared._descriptor < 0
            finally:
                os._exit(0 if is_new else 1)
        assert os.waitpid(child, 0)[1] == 0
        for name in ("a", "b"):
            assert volume_holder(_lock_file(forks, name)) is not None


def _lock_path_of(volume: "onionskin.Volume") -> Path:
    return Path(volume.store._opened.layout.volume_lock(volume._opened.row.id))


def test_a_finalizer_may_close_a_volume_while_another_is_added(
    forks: "onionskin.Store", monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, layout = SharedFile(), forks._opened.layout
    first, second = (VolumeLock(layout, forks._opened.catalog.volume(name).id, name) for name in ("a", "b"))
    first.make_file(shared)
    cycle: list[Any] = [first]
    cycle.append(cycle)
    look = _names.leads_to

    def collect(*arguments: Any) -> bool:
        gc.collect()
        return look(*arguments)

    monkeypatch.setattr(_names, "leads_to", collect)
    del first, cycle
    second.make_file(shared)
    assert not _lock_file(forks, "a").exists()
    assert volume_holder(_lock_file(forks, "b")) is not None
    second.close()
    assert shared._descriptor < 0


def test_a_shared_file_that_is_locked_keeps_out_who_has_the_byte(forks: "onionskin.Store") -> None:
    shared = SharedFile()
    for name in ("a", "b"):
        assert shared.add(_lock_file(forks, name))
    with pytest.raises(onionskin.StateError, match=f"process {os.getpid()}"):
        forks.open("a")
    assert _lock_file(forks, "a").samefile(_lock_file(forks, "b"))
    for name in ("a", "b"):
        shared.remove(_lock_file(forks, name))
    forks.open("a").close()


def test_nobody_is_told_to_remove_a_file_of_a_store_of_which_there_is_a_copy_by_links(
    forks: "onionskin.Store", tmp_path: Path
) -> None:
    """Without its log a catalog loses what was committed, and without its lock files are freed that somebody reads."""
    forks.finish_work()  # else files come and go while they are copied
    subprocess.run(["cp", "-al", forks.path, tmp_path / "copy"], check=True)
    with pytest.raises(onionskin.StateError, match=r"hard link.*remove the copy"):
        onionskin.Store(forks.path)
    for of_sqlite in (tmp_path / "copy").glob("catalog.db-*"):
        of_sqlite.unlink()
    with pytest.raises(onionskin.StateError, match=r"lock has another name.*remove the copy"):
        onionskin.Store(forks.path)
    shutil.rmtree(tmp_path / "copy")
    onionskin.Store(forks.path).close()


@pytest.mark.parametrize("failing", ["fstat", "pread", "fchmod"])
def test_a_lock_file_that_cannot_be_looked_at_is_not_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    tmp_path.chmod(0o2770)  # so the file is shared with a group
    path = tmp_path / "lock"
    path.touch()
    if failing == "pread":
        (tmp_path / "another name").hardlink_to(path)
    inode = path.stat().st_ino

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output error"):
        patched.setattr(os, failing, fail)
        locks._checked_lock_file(FilePath(path), os.O_RDWR | os.O_CREAT, may_be_shared=True)
    assert not any(is_open(int(number), inode) for number in os.listdir("/proc/self/fd"))


def is_open(descriptor: int, inode: int) -> bool:
    """Whether a descriptor of this process is of the file with this inode."""
    with suppress(OSError):  # the one that listed the directory
        return os.fstat(descriptor).st_ino == inode
    return False
