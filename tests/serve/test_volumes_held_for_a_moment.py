"""A server that starts while a group or a fork has a volume open waits for it, and not for what is served already."""

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.nbd import opening
from onionskin.nbd.server import Limits, Server


def a_server() -> Server:
    return Server(limits=Limits(), allow_revert=False, log=lambda line: None)


def test_a_volume_that_is_open_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a group snapshot opens one that nobody holds."""
    monkeypatch.setattr(opening, "WAIT_SECONDS", 60)
    with onionskin.Store(tmp_path / "vms") as store, closing(a_server()) as server:
        held = store.create("web", size="1M")
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
