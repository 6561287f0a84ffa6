"""A volume under a rain of interrupts: the program of test_interrupts.py, which gives it a directory.

An interrupt may strike in a destructor or a callback of the collector, of whoever's, pytest's too: so this is a process of
its own, in which Python says so and goes on. All modules are loaded beforehand: one whose import is interrupted stays half
made.
"""

import _thread
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy  # noqa: F401

import onionskin

BLOCK = 4096
SECONDS = 3


class Sniper:
    """Interrupts the main thread at random moments while a call is under fire, three times at the most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shots = 0
        self._end = time.monotonic() + SECONDS
        threading.Thread(target=self._shoot, daemon=True).start()

    def _shoot(self) -> None:
        while time.monotonic() < self._end:
            time.sleep(random.random() * 0.02)
            with self._lock:
                if self._shots:
                    self._shots -= 1
                    _thread.interrupt_main()  # has happened when it returns, unlike a signal

    def under_fire(self, call: Callable[[], object]) -> None:
        # One more than there are shots: each may strike while the one before is being caught.
        with suppress(KeyboardInterrupt), suppress(KeyboardInterrupt), suppress(KeyboardInterrupt):
            with suppress(KeyboardInterrupt):
                self._arm(3)
                call()
            self._arm(0)
        self._arm(0)

    def _arm(self, shots: int) -> None:
        with self._lock:
            self._shots = shots


def work(directory: Path) -> None:
    chance = random.Random(3)
    store = onionskin.Store(directory / "store")
    web = store.create("web", size=32 * BLOCK)
    web.snapshot("warm")
    web.write(0, b"x")
    web.flatten()
    web.revert("warm")
    web.merge("warm")
    snapshots: dict[str, bytes] = {}
    number = 0
    sniper, end = Sniper(), time.monotonic() + SECONDS
    while time.monotonic() < end or number <= 10:  # a busy host does less in that time
        number += 1
        web.write(chance.randrange(24) * BLOCK, os.urandom(4 * BLOCK))
        before = web.read(0, web.size_bytes)
        name = chance.choice([*snapshots, f"s{number}"])
        changes: list[Callable[[], object]] = [web.flush, web.flatten, partial(web.snapshot, f"s{number}")]
        if name in snapshots:
            changes += [partial(web.revert, name), partial(web.merge, name), partial(web.discard, name, recursive=True)]
        sniper.under_fire(chance.choice(changes))
        assert web.read(0, web.size_bytes) in (before, snapshots.get(name))
        left = {snapshot.name for snapshot in web.snapshots}
        snapshots = {name: disk for name, disk in snapshots.items() if name in left}
        if f"s{number}" in left:
            snapshots[f"s{number}"] = before
    last = web.read(0, web.size_bytes)
    store.close()
    with onionskin.Store(directory / "store") as store, store.open("web") as web:
        assert web.read(0, web.size_bytes) == last
        for name, disk in snapshots.items():
            with store.open("web", snapshot=name) as view:
                assert view.read(0, len(disk)) == disk
        assert [problem for problem in store.check() if problem.severity == "error"] == []


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    print("nothing lost")
