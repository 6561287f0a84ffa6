"""A program that runs command lines many times, each in a copy of a store, and interrupts them somewhere else each time.

Each line of stdin is a JSON object: template, work, words, number, and places, which are parts of the run of the verb, from 0
to 1. With `base`, a file that the verb writes to has what `pristine` has at the beginning of each run, and looks as then.
The answer is a line of JSON: the contents of the store before the verb, how a whole run ended and what it left, and the same
of each run that was struck. With `store` and `at` instead of `template` and `places`, the verb runs once, in the store
itself, and is struck at that event (0: at none); the answer says how it ended, and how many events there were.
All modules are loaded once, and a child is forked for each run.
"""

import faulthandler
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from support.strikes import Strikes

import onionskin
import onionskin.cli
from onionskin.cli import app, exit_status

HANG_SECONDS = 300


def contents(path: Path) -> dict[str, Any]:
    """Describe all volumes of a store, by what they read as and what is recorded about them, and all machines."""
    found = {}
    with onionskin.Store(path, create=False) as store:
        for machine in store.machines():
            taken = {one.name: dict(one.disks) for one in store.machine_snapshots(machine.name)}
            found[f"machine {machine.name}"] = [machine.stands_on, taken]
        for volume in store.volumes(owned=True):
            if volume.name.endswith(".ram"):  # large, and nothing is in it
                continue
            disks = {}
            for snapshot in [None, *store.snapshots(volume.name)]:
                mode = {"mode": "r"} if snapshot is None else {"snapshot": snapshot.name}
                with store.open(volume.name, **mode) as disk:
                    read = hashlib.sha256(disk.read(0, disk.size_bytes)).hexdigest()
                disks[snapshot.name if snapshot else ""] = [read, snapshot and [snapshot.parent, snapshot.note]]
            holds = sorted((hold.snapshot, hold.holder) for hold in store.holds(volume.name))
            found[volume.name] = [volume.size_bytes, volume.wipe, disks, holds]
    return json.loads(json.dumps(found))


def errors(path: Path) -> list[str]:
    """Return what `check` takes for damage. Work that waits for the next opening is none."""
    with onionskin.Store(path, create=False) as store:
        return [str(problem) for problem in store.check() if problem.severity == "error"]


class Runs:
    """The runs of one command line."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.work = Path(given["work"])
        self.store = Path(given.get("store", self.work / "store"))
        self.events = 0
        self._strikes = Strikes()

    def run(self, at: int) -> dict[str, Any]:
        """Run it in a fresh copy, and strike at an event, if it is not 0."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.given["template"], self.store)
        self.restore_base()
        return self.run_here(at) | {"left": contents(self.store), "errors": errors(self.store)} | self._run_again(at)

    def restore_base(self) -> None:
        """Give the base its first bytes, its size and its time: it is the same file then, as the store sees it."""
        if "base" not in self.given:
            return
        pristine, base = Path(self.given["pristine"]), Path(self.given["base"])
        with base.open("r+b") as file:
            file.truncate(0)
            file.write(pristine.read_bytes())
        looks = pristine.stat()
        os.utime(base, ns=(looks.st_atime_ns, looks.st_mtime_ns))

    def _run_again(self, at: int) -> dict[str, Any]:
        """Run what goes on where an interrupted run ended, and say what is there then."""
        if "base" not in self.given or at == 0:
            return {}
        again = self.run_here(None)
        base = hashlib.sha256(Path(self.given["base"]).read_bytes()).hexdigest()
        return {"again": again["status"], "then": contents(self.store), "base": base, "said": again["err"]}

    def run_here(self, at: int | None) -> dict[str, Any]:
        """Run it in the store as it is."""
        child = os.fork()
        if child == 0:
            self._become_the_command(at)
        _, status = os.waitpid(child, 0)
        self.events = int((self.work / "events").read_text()) if at == 0 else self.events
        ended = {"at": at, "status": os.waitstatus_to_exitcode(status), "events": self.events}
        return ended | {name: (self.work / name).read_text() for name in ("out", "err")}

    def _become_the_command(self, at: int | None) -> None:
        """Run the command line as a process of its own does, and count from where its verb begins."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.work / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        sys.argv = ["onionskin", *(word.format(store=self.store) for word in self.given["words"])]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resolve, leave = exit_status.Verbs.resolve_command, os._exit

        def begin(group: exit_status.Verbs, *rest: Any) -> Any:
            if group is app.onionskin and at is not None:
                self._strikes.begin(at, self.given["number"])
            return resolve(group, *rest)

        exit_status.Verbs.resolve_command = begin
        status = 99
        try:
            onionskin.cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
            events = self._strikes.end() if at is not None else 0
            if at == 0:
                (self.work / "events").write_text(str(events))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            leave(status)


def main() -> None:
    """Answer each line of stdin."""
    warnings.simplefilter("ignore")
    for package in ("base", "catalog", "storage", "operations", "control", "machine", "cli"):
        of = importlib.import_module(f"onionskin.{package}")
        for module in pkgutil.iter_modules(of.__path__, f"{of.__name__}."):
            if not module.name.endswith(("__main__", "_preload")):
                importlib.import_module(module.name)
    for line in sys.stdin:
        runs = Runs(json.loads(line))
        if "at" in runs.given:
            print(json.dumps(runs.run_here(runs.given["at"])), flush=True)
            continue
        runs.restore_base()
        before = contents(Path(runs.given["template"]))
        whole = runs.run(0)
        struck = [runs.run(max(1, round(place * runs.events))) for place in runs.given["places"]]
        print(json.dumps({"before": before, "whole": whole, "struck": struck}), flush=True)


if __name__ == "__main__":
    main()
