"""Processes that do random verbs on volumes of one store, and one that kills and stops them at random.

    cd tests && python -m serve.many_processes SECONDS [DIRECTORY] [SEED]

Each volume has a journal: a file of its own, to which whoever holds the volume appends a line before a verb, with what the
volume is before and after it, and one behind it. Whoever opens the volume next looks whether it is what the journal says,
unflushed writes included: a process may die, the machine does not. What an unfinished verb leaves is either of the two; an
unfinished write may have changed some blocks. Snapshots never change their contents, so who reads one needs no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.strays import strays

import onionskin

BLOCK = 4096
BLOCKS = 48
SIZE = BLOCKS * BLOCK
VOLUMES = tuple(f"v{number}" for number in range(5))
SNAPSHOTS_MAX = 6
PROCESSES = 6
OPENINGS = 8

# (what each block of the disk holds, what those of each snapshot do); a block holds one number, repeated
Disk = list[int]
State = dict[str, Any]


class Violation(Exception):
    """The store is not what it must be."""


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def numbers_in(data: bytes) -> Disk:
    found = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), BLOCK)]
    if b"".join(map(block, found)) != data:
        raise Violation("a block holds a mixture of what was written")
    return found


# ---- the journal of a volume ----


class Journal:
    """What was done to one volume, and by whom it is held: the lines that processes appended."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / "journals" / name
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self) -> None:
        os.close(self._descriptor)

    def hold(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lines(self) -> list[dict[str, Any]]:
        """A line that a kill cut off is none: its verb was not begun."""
        *whole, _ = self.path.read_text().split("\n")
        return [json.loads(line) for line in whole if line.endswith("}")]

    def add(self, **values: Any) -> None:
        line = json.dumps({"by": os.getpid(), "at": time.time(), **values}) + "\n"
        if os.write(self._descriptor, ("\n" + line).encode()) != len(line) + 1:
            raise Violation("the journal itself is cut short: is its disk full?")

    def last(self) -> tuple[State | None, State | None, str]:
        """The states between which the volume is (None: there is none), and the verb that leads from one to the other."""
        state: State | None = None
        pending: dict[str, Any] | None = None
        for line in self.lines():
            if line["is"] == "begun":
                pending = line
            elif line["is"] == "done":
                assert pending
                state, pending = pending["after"], None
            elif line["is"] == "refused":
                pending = None
            else:  # "found": what an unfinished verb turned out to be
                state, pending = line["state"], None
        return (pending["before"], pending["after"], pending["verb"]) if pending else (state, state, "")

    @contextlib.contextmanager
    def verb(self, verb: str, before: State | None, after: State | None) -> Iterator[None]:
        self.add(**{"is": "begun", "verb": verb, "before": before, "after": after})
        try:
            yield
        except onionskin.FormatError:
            raise
        except onionskin.OnionskinError as error:
            self.add(**{"is": "refused", "why": str(error)})
            raise
        self.add(**{"is": "done"})

    def snapshot_contents(self, name: str) -> Disk | None:
        for line in self.lines():
            for state in (line.get("after"), line.get("before"), line.get("state")):
                if state and name in state["snapshots"]:
                    return list(state["snapshots"][name])
        return None


def read_state(store: onionskin.Store, volume: onionskin.Volume) -> State:
    snapshots = {}
    for snapshot in volume.snapshots:
        with store.open(volume.name, snapshot=snapshot.name) as view:
            snapshots[snapshot.name] = numbers_in(view.read(0, view.size_bytes))
    return {"head": numbers_in(volume.read(0, volume.size_bytes)), "snapshots": snapshots}


def verified(journal: Journal, found: State) -> State:
    """Compare a volume that is held with its journal; an unfinished verb is settled, and written down."""
    before, after, verb = journal.last()
    candidates = [state for state in (before, after) if state is not None]
    if not candidates:
        raise Violation(f"{journal.path.name} is there, and nobody made it")
    for state in candidates:
        if found == state:
            break
    else:
        if not (verb in ("write", "zero", "trim") and is_between(found, before, after)):
            raise Violation(f"{journal.path.name} is {found} after {verb!r}, not {before} nor {after}")
    if verb:
        journal.add(**{"is": "found", "state": found})
    return found


def is_between(found: State, before: State | None, after: State | None) -> bool:
    assert before and after
    return found["snapshots"] == before["snapshots"] and all(
        number in (old, new) for number, old, new in zip(found["head"], before["head"], after["head"], strict=True)
    )


# ---- what a process does ----


@dataclass
class Session:
    """A volume that is open for writing, and what it is."""

    worker: Worker
    volume: onionskin.Volume
    journal: Journal
    state: State

    def do(self, verb: str, after: State, *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(onionskin.StateError, onionskin.ChainError):
            with self.journal.verb(verb, self.state, after):
                getattr(self.volume, verb)(*arguments, **options)
            self.state = after

    def stretch(self) -> tuple[int, int]:
        first = self.worker.random.randrange(BLOCKS)
        return first, self.worker.random.randint(1, min(12, BLOCKS - first))

    def with_head(self, first: int, numbers: Disk) -> State:
        head = self.state["head"]
        return {**self.state, "head": [*head[:first], *numbers, *head[first + len(numbers) :]]}

    def write(self) -> None:
        first, count = self.stretch()
        numbers = [self.worker.number() for _ in range(count)]
        self.do("write", self.with_head(first, numbers), first * BLOCK, b"".join(map(block, numbers)))

    def zero(self) -> None:
        first, count = self.stretch()
        self.do("zero", self.with_head(first, [0] * count), first * BLOCK, count * BLOCK)

    def trim(self) -> None:
        first, count = self.stretch()
        self.do("trim", self.with_head(first, [0] * count), first * BLOCK, count * BLOCK)

    def flush(self) -> None:
        self.do("flush", self.state)

    def snapshot(self) -> None:
        if len(self.state["snapshots"]) < SNAPSHOTS_MAX:
            name = f"s{self.worker.number()}"
            after = {**self.state, "snapshots": {**self.state["snapshots"], name: self.state["head"]}}
            self.do("snapshot", after, name)

    def some_snapshot(self) -> str | None:
        names = sorted(self.state["snapshots"])
        return self.worker.random.choice(names) if names else None

    def without(self, *names: str) -> dict[str, Disk]:
        return {name: disk for name, disk in self.state["snapshots"].items() if name not in names}

    def revert(self) -> None:
        name = self.some_snapshot()
        if name:
            self.do("revert", {**self.state, "head": self.state["snapshots"][name]}, name)

    def merge(self) -> None:
        name = self.some_snapshot()
        if name:
            self.do("merge", {**self.state, "snapshots": self.without(name)}, name)

    def discard(self) -> None:
        name = self.some_snapshot()
        if name is None:
            return
        gone = {name}
        for snapshot in self.volume.snapshots * SNAPSHOTS_MAX:
            if snapshot.parent in gone:
                gone.add(snapshot.name)
        parent = self.volume.parent
        head = self.state["snapshots"][name] if parent and parent.name in gone else self.state["head"]
        self.do("discard", {"head": head, "snapshots": self.without(*gone)}, name, recursive=True)

    def flatten(self) -> None:
        self.do("flatten", self.state)

    def merge_into_base(self) -> None:
        self.do("merge_into_base", self.state, self.worker.random.choice([None, self.some_snapshot()]))

    def look(self) -> None:
        """What only looks changes nothing, so there is nothing to write down."""
        self.volume.usage()
        name = self.some_snapshot()
        if name:
            with contextlib.suppress(onionskin.ChainError):  # they stand on nothing in common, behind a flatten
                self.volume.diff(name)

    def export(self) -> None:
        target = self.worker.root / f"exported-{os.getpid()}"
        target.unlink(missing_ok=True)
        self.volume.export(target)
        if numbers_in(target.read_bytes()) != self.state["head"]:
            raise Violation(f"the export of {self.volume.name} is not the disk")

    def clone(self) -> None:
        name, new_name = self.some_snapshot(), self.worker.random.choice(VOLUMES)
        journal = Journal(self.worker.root, new_name)
        with contextlib.closing(journal):
            if name is None or new_name == self.volume.name or not journal.hold():
                return
            before, _, verb = journal.last()
            made = {"head": self.state["snapshots"][name], "snapshots": {}}
            if before is not None or verb:
                return
            with contextlib.suppress(onionskin.OnionskinError), journal.verb("clone", None, made):
                self.worker.store.clone(self.volume.name, name, new_name)


class Worker:
    """One process: it opens a volume and does some verbs, or reads a snapshot of one that others have; again and again."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.store = onionskin.Store(root / "store")
        self._numbers = 0

    def number(self) -> int:
        """One that no other process has either."""
        self._numbers += 1
        return os.getpid() << 24 | self._numbers

    def run(self) -> None:
        while True:
            name = self.random.choice(VOLUMES)
            journal = Journal(self.root, name)
            with contextlib.closing(journal):
                lot = self.random.random()
                if lot < 0.1:
                    self.delete(name, journal)
                elif lot < 0.25:
                    self.create(name, journal)
                elif lot < 0.35:
                    self.look_at_all()
                elif lot < 0.5:
                    self.read_snapshot(name, journal)
                else:
                    self.change(name, journal)
            if self.random.random() < 0.1:
                self.store.close()
                self.store = onionskin.Store(self.root / "store")

    def change(self, name: str, journal: Journal) -> None:
        try:
            volume = self.store.open(name)
        except onionskin.VolumeNotFoundError:
            return
        except onionskin.StateError:  # somebody else has it
            return
        with volume:
            if not journal.hold():
                return
            session = Session(self, volume, journal, verified(journal, read_state(self.store, volume)))
            weighted = {
                session.write: 12, session.zero: 2, session.trim: 4, session.flush: 5, session.snapshot: 6,
                session.revert: 2, session.merge: 5, session.discard: 2, session.flatten: 1, session.look: 2,
                session.merge_into_base: 2, session.export: 1, session.clone: 2,
            }  # fmt: skip
            for verb in self.random.choices(list(weighted), list(weighted.values()), k=self.random.randint(1, 12)):
                verb()
            found = numbers_in(volume.read(0, SIZE))
            if found != session.state["head"]:
                raise Violation(f"{name} reads {found}, not {session.state['head']}")

    def create(self, name: str, journal: Journal) -> None:
        if not journal.hold():
            return
        before, after, verb = journal.last()
        if before is not None and verb != "delete":
            return
        if any(info.name == name for info in self.store.volumes()):
            return  # a delete that was killed had not removed it
        base, wipe = None, self.random.choice(["release", "zero"])
        numbers = [0] * BLOCKS
        if self.random.random() < 0.5:
            base = self.root / f"base-{self.number()}"
            numbers = [self.number() for _ in range(BLOCKS)]
            base.write_bytes(b"".join(map(block, numbers)))
        made = {"head": numbers, "snapshots": {}}
        try:
            with journal.verb("create", None, made):
                self.store.create(name, base=base, size=SIZE, wipe=wipe).close()
        except onionskin.VolumeExistsError:
            if not verb:
                raise Violation(f"{name} is there already, and nobody made it") from None
            journal.add(**{"is": "begun", "verb": verb, "before": before, "after": after})  # as it was

    def delete(self, name: str, journal: Journal) -> None:
        """Nobody has it open while the journal is held, but who opens it to look what the journal says."""
        if not journal.hold():
            return
        before, _, verb = journal.last()
        if before is None or verb:
            return
        try:
            with journal.verb("delete", before, None):
                self.store.delete(name, recursive=True)
        except onionskin.VolumeNotFoundError:
            raise Violation(f"{name} is gone") from None
        except (onionskin.StateError, onionskin.ChainError):
            return

    def read_snapshot(self, name: str, journal: Journal) -> None:
        try:
            names = [snapshot.name for snapshot in self.store.snapshots(name)]
            if not names:
                return
            chosen = self.random.choice(names)
            with self.store.open(name, snapshot=chosen) as view:
                found = numbers_in(view.read(0, SIZE))
        except (onionskin.VolumeNotFoundError, onionskin.SnapshotNotFoundError):
            return
        except onionskin.StateError as error:
            self.note(f"a snapshot was refused: {error}")
            return
        if found != journal.snapshot_contents(chosen):
            raise Violation(f"{name}@{chosen} reads {found}, not {journal.snapshot_contents(chosen)}")

    def look_at_all(self) -> None:
        problems = [problem for problem in self.store.check() if problem.severity == "error"]
        if problems:
            raise Violation(f"check: {problems}")
        self.store.tree()

    def note(self, text: str) -> None:
        with (self.root / "notes").open("a") as file:
            file.write(text + "\n")


def work(root: Path, seed: int) -> None:
    """Until it is killed; what is wrong goes to a file of violations, and ends this process."""
    try:
        Worker(root, seed).run()
    except BaseException:
        said = root / f"said-{os.getpid()}"
        said.write_text(f"process {os.getpid()}, seed {seed}: {traceback.format_exc()}\n")
        said.rename(root / "violations")  # it is whole when it is there
        raise


# ---- the process that kills ----


@dataclass
class Outcome:
    """What came of a soak."""

    verbs: int
    kills: int
    stops: int
    violations: list[str]


def soak(root: Path, seconds: float, seed: int, *, verbs_min: int = 0) -> Outcome:
    """Have processes work below a directory that is there and empty, kill and stop them, and judge what they left.

    On a busy machine it goes on until `verbs_min` verbs are done and two processes have been killed.
    """
    source = random.Random(seed)
    (root / "journals").mkdir()
    onionskin.Store(root / "store").close()
    outcome = Outcome(0, 0, 0, [])
    running: dict[subprocess.Popen[bytes], bool] = {}  # whether it is stopped
    end = time.monotonic() + seconds
    try:
        while not (root / "violations").exists():
            if time.monotonic() >= end and outcome.kills >= 2 and verbs_done(root) >= verbs_min:
                break
            while len(running) < PROCESSES:
                running[start(root, source.randrange(1 << 30))] = False
            time.sleep(source.expovariate(3))
            process = source.choice(list(running))
            if process.poll() is not None:
                break  # it has said why
            if running[process]:
                process.send_signal(signal.SIGCONT)
                running[process] = False
            elif source.random() < 0.4:
                process.send_signal(signal.SIGSTOP)
                running[process] = True
                outcome.stops += 1
            else:
                end_of(process)
                del running[process]
                outcome.kills += 1
    finally:
        for process in running:
            end_of(process)
    if (root / "violations").exists():
        outcome.violations.append((root / "violations").read_text())
    elif any(process.returncode != -signal.SIGKILL for process in running):
        outcome.violations.append(f"processes ended with {[process.returncode for process in running]}")
    else:
        outcome.violations += judge(root)
    outcome.verbs = verbs_done(root)
    return outcome


def verbs_done(root: Path) -> int:
    """Count the verbs that ended, by the journals of all processes."""
    return sum(path.read_text().count('"done"') for path in (root / "journals").iterdir())


def start(root: Path, seed: int) -> subprocess.Popen[bytes]:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "serve.many_processes", "--work", str(root), str(seed)]
    with (root / "output").open("ab") as output:
        return subprocess.Popen(command, cwd=tests, stdout=output, stderr=output)


def end_of(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def judge(root: Path) -> list[str]:
    """What is wrong with a store that all have left: every volume and snapshot, and the files."""
    try:
        with onionskin.Store(root / "store") as store:
            there = {info.name for info in store.volumes()}
            for name in VOLUMES:
                judge_volume(store, root, name, is_there=name in there)
        left: list[Any] = []
        for _ in range(OPENINGS):
            with onionskin.Store(root / "store") as store:
                for info in store.volumes():
                    with store.open(info.name):
                        pass
                left = store.check()
            if not left:
                break
        return [str(problem) for problem in left] + strays(root / "store")
    except (Violation, onionskin.OnionskinError, OSError):
        return [traceback.format_exc()]


def judge_volume(store: onionskin.Store, root: Path, name: str, *, is_there: bool) -> None:
    journal = Journal(root, name)
    with contextlib.closing(journal):
        before, after, verb = journal.last()
        if not is_there:
            if before is not None and after is not None:
                raise Violation(f"{name} is gone")
            return
        with store.open(name) as volume:
            state = verified(journal, read_state(store, volume))
            with contextlib.suppress(onionskin.StateError, onionskin.ChainError):
                volume.merge_into_base()  # ends one that was interrupted; else the same disk, or refused
            if read_state(store, volume) != state:
                raise Violation(f"{name} is another after a merge into its base")
    assert verb is not None


def main(arguments: list[str]) -> int:
    if arguments[0] == "--work":
        work(Path(arguments[1]), int(arguments[2]))
        return 0
    seed = int(arguments[2]) if len(arguments) > 2 else random.SystemRandom().randrange(1 << 20)
    root = Path(tempfile.mkdtemp(dir=arguments[1] if len(arguments) > 1 else None))
    outcome = soak(root, float(arguments[0]), seed)
    print(f"seed {seed}: {outcome.verbs} verbs, {outcome.kills} kills, {outcome.stops} stops")
    for violation in outcome.violations:
        print(violation)
    if outcome.violations:
        print(f"what they left is in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
