"""A volume in a sandbox that refuses a call which it does without."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from support.forbid_calls import FALLOCATE, forbid

import onionskin

WRITE = """
import os, signal, sys
import onionskin

with onionskin.Store(sys.argv[1]) as store:
    web = store.create("web", size="1M")
    web.write(0, b"1" * 8192)
    web.snapshot("one")
    web.write(0, b"2" * 4096)
    web.trim(4096, 4096)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_volume_keeps_what_was_written_where_fallocate_is_refused(tmp_path: Path) -> None:
    line = [sys.executable, "-c", WRITE, str(tmp_path / "vms")]
    ended = subprocess.run(line, capture_output=True, text=True, preexec_fn=partial(forbid, FALLOCATE))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with onionskin.Store(tmp_path / "vms") as store, store.open("web") as web:
        assert web.read(0, 8192) == b"2" * 4096 + bytes(4096)
        assert [one.name for one in web.snapshots] == ["one"]
