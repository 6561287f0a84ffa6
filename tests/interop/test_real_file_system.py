"""A real ext4 file system of 2 GiB in a volume: fifty rounds of snapshot, change, revert or merge, each one clean."""

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

import onionskin

SIZE = 2 << 30
BLOCK = 4096
ROUNDS = 50


def run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def data_blocks(path: Path) -> set[int]:
    blocks: set[int] = set()
    with path.open("rb") as file:
        end = 0
        while end < SIZE:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            blocks.update(range(start // BLOCK, -(-end // BLOCK)))
    return blocks


def bring_in(volume: onionskin.Volume, image: Path, before: Path) -> int:
    """Write to the volume what a program changed in an image of it; returns the number of blocks."""
    blocks = np.array(sorted(data_blocks(image) | data_blocks(before)), dtype=np.uint64)
    new, old = (np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, BLOCK) for path in (image, before))
    changed = [block for block in blocks.tolist() if not np.array_equal(new[block], old[block])]
    volume.write_blocks(changed, np.ascontiguousarray(new[changed]))
    return len(changed)


@pytest.mark.slow
def test_fifty_rounds_of_change_leave_a_clean_file_system(tmp_path: Path) -> None:
    source = random.Random(50)
    base, before, after = tmp_path / "base.raw", tmp_path / "before.raw", tmp_path / "after.raw"
    with base.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", base)
    with onionskin.Store(tmp_path / "store") as store, store.create("disk", base=base) as disk:
        files: list[str] = []
        for number in range(ROUNDS):
            disk.snapshot(f"round-{number}")
            disk.export(before)
            run("cp", "--sparse=always", before, after)
            content = tmp_path / "content"
            content.write_bytes(source.randbytes(source.randrange(1, 600_000)))
            run("debugfs", "-w", "-R", f"write {content} file-{number}", after)
            assert bring_in(disk, after, before) > 0
            if source.random() < 0.4:
                disk.revert(f"round-{number}")
            else:
                disk.merge(f"round-{number}")
                files.append(f"file-{number}")
            disk.export(after)
            run("e2fsck", "-fn", after)
        listing = run("debugfs", "-R", "ls -p /", after)
        assert {name for name in listing.split("/") if name.startswith("file-")} == set(files)
