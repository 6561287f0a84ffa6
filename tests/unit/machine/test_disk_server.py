"""The server of a machine's disks, as its supervisor starts it."""

import os
from pathlib import Path

import pytest

from onionskin.errors import StateError
from onionskin.machine import disk_server
from onionskin.machine.disk_server import DiskServer


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> int:
    """Have this process stand in for the server, and return where it says that it is ready."""
    reader, writer = os.pipe()
    monkeypatch.setattr(
        disk_server, "spawn", lambda arguments, log: (os.getpid(), os.fdopen(reader, "rb", buffering=0))
    )
    return writer


def test_a_server_is_waited_for_where_it_is_needed_and_not_where_it_is_begun(tmp_path: Path, said: int) -> None:
    server = DiskServer(tmp_path, ["web"], tmp_path)
    server.begin()
    os.write(said, b'{"listening": true}\n')
    server.wait_listening()
    server.wait_listening()
    os.write(said, b'{"ready": true}\n')
    server.wait_ready()
    os.close(said)


def test_a_server_is_a_program_of_its_own_where_the_process_that_waited_to_be_it_was_killed(
    tmp_path: Path, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in = disk_server.spawn
    assert stands_in is not None
    monkeypatch.setattr(DiskServer, "_start_program", lambda server, *given: stands_in(*given))
    monkeypatch.setattr(disk_server, "spawn", lambda *given: None)
    server = DiskServer(tmp_path, ["web"], tmp_path)
    server.begin()
    os.write(said, b'{"listening": true}\n{"ready": true}\n')
    server.wait_ready()
    os.close(said)


def test_a_server_that_is_slow_and_was_not_stopped_is_waited_for(
    tmp_path: Path, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_server, "READY_SECONDS", 0.0)
    monkeypatch.setattr(disk_server, "LOOK_SECONDS", 0.01)
    looks = []

    def is_at_it(server: DiskServer) -> bool:
        looks.append(server)
        if len(looks) == 3:
            os.write(said, b'{"listening": true}\n')
        return True

    monkeypatch.setattr(DiskServer, "is_at_it", property(is_at_it))
    server = DiskServer(tmp_path, ["web"], tmp_path)
    server.begin()
    server.wait_listening()
    assert len(looks) >= 3
    monkeypatch.setattr(DiskServer, "is_at_it", False)
    monkeypatch.setattr(DiskServer, "end", lambda server, seconds: None)  # this process stands in for it
    with pytest.raises(StateError, match="cannot be served"):
        server.wait_ready()
    server._close_output()
    os.close(said)


def test_who_waits_for_the_disks_alone_hears_that_the_server_listens_too(tmp_path: Path, said: int) -> None:
    server = DiskServer(tmp_path, ["web"], tmp_path)
    server.begin()
    os.write(said, b'{"listening": true}\n{"ready": true}\n')
    server.wait_ready()
    os.close(said)


def test_a_server_that_ends_before_it_listens_is_said_to_have_failed(
    tmp_path: Path, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_server.ProcessId, "end", lambda *_: None)
    server = DiskServer(tmp_path, ["web"], tmp_path)
    server.begin()
    os.close(said)
    with pytest.raises(StateError, match="cannot be served"):
        server.wait_listening()
