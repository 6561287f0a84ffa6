"""What a verb meets in the store that another verb left behind, which was interrupted.

The first verb is killed at one of its steps, or a call fails there, or Ctrl-C meets it there. The store is copied as it
is then. In each copy one further verb runs, in a new process; then the interrupted verb runs once more; then the store is
looked at. The model (model.py) says what each may return, and what must be there at the end.

What must hold: the second verb works, or it is refused with a StateError for a reason that there is: the model says that
it must be refused, or a merge into a base has not ended, and the error says so. The interrupted verb ends well once more.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairs import judging, model
from pairs.model import Event, Found, Operation, State
from pairs.runs import CAN_FAIL, ERRORS, MAKES, RUN_SECONDS, HangError, Plan, Run, Verdict
from pairs.second_verbs import FIRST_VERBS, SECOND_BY_NAME, SECOND_VERBS
from pairs.steps import FREE, Conductor
from pairs.verbs import NEEDS_CLONE, Place, Verb, program
from pairs.worker import Actor, Process
from pairs.world import World, lay_image

if TYPE_CHECKING:
    from pairs.exploring import Explorer

# How the first verb is interrupted. `then killed`: it may tell of the error, and its process dies before it closes anything.
# `then live`: the second verb is used in the same process, with the same handle.
HOWS = (
    "kill",
    *(f"{what}{then}" for what in ("EIO", "ENOSPC", "Ctrl-C") for then in ("", ", then killed", ", then live")),
)
# Why a verb may be refused though the model, which knows nothing of layers, says that it can be done.
REASONS = {
    "a merge into the base has not ended": r"merge into .* base|merge --into-base",
    "others need the base as it is": r"is needed as it is by (?!a branch on layer \w+;)",
}
# Why a verb may be refused by a handle that another verb failed on.
LIVE_REASON = (
    "is poisoned by a failed sync; close it and open it again|is open for writing in process|is in use|"
    "is open for reading in another handle"
)
# What the model sees for itself: no base, and a stream that is not for the disk that has the name, as after half an exchange.
NEEDED = (
    "^ChainError: volume '.*' has no base to relocate$|"
    "^ChainError: volume '.*' stands on .*, where the stream to 's3' does not start;"
)
PAGE_BYTES = 4096
ZERO_PAGE = bytes(PAGE_BYTES)
STATES_IN_A_TURN = 6
SECONDS_IN_A_STATE = 8


@dataclass
class Remains:
    """The files that an interrupted verb left, what the model says that the store was before, and what ran since."""

    first: str
    how: str
    step: int
    label: str
    files: dict[str, bytes]
    images: dict[str, tuple[bytes, int, int]]  # contents, mtime, inode
    before: State
    events: list[Event]
    told: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # of a second verb that was used in the same process
    second: str | None = None  # that one
    verbs: int = 1  # how many were interrupted, one after the other
    before_step: int = 0  # where the one before was

    @property
    def half_merged(self) -> bool:
        return any(event.operation[0] == "merge_base" and event.status != "done" for event in self.events)

    def lay_out(self, world: World) -> None:
        """Make the store as it was left."""
        for directory in ("layers", "segments", "volumes"):
            for path in (world.store / directory).iterdir():
                path.unlink()
        for path in world.store.glob("catalog.db-*"):
            path.unlink()
        for name, data in self.files.items():
            _write_sparsely(world.store / name, data)
        for path in world.root.glob("*.img*"):
            if path.name not in self.images:
                path.unlink()
        for name, (data, mtime_ns, inode) in self.images.items():
            path = world.root / name
            if _kept(world, inode).exists() and (not path.exists() or path.stat().st_ino != inode):
                path.unlink(missing_ok=True)
                path.hardlink_to(_kept(world, inode))
            lay_image(path, data, mtime_ns)


def _write_sparsely(path: Any, data: bytes) -> None:
    """Write a file with holes where it is zero, since `check` looks for data behind the end of a segment."""
    with open(path, "wb") as file:
        for at in range(0, len(data), PAGE_BYTES):
            piece = data[at : at + PAGE_BYTES]
            if piece != ZERO_PAGE:
                file.seek(at)
                file.write(piece)
        file.truncate(len(data))


def _kept(world: World, inode: int) -> Path:
    """Return another name of an image: the store may know the image by its inode, and a later run removes its own name."""
    return world.root / "kept" / str(inode)


def read_files(world: World) -> tuple[dict[str, bytes], dict[str, tuple[bytes, int, int]]]:
    files = {
        str(path.relative_to(world.store)): path.read_bytes()
        for path in world.store.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }
    images = {}
    for path in world.root.glob("*.img*"):
        found = path.stat()
        images[path.name] = path.read_bytes(), found.st_mtime_ns, found.st_ino
        if path.name.endswith("-copy.img"):  # a base that a verb made
            _kept(world, found.st_ino).parent.mkdir(exist_ok=True)
            if not _kept(world, found.st_ino).exists():
                _kept(world, found.st_ino).hardlink_to(path)
    return files, images


# ---- the first verb ----


def plan_of(verb: Verb, number: int, volume: str, *, opens: bool) -> Plan:
    """Work out what one actor does, who has the store to itself."""
    place = Place("ABCD"[number], volume, "v" if volume == "w" else "w", "ABCD"[number], 100 * (number + 1))
    operations = program(verb, place, opens=opens)
    if opens and verb.handle and verb.at_s2:
        operations.insert(2, ("revert", place.own, "s2"))
    handle = (place.handle, volume, verb.at_s2) if verb.handle and not opens else None
    return Plan(number, 0, 0, verb, place, handle, operations)


def _append(plan: Plan, second: Verb) -> None:
    """Let a plan go on with a second verb in the same process, and with the same handle if both need one."""
    plan.goes_on_at = len(plan.operations)
    shares = plan.verb.handle and second.handle
    place = replace(plan.place, actor="B", handle="A" if shares else "B", stamp=200)
    plan.operations += [] if shares or not second.handle else [("open", place.handle, place.volume)]
    plan.operations += [("revert", place.handle, "s2")] if second.at_s2 else []
    plan.operations += second.program(place)


class Interruption(Run):
    """The first verb alone, in the main thread of its process, which is where Ctrl-C arrives."""

    in_main_thread = True
    traces_hangs = False

    def __init__(
        self, conductor: Conductor, world: World, first: str, second: str | None = None, start: Remains | None = None
    ) -> None:
        """Interrupt `first` in a new world, or in the `start` that another one left; `second` is used live behind it."""
        volume = "c" if {first, second} & NEEDS_CLONE else "v"
        plan = plan_of(SECOND_BY_NAME[first], start.verbs if start else 0, volume, opens=start is not None)
        if second:
            _append(plan, SECOND_BY_NAME[second])
        super().__init__(conductor, world, [plan])
        self.first, self.second, self.start, self.actor = first, second, start, plan.number

    def lay_out(self) -> None:
        """Make the store in which the verb begins."""
        if self.start:
            self.start.lay_out(self.world)
            self.before = self.start.before
        else:
            self.world.lay_out()

    def remains(self, how: str, step: int, label: str) -> Remains:
        """Copy what is there now."""
        files, images = read_files(self.world)
        self.receive_outcomes()
        plan, wrong = self.plans[0], list(self.verdict.violations)
        faulty = FREE if how != "kill" else 0
        if self.second:
            faulty = plan.goes_on_at
        outcomes = self.outcomes[self.actor]
        events, told = events_of(self.world, plan, outcomes, faulty=faulty, begun=self._begun(), wrong=wrong)
        at = 1000 * self.actor + 900
        events.append(Event(("gone", (plan.place.handle, plan.place.own, "B", "B-own")), "done", None, at, at + 1))
        now = Remains(self.first, how, step, label, files, images, self.before, events, told, wrong, self.second)
        if self.start:
            told[:0] = self.start.told
            events[:0] = self.start.events
            now.first, now.verbs, now.before_step = self.start.first, self.start.verbs + 1, self.start.step
        return now

    def _begun(self) -> int:
        return sum(note.text.startswith("begin ") for note in self.conductor.notes)

    def killed_at_each_step(self) -> list[Remains]:
        """Return what a kill at each step leaves, without those that leave the same as the step before."""
        found: list[Remains] = []
        try:
            self.begin()
            step = 1
            while self.to_step(self.actor, step):
                held = self.movable(self.actor, "parked")[0]
                now = self.remains("kill", held.number, held.label)
                if not found or (now.files, now.images, len(now.events)) != (
                    found[-1].files, found[-1].images, len(found[-1].events)
                ):  # fmt: skip
                    found.append(now)
                step = max(step, held.number) + 1
        finally:
            self.end_all()
        return found

    def interrupted_at(self, how: str, step: int) -> Remains | None:
        """Return what is left where an error or Ctrl-C meets the verb at a step; None where it cannot be met there."""
        what, _, then = how.partition(", then ")
        try:
            self.begin()
            if not self.to_step(self.actor, step):
                return None
            held = self.movable(self.actor, "parked")[0]
            if then == "live" and self._begun() > self.plans[0].goes_on_at:
                return None
            if what == "Ctrl-C":
                main = self.conductor.of(self.actor)[0]
                # One that has just got a lock of Python's, and does not know yet, would leave it held for ever.
                if main.state == "got" or held.label.startswith(("begin", "between")) or self._begun() == 0:
                    return None
                os.kill(self.pids[0], signal.SIGINT)
                self.faulty[self.actor] = held.label
                self.conductor.limit(self.actor, FREE)
                for thread in self.movable(self.actor, "parked"):
                    self.conductor.resume(thread)
            elif not held.label.startswith(CAN_FAIL[what]):
                return None
            else:
                self.conductor.limit(self.actor, FREE)
                self.fail(held, ERRORS[what])
                for thread in self.movable(self.actor, "parked"):
                    self.conductor.resume(thread)
            self.to_end(self.actor, [])
            self.receive_outcomes()
            if then != "killed":
                self.finish()
            return self.remains(how, step, held.label)
        except HangError:
            if self.traces_hangs:
                self.print_stacks()
            raise
        finally:
            self.end_all()


def events_of(
    world: World, plan: Plan, outcomes: list[tuple[str, Any, str]], *, faulty: int, begun: int, wrong: list[str]
) -> tuple[list[Event], list[str]]:
    """Return what the operations of a plan did, as the model takes it, and the same in words.

    An error met those before `faulty`. What of the others was refused without a reason is added to `wrong`.
    """
    events, told = [], []
    begun += sum(status == "skipped" for status, _, _ in outcomes)
    for index, operation in enumerate(plan.operations[:begun]):
        status, result, text = outcomes[index] if index < len(outcomes) else ("maybe", None, "cut off")
        if status == "skipped":
            continue
        told.append(f"{plan.place.actor} {operation[0]}: {text or status}")
        if index < faulty and status == "raised":
            status = "maybe"
        elif index < faulty and operation[0] in ("check", "repair"):
            result = []
        elif index < faulty and operation[0] == "held":
            result = True
        at = 1000 * plan.number + 2 * index
        event = Event(modelled(world, plan, operation, index), status, result, at, at + 1)
        if status == "raised":
            event = _judge_error(told[-1], event, text, wrong, is_live=plan.goes_on_at > 0)
        events.append(event)
    return events, told


def _judge_error(who: str, event: Event, text: str, wrong: list[str], *, is_live: bool) -> Event:
    """A refusal needs a reason: one that the model sees (`needed`), or one of those that it does not."""
    if event.result in ("not found", "exists", "bounds"):
        return event
    if re.search(NEEDED, text):
        return replace(event, result="needed")
    if event.result != "busy" or not text.startswith("StateError"):
        wrong.append(who)
        return replace(event, status="maybe")
    if any(re.search(reason, text) for reason in REASONS.values()) or (is_live and re.search(LIVE_REASON, text)):
        return event
    return replace(event, result="needed")


def modelled(world: World, plan: Plan, operation: Operation, index: int) -> Operation:
    """Return an operation with what the model has to know of it."""
    if operation[0] in MAKES:
        return (*operation, f"made by {plan.number} {index}")
    if operation[0] == "apply":
        _, start, end = world.streams[plan.place.volume]
        return (*operation, "s3", end, start)
    return operation


# ---- the second verb, and the first one once more ----


@dataclass
class Told:
    """What was seen in one copy."""

    outcomes: list[list[tuple[str, Any, str]]]
    findings: judging.Findings
    half_merged: bool


class Aftermath:
    """Runs second verbs in copies of what was left, all in one process as long as that lives."""

    def __init__(self, world: World, remains: Remains) -> None:
        self.world, self.remains = world, remains

    def plans(self, second: str, relation: str) -> list[Plan]:
        volume = "c" if self.remains.first in NEEDS_CLONE or second in NEEDS_CLONE else "v"
        own = volume if relation == "same" else {"v": "c", "c": "v"}[volume]
        if second in NEEDS_CLONE:
            own = "c"
        again = "c" if self.remains.first in NEEDS_CLONE else "v"
        last = self.remains.verbs + 1
        once_more = plan_of(SECOND_BY_NAME[self.remains.first], last, again, opens=True)
        if self.remains.second:
            return [once_more]
        return [plan_of(SECOND_BY_NAME[second], last - 1, own, opens=True), once_more]

    def run(self, cases: list[tuple[str, str]]) -> list[tuple[tuple[str, str], Told | str]]:
        """Run cases (second, relation); a text instead of what was seen where the process died or hangs."""
        seen: list[tuple[tuple[str, str], Told | str]] = []
        while len(seen) < len(cases):
            rest = cases[len(seen) :]
            mine, its = Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                mine.close()
                self._child(rest, its)
            its.close()
            try:
                while len(seen) < len(cases):
                    if not mine.poll(RUN_SECONDS):
                        seen.append((cases[len(seen)], "nothing goes on"))
                        break
                    seen.append((cases[len(seen)], mine.recv()))
            except EOFError:
                seen.append((cases[len(seen)], "the process died"))
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                mine.close()
        return seen

    def _child(self, cases: list[tuple[str, str]], its: Connection) -> None:
        gc.disable()
        from onionskin.base import background

        background.LINGER_SECONDS = 0.0
        try:
            for case in cases:
                try:
                    its.send(self._one(*case))
                except BaseException as error:
                    its.send(f"{type(error).__name__}: {error}")
                gc.collect()
        finally:
            os._exit(0)

    def _one(self, second: str, relation: str) -> Told:
        self.remains.lay_out(self.world)
        wrong: list[str] = []
        outcomes = [self._act(plan, wrong) for plan in self.plans(second, relation)]
        half_merged = _is_half_merged(self.world)
        (self.world.root / "copied out").unlink(missing_ok=True)
        findings = judging.find(self.world.root, judging.Question(half_merged, killed=True))
        findings.wrong += wrong
        return Told(outcomes, findings, half_merged)

    def _act(self, plan: Plan, wrong: list[str]) -> list[tuple[str, Any, str]]:
        import onionskin

        outcomes = []
        streams = dict.fromkeys((plan.place.handle, plan.place.own), self.world.streams[plan.place.volume][0])
        actor = Actor(plan.number, plan.operations, None, 0, None, streams)  # type: ignore[arg-type]
        process = Process(self.world.root, [actor])
        try:
            process.stores[0] = onionskin.Store(self.world.store)
            for operation in plan.operations:
                outcomes.append(process._outcome(actor, operation))
                if outcomes[-1][0] == "raised":
                    break
            process.stores[0].finish_work()
        except BaseException as error:
            wrong.append(f"the store of {plan.verb.name}: {type(error).__name__}: {error}")
        wrong += process._close_all()
        return outcomes

    # ---- judging ----

    def judge(self, second: str, relation: str, told: Told | str) -> tuple[list[str], list[str]]:
        """Return what is wrong, and what was said."""
        if isinstance(told, str):
            return [told], []
        wrong = [*self.remains.wrong, *told.findings.wrong]
        faulty = self.remains.how != "kill"
        events, lines = [list(self.remains.events)], list(self.remains.told)
        for plan, outcomes in zip(self.plans(second, relation), told.outcomes, strict=True):
            made, words = events_of(self.world, plan, outcomes, faulty=0, begun=len(outcomes), wrong=wrong)
            at = 1000 * plan.number + 900
            made.append(Event(("gone", (plan.place.handle, plan.place.own)), "done", None, at, at + 1))
            events.append(made)
            lines += words
        findings = told.findings
        merges = any(event.operation[0] == "merge_base" for actor in events[1:] for event in actor)
        bases = {name for name in findings.images if name in ("base.img", "moved.img") or name.endswith("-copy.img")}
        torn = bases if merges or self.remains.half_merged or told.half_merged else set()
        found = Found(findings.volumes, findings.snaps, findings.images, frozenset(findings.passed))
        explanation = model.explain(self.remains.before, events, found, faulty=faulty, torn=torn)
        if not explanation.found and not explanation.unknown:
            wrong.append(explanation.nearest)
        elif explanation.late:
            wrong.append(explanation.late)
        return wrong, lines


def _is_half_merged(world: World) -> bool:
    with closing(sqlite3.connect(f"file:{world.store / 'catalog.db'}?mode=ro", uri=True)) as catalog:
        return bool(catalog.execute("SELECT count(*) FROM pending WHERE kind = 'base-merge'").fetchone()[0])


# ---- which are tried ----


class AftermathExplorer:
    """Goes through first verbs, and tries in what each left behind the second verbs that were tried there the least.

    Of those that were tried there equally often, the ones come first that were tried behind this first verb the least, in
    whatever it left. So every pair was tried before one of them is tried in a second state.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.given, self.random = explorer, explorer.given, explorer.random
        self.tried: Counter[tuple[str, str, str]] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.states: set[tuple[str, str, str, str]] = set()
        self.cases: Counter[str] = Counter()
        self.seconds: set[str] = set()
        self.refusals: Counter[str] = Counter()
        self.labels: dict[str, int] = {}

    def run(self) -> None:
        """Make runs until the time is over; without a time, each first verb once."""
        from onionskin.operations import merge_into_base

        # So that a merge into a small base is done in several stretches, each of which the catalog notes.
        merge_into_base.FIRST_STRETCH_BYTES = merge_into_base.STRETCH_BYTES_MIN = 8 * PAGE_BYTES
        part, parts = map(int, self.given.part.split("/"))
        firsts = (self.given.first or [verb.name for verb in FIRST_VERBS])[part::parts]
        if self.given.step >= 0:
            self._repeat()
            return
        while True:
            self.random.shuffle(firsts)
            for first in firsts:
                for how in self._hows():
                    self._try(first, how)
                    if self.explorer.is_over():
                        return
            if not self.given.seconds:
                return

    def _hows(self) -> list[str]:
        chosen = [how for how in HOWS if not self.given.fault or how in self.given.fault]
        others = [how for how in chosen if how != "kill"]
        return (["kill"] if "kill" in chosen else []) + ([self.random.choice(others)] if others else [])

    def _world(self) -> World:
        return self.explorer.world(self.random.choice(self.given.wipe or ("release", "zero")))

    def _try(self, first: str, how: str) -> None:
        world = self._world()
        for remains in self._states(world, first, how):
            if self.explorer.is_over():
                return
            self.states.add((first, how, _kind_of(remains.label), world.wipe))
            if remains.second:
                self._in(world, remains, [(remains.second, "same")], first)
                continue
            names = self.given.second or [verb.name for verb in SECOND_VERBS]
            at = f"{first} {how} {_kind_of(remains.label)} {len(remains.events)} {world.wipe}"
            order = sorted(
                names, key=lambda name: (self.tried[first, at, name], self.pairs[first, name], self.random.random())
            )
            cases = [(name, self.random.choice(self._relations())) for name in order[:SECONDS_IN_A_STATE]]
            self._in(world, remains, cases, at)
            if how == "kill" and not self.given.second and not self.explorer.is_over():
                self._try_twice(world, remains)

    def _try_twice(self, world: World, remains: Remains) -> None:
        """Kill a second verb too, at a step that is drawn; then all that was interrupted is used again."""
        then = self.random.choice(FIRST_VERBS).name
        try:
            found = Interruption(self.explorer.conductor, world, then, start=remains).killed_at_each_step()
        except HangError as hang:
            found = []
            self._violated(world, remains, [f"hang: {hang}"], then, "same", then)
        for now in self.random.sample(found, min(3, len(found))):
            others = [self.random.choice(SECOND_VERBS).name for _ in range(3)]
            self._in(world, now, [(name, "same") for name in (then, *others)], then, then=then)

    def _relations(self) -> list[str]:
        return [relation for relation in (self.given.relation or ("same", "same", "related")) if relation != "other"]

    def _in(
        self,
        world: World,
        remains: Remains,
        cases: list[tuple[str, str]],
        at: str,
        *,
        then: str = "",
        tell: bool = False,
    ) -> None:
        """Try second verbs in what was left. `then`: the verb that was killed there too, behind the first one."""
        aftermath = Aftermath(world, remains)
        for (second, relation), told in aftermath.run(cases):
            wrong, lines = aftermath.judge(second, relation, told)
            self.tried[remains.first, at, second] += 1
            self.pairs[remains.first, second] += 1
            self.cases[f"{remains.how} twice" if then else remains.how] += 1
            self.seconds.add(second)
            for line in lines[len(remains.told) :]:
                if "Error" in line:
                    self.refusals[f"{remains.first}, {second}: {line}"] += 1
            self._violated(world, remains, wrong, second, relation, then)
            if tell:
                print(*lines, *[f"violation: {what}" for what in wrong] or ["no violation"], sep="\n")

    def _violated(
        self, world: World, remains: Remains, wrong: list[str], second: str, relation: str, then: str
    ) -> None:
        """Count a run, and print what is wrong with it and was not seen before."""
        before = f" --step {remains.step}"
        if then:
            before = f" --step {remains.before_step} --then {then!r} --then-step {remains.step}"
        again = (
            f"python -m pairs --aftermath --first {remains.first!r} --fault {remains.how!r}{before} "
            f"--second {second!r} --relation {relation} --wipe {world.wipe}"
        )
        self.explorer.tally.runs[remains.how] += 1
        self.explorer.say_how_far()
        self.explorer.tally.pairs.add((remains.first, second))
        who = f"{remains.first} ({remains.how}) / {then + ' (kill) / ' if then else ''}{second}"
        self.explorer.add(Verdict(violations=wrong, met=remains.how, at=remains.label), again, who)

    def _states(self, world: World, first: str, how: str) -> list[Remains]:
        step = 0
        try:
            if how == "kill":
                found = Interruption(self.explorer.conductor, world, first).killed_at_each_step()
                self.labels[first] = max([self.labels.get(first, 0), *(remains.step for remains in found)])
                self.random.shuffle(found)
                found.sort(key=lambda remains: (first, how, _kind_of(remains.label), world.wipe) in self.states)
                return found[:STATES_IN_A_TURN]
            found = []
            for _ in range(12):
                step = self.random.randrange(1, self.labels.get(first, 60) + 4)
                second = None
                if how.endswith("live"):
                    names = self.given.second or [verb.name for verb in SECOND_VERBS]
                    second = min(names, key=lambda name: (self.tried[first, first, name], self.random.random()))
                one = Interruption(self.explorer.conductor, world, first, second).interrupted_at(how, step)
                if one and (second or (first, how, _kind_of(one.label), world.wipe) not in self.states):
                    found.append(one)
                if len(found) == (6 if second else 2):
                    break
            return found
        except HangError as hang:
            again = f"python -m pairs --aftermath --first {first!r} --fault {how!r} --step {step} --wipe {world.wipe}"
            self.explorer.add(Verdict(violations=[f"hang: {hang}"], met=how), again, f"{first} ({how})")
            return []

    def _repeat(self) -> None:
        """Tell one run in full."""
        (first,), (how,) = self.given.first, self.given.fault or ("kill",)
        world = self._world()
        if how == "kill":
            found = self._killed_at(world, first, self.given.step)
            if self.given.then and found:
                found = self._killed_at(world, self.given.then, self.given.then_step, found[0])
        else:
            second = self.given.second[0] if how.endswith("live") else None
            interruption = Interruption(self.explorer.conductor, world, first, second)
            interruption.traces_hangs = True
            one = interruption.interrupted_at(how, self.given.step)
            found = [one] if one else []
        for remains in found:
            print(f"{first}: {how} at {remains.step} {remains.label}")
            cases = [(name, relation) for name in self.given.second or () for relation in self._relations()[:1]]
            self._in(world, remains, cases, "", tell=True)

    def _killed_at(self, world: World, verb: str, step: int, start: Remains | None = None) -> list[Remains]:
        found = Interruption(self.explorer.conductor, world, verb, start=start).killed_at_each_step()
        return [remains for remains in found if remains.step <= step][-1:]

    def tell(self) -> None:
        """Say what was tried."""
        print(
            f"aftermath: first verbs {len({first for first, *_ in self.states})}, states {len(self.states)}, "
            f"second verbs {len(self.seconds)}, pairs {len(self.pairs)}, runs {sum(self.cases.values())} "
            f"({', '.join(f'{how} {count}' for how, count in sorted(self.cases.items()))})"
        )


def _kind_of(label: str) -> str:
    """Return a label without what differs from run to run."""
    return re.sub(r"\b[0-9a-f]{4}~", "", label)


def explore_aftermath(explorer: Explorer) -> None:
    """Make runs until the time is over."""
    exploring = AftermathExplorer(explorer)
    exploring.run()
    exploring.tell()
    if explorer.given.step < 0:
        for what, count in exploring.refusals.most_common(0 if not os.environ.get("PAIRS_REFUSALS") else 400):
            print(f"  {count} times: {what}")
