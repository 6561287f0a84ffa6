"""A wipe that cannot reach the old bytes says so, and does not claim success."""

import subprocess
import sys

import pytest
from conftest import Mount
from support.logs import words_of

import onionskin

MIB = 1 << 20


def written(store: onionskin.Store) -> onionskin.Volume:
    web = store.create("web", size=4 * MIB, wipe="zero")
    web.write(0, b"secret" * 10_000)
    web.flush()
    return web


def test_a_trim_on_a_copy_on_write_file_system_is_said_to_leave_bytes(
    btrfs_mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    with onionskin.Store(btrfs_mount() / "store") as store, written(store) as web:
        assert store.unreachable_bytes == 0
        web.trim(0, 32768)
        web.flush()
        assert store.unreachable_bytes == 32768
        web.trim(32768, 16384)
        web.flush()
        assert store.unreachable_bytes == 49152
    (said,) = words_of(caplog, "onionskin.storage.open_store")
    assert "may still be on the medium" in said


def test_a_revert_on_a_copy_on_write_file_system_is_said_to_leave_bytes(btrfs_mount: Mount) -> None:
    with onionskin.Store(btrfs_mount() / "store") as store, store.create("web", size=4 * MIB, wipe="zero") as web:
        web.snapshot("clean")
        web.write(0, b"x" * MIB)
        web.revert("clean")
        assert store.unreachable_bytes >= MIB


def test_a_wipe_in_place_is_said_to_reach_all(ext4_mount: Mount) -> None:
    with onionskin.Store(ext4_mount() / "store") as store, written(store) as web:
        web.trim(0, 32768)
        web.flush()
        assert store.unreachable_bytes == 0


def test_a_command_says_on_stderr_that_bytes_may_be_left(btrfs_mount: Mount) -> None:
    path = btrfs_mount() / "store"
    with onionskin.Store(path) as store, written(store):
        pass
    command = [sys.executable, "-m", "onionskin", "trim", f"{path}/web", "0", "32K", "--json"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "may still be on the medium" in result.stderr
    assert "may still be" not in result.stdout
