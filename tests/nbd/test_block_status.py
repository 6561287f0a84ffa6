"""What BLOCK_STATUS says of a disk with data of every kind."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.loop_devices import loop_devices
from support.phony_client import REQ_ONE, SET_META, TRIM, Client
from support.serving import Serving, served_volume

MIB = 1 << 20
ALLOCATION, DEPTH, CHANGED = "base:allocation", "qemu:allocation-depth", "onionskin:changed-since:clean"
Served = tuple[Serving, Any]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """8 MiB, of which the MiB at 2 MiB is data and the rest a hole."""
    path = tmp_path / "base.raw"
    with path.open("wb") as out:
        out.truncate(8 * MIB)
        out.seek(2 * MIB)
        out.write(b"b" * MIB)
    return path


def test_allocation_and_depth_of_head_layer_base_zero_and_hole(tmp_path: Path, base: Path) -> None:
    with served_volume(tmp_path, size=0, base=base) as (at, volume):
        volume.write(4 * MIB, b"layer" * 1000)
        volume.snapshot("clean")
        volume.write(5 * MIB, b"h" * MIB)
        volume.zero(2 * MIB, 8192)
        with Client(at.path) as client:
            client.go(contexts=(ALLOCATION, DEPTH))
            status = client.status(0, 8 * MIB)
    assert status[ALLOCATION] == [
        (2 * MIB + 8192, 3),
        (MIB - 8192, 0),
        (MIB, 3),
        (8192, 0),
        (MIB - 8192, 3),
        (MIB, 0),
        (2 * MIB, 3),
    ]
    assert status[DEPTH] == [
        (2 * MIB, 0),
        (MIB, 2),
        (MIB, 0),
        (8192, 2),
        (MIB - 8192, 0),
        (MIB, 1),
        (2 * MIB, 0),
    ]


def test_one_extent_is_what_req_one_gets_and_it_may_begin_anywhere(tmp_path: Path, base: Path) -> None:
    with served_volume(tmp_path, size=0, base=base) as (at, _), Client(at.path) as client:
        client.go(contexts=(ALLOCATION, DEPTH))
        assert client.status(1000, 5 * MIB, flags=REQ_ONE) == {
            ALLOCATION: [(2 * MIB - 1000, 3)],
            DEPTH: [(2 * MIB - 1000, 0)],
        }
        assert client.status(2 * MIB + 1, 3)[ALLOCATION] == [(3, 0)]


def test_a_base_that_was_cut_short_has_no_holes_that_a_client_could_skip(tmp_path: Path, base: Path) -> None:
    with served_volume(tmp_path, size=0, base=base) as (at, _), Client(at.path) as client:
        client.go(contexts=(ALLOCATION,))
        os.truncate(base, MIB)
        assert client.status(0, 8 * MIB)[ALLOCATION] == [(8 * MIB, 0)]


def test_a_device_that_became_shorter_has_no_holes_that_a_client_could_skip(tmp_path: Path, base: Path) -> None:
    with loop_devices() as device, served_volume(tmp_path, size=0, base=(at := device(base))) as (serving, _):
        os.truncate(base, MIB)
        subprocess.run(["losetup", "--set-capacity", at], check=True)
        with Client(serving.path) as client:
            client.go(contexts=(ALLOCATION,))
            assert client.status(0, 8 * MIB)[ALLOCATION] == [(8 * MIB, 0)]


def test_a_disk_too_scattered_for_one_reply_is_described_from_its_start(served: Served) -> None:
    at, volume = served
    blocks = np.arange(0, 16384, 2, dtype=np.uint64)
    volume.write_blocks(blocks, b"x" * 4096 * len(blocks))
    with Client(at.path) as client:
        client.go(contexts=(ALLOCATION,))
        described: list[tuple[int, int]] = []
        offset = 0
        while offset < 64 * MIB:
            extents = client.status(offset, 64 * MIB - offset)[ALLOCATION]
            assert 0 < len(extents) <= 2048
            described += extents
            offset += sum(length for length, _ in extents)
    assert described == [(4096, flags) for _ in range(8192) for flags in (0, 3)]


def test_a_status_of_the_whole_disk_goes_through_the_helper(tmp_path: Path) -> None:
    with served_volume(tmp_path, size=1 << 30) as (at, volume), Client(at.path) as client:
        volume.write(512 * MIB, b"x" * 4096)
        client.go(contexts=(ALLOCATION,))
        rest = (1 << 30) - 512 * MIB - 4096
        assert client.status(0, 1 << 30)[ALLOCATION] == [(512 * MIB, 3), (4096, 0), (rest, 3)]


# ---- changed since ----


def changed(client: Client, length: int = 64 * MIB) -> list[tuple[int, int]]:
    """(offset, length) of what counts as changed."""
    out, offset = [], 0
    for part, flags in client.status(0, length)[CHANGED]:
        if flags:
            out.append((offset, part))
        offset += part
    assert offset == length
    return out


def test_a_view_says_exactly_what_changed(served: Served) -> None:
    at, volume = served
    at.server.add_export("view", volume._path, read_only=True)
    at.server.set_changed_since("view", CHANGED, np.array([[MIB, 4096], [3 * MIB, 100]], dtype=np.uint64))
    volume.write(10 * MIB, b"x" * 4096)
    with Client(at.path) as client:
        client.go("view", contexts=(ALLOCATION, CHANGED))
        assert changed(client) == [(MIB, 4096), (3 * MIB, 100)]


def test_a_writable_export_adds_what_is_written_and_trimmed_later(served: Served) -> None:
    at, volume = served
    volume.write(0, b"old" * 100_000)
    volume.snapshot("clean")
    volume.write(8 * MIB, b"x" * 4096)
    mark = at.server.change_mark("web")
    at.server.set_changed_since("web", CHANGED, np.array([[8 * MIB, 4096]], dtype=np.uint64), mark=mark)
    with Client(at.path) as client:
        client.go("web", contexts=(CHANGED,))
        assert changed(client) == [(8 * MIB, 4096)]
        client.write(16 * MIB, b"y" * 8192)
        client.write(8 * MIB, b"z" * 4096)  # in place
        client.simple(TRIM, 4096, 4096)
        assert changed(client) == [(4096, 4096), (8 * MIB, 4096), (16 * MIB, 8192)]
        volume.snapshot("later")  # what is written next goes to another segment
        client.write(20 * MIB, b"y" * 4096)
        assert changed(client)[-2:] == [(16 * MIB, 8192), (20 * MIB, 4096)]


def test_after_another_path_everything_has_changed(served: Served) -> None:
    at, volume = served
    at.server.set_changed_since("web", CHANGED, np.empty((0, 2), dtype=np.uint64))
    with Client(at.path) as client:
        client.go("web", contexts=(CHANGED,))
        assert changed(client) == []
        at.server.replace_path("web", volume._path)
        assert changed(client) == [(0, 64 * MIB)]
        at.server.set_changed_since("web", CHANGED, np.empty((0, 2), dtype=np.uint64))
        assert changed(client) == []


def test_a_context_is_computed_when_a_client_asks_for_it(served: Served) -> None:
    at, _ = served
    asked = []

    def compute(name: str, context: str) -> bool:
        asked.append((name, context))
        if context != CHANGED:
            return False
        at.server.set_changed_since(name, context, [[0, 4096]])
        return True

    at.server.on_unknown_context = compute
    with Client(at.path) as client:
        client.start_structured()
        assert len(client.meta(SET_META, "web", "onionskin:changed-since:none", "x:y")) == 1
        client.go("web", structured=False, contexts=(CHANGED,))
        assert changed(client) == [(0, 4096)]
    assert asked == [("web", "onionskin:changed-since:none"), ("web", CHANGED)]


@pytest.mark.parametrize("runs", [[[0, 0]], [[4096, 4096], [0, 4096]], [[0, 8192], [4096, 4096]]])
def test_runs_that_are_not_sorted_and_apart_are_refused(served: Served, runs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sorted"):
        served[0].server.set_changed_since("web", CHANGED, runs)
