"""A server that starts while a group or a fork has a volume open waits for it, and not for what is served already."""

import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.base.sockets import short_path
from onionskin.nbd import opening
from onionskin.nbd.server import Limits, Server


def a_server() -> Server:
    return Server(limits=Limits(), allow_revert=False, log=lambda line: None)


@pytest.mark.parametrize("socket_left", [False, True])
def test_a_volume_that_is_open_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, socket_left: bool
) -> None:
    """As a group snapshot opens one that nobody holds. A server that was killed may have left its control socket."""
    monkeypatch.setattr(opening, "WAIT_SECONDS", 300)
    with onionskin.Store(tmp_path / "vms") as store, closing(a_server()) as server:
        store.create("web", size="1M").close()
        if socket_left:
            _leave_a_socket(store)
        held = store.open("web")
        refused = threading.Event()
        open_volume = onionskin.Store._open_to_write

        def note(*args: Any, **more: Any) -> Any:
            try:
                return open_volume(*args, **more)
            finally:
                refused.set()

        monkeypatch.setattr(onionskin.Store, "_open_to_write", note)
        serving = threading.Thread(target=server.exports.add_volume, args=(tmp_path / "vms", "web"))
        serving.start()
        refused.wait()
        held.close()
        serving.join()
        assert server.exports.names() == ["web"]


def _leave_a_socket(store: onionskin.Store) -> Path:
    path = Path(store._opened.layout.volume_control(store._opened.catalog.volume("web").id))
    with socket.socket(socket.AF_UNIX) as dead, short_path(path) as short:
        dead.bind(short)
    return path


def test_who_opens_what_a_killed_server_had_is_not_taken_for_a_server(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1M").close()
        _leave_a_socket(store)
        with store.open("web"), pytest.raises(onionskin.StateError, match="; close it there"):
            store.open("web")


def test_the_socket_that_a_killed_server_left_goes_with_its_volume(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1M").close()
        path = _leave_a_socket(store)
        store.delete("web")
        store.finish_work()
        assert not path.exists()


def test_a_volume_that_is_served_already_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WAIT_SECONDS", 1 << 20)
    with onionskin.Store(tmp_path / "vms") as store, closing(a_server()) as server, closing(a_server()) as other:
        store.create("web", size="1M").close()
        server.exports.add_volume(tmp_path / "vms", "web")
        with pytest.raises(onionskin.StateError, match="web"):
            other.exports.add_volume(tmp_path / "vms", "web")


def test_a_volume_that_stays_held_is_refused_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WAIT_SECONDS", 0.1)
    with (
        onionskin.Store(tmp_path / "vms") as store,
        closing(a_server()) as server,
        store.create("web", size="1M"),
        pytest.raises(onionskin.StateError, match="web"),
    ):
        server.exports.add_volume(tmp_path / "vms", "web")
