"""What `onionskin serve` sets for its process, so that no client waits for its upkeep."""

import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.servers import Serve

import onionskin
from onionskin.base.waiting import within
from onionskin.cli.app import onionskin as command_line
from onionskin.nbd import own_process
from onionskin.nbd.server import Limits, Server
from onionskin.operations import expiry


def test_the_table_of_descriptors_of_a_server_has_room_from_the_start(vms: Path, serve: Callable[..., Serve]) -> None:
    status = Path(f"/proc/{serve(vms).process.pid}/status").read_text()
    size = re.search(r"^FDSize:\s+(\d+)$", status, re.MULTILINE)
    assert size
    assert int(size[1]) >= 1024


def test_that_room_is_made_before_the_server_has_threads(vms: Path, tmp_path: Path) -> None:
    """With threads the system waits for all processors, and the machine that starts waits for its disks."""
    text = f"""
import os, sys
from onionskin.nbd import own_process
def look():
    print(len(os.listdir("/proc/self/task")))
    raise SystemExit(0)
own_process.make_room_for_descriptors = look
from onionskin.cli.app import onionskin
onionskin(["serve", {str(vms)!r}, "--socket", {str(tmp_path / "socket")!r}])
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr


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
    own_process.make_room_for_descriptors()


@pytest.mark.parametrize("is_found", [False, True])
def test_a_volume_that_a_server_drops_is_gone_without_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_found: bool
) -> None:
    """Those that are served from the start are left to no collection, and of others many go between two."""
    at = tmp_path / "vms"
    with onionskin.Store(at) as store:
        with store.create("web", size="1M") as web:
            web.snapshot("clean")
        store.fork("web@clean", names=["job"], lifetime="1h")
    monkeypatch.setattr(expiry, "due", lambda store: iter([[store.catalog.volume("job")]]))
    monkeypatch.setattr(expiry, "drop", lambda store, rows: [])
    gc.disable()
    try:
        with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
            server.exports.add_store(at)
            whole, table = server.exports._whole_stores[0], server.exports.table
            if is_found:
                server.exports.tidy()
                server.exports._serve(whole, "job")
            gone = [weakref.ref(table.served["job"]), weakref.ref(table.served["job"].opened)]
            server.exports.tidy()
            assert "job" not in table.served
            # A thread that has just looked at it, as those of the control sockets do, lets it go a moment later.
            assert within(300, lambda: [one() for one in gone] == [None, None])
    finally:
        gc.enable()
