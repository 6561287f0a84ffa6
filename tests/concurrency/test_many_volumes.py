"""Threads that work on different volumes of one store: none of them loses what another one does.

cd tests && python -m threads.test_many_volumes SECONDS [DIRECTORY]
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.strays import strays

import onionskin

SIZE = 16 << 20
BLOCK = 4096
# One `Store` for all threads, with and without a diff between the steps; or one for each thread's task.
MODES = ("shared", "no diff", "own")


def work_on(store: onionskin.Store, number: int, mode: str) -> None:
    """What a volume reads, and what its snapshots read and differ in, is what this thread alone did to it."""
    offset, data = number * BLOCK, os.urandom(2 * BLOCK)
    changed = [(offset, 2 * BLOCK)]
    with nullcontext(store) if mode != "own" else onionskin.Store(store.path) as mine:
        with mine.open(f"t{number}") as disk:
            disk.snapshot("start")
            disk.write(offset, data)
            disk.flush()
            if mode != "no diff":
                assert stretches(disk.diff("start")) == changed
            disk.snapshot("end")
            if mode != "no diff":
                assert stretches(disk.diff("start", "end")) == changed
            assert disk.read(offset, 2 * BLOCK) == data
        with mine.open(f"t{number}", snapshot="end") as view:
            assert view.read(0, SIZE) == data.rjust(offset + 2 * BLOCK, b"\0").ljust(SIZE, b"\0")
        with mine.open(f"t{number}", snapshot="start") as view:
            assert view.read(0, SIZE) == bytes(SIZE)


def stretches(found: object) -> list[tuple[int, int]]:
    return [(int(row["offset"]), int(row["length"])) for row in found]


def run_threads(path: Path, mode: str, threads: int, volumes: int) -> None:
    """Threads on a new store; afterwards each file has a row, and each row its file."""
    with onionskin.Store(path) as store:
        for number in range(volumes):
            store.create(f"t{number}", size=SIZE).close()
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work_on, store, number, mode) for number in range(volumes)]:
                done.result()
    with onionskin.Store(path) as store:
        assert store.check() == []
    assert strays(path) == []


@pytest.mark.parametrize("mode", MODES)
def test_threads_on_different_volumes_of_one_store_lose_nothing(tmp_path: Path, mode: str) -> None:
    run_threads(tmp_path / "store", mode, threads=8, volumes=24)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_threads_on_fifty_volumes_lose_nothing_in_any_of_many_runs(tmp_path: Path, mode: str) -> None:
    for number in range(10):
        run_threads(tmp_path / f"{number}", mode, threads=8, volumes=50)


def soak(seconds: float, directory: Path | None) -> int:
    """Runs of 8 threads and 50 volumes, all modes in turn, as long as it was asked for; returns how many."""
    end, runs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        path = Path(tempfile.mkdtemp(dir=directory))
        run_threads(path / "store", MODES[runs % len(MODES)], threads=8, volumes=50)
        shutil.rmtree(path)
        runs += 1
    return runs


if __name__ == "__main__":
    print(soak(float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None), "runs, nothing lost")
