"""What merges move, in bytes, as strace counts them: a merge of a name moves none, one into the base what changed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin

SOURCE = str(Path(onionskin.__file__).parents[1])
EXTENT = 64 << 10
CHANGED = int(os.environ.get("ONIONSKIN_CHANGED_BYTES", 1 << 28))
DISK = 4 * CHANGED
PROGRAM = """
import sys
sys.path.insert(0, {source!r})
import onionskin
with onionskin.Store({store!r}, create=False) as store, store.open("web") as disk:
    open("/dev/null").close()  # begin
    {body}
    open("/dev/zero").close()  # end
"""
CALLS = "trace=openat,write,pwrite64,pwritev,pwritev2,writev,copy_file_range,sendfile"
# With -y the file behind each descriptor stands in brackets; the last one named is where the bytes go. A call that
# another thread's interrupts stands in two lines: its arguments, then its result.
CALL = re.compile(r"^(\d+) +(?:write|pwrite|copy_file_range|sendfile).*\d+<([^>]*)>")
RESULT = re.compile(r"^(\d+) .* = (\d+)$")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk on a base, with scattered changes before the first snapshot and as many behind it."""
    root = tmp_path_factory.mktemp("moved")
    with (root / "base.raw").open("wb") as base:
        base.truncate(DISK)
    with onionskin.Store(root / "store") as store, store.create("web", base=root / "base.raw") as disk:
        for turn in (0, 1):
            for number in range(CHANGED // EXTENT):
                # Every other extent of the first turn is written again in the second, the others lie beside them.
                disk.write((4 * number + turn * (number % 2)) * EXTENT, bytes([1 + turn]) * EXTENT)
            disk.snapshot(f"s{turn}")
    return root / "store"


def bytes_moved(store: Path, body: str) -> dict[str, int]:
    """Run a program on the disk; returns the bytes that went to segments, and to the base."""
    trace = store.parent / "trace"
    program = PROGRAM.format(source=SOURCE, store=str(store), body=body)
    subprocess.run(["strace", "-f", "-y", "-e", CALLS, "-o", trace, sys.executable, "-c", program], check=True)
    lines = trace.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"/dev/null"' in line)
    last = next(i for i, line in enumerate(lines) if '"/dev/zero"' in line)
    moved = {".seg": 0, ".raw": 0}
    target: dict[str, str] = {}  # of the call that a thread is in
    for line in lines[first:last]:
        if call := CALL.match(line):
            target[call[1]] = Path(call[2]).suffix
        if (result := RESULT.match(line)) and (suffix := target.pop(result[1], "")) in moved:
            moved[suffix] += int(result[2])
    return moved


@pytest.mark.slow
def test_a_merge_moves_no_block_and_one_into_the_base_only_what_changed(store: Path) -> None:
    assert bytes_moved(store, 'disk.merge("s0")') == {".seg": 0, ".raw": 0}
    with onionskin.Store(store, create=False) as opened, opened.open("web") as disk:
        changed = int(disk.extents()["length"].sum())
    assert changed == CHANGED * 3 // 2
    assert bytes_moved(store, 'disk.merge_into_base("s1")') == {".seg": 0, ".raw": changed}
