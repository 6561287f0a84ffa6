"""Groups: a snapshot of eight served disks against one of them, and how long a writer waits beside it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rig.group_load import Load, writing
from rig.plain_group import build, plain_group

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Samples
from targets.report import Figure, several, skipped, within

DISKS = 8
TURNS = 2  # of the disks that are served, and of a plain program
ROUNDS = 150  # of each kind in a turn: the p99 of all is then not the longest, which is one event
PAUSE_SECONDS = 0.05  # between two snapshots
APART = ("here", "there")  # disks with a server each
SETTLING_SECONDS = 2  # for which is written before, as `writing` does
LONGEST = {"idle": 3e-3, "one": 3e-3, "group": 3e-3, "two servers": 4e-3}  # seconds that a write beside it may take


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
        self.windows: list[tuple[float, float]] = []  # of those whose load has not ended
        self.pauses: list[float] = []  # the longest write beside each

    def take(self, call: Callable[[], object]) -> None:
        time.sleep(PAUSE_SECONDS)
        begin, start = time.time(), time.perf_counter()
        call()
        self.seconds.append(time.perf_counter() - start)
        self.windows.append((begin, time.time()))

    def note(self, load: Load) -> None:
        """Note the longest write beside each that was taken since the last call."""
        self.pauses += load.longest_within_each(self.windows)
        self.windows.clear()


def groups(directory: Path) -> Iterator[Figure]:
    """Each kind in turn, by a caller that connects for each snapshot, as a command does; and a plain program in turns."""
    what = f"group snapshot of {DISKS} disks of one server under load"
    if reason := peers.missing("fio", "gcc"):
        yield skipped(what, "<= 2 x", reason)
        return
    taken = {kind: _Taken() for kind in (*LONGEST, "plain")}
    program = build(directory)
    with onionskin.Store(directory / "store") as store, ExitStack() as stack:
        disks = [f"disk-{number}" for number in range(DISKS)]
        for name in (*disks, *APART):
            store.create(name, size="64M").close()
        exports = stack.enter_context(_served(store.path, directory / "all", *disks))
        for name in APART:
            exports += stack.enter_context(_served(store.path, directory / name, name))
        for turn in range(TURNS):
            with writing(directory, exports) as load:
                for number in range(turn * ROUNDS, (turn + 1) * ROUNDS):
                    _take_each(store, disks, number, taken)
            _note(taken, LONGEST, load)
            with plain_group(program, directory / f"plain-{turn}", len(exports)) as plain:
                time.sleep(SETTLING_SECONDS)
                for _ in range(ROUNDS):
                    taken["plain"].take(plain.take)
            _note(taken, ["plain"], plain.load)
    samples = {kind: Samples(one.seconds) for kind, one in taken.items()}
    yield within(f"{what}, against one of them", 2, samples, "group", "one")
    for kind, most in LONGEST.items():
        yield several(
            f"longest write beside it: {kind}", f"<= {most * 1e3:.0f} ms p99", taken[kind].pauses, most, at=0.99
        )
    row = "longest write beside the like of a group by a plain program, the floor of this disk"
    yield several(row, "", taken["plain"].pauses, float("inf"), at=0.99)


def _take_each(store: onionskin.Store, disks: list[str], number: int, taken: dict[str, _Taken]) -> None:
    taken["idle"].take(lambda: time.sleep(0.02))
    taken["one"].take(partial(_take_one, store, disks[0], f"one-{number}"))
    for kind, names in (("group", disks), ("two servers", list(APART))):
        taken[kind].take(partial(store.snapshot_group, dict.fromkeys(names, f"{kind}-{number}")))


def _note(taken: dict[str, _Taken], kinds: Iterable[str], load: Load) -> None:
    """Note the longest writes of a load that has ended."""
    for kind in kinds:
        taken[kind].note(load)


def _take_one(store: onionskin.Store, disk: str, name: str) -> None:
    with onionskin.connect(store, disk) as live:
        live.snapshot(name)
