"""A store under a quota of btrfs that is used up: nothing is lost, and no process ends by a signal."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin
from onionskin.base.paths import FilePath
from onionskin.catalog.copy_on_write import has_quotas

BLOCK = 4096
BLOCKS = 1024
# Each verb goes on where one before it failed.
_FILL = f"""
import sys
from contextlib import suppress
import onionskin
from onionskin.errors import OnionskinError

store = onionskin.Store(sys.argv[1])
web = store.open("web")
with suppress(OSError, OnionskinError):
    for block in range(1, {BLOCKS}, 3):
        web.write(block * {BLOCK}, b"z" * {BLOCK})
for verb in (web.flush, lambda: web.snapshot("full"), web.close):
    with suppress(OSError, OnionskinError):
        verb()
for name in ("s0", "s1"):
    with suppress(OSError, OnionskinError), store.open("web") as web:
        web.merge(name)
store.close()
print("ended")
"""


def btrfs(*arguments: object) -> str:
    return subprocess.run(["btrfs", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("left", [32, 400, 1200])
def test_a_quota_that_is_used_up_ends_no_process(btrfs_mount: Callable[..., Path], left: int) -> None:
    """SQLite writes the index of its log through a mapping, and each page of it counts for hundreds of KiB."""
    mounted = btrfs_mount(512 << 20)
    limited = mounted / "limited"
    btrfs("subvolume", "create", limited)
    assert not has_quotas(FilePath(mounted))
    btrfs("quota", "enable", mounted)
    assert has_quotas(FilePath(limited))
    with onionskin.Store(limited / "store") as store, store.create("web", size=BLOCKS * BLOCK) as web:
        for number in range(4):
            for block in range(0, BLOCKS, 3):
                web.write(block * BLOCK, bytes([65 + number]) * BLOCK)
            web.snapshot(f"s{number}")
    btrfs("filesystem", "sync", mounted)
    used = int(btrfs("qgroup", "show", "--raw", "-f", limited).split()[-2])
    btrfs("qgroup", "limit", used + (left << 10), limited)
    ended = subprocess.run(
        [sys.executable, "-c", _FILL, limited / "store"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr
    btrfs("filesystem", "sync", mounted)
    btrfs("qgroup", "limit", "none", limited)
    with onionskin.Store(limited / "store") as store:
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        for name in ("s2", "s3"):
            with store.open("web", snapshot=name) as view:
                assert view.read(0, BLOCK) == bytes([65 + int(name[1])]) * BLOCK
