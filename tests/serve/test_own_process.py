"""What `onionskin serve` sets for its process, so that no client waits for its upkeep."""

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.servers import Serve

from onionskin.cli.app import onionskin as command_line
from onionskin.nbd import own_process
from onionskin.nbd.server import Server


def test_the_table_of_descriptors_of_a_server_has_room_from_the_start(vms: Path, serve: Callable[..., Serve]) -> None:
    status = Path(f"/proc/{serve(vms).process.pid}/status").read_text()
    size = re.search(r"^FDSize:\s+(\d+)$", status, re.MULTILINE)
    assert size
    assert int(size[1]) >= 1024


def test_a_server_leaves_what_it_imported_to_no_collection(
    vms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []
    threshold = gc.get_threshold()
    monkeypatch.setattr(Server, "run", lambda self, ready: frozen.append((gc.get_freeze_count(), gc.get_threshold())))
    try:
        answer = CliRunner().invoke(command_line, ["serve", str(vms), "--socket", str(tmp_path / "socket")])
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
    assert answer.exit_code == 0
    ((count, new_threshold),) = frozen
    assert count > 10_000
    assert new_threshold == (own_process.GARBAGE_OBJECTS, *threshold[1:])


def test_a_process_that_may_have_few_descriptors_serves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_process, "getrlimit", lambda _: (3, 3))
    monkeypatch.setattr(own_process, "_keep_collections_short", lambda: None)
    own_process.prepare()
