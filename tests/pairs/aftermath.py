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
import random
import re
import signal
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pairs import judging, model
from pairs.model import Event, Found, Operation, State
from pairs.runs import CAN_FAIL, ERRORS, MAKES, NO_HOLDER, RUN_SECONDS, HangError, Plan, Run, Verdict
from pairs.second_verbs import SECOND_BY_NAME, SECOND_VERBS
from pairs.steps import FREE, Conductor
from pairs.verbs import BY_NAME, NEEDS_CLONE, VERBS, Place, Verb, program
from pairs.worker import Actor, Process
from pairs.world import World, lay_image

if TYPE_CHECKING:
    from pairs.exploring import Explorer

# How the first verb is interrupted. `then killed`: it may tell of the error, and its process dies before it closes anything.
HOWS = ("kill", "EIO", "EIO, then killed", "ENOSPC", "ENOSPC, then killed", "Ctrl-C", "Ctrl-C, then killed")
# Why a verb may be refused though the model, which knows nothing of layers, says that it can be done.
REASONS = {
    "a merge into the base has not ended": r"merge into .* base|merge --into-base",
    "others need the base as it is": r"is needed as it is by (?!a branch)",
    "its snapshots stand on each other": r"is made already|has data already",
}
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
    images: dict[str, tuple[bytes, int]]
    before: State
    events: list[Event]
    told: list[str] = field(default_factory=list)

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
        for name, (data, mtime_ns) in self.images.items():
            lay_image(world.root / name, data, mtime_ns)


def _write_sparsely(path: Any, data: bytes) -> None:
    """Write a file with holes where it is zero, since `check` looks for data behind the end of a segment."""
    with open(path, "wb") as file:
        for at in range(0, len(data), PAGE_BYTES):
            piece = data[at : at + PAGE_BYTES]
            if piece != ZERO_PAGE:
                file.seek(at)
                file.write(piece)
        file.truncate(len(data))


def _read_files(world: World) -> tuple[dict[str, bytes], dict[str, tuple[bytes, int]]]:
    files = {
        str(path.relative_to(world.store)): path.read_bytes()
        for path in world.store.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }
    images = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in world.root.glob("*.img*")}
    return files, images


# ---- the first verb ----


def plan_of(verb: Verb, number: int, volume: str, *, opens: bool) -> Plan:
    """Work out what one actor does, who has the store to itself."""
    place = Place("ABC"[number], volume, "v" if volume == "w" else "w", "ABC"[number], 100 * (number + 1))
    operations = program(verb, place, opens=opens)
    if opens and verb.handle and verb.at_s2:
        operations.insert(2, ("revert", place.own, "s2"))
    handle = (place.handle, volume, verb.at_s2) if verb.handle and not opens else None
    return Plan(number, 0, 0, verb, place, handle, operations)


class Interruption(Run):
    """The first verb alone, in the main thread of its process, which is where Ctrl-C arrives."""

    in_main_thread = True
    traces_hangs = False

    def __init__(self, conductor: Conductor, world: World, first: str) -> None:
        volume = "c" if first in NEEDS_CLONE else "v"
        super().__init__(conductor, world, [plan_of(BY_NAME[first], 0, volume, opens=False)])
        self.first = first

    def remains(self, how: str, step: int, label: str) -> Remains:
        """Copy what is there now."""
        files, images = _read_files(self.world)
        self.receive_outcomes()
        events, told = events_of(self, self.plans[0], self.outcomes[0], faulty=how != "kill", begun=self._begun())
        events.append(Event(("gone", (self.plans[0].place.handle, self.plans[0].place.own)), "done", None, 900, 901))
        return Remains(self.first, how, step, label, files, images, self.before, events, told)

    def _begun(self) -> int:
        return sum(note.text.startswith("begin ") for note in self.conductor.notes)

    def killed_at_each_step(self) -> list[Remains]:
        """Return what a kill at each step leaves, without those that leave the same as the step before."""
        found: list[Remains] = []
        try:
            self.begin()
            step = 1
            while self.to_step(0, step):
                held = self.movable(0, "parked")[0]
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
            if not self.to_step(0, step):
                return None
            held = self.movable(0, "parked")[0]
            if what == "Ctrl-C":
                main = self.conductor.of(0)[0]
                # One that has just got a lock of Python's, and does not know yet, would leave it held for ever.
                if main.state == "got" or held.label.startswith(("begin", "between")) or self._begun() == 0:
                    return None
                os.kill(self.pids[0], signal.SIGINT)
                self.faulty[0] = held.label
                self.conductor.limit(0, FREE)
                for thread in self.movable(0, "parked"):
                    self.conductor.resume(thread)
            elif not held.label.startswith(CAN_FAIL[what]):
                return None
            else:
                self.conductor.limit(0, FREE)
                self.fail(held, ERRORS[what])
                for thread in self.movable(0, "parked"):
                    self.conductor.resume(thread)
            self.to_end(0, [])
            self.receive_outcomes()
            if not then:
                self.finish()
            return self.remains(how, step, held.label)
        except HangError:
            if self.traces_hangs:
                self.print_stacks()
            raise
        finally:
            self.end_all()


def events_of(
    run: Run, plan: Plan, outcomes: list[tuple[str, Any, str]], *, faulty: bool, begun: int
) -> tuple[list[Event], list[str]]:
    """Return what the operations of a plan did, as the model takes it, and the same in words."""
    events, told = [], []
    for index, operation in enumerate(plan.operations[:begun]):
        status, result, text = outcomes[index] if index < len(outcomes) else ("maybe", None, "cut off")
        told.append(f"{plan.place.actor} {operation[0]}: {text or status}")
        if faulty and status == "raised":
            status = "maybe"
        elif faulty and operation[0] in ("check", "repair"):
            result = []
        elif faulty and (result == NO_HOLDER or operation[0] == "held"):
            result = True
        at = 1000 * plan.number + 2 * index
        events.append(Event(modelled(run.world, plan, operation, index), status, result, at, at + 1))
    return events, told


def modelled(world: World, plan: Plan, operation: Operation, index: int) -> Operation:
    """Return an operation with what the model has to know of it."""
    if operation[0] in (*MAKES, "fork_group"):
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

    def __init__(self, world: World, remains: Remains, *, number: int = 0) -> None:
        self.world, self.remains = world, remains

    def plans(self, second: str, relation: str) -> list[Plan]:
        volume = "c" if self.remains.first in NEEDS_CLONE or second in NEEDS_CLONE else "v"
        own = volume if relation == "same" else {"v": "c", "c": "v"}[volume]
        if second in NEEDS_CLONE:
            own = "c"
        again = "c" if self.remains.first in NEEDS_CLONE else "v"
        return [
            plan_of(SECOND_BY_NAME[second], 1, own, opens=True),
            plan_of(BY_NAME[self.remains.first], 2, again, opens=True),
        ]

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
        wrong = list(told.findings.wrong)
        faulty = self.remains.how != "kill"
        events, lines = [list(self.remains.events)], list(self.remains.told)
        for plan, outcomes in zip(self.plans(second, relation), told.outcomes, strict=True):
            run = Run.__new__(Run)
            run.world = self.world
            made, words = events_of(run, plan, outcomes, faulty=False, begun=len(outcomes))
            strict = []
            for event, (status, _, text) in zip(made, outcomes, strict=True):
                if status == "raised":
                    event = self._judge_error(plan, event, text, wrong)
                strict.append(event)
            strict.append(Event(("gone", (plan.place.handle, plan.place.own)), "done", None, plan.number * 1000 + 900,
                                plan.number * 1000 + 901))  # fmt: skip
            events.append(strict)
            lines += words
        findings = told.findings
        torn = {"base.img", "moved.img"} if self.remains.half_merged or told.half_merged else set()
        if any(event.operation[0] == "merge_base" for actor in events[1:] for event in actor):
            torn = {"base.img", "moved.img"}
        found = Found(findings.volumes, findings.snaps, findings.images, frozenset(findings.passed))
        explanation = model.explain(self.remains.before, events, found, faulty=faulty, torn=torn)
        if not explanation.found and not explanation.unknown:
            wrong.append(explanation.nearest)
        return wrong, lines

    def _judge_error(self, plan: Plan, event: Event, text: str, wrong: list[str]) -> Event:
        """A refusal needs a reason: one that the model sees (`needed`), or one of those that it does not."""
        who = f"{plan.place.actor} {event.operation[0]} raised {text}"
        if event.result in ("not found", "exists", "bounds"):
            return event
        if event.result != "busy" or not text.startswith("StateError"):
            wrong.append(who)
            return replace(event, status="maybe")
        if any(re.search(reason, text) for reason in REASONS.values()):
            return event
        return replace(event, result="needed")


def _is_half_merged(world: World) -> bool:
    with closing(sqlite3.connect(f"file:{world.store / 'catalog.db'}?mode=ro", uri=True)) as catalog:
        return bool(catalog.execute("SELECT count(*) FROM pending WHERE kind = 'base-merge'").fetchone()[0])


# ---- which are tried ----


class AftermathExplorer:
    """Goes through first verbs, and tries in what each left behind the second verbs that were tried there the least."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.given, self.random = explorer, explorer.given, explorer.random
        self.tried: Counter[tuple[str, str, str]] = Counter()
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
        firsts = [name for name in (self.given.first or [verb.name for verb in VERBS])]
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
            names = self.given.second or [verb.name for verb in SECOND_VERBS]
            at = f"{first} {how} {_kind_of(remains.label)} {len(remains.events)} {world.wipe}"
            order = sorted(names, key=lambda name: (self.tried[first, at, name], self.random.random()))
            cases = [(name, self.random.choice(self._relations())) for name in order[:SECONDS_IN_A_STATE]]
            self._in(world, remains, cases, at)

    def _relations(self) -> list[str]:
        return [relation for relation in (self.given.relation or ("same", "same", "related")) if relation != "other"]

    def _in(self, world: World, remains: Remains, cases: list[tuple[str, str]], at: str, *, tell: bool = False) -> None:
        aftermath = Aftermath(world, remains)
        for (second, relation), told in aftermath.run(cases):
            wrong, lines = aftermath.judge(second, relation, told)
            self.tried[remains.first, at, second] += 1
            self.cases[remains.how] += 1
            self.seconds.add(second)
            for line in lines[len(remains.told) :]:
                if "Error" in line:
                    self.refusals[f"{remains.first}, {second}: {line}"] += 1
            again = (
                f"python -m pairs --aftermath --first {remains.first!r} --fault {remains.how!r} --step {remains.step} "
                f"--second {second!r} --relation {relation} --wipe {world.wipe}"
            )
            verdict = Verdict(violations=wrong, met=remains.how, at=remains.label)
            self.explorer.tally.runs[remains.how] += 1
            self.explorer.tally.pairs.add((remains.first, second))
            self.explorer.add(verdict, again, f"{remains.first} ({remains.how}) / {second}")
            if tell:
                print(*lines, *[f"violation: {what}" for what in wrong] or ["no violation"], sep="\n")

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
                one = Interruption(self.explorer.conductor, world, first).interrupted_at(how, step)
                if one and (first, how, _kind_of(one.label), world.wipe) not in self.states:
                    found.append(one)
                if len(found) == 2:
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
            found = [
                remains
                for remains in Interruption(self.explorer.conductor, world, first).killed_at_each_step()
                if remains.step <= self.given.step
            ][-1:]
        else:
            interruption = Interruption(self.explorer.conductor, world, first)
            interruption.traces_hangs = True
            one = interruption.interrupted_at(how, self.given.step)
            found = [one] if one else []
        for remains in found:
            print(f"{first}: {how} at {remains.step} {remains.label}")
            cases = [(name, relation) for name in self.given.second or () for relation in self._relations()[:1]]
            self._in(world, remains, cases, "", tell=True)

    def tell(self) -> None:
        """Say what was tried."""
        print(
            f"aftermath: first verbs {len({first for first, *_ in self.states})}, states {len(self.states)}, "
            f"second verbs {len(self.seconds)}, runs {sum(self.cases.values())} "
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
