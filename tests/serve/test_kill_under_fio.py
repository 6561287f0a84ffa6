"""kill -9 of the server under fio's verified load: fio itself finds everything that it was answered for.

One fio writes to two halves of a volume. In the lower one, parts are written one after the other, each to its end, with a
flush behind it or without one: a part that fio ended without an error was answered for as a whole. In the upper one, a load
with sixteen requests under way and, where the parts have some, flushes of its own goes on until the server is gone. Without
flushes a snapshot comes first, so that all that is written is new to the head, and only pending records say where it is.
Every part has a seed of its own each time, so that fio takes what an earlier round wrote for the error that it would be.
"""

import json
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import numpy
import pytest
from support.servers import END_SECONDS, Serve, onionskin, short_socket

KILLS = 50
PARTS = 6
PART_BYTES = 64 << 10
LOAD_OFFSET, LOAD_BYTES = 8 << 20, 1 << 20
BLOCK = 4096
HEADER = struct.Struct(
    "<HHIQQIIHHII"
)  # magic, kind, length, seed, offset, time, time, thread, number, crc; crc of data
HEADER_MAGIC = 0xACCA
Start = Callable[..., Serve]


class Fio:
    """Job files for one export, and what came of them."""

    def __init__(self, directory: Path, uri: str, *, flushes: bool) -> None:
        self.directory = directory
        self._common = [
            *("[global]", "ioengine=nbd", f"uri={uri}", "rw=randwrite", f"bs={BLOCK}", "verify=crc32c"),
            *("verify_fatal=1", "verify_state_save=0", "exitall_on_error=1"),
            *(("fsync=4", "end_fsync=1") if flushes else ()),
        ]

    def start_writing(self, seeds: dict[int, int], load_seed: int) -> "subprocess.Popen[str]":
        """Write the parts in order, and the load beside them."""
        self._ended, says = os.pipe()
        jobs = ["do_verify=0", "[load]", f"offset={LOAD_OFFSET}", f"size={LOAD_BYTES}", "iodepth=16"]
        jobs += [f"randseed={load_seed}", "time_based=1", "runtime=300"]
        for part, seed in seeds.items():
            jobs += [*_part(part, seed), f"exec_postrun=echo . | tee /dev/fd/{says}"]
            jobs += [f"wait_for=part{part - 1}"] if part else []
        try:
            return self._start("write", jobs, pass_fds=[says])
        finally:
            os.close(says)

    def wait_for_parts(self, count: int) -> None:
        """Return when so many parts have ended since `start_writing`, or fio has."""
        while count and (ended := os.read(self._ended, 1)):
            count -= ended == b"."

    def end(self, writing: "subprocess.Popen[str]") -> tuple[set[int], set[int]]:
        """Wait for the end of what `start_writing` began; the parts that were answered for as a whole, and those begun."""
        writing.communicate(timeout=END_SECONDS)
        os.close(self._ended)
        text = (self.directory / "write.json").read_text()
        jobs = json.loads(text[text.index("{\n") :])["jobs"]  # behind what went wrong
        parts = {int(job["jobname"][4:]): job for job in jobs if job["jobname"] != "load"}
        whole = {part for part, job in parts.items() if not job["error"] and job["write"]["io_bytes"] == PART_BYTES}
        return whole, {part for part, job in parts.items() if job["write"]["io_bytes"]} | {max(whole, default=-1) + 1}

    def fill_load(self) -> None:
        """Write all blocks of the load's half once."""
        _ended_well(self._start("fill", ["do_verify=0", "[load]", f"offset={LOAD_OFFSET}", f"size={LOAD_BYTES}"]))

    def verify(self, seeds: dict[int, int]) -> None:
        """Have fio look for what it wrote."""
        jobs = ["verify_only=1", "thread=1"]
        for part, seed in seeds.items():
            jobs += _part(part, seed)
        _ended_well(self._start("verify", jobs))

    def _start(self, name: str, jobs: Iterable[str], pass_fds: Iterable[int] = ()) -> "subprocess.Popen[str]":
        file = self.directory / f"{name}.fio"
        file.write_text("\n".join([*self._common, *jobs, ""]))
        command = ["fio", "--output-format=json", f"--output={self.directory}/{name}.json", str(file)]
        return subprocess.Popen(
            command,
            cwd=self.directory,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(pass_fds),
        )


def _part(part: int, seed: int) -> list[str]:
    return [f"[part{part}]", f"offset={part * PART_BYTES}", f"size={PART_BYTES}", f"randseed={seed}"]


def _ended_well(fio: "subprocess.Popen[str]") -> None:
    output, _ = fio.communicate(timeout=END_SECONDS)
    assert fio.returncode == 0, output


def crc32c_of_each(rows: "numpy.ndarray") -> list[int]:
    """CRC32C of each row of bytes; fio's begins with all ones and is not inverted at the end."""
    table = numpy.arange(256, dtype=numpy.uint32)
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * numpy.uint32(0x82F63B78)
    crc = numpy.full(len(rows), 0xFFFFFFFF, numpy.uint32)
    for column in rows.T:
        crc = (crc >> 8) ^ table[(crc & 0xFF) ^ column]
    return crc.tolist()


def check_whole_blocks(load: bytes) -> None:
    """Each block is one that fio wrote there, whole, whenever it was."""
    blocks = numpy.frombuffer(load, numpy.uint8).reshape(-1, BLOCK)
    for index, crc in enumerate(crc32c_of_each(blocks[:, HEADER.size :])):
        magic, _, length, _, offset, *_, expected = HEADER.unpack_from(load, index * BLOCK)
        assert (magic, length) == (HEADER_MAGIC, BLOCK), f"block {index}: no header"
        assert offset == LOAD_OFFSET + index * BLOCK, f"block {index}: it belongs to {offset}"
        assert crc == expected, f"block {index} is torn"


@pytest.mark.slow
@pytest.mark.parametrize("flushes", [True, False], ids=["flushed", "not flushed"])
def test_fio_finds_all_it_was_answered_for_after_each_of_fifty_kills(
    tmp_path: Path, serve: Start, *, flushes: bool
) -> None:
    onionskin("create", f"{tmp_path}/vms/web", "--size", "16M")
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    fio = Fio(tmp_path, f"nbd+unix:///web?socket={short_socket(tmp_path)}", flushes=flushes)
    server = serve(f"{tmp_path}/vms/web")
    fio.fill_load()
    answered: dict[int, int] = {}
    in_the_middle = 0
    for round_ in count():
        if round_ >= KILLS and in_the_middle > KILLS // 2:  # on a busy host many a kill comes late
            break
        if not flushes:
            onionskin("snapshot", f"{tmp_path}/vms/web@{round_}")
        seeds = {part: rng.randrange(1, 1 << 31) for part in range(PARTS)}
        writing = fio.start_writing(seeds, rng.randrange(1, 1 << 31))
        fio.wait_for_parts(rng.randrange(1, PARTS))
        threading.Event().wait(rng.random() * 0.02)  # so that the kill comes anywhere in a part
        server.kill()
        whole, begun = fio.end(writing)
        in_the_middle += len(whole) < PARTS
        answered = {part: seed for part, seed in answered.items() if part not in begun}
        answered |= {part: seeds[part] for part in whole}
        server = serve(f"{tmp_path}/vms/web")
        fio.verify(answered)
        with server.client() as client:
            check_whole_blocks(client.read(LOAD_OFFSET, LOAD_BYTES))
    assert onionskin("check", f"{tmp_path}/vms").stdout.endswith("no problem found\n")
