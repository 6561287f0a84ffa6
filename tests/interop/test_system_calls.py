"""What snapshot and flush ask of the system, counted with strace: the cost must not grow with the disk."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import onionskin

SOURCE = str(Path(onionskin.__file__).parents[1])
PROGRAM = """
import os, sys
sys.path.insert(0, {source!r})
import onionskin
store = onionskin.Store({store!r})
disk = store.create("web", size={size!r})
disk.write(0, b"x" * 65536)
disk.flush()
disk.write(0, b"y" * 65536)
{prepare}
os.close(os.open("/dev/null", os.O_RDONLY))  # begin
{body}
os.close(os.open("/dev/zero", os.O_RDONLY))  # end
"""
CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\(")


def calls(tmp_path: Path, body: str, *, size: str = "1G", prepare: str = "") -> Counter[str]:
    """Count the system calls of `body`."""
    program = PROGRAM.format(
        source=SOURCE, store=str(tmp_path / f"store-{size}"), size=size, prepare=prepare, body=body
    )
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-o", trace, sys.executable, "-c", program], check=True)
    lines = trace.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"/dev/null"' in line)
    last = next(i for i, line in enumerate(lines) if '"/dev/zero"' in line)
    return Counter(match[1] for line in lines[first + 1 : last] if (match := CALL.match(line)))


def syncs(found: Counter[str]) -> int:
    return found["fdatasync"] + found["fsync"]


def test_a_flush_of_overwrites_is_one_sync(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()")) == 1


def test_a_flush_of_new_blocks_is_two_syncs(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()", prepare='disk.write(1 << 20, b"n" * 65536)')) == 2


def test_a_flush_of_nothing_is_no_sync(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()", prepare="disk.flush()")) == 0


def test_a_snapshot_is_one_flush_and_one_commit(tmp_path: Path) -> None:
    found = calls(tmp_path, 'disk.snapshot("a")', prepare='disk.write(1 << 20, b"n" * 65536)')
    assert syncs(found) == 3


def test_a_fork_and_its_opening_are_one_commit(tmp_path: Path) -> None:
    body = 'store.fork("web@a", names=["b"]); fork = store.open("b"); fork.read(0, 4096)'
    found = calls(tmp_path, body, prepare='disk.snapshot("a"); store._opened.finish_work()')
    assert syncs(found) == 1


PREPARED = """
for name in "abc":
    disk.snapshot(name)
    store.finish_work()
store._opened.wake = lambda: None  # what is made for the head after the next one is not counted
"""


def test_a_snapshot_of_a_head_that_was_prepared_makes_no_file(tmp_path: Path) -> None:
    body = 'disk.write(0, b"n" * 65536); disk.snapshot("d"); disk.write(0, b"o" * 65536)'
    found = calls(tmp_path, body, prepare=PREPARED)
    assert found["openat"] == 0
    assert syncs(found) == 3


@pytest.mark.parametrize("body", ['disk.snapshot("a")', "disk.flush()"])
def test_no_call_grows_with_the_size_of_the_disk(tmp_path: Path, body: str) -> None:
    small, large = (calls(tmp_path, body, size=size) for size in ("1G", "1T"))
    assert small == large
