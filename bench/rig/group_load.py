"""Served disks under a steady load over NBD: fio writes to each, and says how long each write took and when it ended."""

import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

WRITES_PER_SECOND = 300


class Write(NamedTuple):
    """One write: seconds of the clock of the day, and how long it took."""

    begun: float
    took: float


class Load:
    """What fio wrote, once it has ended."""

    def __init__(self) -> None:
        self.writes: list[Write] = []

    def longest_within_each(self, windows: Sequence[tuple[float, float]]) -> list[float]:
        """The longest write that was under way in each of these times, which do not overlap; fio's log has milliseconds."""
        longest = [0.0] * len(windows)
        ends = [end for _, end in windows]
        for one in self.writes:
            for at in range(bisect_left(ends, one.begun), len(windows)):
                if windows[at][0] > one.begun + one.took:
                    break
                longest[at] = max(longest[at], one.took)
        return longest


@contextmanager
def writing(directory: Path, exports: Sequence[str]) -> Iterator[Load]:
    """Write 4 KiB at random places of each export, at a steady rate, until the block ends."""
    load = Load()
    options = ["--rw=randwrite", "--bs=4k", "--size=64m", f"--rate_iops={WRITES_PER_SECOND}"]
    options += ["--time_based", "--runtime=600", "--thread", "--log_unix_epoch=1", "--rate_process=poisson"]
    jobs: list[str] = []
    for number, uri in enumerate(exports):
        jobs += [
            f"--name=job{number}",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--write_lat_log={directory / f'job{number}'}",
        ]
        jobs += options
    fio = subprocess.Popen(["fio", "--output=/dev/null", *jobs], cwd=directory)
    try:
        time.sleep(2)  # it has connected, and writes at its rate
        if fio.poll() is not None:
            raise RuntimeError("fio has ended; does it have the engine for NBD?")
        yield load
    finally:
        fio.terminate()
        fio.wait()
    for log in directory.glob("job*_lat.*.log"):
        for line in log.read_text().splitlines():
            at_ms, took_ns, *_ = line.split(",")
            took = int(took_ns) / 1e9
            load.writes.append(Write(int(at_ms) / 1000 - took, took))
