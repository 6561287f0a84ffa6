"""Groups: a snapshot of eight served disks against one of them, and how long a writer waits beside it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rig.group_load import Load, writing

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Samples
from targets.report import Figure, several, skipped, within

DISKS = 8
ROUNDS = 60
PAUSE_SECONDS = 0.05  # between two snapshots
APART = ("here", "there")  # disks with a server each


@contextmanager
def _served(store: Path, socket: Path, *names: str) -> Iterator[list[str]]:
    """Serve volumes, and give what a client calls them."""
    command = [sys.executable, "-m", "onionskin", "serve", *(str(store / name) for name in names)]
    command += ["--socket", str(socket), "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout
        assert json.loads(server.stdout.readline())["ready"]
        yield [f"nbd+unix:///{name}?socket={socket}" for name in names]
    finally:
        server.terminate()
        server.wait()


class _Taken:
    """Snapshots of one kind: how long each took, and when."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.windows: list[tuple[float, float]] = []

    def take(self, call: Callable[[], object]) -> None:
        time.sleep(PAUSE_SECONDS)
        begin, start = time.time(), time.perf_counter()
        call()
        self.seconds.append(time.perf_counter() - start)
        self.windows.append((begin, time.time()))

    def pauses(self, load: Load) -> list[float]:
        return [load.longest_within(*window) for window in self.windows]


def groups(directory: Path) -> Iterator[Figure]:
    """Each kind in turn, by a caller that connects for each snapshot, as a command does."""
    what = f"group snapshot of {DISKS} disks of one server under load"
    if reason := peers.missing("fio"):
        yield skipped(what, "<= 2 x", reason)
        return
    disks = [f"disk-{number}" for number in range(DISKS)]
    taken = {kind: _Taken() for kind in ("idle", "one", "group", "two servers")}
    with onionskin.Store(directory / "store") as store, ExitStack() as stack:
        for name in (*disks, *APART):
            store.create(name, size="64M").close()
        exports = stack.enter_context(_served(store.path, directory / "all", *disks))
        for name in APART:
            exports += stack.enter_context(_served(store.path, directory / name, name))
        load = stack.enter_context(writing(directory, exports))
        for number in range(ROUNDS):
            taken["idle"].take(lambda: time.sleep(0.02))
            taken["one"].take(partial(_take_one, store, disks[0], f"one-{number}"))
            for kind, names in (("group", disks), ("two servers", list(APART))):
                taken[kind].take(partial(store.snapshot_group, dict.fromkeys(names, f"{kind}-{number}")))
    samples = {kind: Samples(one.seconds) for kind, one in taken.items()}
    yield within(f"{what}, against one of them", 2, samples, "group", "one")
    for kind, most in (("idle", 3e-3), ("one", 3e-3), ("group", 3e-3), ("two servers", 4e-3)):
        row = f"longest write beside it: {kind}"
        yield several(row, f"<= {most * 1e3:.0f} ms p99", taken[kind].pauses(load), most, at=0.99)


def _take_one(store: onionskin.Store, disk: str, name: str) -> None:
    with onionskin.connect(store, disk) as live:
        live.snapshot(name)
