"""Snapshots, reverts and forks of machines beside QEMU's savevm and loadvm: the same guest, in one run, taking turns.

    python bench/machines.py --kernel vmlinuz --initrd initrd --append "console=ttyS0 counter=..." [--qemu "PROGRAM ..."]

The guest says "tick N ..." on its serial port, and writes to its memory and disks all the time, as tests/machine/counter.c
does. One machine runs at a time: the other one stands still, or is off. Each row is a median, with the least and the
greatest.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import onionskin
from onionskin.machine import restore
from onionskin.machine.monitor import Monitor
from onionskin.machine.record import Record
from onionskin.machine.supervisor import Supervisor

SECONDS_MAX = 120.0
REST_SECONDS = 1.0  # before what is timed of forks, for what a fork leaves to be done, or has wait for the next one
DISKS = {"d1": "64M", "d2": "8M"}
TICK_WORD = "{tick}"  # of the guest's command line: the milliseconds of its tick
PARTS = ("first", "snapshots", "reverts", "forks", "ram")
TICK = re.compile(rb"tick (\d+) [^\n]*\n")


class Console:
    """Reads what a guest says."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)
        self.text = b""
        self._parts: list[tuple[int, float]] = []  # up to which byte it was read, and when
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while part := self._socket.recv(65536):
            with self._news:
                self.text += part
                self._parts.append((len(self.text), time.monotonic()))
                self._news.notify_all()

    def wait_ticks(self, count: int = 1, *, since: int | None = None) -> None:
        """Wait for so many whole ticks from now on, or from a place in the text on."""
        with self._news:
            at = len(self.text) if since is None else since
            if not self._news.wait_for(lambda: len(TICK.findall(self.text, at)) >= count, SECONDS_MAX):
                raise TimeoutError(f"the guest says nothing: {self.text[-200:]!r}")

    def time_back(self, since: int) -> float:
        """Return when the first whole tick behind a place in the text came whose number is less than the one before it."""

        def find() -> float | None:
            before = 0
            for tick in TICK.finditer(self.text, since):
                if int(tick[1]) < before:
                    return next(when for read, when in self._parts if read >= tick.end())
                before = int(tick[1])
            return None

        with self._news:
            if not self._news.wait_for(lambda: find() is not None, SECONDS_MAX):
                raise TimeoutError(f"the guest did not go back: {self.text[-200:]!r}")
            found = find()
            assert found is not None
            return found

    def last_tick(self) -> int:
        """Return where the last whole tick begins."""
        with self._news:
            return [tick.start() for tick in TICK.finditer(self.text)][-1]


class Times:
    """The rows of the table, in milliseconds."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def add(self, row: str, seconds: float) -> None:
        """Add a time."""
        self.rows.setdefault(row, []).append(seconds * 1e3)

    def take(self, row: str, call: Callable[[], Any]) -> Any:
        """Time a call."""
        begun = time.monotonic()
        result = call()
        self.add(row, time.monotonic() - begun)
        return result

    def median(self, row: str) -> float:
        """Return the median of a row, NaN if it is empty."""
        return statistics.median(self.rows[row]) if row in self.rows else float("nan")

    def lines(self) -> list[str]:
        """Return the table."""
        return [
            f"{row:50} {statistics.median(ms):8.1f} ms   [{min(ms):.1f} to {max(ms):.1f}]   n={len(ms)}"
            for row, ms in self.rows.items()
        ]


class Peer:
    """The same guest in a QEMU of its own, on qcow2 files."""

    def __init__(self, root: Path, given: argparse.Namespace, tick: str, *, load: str | None = None) -> None:
        directory = Path(tempfile.mkdtemp(dir=root))
        drives = []
        for disk, size in DISKS.items():
            path = root / f"{disk}.qcow2"
            if not path.exists():
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
            drives += ["-drive", f"file={path},if=virtio,format=qcow2"]
        self._process = subprocess.Popen(
            [
                *shlex.split(given.qemu),
                *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "max", "-S"),
                *("-machine", f"{given.machine_type},usb=off", "-m", str(given.memory), "-kernel", given.kernel),
                *("-initrd", given.initrd, "-append", given.append.replace(TICK_WORD, tick), *drives),
                *("-chardev", f"socket,id=console,path={directory}/console,server=on,wait=off"),
                *("-serial", "chardev:console", "-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
                *(["-loadvm", load] if load else []),
            ]
        )
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            try:
                self.monitor = Monitor(directory / "qmp", "peer")
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)
        self.console = Console(directory / "console")

    def say(self, command: str) -> None:
        """Give a command of the human monitor."""
        if said := self.monitor.execute("human-monitor-command", {"command-line": command}, seconds=SECONDS_MAX):
            raise RuntimeError(said)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        self.monitor.close()


def pss_mib(pid: int) -> tuple[float, float]:
    """Return how much memory a process has, and how much of that is its guest's; shared pages by halves."""
    whole = guests = 0
    is_guests = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_guests = bool(re.search(r"/ram\.empty|/ram/", line))
        elif line.startswith("Pss:"):
            size = int(line.split()[1])
            whole += size
            guests += size if is_guests else 0
    return whole / 1024, guests / 1024


def create_lab(store: "onionskin.Store", name: str, given: argparse.Namespace, tick: str) -> "onionskin.Machine":
    """Make the machine with its disks."""
    for disk, size in DISKS.items():
        store.create(disk, size=size).close()
    program, *arguments = shlex.split(given.qemu)
    return store.create_machine(
        name,
        disks=list(DISKS),
        memory=f"{given.memory}M",
        program=program,
        qemu_args=arguments,
        machine_type=given.machine_type,
        kernel=given.kernel,
        initrd=given.initrd,
        append=given.append.replace(TICK_WORD, tick),
        agent=False,
    )


@contextmanager
def ran(root: Path, given: argparse.Namespace, tick: str) -> "Iterator[tuple[onionskin.Store, onionskin.Machine]]":
    """Run a machine in a store of its own, and end all that runs there behind the block."""
    root.mkdir()
    with onionskin.Store(root / "vms") as store:
        lab = create_lab(store, "lab", given, tick)
        try:
            lab.start()
            yield store, lab
        finally:
            for info in store.machines():
                store.open_machine(info.name).stop(force=True)


def pid_of(machine: "onionskin.Machine") -> int:
    """Return QEMU's process."""
    record = Record.read(machine._directory)
    assert record is not None and record.hypervisor is not None
    return record.hypervisor.pid


def console_of(machine: "onionskin.Machine") -> Console:
    """Connect to the console of a machine, as soon as it is there."""
    return Console(machine._directory / "console")


def measure_first(times: Times, root: Path, given: argparse.Namespace) -> None:
    """Take the first snapshot of machines that were just booted, each in a store of its own, beside savevm to own files.

    What others wrote to the disk is synced before, so that neither waits for it.
    """
    for number in range(given.fresh):
        place = root / f"fresh{number}"
        place.mkdir()
        with onionskin.Store(place / "vms") as store:
            lab = create_lab(store, "lab", given, given.ticks[0])
            lab.start()
            console_of(lab).wait_ticks(30)
            os.sync()
            first = times.take("first snapshot, durable", lambda: lab.snapshot("first"))  # noqa: B023
            times.add("pause of the first", first.pause_seconds)
            lab.stop(force=True)
        peer = Peer(place, given, given.ticks[0])
        try:
            peer.monitor.execute("cont")
            peer.console.wait_ticks(30)
            os.sync()
            times.take("first savevm", lambda: peer.say("savevm first"))  # noqa: B023
        finally:
            peer.end()
        shutil.rmtree(place)


def measure_snapshots(
    times: Times, store: "onionskin.Store", lab: "onionskin.Machine", root: Path, given: argparse.Namespace
) -> dict[str, float]:
    """Take second snapshots and savevm in turns, and then snapshots alone, for the pause."""
    console_of(lab).wait_ticks(30)
    lab.snapshot("first")
    lab.pause()
    peer = Peer(root, given, given.ticks[0])
    try:
        peer.monitor.execute("cont")
        peer.console.wait_ticks(30)
        peer.say("savevm first")
        peer.monitor.execute("stop")
        stored = []
        for number in range(given.rounds):
            lab.resume()
            time.sleep(given.seconds)
            taken = times.take("second snapshot, durable", lambda: lab.snapshot(f"s{number}"))  # noqa: B023
            times.add("pause of the second", taken.pause_seconds)
            stored.append(taken.bytes_stored / 2**20)
            lab.pause()
            peer.monitor.execute("cont")
            time.sleep(given.seconds)
            times.take("second savevm", lambda: peer.say(f"savevm s{number}"))  # noqa: B023
            peer.monitor.execute("stop")
    finally:
        peer.end()
    changed = changed_mib(store, ["first", *(f"s{number}" for number in range(given.rounds))], given.memory)
    found = {"second snapshots: stored MiB, median": statistics.median(stored)}
    found["second snapshots: stored / changed RAM, median"] = statistics.median(
        one / other for one, other in zip(stored, changed, strict=True)
    )
    lab.resume()
    for _ in range(given.pauses):
        time.sleep(0.3)
        times.add("pause of a live snapshot", lab.snapshot().pause_seconds)
    return found


def measure_reverts(times: Times, lab: "onionskin.Machine", root: Path, given: argparse.Namespace) -> dict[str, float]:
    """Revert and loadvm in turns, each to a snapshot that was taken some seconds before.

    A loadvm maps the RAM of its snapshot in the qcow2 file again, so the next savevm has all of that copied as it writes.
    """
    console = console_of(lab)
    console.wait_ticks(30)
    found = dict(zip(("booted: PSS MiB", "booted: of which guest RAM"), pss_mib(pid_of(lab)), strict=True))
    lab.snapshot("first")  # of which forks are made
    lab.pause()
    peer = Peer(root, given, given.ticks[1])
    try:
        peer.monitor.execute("cont")
        peer.console.wait_ticks(30)
        peer.say("savevm first")
        peer.monitor.execute("stop")
        for number in range(given.rounds):
            lab.resume()
            time.sleep(given.seconds / 2)
            row = "snapshot behind a revert, durable" if number else "snapshot before any revert"
            times.take(row, lambda: lab.snapshot(f"r{number}"))  # noqa: B023
            time.sleep(given.seconds)
            since, begun = console.last_tick(), time.monotonic()
            times.take("revert, call", lambda: lab.revert(f"r{number}"))  # noqa: B023
            times.add("revert to first output", console.time_back(since) - begun)
            lab.pause()
            peer.monitor.execute("cont")
            time.sleep(given.seconds / 2)
            row = "savevm behind a loadvm" if number else "savevm before any loadvm"
            times.take(row, lambda: peer.say(f"savevm r{number}"))  # noqa: B023
            time.sleep(given.seconds)
            since, begun = peer.console.last_tick(), time.monotonic()
            times.take("loadvm, call", lambda: peer.say(f"loadvm r{number}"))  # noqa: B023
            times.add("loadvm to first output", peer.console.time_back(since) - begun)
            peer.monitor.execute("stop")
    finally:
        peer.end()
    return found


def changed_mib(store: "onionskin.Store", names: list[str], memory: int) -> list[float]:
    """Return how much of RAM differs between each of these snapshots and the one before it."""
    found = []
    for before, after in pairwise(names):
        with store.open("lab.ram", snapshot=before) as one, store.open("lab.ram", snapshot=after) as other:
            pages = 0
            for at in range(0, memory << 20, 8 << 20):
                pair = [np.frombuffer(volume.read(at, 8 << 20), np.uint64).reshape(-1, 512) for volume in (one, other)]
                pages += int((pair[0] != pair[1]).any(1).sum())
        found.append(pages * 4096 / 2**20)
    return found


def measure_ram_part(times: Times, store: "onionskin.Store", given: argparse.Namespace) -> None:
    """Time the part of a revert that puts RAM back, where the RAM file of that snapshot is mapped, and where another is."""
    lab = store.open_machine("lab")
    lab.stop(force=True)
    store._revert_machine("lab", "first")  # so that its next start goes on from there
    supervisor = Supervisor(onionskin.Store(store.path), "lab", lambda _: None)
    supervisor.begin()
    real = restore._put_back
    try:
        console = Console(supervisor._directory / "console")
        for row, name in (("RAM part of a revert, its file mapped", "first"), ("... another file mapped", "own")):
            if name == "own":
                console.wait_ticks(3)
                supervisor.snapshot(lambda: None, name, "", None, False)
                supervisor.running.files.finish()
            supervisor.revert(lambda: None, name)
            for _ in range(given.rounds):
                console.wait_ticks(3)
                time.sleep(given.seconds / 2)
                restore._put_back = lambda *a: times.take(row, lambda: real(*a))  # noqa: B023
                supervisor.revert(lambda: None, name)
                restore._put_back = real
    finally:
        restore._put_back = real
        supervisor._process.quit(0)
        supervisor.end()


def measure_forks(times: Times, lab: "onionskin.Machine", root: Path, given: argparse.Namespace) -> dict[str, float]:
    """Fork one machine, then several at once, with a pool and without one, beside fresh QEMUs with -loadvm.

    One of another snapshot each time: how much a guest runs until it speaks depends on where a snapshot met it. The RAM file
    is there by then: the first fork of a snapshot, which has it made, is not timed.
    """
    lab.stop(force=True)
    found: dict[str, float] = {}
    names = [f"r{number}" for number in range(given.rounds)]
    for name, count in (*((name, 1) for name in names), ("first", given.forks), ("first", given.forks)):
        fork(Times(), lab, name, 1, "not timed")
        time.sleep(REST_SECONDS)
        load_peers(times, count, root, given, name)
        time.sleep(REST_SECONDS)
        found |= fork(times, lab, name, count, f"fork of {count} to last first output")
        with lab.pool(name, warm=count):
            found |= fork(times, lab, name, count, f"fork of {count} from a pool to the same")
    return found | memory_of_forks(lab, given.forks)


def fork(times: Times, lab: "onionskin.Machine", name: str, count: int, row: str) -> dict[str, float]:
    """Fork, and wait for the first output of each."""
    begun = time.monotonic()
    forks = lab.fork(name, count=count)
    times.add(f"{row}, call", time.monotonic() - begun)
    consoles = [console_of(one) for one in forks]
    for console in consoles:
        console.wait_ticks(since=0)
    times.add(row, time.monotonic() - begun)
    memory = [pss_mib(pid_of(one)) for one in forks]
    for one in forks:
        one.stop(force=True)
        one.delete()
    return {
        f"{row}: PSS MiB": sum(whole for whole, _ in memory),
        f"{row}: of which guest RAM": sum(guests for _, guests in memory),
    }


def memory_of_forks(lab: "onionskin.Machine", count: int) -> dict[str, float]:
    """Let forks run one after the other, each to its first output, and return how much memory they have together then.

    Forks that run take more all the time: what their guests write, and what QEMU translates. So what those have that run at
    once says how long the last of them took, too.
    """
    forks = lab.fork("first", count=count, start=False)
    try:
        for one in forks:
            one.start()
            console_of(one).wait_ticks(since=0)
            one.pause()
        memory = [pss_mib(pid_of(one)) for one in forks]
    finally:
        for one in forks:
            one.stop(force=True)
            one.delete()
    return {
        f"{count} forks, each at its first output: PSS MiB": sum(whole for whole, _ in memory),
        f"{count} forks, each at its first output: of which guest RAM": sum(guests for _, guests in memory),
    }


def load_peers(times: Times, count: int, root: Path, given: argparse.Namespace, name: str) -> None:
    """Start so many QEMUs with -loadvm at once, each with files of its own, and wait for the first output of each."""
    roots = [root] if count == 1 else [root / f"peer{number}" for number in range(count)]
    for one in roots:
        for disk in DISKS:
            if not (one / f"{disk}.qcow2").exists():
                one.mkdir(exist_ok=True)
                shutil.copy(root / f"{disk}.qcow2", one)

    def start(root: Path) -> Peer:
        peer = Peer(root, given, given.ticks[1], load=name)
        peer.monitor.execute("cont")
        peer.console.wait_ticks(since=0)
        return peer

    with ThreadPoolExecutor(count) as threads:
        begun = time.monotonic()
        peers = list(threads.map(start, roots))
        times.add(f"{count} fresh -loadvm to last first output", time.monotonic() - begun)
    for peer in peers:
        peer.end()


def ratios(times: Times, found: dict[str, float], forks: int) -> None:
    """Print how many times as long QEMU takes for what is said first, or how much more memory that has."""
    pairs = [
        ("first savevm", "first snapshot, durable"),
        ("first savevm", "pause of the first"),
        ("second savevm", "second snapshot, durable"),
        ("savevm behind a loadvm", "snapshot behind a revert, durable"),
        ("loadvm to first output", "revert to first output"),
    ]
    for count in (1, forks):
        rows = (f"fork of {count} to last first output", f"fork of {count} from a pool to the same")
        pairs += [(f"{count} fresh -loadvm to last first output", row) for row in rows]
    for peer, row in pairs:
        if row in times.rows:
            print(f"{peer} / {row}: {times.median(peer) / times.median(row):.2f}")
    if (together := found.get(f"{forks} forks, each at its first output: PSS MiB")) is not None:
        print(f"memory of {forks} forks / booted: {together / found['booted: PSS MiB']:.2f}")


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("kernel", None), ("initrd", None), ("append", None), ("machine-type", "pc-i440fx-7.2")):
        parser.add_argument(f"--{option}", required=default is None, default=default)
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--memory", type=int, default=512, help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="that the guest runs before each snapshot")
    parser.add_argument("--fresh", type=int, default=5, help="machines for the first snapshot, each booted for it")
    parser.add_argument("--ticks", nargs=2, default=["20", "2"], help="ms, for snapshots, and for first outputs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--forks", type=int, default=8)
    parser.add_argument("--pauses", type=int, default=50, help="further snapshots, for the pause")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times, found = Times(), dict[str, float]()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if "first" in given.parts:
            measure_first(times, root, given)
        if "snapshots" in given.parts:
            with ran(root / "snapshots", given, given.ticks[0]) as (store, lab):
                found |= measure_snapshots(times, store, lab, root / "snapshots", given)
        if {"reverts", "forks", "ram"} & set(given.parts):
            with ran(root / "reverts", given, given.ticks[1]) as (store, lab):
                found |= measure_reverts(times, lab, root / "reverts", given)
                if "forks" in given.parts:
                    found |= measure_forks(times, lab, root / "reverts", given)
                if "ram" in given.parts:
                    measure_ram_part(times, store, given)
    if given.json:
        print(json.dumps({"ms": times.rows, "other": found}))
    else:
        print("\n".join([*times.lines(), *(f"{what:50} {value:8.1f}" for what, value in found.items())]))
        ratios(times, found, given.forks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
