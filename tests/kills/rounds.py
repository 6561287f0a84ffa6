"""One round: somebody is killed in a gap of a verb, and what must hold is looked at.

- The snapshot is there as a whole, and can be gone back to, or nothing of it is. Forks are all there, and run, or none is.
- The store opens and has no damage, and the machine goes back to the snapshot that it had before.
- The machine runs, or is off or failed and says so. It never stands still.
- No process and no directory is left of what is not there.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills.hands import DONE, FAILED, KILLED, Broken, Hands
from kills.plan import Gap
from support.gap import Armed
from support.gap_places import OF_A_SPARE, WITH_DISKS
from support.guests import SECONDS_MAX
from support.processes import processes_in

RESTART_EVERY = 16  # so many rounds one supervisor and one QEMU may have, where nobody kills them
AGAIN_EVERY = 200  # so many rounds are made in one store
FORKS_MAX = 2
_LOG_BYTES = 3000


@dataclass(frozen=True)
class Result:
    """How a round ended.

    Attributes
    ----------
    gap : Gap
    victim : str
    is_met : bool
        Whether somebody was killed: of a fork, the victim may not be there yet.
    failure : str
        What did not hold; empty where all did.
    seconds : float
    left : str
        Where the store is, of a round that failed.
    """

    gap: Gap
    victim: str
    is_met: bool
    failure: str
    seconds: float
    left: str = ""


class World:
    """A store with a machine, for many rounds."""

    def __init__(self, root: Path, qemu: list[str], disk: Path) -> None:
        self._root, self._qemu, self._disk = root, qemu, disk
        self._armed = Armed(root / "gap")
        os.environ |= self._armed.environment() | {"ONIONSKIN_GAP_RESTARTS": "1000000"}
        os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning"  # the hooks load a module that is run as a program
        self._number = self._stores = 0
        self._hands: Hands | None = None

    def play(self, gap: Gap, victim: str) -> Result:
        """Make one round."""
        begun, is_met = time.monotonic(), False
        self._number += 1
        try:
            if self._hands is None or self._number % AGAIN_EVERY == 0:
                self._make()
            elif self._number % RESTART_EVERY == 0:
                self._hands.well("restart")
            is_met = getattr(self, f"_{gap.verb}")(gap, victim)
            return Result(gap, victim, is_met, "", time.monotonic() - begun)
        except (Broken, AssertionError, OSError) as error:
            self._armed.disarm()
            why = f"{error}\n{traceback.format_exc()}{self._logs()}"
            left = str(self._store)
            self.end()
            return Result(gap, victim, is_met, why, time.monotonic() - begun, left)

    @property
    def _store(self) -> Path:
        return self._root / f"store{self._stores}"

    def _make(self) -> None:
        self.end(forget=True)
        self._stores += 1
        self._hands = Hands(self._store)
        self._hands.well("make", self._qemu, self._disk)
        self._home = self._hands.well("home")

    def end(self, *, forget: bool = False) -> None:
        """End all processes of the store."""
        if self._hands is not None:
            self._hands.end()
        self._hands = None
        for pid in processes_in(self._store):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if forget:
            shutil.rmtree(self._store, ignore_errors=True)

    def _logs(self) -> str:
        """Return the ends of the logs of the machines."""
        found = []
        for path in sorted((self._store / "machines").glob("*/*.log")):
            with suppress(OSError):
                found.append(
                    f"--- {path.parent.name[:8]}/{path.name}\n{path.read_text(errors='replace')[-_LOG_BYTES:]}"
                )
        return "\n".join(found)

    def _struck(self, gap: Gap, victim: str, *asked: Any) -> tuple[str, Any, bool]:
        """Have something done while somebody is to be killed. Return how it ended, with what, and whether one was killed."""
        assert self._hands is not None
        self._armed.arm(gap.where, str(self._hands.pid) if victim == "verb" else victim)
        how, result = self._hands.ask(gap.verb, *asked)
        is_met = self._armed.disarm()
        if how == KILLED or (victim == "verb" and is_met):  # which may have answered before the signal came
            self._hands.end()
            self._hands = Hands(self._store)
        return how, result, is_met

    # ---- the verbs ----

    def _snapshot(self, gap: Gap, victim: str) -> bool:
        name = f"s{self._number}"
        how, why, is_met = self._struck(gap, victim, name)
        if not is_met:
            raise Broken(f"a snapshot does not come to {gap.where}: {how}, {why}")
        hands = self._hands
        assert hands is not None
        hands.well("come_to_rest")
        hands.well("go_back", "ready")  # it waits until nobody is at work on the machine
        mode = hands.well("snapshots").get(name)
        if how == DONE and mode is None:
            raise Broken("the snapshot was taken, and is not there")
        if mode is not None:
            hands.well("go_back" if mode != "off" else "go_back_to_disks", name)
            if mode == "off":
                hands.well("restart")
            hands.well("go_back", "ready")
            hands.well("drop", name)
        self._look(hands)
        return is_met

    def _revert(self, gap: Gap, victim: str) -> bool:
        hands = self._hands
        assert hands is not None
        if gap.where.startswith("GuestRam.drop"):
            hands.well("restart")  # it has its RAM over the file of the snapshot then
        how, why, is_met = self._struck(gap, victim, "ready")
        if not is_met:
            raise Broken(f"a revert does not come to {gap.where}: {how}, {why}")
        hands = self._hands
        assert hands is not None
        hands.well("come_to_rest")
        hands.well("go_back", "ready")
        self._look(hands)
        return is_met

    def _fork(self, gap: Gap, victim: str) -> bool:
        assert self._hands is not None
        count = 1 + self._number % FORKS_MAX
        if gap.where.rpartition(" ")[0] in OF_A_SPARE:
            self._hands.well("have_spare")
            count = 1
        elif gap.where.startswith("fork "):
            self._hands.well("have_no_spare")
        how, made, is_met = self._struck(gap, victim, count)
        if not is_met and victim in ("verb", "supervisor"):
            raise Broken(f"a fork does not come to {gap.where}: {how}, {made}")
        hands = self._hands
        assert hands is not None
        there = hands.well("forks")
        if sorted(there) != sorted(made if how == DONE else []) and (how != KILLED or len(there) != count):
            raise Broken(f"there are forks {sorted(there)} behind one of {count} that ended: {how}, {made}")
        if how == FAILED and victim == "server" and gap.where in WITH_DISKS:
            raise Broken(f"the server was not started again: {made}")
        if how != KILLED:
            self._refuse_others({self._home, *there.values()})
        for name in there:
            hands.well("run_fork", name)
            hands.well("drop_fork", name)
        self._refuse_others({self._home})
        state = hands.well("come_to_rest")
        if state != "running":
            raise Broken(f"the machine that was forked is {state}")
        self._look(hands)
        return is_met

    def _refuse_others(self, known: set[str]) -> None:
        """Wait until no directory and no process is left but those of machines that there are."""
        deadline = time.monotonic() + SECONDS_MAX
        while others := self._others(known):
            if time.monotonic() > deadline:
                raise Broken(f"these are left: {others}")
            time.sleep(0.01)

    def _others(self, known: set[str]) -> dict[str, Any]:
        root = self._store / "machines"
        found: dict[str, Any] = {name: "a directory" for name in os.listdir(root) if name not in known}
        found |= {str(pid): name for pid, name in processes_in(root).items() if name not in known}
        return found

    def _look(self, hands: Hands) -> None:
        """Open the store, look for damage, and for what a killed process left in the directory of the machine."""
        if damage := hands.well("damage"):
            raise Broken(f"the store is damaged: {damage}")
        deadline = time.monotonic() + SECONDS_MAX
        while drafts := sorted(path.name for path in (self._store / "machines" / self._home).glob("*.json.*")):
            if time.monotonic() > deadline:  # until then somebody may be writing one
                raise Broken(f"drafts are left: {drafts}")
            time.sleep(0.01)
