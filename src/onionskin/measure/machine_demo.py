"""The main job for a whole machine, in one command: CPU, RAM and disk as one snapshot, with proofs.

A guest counts on its disk and in its memory, and holds a secret in memory alone. It is taken as a snapshot while it runs.
Then another system is installed over its disk, by the guest itself, and started. A revert has to bring the first one back:
it goes on at the next tick, with its secret, and disk and memory agree. Then eight machines are forked from the snapshot.
Each operation is timed beside QEMU's own: the same guest on a qcow2 disk, savevm and loadvm, in the same run. One guest
stands still while the other is timed. A proof that fails raises VerifyError.

What must hold: whatever happens, no process and no file is left, unless the files are asked for.
"""

import contextlib
import os
import select
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from onionskin.errors import OnionskinError, StateError
from onionskin.guests import counting, packages
from onionskin.guests.console import Console
from onionskin.guests.counting import Tick, ticks
from onionskin.guests.packages import Kernel
from onionskin.machine.machine import Machine, MachineSnapshot
from onionskin.measure.demo import program
from onionskin.measure.plain_qemu import PlainQemu
from onionskin.measure.steps import Step, Steps
from onionskin.store import Store

SIZE_BYTES_MIN = 16 << 20
MEMORY_BYTES = 256 << 20
FILLED_BYTES = 48 << 20  # of the memory, with what does not repeat
FORKS = 8
_ROUNDS = 3
_QEMU = "qemu-system-x86_64"  # which machines have by default
_BOOT_SECONDS, _SECONDS = 300.0, 120.0  # of a busy host; an error says that they are over
_SOME_TICKS = 20
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Timed:
    """How long something took with onionskin, and what QEMU alone has for it."""

    what: str
    seconds: float
    other: str
    other_seconds: float

    @property
    def faster(self) -> float:
        """How many times as fast it was."""
        return self.other_seconds / self.seconds


@dataclass(slots=True)
class Result:
    """What a demonstration measured.

    `different` is how many different random numbers the forks drew at one tick; `machine_bytes` and `forks_bytes`, how much
    memory the hypervisor of the machine takes that booted, and those of all its forks together.
    """

    kernel: str
    size_bytes: int
    hypervisor: str = ""
    memory_bytes: int = MEMORY_BYTES
    forks: int = FORKS
    different: int = 0
    machine_bytes: int = 0
    forks_bytes: int = 0
    steps: list[Step] = field(default_factory=list)
    times: list[Timed] = field(default_factory=list)


def demonstrate(size_bytes: int, keep: Path | None, packages_in: Path | None, report: Callable[[Step], None]) -> Result:
    """Run the demonstration.

    Parameters
    ----------
    size_bytes : int
        Size of the disk, at least 16 MiB.
    keep : path, optional
        A new directory where everything is left. By default all happens in a temporary directory that is removed again.
    packages_in : path, optional
        A directory with packages of Debian, of whose kernel the guest is made. By default what is installed here.
    report : callable
        Called with each step as it ends.

    Raises
    ------
    StateError
        Something that the guest is made of is not here. It names all of that.
    VerifyError
        A proof failed.
    """
    size_bytes = size_bytes // 4096 * 4096
    if size_bytes < SIZE_BYTES_MIN:
        raise ValueError(f"a disk of {size_bytes} bytes is too small for a system; give at least 16M")
    with contextlib.ExitStack() as stack:
        parts = _find_parts(packages_in)
        if keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onionskin-demo-")))
        else:
            keep.mkdir(parents=True)
            directory = keep.absolute()
        return _Demonstration(directory, size_bytes, parts, report).run()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the demonstration is made of."""

    kernel: Kernel
    busybox: bytes
    mkfs: str
    qemu: str
    qemu_img: str


def _find_parts(packages_in: Path | None) -> _Parts:
    qemu, qemu_img, mkfs = shutil.which(_QEMU), shutil.which("qemu-img"), program("mkfs.ext4")
    kernel, busybox = packages.find_kernel(packages_in), packages.find_busybox(packages_in)
    missing = [
        how
        for part, how in (
            (qemu, "QEMU: apt-get install qemu-system-x86"),
            (qemu_img, "qemu-img: apt-get install qemu-utils"),
            (mkfs, "mkfs.ext4: apt-get install e2fsprogs"),
            (busybox, packages.HOW_BUSYBOX),
            (kernel, packages.HOW_KERNEL),
        )
        if part is None
    ]
    if kernel is None or busybox is None or mkfs is None or qemu is None or qemu_img is None:
        raise StateError(f"the demo of a machine needs what is not here: {'; '.join(missing)}")
    return _Parts(kernel, busybox, mkfs, qemu, qemu_img)


class _Demonstration(Steps):
    """The steps, in order; each reports itself."""

    def __init__(self, directory: Path, size_bytes: int, parts: _Parts, report: Callable[[Step], None]) -> None:
        self._directory = directory
        self._parts = parts
        self._result = Result(parts.kernel.release, size_bytes)
        super().__init__(self._result.steps, report, "demo --machine --keep DIR")
        self._firsts: list[Tick] = []  # behind each revert
        self._lab: Machine
        self._console: Console
        self._plain: PlainQemu

    def run(self) -> Result:
        with self._step("build the guests"):
            self._build()
        with Store(self._directory / "store") as store, contextlib.ExitStack() as stack:
            self._lab = self._create(store)
            stack.callback(_end, [self._lab])
            with self._step("boot the guest, on onionskin and on qcow2"):
                self._boot(stack)
            before, after = self._take()
            self._replace_and_revert(before, after)
            self._compare_reverts()
            self._plain.end()
            self._fork(before)
            self._prove("check finds no problem in the store", lambda: store.check() == [])
        return self._result

    # ---- what is needed ----

    def _build(self) -> None:
        directory, parts = self._directory, self._parts
        (directory / "vmlinuz").write_bytes(parts.kernel.image)
        counting.build_initramfs(directory / "initramfs", parts.kernel, parts.busybox, filled_bytes=FILLED_BYTES)
        for name in ("first", "second"):
            image = directory / f"{name}.raw"
            counting.build_disk(image, parts.mkfs, self._result.size_bytes, parts.busybox, first=name == "first")
        command = (parts.qemu_img, "convert", "-O", "qcow2", directory / "first.raw", directory / "disk.qcow2")
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if ended.returncode:
            raise OnionskinError(f"qemu-img failed: {ended.stderr.strip()}")

    def _create(self, store: Store) -> Machine:
        for name, image in (("disk", "first.raw"), ("medium", "second.raw")):
            store.create(name, base=self._directory / image).close()
        return store.create_machine(
            "lab",
            disks=["disk", "medium"],
            memory=MEMORY_BYTES,
            kernel=str(self._directory / "vmlinuz"),
            initrd=str(self._directory / "initramfs"),
            append=counting.APPEND,
            agent=False,
        )

    def _boot(self, stack: contextlib.ExitStack) -> None:
        self._lab.start()
        self._console = stack.enter_context(Console(self._lab.console(), "the guest"))
        recorded = self._lab.status()["recorded"]
        self._result.hypervisor = f"QEMU {recorded['version']} ({recorded['accelerator']})"
        self._plain = stack.enter_context(PlainQemu(self._directory, self._plain_command()))
        _wait_for_more((self._console, self._plain.console), _BOOT_SECONDS)
        self._plain.run("stop")  # it runs only while it is timed, and the other one does not then

    def _plain_command(self, *more: str) -> list[str]:
        recorded = self._lab.status()["recorded"]
        return [
            *(self._parts.qemu, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", recorded["accelerator"], "-machine", recorded["machine_type"], "-cpu", "max"),
            *("-m", f"{MEMORY_BYTES >> 20}M", "-kernel", "vmlinuz", "-initrd", "initramfs", "-append", counting.APPEND),
            *more,
        ]

    # ---- the story ----

    def _take(self) -> tuple[Tick, Tick]:
        """Take the snapshots. Return the last ticks that were heard before the first one, and after it."""
        before = self._last_tick()
        taken, seconds = self._snapshot("ready", "snapshot the machine while it counts")
        after = self._last_tick()
        other = self._save("ready")
        self._time("first snapshot of the running guest", seconds, "savevm, synced", other)
        self._time("  for which it stands still", taken.pause_seconds, "", other)
        self._console.wait(_more(self._console), _SECONDS, "more ticks")
        taken, seconds = self._snapshot("later", "snapshot it again, a second later")
        other = self._save("later")
        self._time("second snapshot", seconds, "savevm, synced", other)
        self._time("  for which it stands still", taken.pause_seconds, "", other)
        return before, after

    def _snapshot(self, name: str, what: str) -> tuple[MachineSnapshot, float]:
        begun = time.perf_counter()
        with self._step(what, operation=True):
            taken = self._lab.snapshot(name)
        return taken, time.perf_counter() - begun

    def _last_tick(self) -> Tick:
        """Return the last tick that the guest says from now on: one that is whole, and behind what happened before."""
        self._console.wait(_more(self._console, 1), _SECONDS, "its next tick")
        return ticks(self._console.text)[-1]

    def _replace_and_revert(self, before: Tick, after: Tick) -> None:
        console = self._console
        with self._step("the guest installs another system over its disk"):
            console.type("install")
            console.wait(_said("installed"), _SECONDS, "that the other system is installed")
        self._prove("its disk is the other system, every byte", lambda: "differ" not in console.text)
        console.wait(_said("second system: up"), _SECONDS, "that the other system runs")
        with self._step("revert the machine, in the same process", operation=True):
            self._lab.revert("ready")
        first = self._hear_back()
        self._prove("it counts on at the next tick", lambda: before.count < first.count <= after.count + 1)
        self._prove("it knows the secret that was in its memory alone", lambda: first.secret == before.secret)
        console.wait(_more(console), _SECONDS, "more ticks")
        self._prove("at each tick, its disk and its memory agree", lambda: "wrong" not in console.text)

    def _hear_back(self) -> Tick:
        """Wait for the first tick behind a revert, and return it."""
        tick = _hear_back(self._console)
        self._firsts.append(tick)
        return tick

    def _compare_reverts(self) -> None:
        """Time how long it takes until a guest that runs says its next tick after a snapshot."""
        ours, theirs = [], []
        for _ in range(_ROUNDS):
            self._console.wait(_more(self._console), _SECONDS, "more ticks")
            begun = time.perf_counter()
            self._lab.revert("ready")
            self._hear_back()
            ours.append(time.perf_counter() - begun)
            theirs.append(self._load())
        what = f"revert in place, until its next tick (median of {_ROUNDS})"
        self._time(what, statistics.median(ours), "loadvm", statistics.median(theirs))
        one = len({first.count for first in self._firsts}) == 1
        self._prove(f"each of {len(self._firsts)} reverts goes on at the same tick", lambda: one)

    # ---- QEMU alone ----

    def _save(self, name: str) -> float:
        """Let the guest on qcow2 run for a while, and time a savevm of it, until it is on the disk as ours is."""
        with self._other_runs(), open(self._directory / "disk.qcow2", "rb") as disk:
            begun = time.perf_counter()
            self._plain.run(f"savevm {name}")
            os.fdatasync(disk.fileno())
            return time.perf_counter() - begun

    def _load(self) -> float:
        """Let it run for a while, and time until it has ticked behind a loadvm."""
        with self._other_runs():
            begun = time.perf_counter()
            self._plain.run("loadvm ready")
            _hear_back(self._plain.console)
            return time.perf_counter() - begun

    @contextlib.contextmanager
    def _other_runs(self) -> Iterator[None]:
        """Have the guest on qcow2 run for the time of the block, in which the machine stands still."""
        self._lab.pause()
        self._plain.run("cont")
        self._plain.console.wait(_more(self._plain.console), _SECONDS, "more ticks")
        yield
        self._plain.run("stop")
        self._lab.resume()

    # ---- forks ----

    def _fork(self, before: Tick) -> None:
        self._result.machine_bytes = _memory_of([self._lab])
        self._lab.pause()
        with self._forks(1) as (_, _, one_seconds):
            pass
        begun = time.perf_counter()
        with PlainQemu(self._directory, self._plain_command("-loadvm", "ready")) as again:
            again.console.wait(_ticked, _SECONDS, "a tick")
            other = time.perf_counter() - begun
        self._time("one fork, until it ticks", one_seconds, "a new QEMU -loadvm", other)
        with self._forks(FORKS) as (forks, consoles, seconds):
            self._time(f"{FORKS} forks, until all tick", seconds, "one new QEMU -loadvm", other)
            self._result.forks_bytes = _memory_of(forks)
            self._look_at(consoles, before)

    @contextlib.contextmanager
    def _forks(self, count: int) -> Iterator[tuple[list[Machine], list[Console], float]]:
        """Fork the machine for the time of the block. Gives the machines, their consoles, and how long it took."""
        begun = time.perf_counter()
        what = f"fork {count} machine{'s' * (count > 1)} from the snapshot"
        with self._step(what, operation=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of random numbers, the result says too
            forks = self._lab.fork("ready", count=count)
        with contextlib.ExitStack() as stack:
            stack.callback(_end, forks)
            consoles = [stack.enter_context(Console(fork.console(), f"machine {fork.name!r}")) for fork in forks]
            for console in consoles:
                console.wait(_ticked, _SECONDS, "a tick")
            yield forks, consoles, time.perf_counter() - begun

    def _look_at(self, consoles: Sequence[Console], before: Tick) -> None:
        """Prove that forks go on as the snapshot, each by itself, and count those that draw random numbers of their own."""
        _wait_for_more(consoles, _SECONDS)
        heard = [ticks(console.text) for console in consoles]
        # The number of a fork's first tick may have been drawn before the snapshot, and said behind it.
        first = max(one[1].count for one in heard)
        self._prove(
            f"all {FORKS} know the secret, and count on from the snapshot",
            lambda: all(tick.secret == before.secret and tick.count > before.count for one in heard for tick in one),
        )
        self._prove(
            "in each, disk and memory agree at each tick", lambda: all("wrong" not in one.text for one in consoles)
        )
        drawn = {tick.random for one in heard for tick in one if tick.count == first}
        self._result.different = len(drawn)

    # ---- reports ----

    def _time(self, what: str, seconds: float, other: str, other_seconds: float) -> None:
        self._result.times.append(Timed(what, seconds, other, other_seconds))


# ---- what is found on a console ----


def _more(console: Console, count: int = _SOME_TICKS) -> Callable[[str], bool | None]:
    """Return what finds so many ticks more than there are now."""
    goal = len(ticks(console.text)) + count
    return lambda text: True if len(ticks(text)) >= goal else None


def _wait_for_more(consoles: Sequence[Console], seconds: float) -> None:
    """Wait until each has said some ticks more than it has now."""
    for console, more in [(console, _more(console)) for console in consoles]:
        console.wait(more, seconds, "more ticks")


def _ticked(text: str) -> bool | None:
    return True if ticks(text) else None


def _said(line: str) -> Callable[[str], bool | None]:
    return lambda text: True if line in text else None


def _hear_back(console: Console) -> Tick:
    """Wait for the first tick whose count is not above the one before it, and return it. What was before is forgotten."""

    def back(text: str) -> Tick | None:
        found = ticks(text)
        return next((now for before, now in pairwise(found) if now.count <= before.count), None)

    tick = console.wait(back, _SECONDS, "a tick of the snapshot")
    console.forget_before(f"tick {tick.count:09d}")
    return tick


# ---- processes ----


def _memory_of(machines: Sequence[Machine]) -> int:
    """Return the memory that the hypervisors of machines take together: what several share counts once."""
    taken = 0
    for machine in machines:
        text = Path(f"/proc/{machine.status()['pids']['hypervisor']}/smaps_rollup").read_text()
        taken += next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return taken


def _end(machines: Sequence[Machine]) -> None:
    """End machines, and wait until nothing of them runs any more: their files may be removed then."""
    for machine in machines:
        pid = machine.status().get("pids", {}).get("supervisor")
        with contextlib.ExitStack() as stack:
            descriptor = None
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    stack.callback(os.close, descriptor)
            machine.stop(force=True)
            if descriptor is not None:
                select.select([descriptor], [], [], _END_SECONDS)
