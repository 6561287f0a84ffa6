"""Two verbs of a machine that two processes carry out at once, and what must hold behind them: see `Round`.

One of the two may be killed (SIGKILL), or the supervisor stopped for a moment (SIGSTOP), at an instant that is drawn.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.guests import SECONDS_MAX, Console, count_in, until
from support.machine_model import FORK, OFF, PAUSED, RUNNING, VERBS, State, ends
from support.strays import strays

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine.pool import SOCKET_PREFIX, MachinePool
from onionskin.machine.record import Record, read_json

if TYPE_CHECKING:
    from onionskin.machine.machine import Machine

BEGINNINGS = (RUNNING, PAUSED, OFF, "resumes")
LEFT_OF_A_MACHINE = {"ended.json", "pool.log", "qemu.log", "server.log", "supervisor.log"}


@dataclass
class Outcome:
    """How a verb ended: True: it succeeded; False: it failed; None: it was killed."""

    verb: str
    is_done: bool | None
    said: str


class Round:
    """Two verbs on a copy of a store with the machine `lab`, which is off and has the snapshots `first` and `ready`.

    Parameters
    ----------
    template, vms : Path
        The store, and where the copy is made.
    begins : str
        How the machine is before: one of BEGINNINGS.
    verbs : two of VERBS
    draw : random.Random
        For the instants.
    """

    def __init__(self, template: Path, vms: Path, begins: str, verbs: tuple[str, str], draw: random.Random) -> None:
        self.vms = vms
        self._begins = begins
        self._verbs = verbs
        self._draw = draw
        self.outcomes: list[Outcome] = []
        shutil.copytree(template, vms)

    def play(self) -> list[Outcome]:
        """Carry the verbs out, and check all."""
        begun = self._begin()
        self._carry_out()
        for one in self.outcomes:
            self._check_said(one)
        with onionskin.Store(self.vms) as store:
            until(lambda: not self._strangers())
            self._end_what_goes_on(store)
            found = self._state(store)
            given = [(VERBS[one.verb], one.is_done) for one in self.outcomes]
            allowed = list(ends(begun, given))
            if any(one.verb == "stop" and not one.is_done for one in self.outcomes):
                stop = VERBS["stop"]
                allowed = [after for one in allowed for after in stop.effect(one) or [one]]
            assert found in allowed, f"{self}: it is {found}; it may be {allowed}"
            for pool in self._pools(store):
                pool.stop()
            until(lambda: not self._strangers())
            for name in filter(None, (found.name, found.fork and FORK)):
                self._check_guest(store.open_machine(name))
            if found.name:
                self._check_snapshots(store, store.open_machine(found.name))
            self._check_end(store, found)
        assert strays(self.vms) == [], self
        shutil.rmtree(self.vms)
        return self.outcomes

    def __str__(self) -> str:
        said = "; ".join(f"{one.verb}: {one.is_done}, {one.said!r}" for one in self.outcomes)
        return f"{self._begins}: {self._verbs}: {said}"

    # ---- the verbs ----

    def _begin(self) -> State:
        """Bring the machine to where it is to begin."""
        state = State(at="ready", snapshots=(("first", ""), ("ready", "first")), disk=frozenset({"base"}))
        with onionskin.Store(self.vms) as store:
            machine = store.open_machine("lab")
            if self._begins == "resumes":
                store._revert_machine("lab", "ready")
                state = State(**vars(state) | {"resumes": True})
            elif self._begins != OFF:
                machine.revert("ready")
                if self._begins == PAUSED:
                    machine.pause()
                state = State(**vars(state) | {"runs": self._begins})
            if "pool --stop" in self._verbs and self._draw.random() < 0.7:
                machine.pool("ready", warm=1)
                state = State(**vars(state) | {"has_pool": True})
        return state

    def _carry_out(self) -> None:
        order = list(self._verbs)
        self._draw.shuffle(order)
        is_killed, is_stopped = self._draw.random() < 0.35, self._draw.random() < 0.2
        begun = [self._start(order[0])]
        time.sleep(self._draw.random() ** 2 * 0.6)
        begun.append(self._start(order[1]))
        killed = self._draw.choice(begun) if is_killed else None
        if killed is not None:
            time.sleep(self._draw.random() * 0.7)
            killed.kill()
        if is_stopped:
            self._stop_supervisor(self._draw.random() * 0.5, self._draw.random())
        for verb, process in zip(order, begun, strict=True):
            said = process.communicate(timeout=SECONDS_MAX)[1]
            is_done = None if process.returncode == -signal.SIGKILL else process.returncode == 0
            self.outcomes.append(Outcome(verb, is_done, said))

    def _start(self, verb: str) -> subprocess.Popen[str]:
        words = [word.format(store=self.vms) for word in VERBS[verb].words]
        line = [sys.executable, "-m", "onionskin", *words]
        # What stays of it has neither: else this would wait for that.
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def _stop_supervisor(self, wait: float, seconds: float) -> None:
        time.sleep(wait)
        for path in (self.vms / "machines").glob("*/running.json"):
            with suppress(OSError, OnionskinError):
                found = Record.read(path.parent)
                if found is not None and found.supervisor is not None and found.supervisor.is_alive:
                    os.kill(found.supervisor.pid, signal.SIGSTOP)
                    time.sleep(seconds)
                    os.kill(found.supervisor.pid, signal.SIGCONT)

    def _check_said(self, one: Outcome) -> None:
        """What failed says so in one line."""
        lines = one.said.splitlines()
        assert all(line.startswith("onionskin: ") for line in lines), self
        assert one.is_done is not False or lines, self

    # ---- what came of it ----

    def _end_what_goes_on(self, store: onionskin.Store) -> None:
        """Wait for what was asked for by a verb that is gone: another one has its turn behind that.

        A guest that was asked to shut down may do so at any time: it is ended.
        """
        for info in store.machines():
            if info.name in ("lab", "other"):
                machine = store.open_machine(info.name)
                if any(one.verb == "stop" and not one.is_done for one in self.outcomes):
                    machine.stop(force=True)
                if machine.state != OFF:
                    with suppress(OnionskinError):
                        machine.revert("none-of-that-name")
        until(lambda: not self._strangers())

    def _state(self, store: onionskin.Store) -> State:
        machines = {info.name: info for info in store.machines() if not info.name.startswith("warm-")}
        name = next((name for name in machines if name != FORK), "")
        fork = store.open_machine(FORK).state if FORK in machines else ""
        owned = {one.name for one in store.volumes(owned=True)} - {one.name for one in store.volumes()}
        volumes = frozenset(one.name for one in store.volumes(owned=True) if one.name not in owned)
        disk = {one.name for one in store.snapshots("web")}
        state = State("", fork=fork, volumes=volumes, disk=frozenset(disk))
        if not name:
            return state
        machine = store.open_machine(name)
        taken = {one.name: one.parent or "" for one in machine.snapshots}
        runs = machine.state
        info = store.machine_info(name)
        return State(
            name,
            runs,
            tuple(sorted(taken.items())),
            info.stands_on or "",
            info.begins != "boots",
            fork,
            bool(machine.pools()),
            frozenset(disk - taken.keys()),
            volumes,
        )

    def _pools(self, store: onionskin.Store) -> list[Any]:
        found = []
        for info in store.machines():
            if info.name in ("lab", "other"):
                found += store.open_machine(info.name).pools()
        return found

    def _check_guest(self, machine: Machine) -> None:
        """It counts on, and its disk and its memory agree."""
        if machine.state == OFF:
            machine.start()
        with Console(machine._directory / "console") as screen:
            machine.resume()
            screen.wait_ticks(2)

    def _check_snapshots(self, store: onionskin.Store, machine: Machine) -> None:
        """Each has the RAM that belongs to its disk. One whose power button was just pressed shuts down, and is left out."""
        for taken in machine.snapshots:
            if taken.mode == "off" or (taken.name not in ("first", "ready") and "stop" in self._verbs):
                continue
            machine.pause()
            with Console(machine._directory / "console") as screen:
                machine.revert(taken.name)
                before = len(screen.ticks)
                machine.resume()
                screen.wait_ticks(3)
                first = screen.ticks[before]
            count = count_in(store, taken.name)
            boots = self._begins not in (RUNNING, PAUSED) and taken.name not in ("first", "ready")
            # A guest that has not ticked yet, since it boots, begins anew.
            assert first in (count, count + 1) or (boots and first == 1), (
                f"{self}: {taken.name} goes on at {first}, and its disk says {count}"
            )

    def _check_end(self, store: onionskin.Store, found: State) -> None:
        """When all has ended, nothing is left."""
        for name in filter(None, (found.fork and FORK, found.name)):
            machine = store.open_machine(name)
            machine.stop(force=True)
            until(lambda machine=machine: not processes_of(machine._directory))
            left = {path.name for path in machine._directory.iterdir()} - LEFT_OF_A_MACHINE
            assert left == set(), f"{self}: {left}"
            machine.delete(recursive=True)
        assert not processes_of(self.vms), self
        assert not list((self.vms / "machines").glob("*")), self
        assert [problem for problem in store.check() if problem.severity == "error"] == [], self
        assert {one.name for one in store.volumes(owned=True)} == found.volumes, self

    # ---- processes ----

    def _strangers(self) -> set[int]:
        """The processes of the store that nobody has recorded: those of what begins or ends just now."""
        found = processes_of(self.vms)
        for path in (self.vms / "machines").glob("*/running.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                value: Any = read_json(path)
                found -= {value[one]["pid"] for one in ("supervisor", "hypervisor", "server") if value[one]}
        for path in (self.vms / "machines").glob(f"*/{SOCKET_PREFIX}*"):
            with suppress(OSError, OnionskinError, ValueError):  # it has ended, or is no socket
                id = bytes.fromhex(path.name.removeprefix(SOCKET_PREFIX))
                found.discard(MachinePool(path.parent, "", id).status()["pid"])
        return found


def processes_of(path: Path) -> set[int]:
    """Return the processes that have a path in their command line, or write to a log below it; but for this one."""
    found = set()
    for process in filter(lambda one: one.name.isdigit(), Path("/proc").iterdir()):
        with suppress(OSError):
            line = (process / "cmdline").read_bytes()
            log = str((process / "fd/2").readlink())
            if os.fsencode(path) in line or log.startswith(f"{path}/"):
                found.add(int(process.name))
    return found - {os.getpid()}
