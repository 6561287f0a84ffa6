"""Processes that make rounds at the same time, each with a store of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from kills.plan import Gap, rounds_of
from kills.rounds import Result, World
from support.guests import build_tick_disk

# Each that is killed is followed by one that was forked, and has all of this.
_LOADED = ("supervisor", "restore", "capture", "machine", "fork", "pool", "ram")


def run_all(
    gaps: Sequence[Gap], given: argparse.Namespace, qemu: list[str], root: Path, deadline: float | None
) -> Iterator[Result]:
    """Make the rounds, and give how each ended, until all were made or the time is over."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has one thread
    for module in _LOADED:
        importlib.import_module(f"onionskin.machine.{module}")
    disk = build_tick_disk(root)
    rounds = rounds_of(gaps, given.rounds, given.seed, given.victim)
    workers = {}
    for number in range(given.workers):
        here, pid = _start(root / f"worker{number}", qemu, disk)
        workers[here] = pid
    try:
        idle = list(workers)
        busy: set[Connection] = set()
        while idle or busy:
            while idle:
                one = idle.pop()
                drawn = None if deadline is not None and time.monotonic() > deadline else next(rounds, None)
                if drawn is not None:
                    one.send(drawn)
                    busy.add(one)
            for one in wait(list(busy)) if busy else ():
                assert isinstance(one, Connection)
                busy.discard(one)
                yield one.recv()
                idle.append(one)
    finally:
        for one in workers:
            with suppress(OSError):
                one.send(None)  # the others have its end too, so it would not see that closed
        for pid in workers.values():
            os.waitpid(pid, 0)


def _start(root: Path, qemu: list[str], disk: Path) -> tuple[Connection, int]:
    root.mkdir()
    here, there = Pipe()
    pid = os.fork()
    if pid == 0:
        here.close()
        _work(there, World(root, qemu, disk))
    there.close()
    return here, pid


def _work(connection: Connection, world: World) -> NoReturn:
    try:
        while (drawn := connection.recv()) is not None:
            connection.send(world.play(*drawn))
    except BaseException:
        traceback.print_exc()
    finally:
        world.end(forget=True)
        os._exit(0)
