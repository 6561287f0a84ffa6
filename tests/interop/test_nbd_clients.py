"""Other people's NBD clients, unchanged, against our server on a Unix socket."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import Serving, served_volume

MIB = 1 << 20
SIZE = 64 * MIB
Served = tuple[Serving, Any]


def run(*command: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run([*map(str, command)], input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A disk with data of all sizes at scattered places, its last byte among them."""
    rng = np.random.default_rng(4)
    disk = np.zeros(SIZE, dtype=np.uint8)
    for start in rng.integers(0, SIZE - 600_000, 40):
        length = int(rng.integers(1, 600_000))
        disk[start : start + length] = rng.integers(0, 256, length, dtype=np.uint8)
    disk[-1] = 1
    path = tmp_path / "disk.raw"
    disk.tofile(path)
    return path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with served_volume(tmp_path, size=SIZE) as both:
        yield both


@pytest.fixture
def overlay(tmp_path: Path, raw: Path) -> Iterator[Served]:
    """A fresh volume on the disk as its base."""
    with served_volume(tmp_path, size=0, base=raw) as both:
        yield both


def test_nbdinfo_shows_size_flags_and_exports(served: Served) -> None:
    at, volume = served
    at.server.add_export("web@clean", volume._path, read_only=True, description="a snapshot")
    (info,) = json.loads(run("nbdinfo", "--json", at.uri("web@clean")))["exports"]
    assert info["export-size"] == SIZE and info["is_read_only"] and info["can_multi_conn"] and info["can_df"]
    assert info["description"] == "a snapshot"
    listed = json.loads(run("nbdinfo", "--list", "--json", "--no-content", at.uri()))["exports"]
    assert [export["export-name"] for export in listed] == ["web", "web@clean"]


def test_nbdinfo_maps_what_is_allocated_and_how_deep(served: Served) -> None:
    at, volume = served
    volume.write(MIB, b"x" * MIB)
    extents = json.loads(run("nbdinfo", "--map", "--json", at.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, MIB, 3),
        (MIB, MIB, 0),
        (2 * MIB, SIZE - 2 * MIB, 3),
    ]
    depths = json.loads(run("nbdinfo", "--map=qemu:allocation-depth", "--json", at.uri()))
    assert [e["type"] for e in depths] == [0, 1, 0]


def test_nbdcopy_copies_a_disk_in_and_out(served: Served, raw: Path, tmp_path: Path) -> None:
    at, volume = served
    run("nbdcopy", raw, at.uri())
    assert volume.read(0, SIZE) == raw.read_bytes()
    run("nbdcopy", at.uri(), tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == raw.read_bytes()


def test_nbdcopy_from_one_server_to_another(overlay: Served, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with served_volume(tmp_path / "other", size=SIZE) as (other, volume):
        run("nbdcopy", overlay[0].uri(), other.uri())
        assert volume.read(0, SIZE) == raw.read_bytes()


def test_qemu_io_verifies_patterns_over_our_base(overlay: Served, raw: Path) -> None:
    at, volume = overlay
    commands = [
        "write -P 17 1000 100000",
        "write -f -P 18 200k 64k",
        "writev -P 19 1M 4k 8k 512",
        "aio_write -P 20 2M 1M",
        "aio_flush",
        "write -z 4M 1M",
        "write -zu 5M 1M",
        "discard 6M 1M",
        "read -P 17 1000 100000",
        "read -P 18 200k 64k",
        "readv -P 19 1M 4k 8k 512",
        "read -P 20 2M 1M",
        "read -P 0 4M 2M",
        "flush",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    assert "verification failed" not in run("qemu-io", "-f", "raw", *arguments, at.uri())
    expected = bytearray(raw.read_bytes())
    expected[1000:101000] = b"\x11" * 100_000
    assert volume.read(0, 101_000) == expected[:101_000]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_qemu_img_converts_out_and_in(overlay: Served, raw: Path, tmp_path: Path, kind: str) -> None:
    at, _ = overlay
    run("qemu-img", "convert", "-f", "raw", "-O", kind, at.uri(), tmp_path / "out")
    run("qemu-img", "compare", "-f", kind, "-F", "raw", tmp_path / "out", raw)
    (tmp_path / "other").mkdir()
    with served_volume(tmp_path / "other", size=SIZE) as (other, volume):
        run("qemu-img", "convert", "-n", "-f", kind, "-O", "raw", tmp_path / "out", other.uri())
        assert volume.read(0, SIZE) == raw.read_bytes()


def test_qemu_img_map_shows_the_holes_of_a_sparse_base(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as out:
        out.truncate(SIZE)
        out.seek(8 * MIB)
        out.write(b"x" * MIB)
    with served_volume(tmp_path, size=0, base=base) as (at, _):
        extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", at.uri()))
    assert [(e["start"], e["length"], e["zero"]) for e in extents] == [
        (0, 8 * MIB, True),
        (8 * MIB, MIB, False),
        (9 * MIB, SIZE - 9 * MIB, True),
    ]


@pytest.mark.parametrize(
    "mix", [["--rw=randwrite", "--bs=4k"], ["--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=1"]]
)
def test_fio_verifies_what_it_wrote(
    overlay: Served, mix: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, _ = overlay
    monkeypatch.chdir(tmp_path)  # fio leaves files behind
    command = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={at.uri()}", f"--size={SIZE // 2}", "--iodepth=16"]
    run(*command, "--verify=crc32c", "--verify_fatal=1", "--fsync=200", "--randrepeat=0", *mix)
    counters = at.server.counters()
    assert counters["errors"] == 0 and counters["requests"]["flush"] > 0


LIBNBD = """
import errno, nbd, os, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(sys.argv[1])
assert h.get_structured_replies_negotiated() and h.can_multi_conn() and h.can_fast_zero() and h.can_fua()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
data = os.urandom(1 << 20)
h.pwrite(data, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 12345) == data
h.zero(1 << 20, 0, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
seen = {}
h.block_status(8 << 20, 0, lambda context, offset, entries, error: seen.update({context: list(entries)}))
assert set(seen) == {"base:allocation", "qemu:allocation-depth"}, seen
assert seen["base:allocation"][:2] == [(1 << 20) + 4096, 3], seen
chunks = []
h.pread_structured(8 << 20, 0, lambda buffer, offset, status, error: chunks.append((offset, len(buffer), status)))
assert sum(length for _, length, _ in chunks) == 8 << 20
_ = [h.aio_pread(nbd.Buffer(4096), i * 4096) for i in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
h.set_strict_mode(0)
for call, code in ((lambda: h.pread(1, 1 << 40), errno.EINVAL), (lambda: h.pwrite(b"x", 1 << 40), errno.ENOSPC)):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == code, error
    else:
        raise AssertionError("no error")
h.shutdown()
"""


def test_libnbd_from_python(served: Served) -> None:
    # The system's Python has libnbd's module; ours need not be the same one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        ["/usr/bin/python3", "-c", LIBNBD, served[0].uri()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
