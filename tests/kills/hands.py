"""A process that carries out the verbs, as the command line does, and that is killed in some of them.

Who asks it has no store open, and starts another one when it was killed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from support import gap as gaps
from support.guests import SECONDS_MAX, Console, configuration, until
from support.processes import spare_of

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine import fork as fork_process
from onionskin.machine.machine import Machine

DONE, FAILED, KILLED = "done", "failed", "killed"
TICKS = 2
_HOOKS = Path(gaps.__file__).parent / "gaps" / "sitecustomize.py"


class Broken(Exception):
    """Something does not hold that must."""


class Hands:
    """The process.

    Parameters
    ----------
    store : Path
        With a machine `lab`, which `make` makes.
    """

    def __init__(self, store: Path) -> None:
        self._connection, there = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            _serve(there, store)
        there.close()

    def ask(self, verb: str, *given: Any) -> tuple[str, Any]:
        """Have something done. Return how that ended, and with what.

        Raises
        ------
        Broken
            It failed in a way that no verb may, or did not end.
        """
        self._connection.send((verb, given))
        if not self._connection.poll(SECONDS_MAX):
            raise Broken(f"{verb} has not ended within {SECONDS_MAX} s")
        try:
            how, result = self._connection.recv()
        except (EOFError, ConnectionError):
            return KILLED, None
        if how is None:
            raise Broken(f"{verb}: {result}")
        return how, result

    def well(self, verb: str, *given: Any) -> Any:
        """Have something done that has to end well. Return its result."""
        how, result = self.ask(verb, *given)
        if how != DONE:
            raise Broken(f"{verb}{given}: {how}: {result}")
        return result

    def end(self) -> None:
        """End it, if it was not killed."""
        self._connection.close()
        with suppress(ChildProcessError):
            if not self._ends_by_itself():
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    def _ends_by_itself(self) -> bool:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return True
            time.sleep(0.005)
        return False


def _serve(connection: Connection, path: Path) -> NoReturn:
    try:
        _hook()
        with onionskin.Store(path) as store:
            work = Work(store)
            while True:
                verb, given = connection.recv()
                connection.send(_answer(getattr(work, verb), given))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _hook() -> None:
    """Have this process killed in its own gaps, too. Nobody else is found here."""
    spec = importlib.util.spec_from_file_location("gaps_of_hands", _HOOKS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module._found.clear()


def _answer(call: Callable[..., Any], given: tuple[Any, ...]) -> tuple[str | None, Any]:
    try:
        return DONE, call(*given)
    except (OnionskinError, OSError) as error:
        return FAILED, f"{type(error).__name__}: {error}"
    except BaseException:
        return None, traceback.format_exc()


class Work:
    """What it does with an open store."""

    def __init__(self, store: onionskin.Store) -> None:
        self._store = store

    @property
    def _lab(self) -> Machine:
        return self._store.open_machine("lab")

    def make(self, qemu: list[str], disk: Path) -> None:
        """Make the machine, let it run, and take it as `ready`."""
        self._store.create("web", base=disk).close()
        self._store.create("data", size="1M").close()
        one = configuration(qemu)
        machine = self._store.create_machine(
            "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
        )
        machine.start()
        self._hear("lab")
        machine.snapshot("ready")

    def _hear(self, name: str) -> None:
        """Wait for ticks of a machine: its disk and its RAM agree, and it runs."""
        with Console(self._store.open_machine(name)._directory / "console") as screen:
            screen.wait_ticks(TICKS)

    # ---- what may be struck ----

    def snapshot(self, name: str) -> None:
        """Take the machine."""
        self._lab.snapshot(name)

    def revert(self, name: str) -> None:
        """Put it back."""
        self._lab.revert(name)

    def fork(self, count: int) -> list[str]:
        """Fork it. Return the names of the forks."""
        return [one.name for one in self._lab.fork("ready", count=count)]

    # ---- what must hold behind it ----

    def come_to_rest(self) -> str:
        """Return the state of the machine once nobody does something to it: it is never left standing still."""
        until(lambda: self._lab.state in ("running", "failed", "off"))
        status = self._lab.status()
        assert status["state"] != "failed" or status["why"], status
        return str(status["state"])

    def snapshots(self) -> dict[str, str]:
        """Return the modes of the snapshots, by their names."""
        return {one.name: one.mode for one in self._lab.snapshots}

    def go_back(self, name: str) -> None:
        """Put the machine back to a snapshot, which has to end well, and hear that it runs on."""
        self._lab.revert(name)
        state = self._lab.state
        assert state == "running", state
        self._hear("lab")

    def go_back_to_disks(self, name: str) -> None:
        """Put it back to a snapshot that was taken while it was off."""
        self._lab.stop(force=True)
        self.go_back(name)

    def drop(self, name: str) -> None:
        """Drop a snapshot, on which the machine does not stand."""
        self._lab.discard(name, recursive=True)

    def restart(self) -> None:
        """Have other processes run it, which begin at `ready`."""
        self._lab.stop(force=True)
        self._lab.revert("ready")

    def damage(self) -> list[str]:
        """Return what is wrong with the store, which is opened anew for that."""
        with onionskin.Store(self._store.path, create=False) as store:
            return [str(problem) for problem in store.check() if problem.severity == "error"]

    # ---- forks ----

    def have_spare(self) -> None:
        """Have a supervisor wait for the machine that the next fork starts."""
        (name,) = self.fork(1)
        self.drop_fork(name)
        until(lambda: spare_of(os.getpid()) is not None)

    def have_no_spare(self) -> None:
        """Have the next fork load all that it needs."""
        fork_process._end_process()

    def forks(self) -> dict[str, str]:
        """Return the names of the directories of the forks that there are, by their names."""
        found = [self._store.open_machine(info.name) for info in self._store.machines() if info.name != "lab"]
        return {one.name: one._directory.name for one in found}

    def home(self) -> str:
        """Return the name of the directory of the machine itself."""
        return self._lab._directory.name

    def run_fork(self, name: str) -> None:
        """Have a fork run, whoever was about to start it, and hear it."""
        fork = self._store.open_machine(name)

        def runs() -> bool:
            if fork.state == "running":
                return True
            with suppress(OnionskinError):  # somebody may just start it
                fork.start()
            return fork.state == "running"

        until(runs)
        self._hear(name)

    def drop_fork(self, name: str) -> None:
        """End and delete a fork, whoever was about to start it."""
        fork = self._store.open_machine(name)

        def is_dropped() -> bool:
            fork.stop(force=True)
            try:
                fork.delete()
            except OnionskinError:
                return False
            return True

        until(is_dropped)
