"""The process of a pool goes on where it can start no process, and has no descriptor left."""

import errno
import os
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onionskin
from onionskin.base.sockets import UnixListener
from onionskin.control import frames
from onionskin.errors import StateError
from onionskin.machine import pool_server
from onionskin.machine.pool import MachinePool, socket_path
from onionskin.machine.pool_server import Member, Pool


def refuse(number: int) -> Any:
    raise OSError(number, os.strerror(number))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(pool_server.daemon, "log_line", lambda line: None)
    what = {"machine": "00" * 16, "snapshot": "00" * 16, "warm": 2, "store": str(tmp_path), "trust": False}
    return Pool(what, None)


def test_a_process_that_cannot_be_forked_costs_no_descriptor_and_is_tried_again_later(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: refuse(errno.EAGAIN))
    before = descriptors()
    for _ in range(3):
        pool._fill()
    assert pool._failure == os.strerror(errno.EAGAIN)
    monkeypatch.setattr(pool, "_make", lambda count: {"one": "11" * 16})
    for _ in range(3):
        pool._fill()  # its rows are there, and no supervisor
    assert not pool._members
    assert descriptors() <= before  # what earlier tests left is closed at any moment


def test_who_waits_for_a_pool_is_told_of_a_full_disk_as_the_error_that_it_is(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = socket.socketpair()
    pool._waiting = [there]

    def refuse_rows(count: int) -> dict[str, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/vms/catalog.db")

    monkeypatch.setattr(pool, "_make", refuse_rows)
    pool._fill()
    with here:
        reply = frames.receive(here, bytes_max=frames.REPLY_BYTES_MAX)
    error = frames.unpack_error((reply or {})["error"])
    assert isinstance(error, OSError) and (error.errno, error.filename) == (errno.ENOSPC, "/vms/catalog.db")
    assert pool._status()["failure"] == f"/vms/catalog.db: {os.strerror(errno.ENOSPC)}"
    with pytest.raises(OSError, match="No space left"):
        pool.run()  # whoever started it is told so, too


def test_a_copy_that_was_put_where_the_store_of_a_pool_was_is_left_alone(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "vms"
    pool._what["store"] = str(path)
    onionskin.Store(path).close()
    assert pool._in_store(lambda store: store.path) == path
    path.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", path)
    with pytest.raises(StateError, match=r"another store is at .* move it back"):
        pool._in_store(lambda store: pytest.fail("it was opened"))
    shutil.rmtree(path)
    (tmp_path / "moved").rename(path)
    assert pool._in_store(lambda store: store.path) == path


def test_a_pool_goes_on_where_nobody_can_clean_up_after_a_machine_that_ended(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = socket.socketpair()
    pool._members = [Member(bytes(16), os.getpid(), here, None)]
    there.close()
    monkeypatch.setattr(os, "fork", lambda: refuse(errno.ENOMEM))
    pool._lose(pool._members[0])
    assert not (pool._members or pool._cleaning)


def test_a_pool_without_descriptors_does_not_spin_on_who_connects(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    pool._listener = UnixListener(tmp_path / "pool")
    monkeypatch.setattr(socket.socket, "accept", lambda self: refuse(errno.EMFILE))
    monkeypatch.setattr(pool_server, "time", SimpleNamespace(sleep=slept.append))  # of it alone
    pool._accept()
    pool._listener.close()
    assert slept == [pool_server.ACCEPT_AGAIN_SECONDS]


def test_the_ends_of_supervisors_are_waited_for_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", lambda pid: refuse(errno.EMFILE))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    threading.Timer(0.05, os.close, (writer,)).start()
    pool_server._wait_for_ends([child])
    assert os.waitpid(child, os.WNOHANG)[0] == child  # it has ended, and is still to be taken note of
    pool_server._wait_for_ends([child])


def test_a_pool_that_gives_no_answer_and_is_there_is_not_said_to_have_ended(tmp_path: Path) -> None:
    listener = UnixListener(socket_path(tmp_path, bytes(16)))

    def hang_up() -> None:
        with listener.socket.accept()[0] as connection:
            connection.recv(1 << 16)

    answering = threading.Thread(target=hang_up)
    answering.start()
    one = MachinePool(tmp_path, "clean", bytes(16))
    with pytest.raises(StateError, match="gave no answer, and has not ended"):
        one.stop()
    answering.join()
    listener.close()
    one.stop()  # now it has
