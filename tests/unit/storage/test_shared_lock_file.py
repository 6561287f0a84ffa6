"""One file stands for the lock files of many volumes: the byte of each still keeps a second writer out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin
from onionskin.storage.locks import VolumeLock, volume_holder

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
