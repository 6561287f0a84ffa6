"""One run: two or more actors, an arrangement of their steps, and the verdict on it.

The arrangement of a pair: the first actor goes on to its step k and is held there; the second runs to its end, or until
it waits for something that the first one has: then the first makes one step at a time until it can; at last the first
one goes on to its end. At step k the first may be killed, before or after the second runs, or an error may meet it there.
At a COMMIT its sync alone may fail (`unsynced`): then the first one goes on to its end, the second runs, and all are killed.
The first may also be stopped at step k, as by SIGSTOP or a debugger: then the second has to end, well or with an error,
before the first makes another step. It waits for nothing without a limit.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from pairs import judging, model
from pairs.model import Event, Found, Operation
from pairs.steps import FREE, UNSYNCED, Conductor, Thread
from pairs.verbs import BY_NAME, NEEDS_CLONE, UNWRITTEN, Place, Verb, program
from pairs.worker import Actor, Process
from pairs.world import World

RELATIONS = ("same", "related", "other")
PLACES = ("threads", "stores", "processes")
FAULTS = ("none", "kill first", "kill last", "EIO", "ENOSPC", "unsynced", "stopped")
ERRORS = {"EIO": 5, "ENOSPC": 28}
# Steps at which a call can fail. Locks, looks and what is between calls cannot.
CAN_FILL = ("create", "rename", "link", "write", "sync", "truncate", "allocate", "copy to", "catalog: COMMIT",
            "catalog: INSERT", "catalog: UPDATE", "catalog: DELETE")  # fmt: skip
CAN_FAIL = {
    "ENOSPC": CAN_FILL,
    "EIO": (*CAN_FILL, "open", "unlink", "read", "punch", "catalog"),
    "unsynced": ("catalog: COMMIT",),
}
OPENS_WHAT_IT_MAKES = ("create", "temporary")  # and removes it again if it cannot be opened
MAKES = ("create", "import", "import_stream", "fork_group", "clone", "fork", "fork_numbered", "fork_with_key",
         "temporary")  # fmt: skip
# What is asked of an open volume is answered, whatever others do to it, unless they close it.
ALWAYS_ANSWERED = ("read", "parent", "changed", "extents", "own_diff", "own_usage", "own_layering")
NO_HOLDER = "the holder is None"  # what `held` says
RUN_SECONDS = 120.0
THOROUGH_EVERY = 4
HANG_SECONDS = 3.0
IDLE_STEPS_MAX = 600
WAITS_SECONDS = 0.2  # beside one that was stopped: the limits of a minute are as short in such a run
STOPPED_SECONDS = 40.0


class HangError(Exception):
    """Nobody goes on."""


@dataclass(frozen=True)
class Case:
    """One arrangement of a pair. `step` 0: the second one runs first; -1: the first one runs to its end."""

    first: str
    second: str
    relation: str
    place: str
    wipe: str = "release"
    fault: str = "none"
    step: int = -1

    def __str__(self) -> str:
        fault = "" if self.fault == "none" else f" --fault {self.fault!r}"
        return (
            f"{self.first!r} {self.second!r} --relation {self.relation} --place {self.place} --wipe {self.wipe}{fault} "
            f"--step {self.step}"
        )


@dataclass
class Verdict:
    """What is wrong with a run, how many steps the first one made, and the labels of its steps where they were traced."""

    violations: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)  # raised, and was done
    unknown: bool = False  # too many orders to try
    steps: int = 0
    met: str = "none"  # the fault that was tried
    at: str = ""
    labels: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """An actor before its process is made."""

    number: int
    store: int
    process: int
    verb: Verb
    place: Place
    handle: tuple[str, str, bool] | None
    operations: list[Operation]
    goes_on_at: int = 0  # where a program goes on of which an operation before it raised


def can_be(first: Verb, second: Verb, relation: str, place: str) -> bool:
    """Whether a pair says anything at a place that another one does not: a second handle on one volume is refused."""
    return not (relation == "same" and place != "threads" and first.handle and second.handle)


def volumes_for(first: Verb, second: Verb, relation: str) -> tuple[str, str]:
    """Return the volumes on which two verbs are used."""
    if relation == "same":
        return ("c", "c") if {first.name, second.name} & NEEDS_CLONE else ("v", "v")
    volume = "c" if first.name in NEEDS_CLONE else "v"
    return volume, "w" if relation == "other" else {"v": "c", "c": "v"}[volume]


def plans_of(case: Case) -> list[Plan]:
    """Work out what the two actors of a case do."""
    verbs = BY_NAME[case.first], BY_NAME[case.second]
    volumes = volumes_for(*verbs, case.relation)
    shares = case.relation == "same" and all(verb.handle for verb in verbs)
    plans = []
    for number, (verb, volume) in enumerate(zip(verbs, volumes, strict=True)):
        beside = verbs[1 - number]
        opens = verb.handle and case.relation == "same" and beside.alone
        handle = "AB" if shares else "AB"[number]
        place = Place("AB"[number], volume, "v" if volume == "w" else "w", handle, 100 * (number + 1))
        at_s2 = verb.at_s2 or (shares and beside.at_s2)
        plans.append(
            Plan(
                number,
                store=number if case.place == "stores" else 0,
                process=number if case.place == "processes" else 0,
                verb=verb,
                place=place,
                handle=(handle, volume, at_s2) if verb.handle and not opens else None,
                operations=program(verb, place, opens=opens),
            )
        )
    return plans


class Run:
    """The processes and threads of one run."""

    in_main_thread = False  # an actor that is alone in its process

    def __init__(self, conductor: Conductor, world: World, plans: list[Plan]) -> None:
        self.conductor, self.world, self.plans = conductor, world, plans
        self.verdict = Verdict()
        self.pids: dict[int, int] = {}  # process number -> pid
        self.controls: dict[int, Connection] = {}
        self.results: dict[int, Connection] = {}
        self.dead: set[int] = set()  # actors whose process was killed
        self.died_at: dict[int, int] = {}
        self.faulty: dict[int, str] = {}  # actors that an error met, and at which step
        self.deadline = time.monotonic() + RUN_SECONDS
        self.before = world.state
        self.outcomes: dict[int, list[tuple[str, Any, str]]] = {plan.number: [] for plan in plans}
        self.findings: judging.Findings | None = None
        self.thorough = True  # look at what was not used too
        self.crashes = False  # at its end nothing is closed

    # ---- beginning ----

    def begin(self) -> None:
        """Lay the world out, and hold each actor at its beginning."""
        self.lay_out()
        self.conductor.reset(self.world.root)
        for plan in self.plans:
            if plan.handle and plan.handle[0] not in self.before.handles:
                handle, name, at_s2 = plan.handle
                self.before = model.open_(self.before, None, handle, name)
                if at_s2:
                    self.before = model.revert(self.before, None, handle, "s2")
        for process in sorted({plan.process for plan in self.plans}):
            self._fork(process)
        wanted = len(self.plans)
        while sum(thread.state == "parked" for thread in self.conductor.threads.values()) < wanted:
            self._look_at_the_clock()
            self.conductor.wait_for_any(0.5)

    def lay_out(self) -> None:
        """Make the store that the run begins with."""
        self.world.lay_out()

    def _fork(self, process: int) -> None:
        actors = []
        theirs = []
        for plan in self.plans:
            if plan.process == process:
                mine, its = Pipe(duplex=False)
                self.results[plan.number] = mine
                theirs.append(its)
                stream, _, _ = self.world.streams[plan.place.volume]
                streams = dict.fromkeys((plan.place.handle, plan.place.own, "B"), stream)
                actors.append(
                    Actor(plan.number, plan.operations, its, plan.store, plan.handle, streams, plan.goes_on_at)
                )
        mine, its = Pipe()
        pid = os.fork()
        if pid == 0:
            mine.close()
            Process(self.world.root, actors, in_main_thread=self.in_main_thread).run(its)
        its.close()
        for one in theirs:
            one.close()
        self.pids[process], self.controls[process] = pid, mine
        answer = mine.recv() if mine.poll(RUN_SECONDS) else "no answer"
        if answer != "ready":
            raise HangError(f"the beginning: {answer}")

    # ---- moving ----

    def movable(self, actor: int, *states: str) -> list[Thread]:
        return [
            thread for thread in self.conductor.of(actor) if thread.state in (states or ("parked", "got", "sleeps"))
        ]

    def ended(self, actor: int) -> bool:
        return not self.conductor.of(actor)

    def settle(self) -> None:
        """Wait until no thread runs. One that does nothing, and says nothing, waits for something unknown."""
        while not self.conductor.settle():
            self._look_at_the_clock()
            for thread in self.conductor.threads.values():
                if thread.state == "runs" and not is_at_work(thread.process):
                    thread.state, thread.label = "blocked", f"something unknown behind {thread.label}"
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise HangError("it takes too long")
        self._look_for_deaths()

    def _look_for_deaths(self) -> None:
        for process, pid in list(self.pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.pids[process]
                raise HangError(f"a process died ({status})")

    def to_step(self, actor: int, step: int) -> bool:
        """Let an actor alone go on to a step; False if it ended before."""
        self.conductor.limit(actor, step)
        for thread in self.movable(actor, "parked"):
            self.conductor.resume(thread)
        idle = 0
        while True:
            self.settle()
            if self.ended(actor):
                return False
            if self.movable(actor, "parked"):
                return True
            goers = self.movable(actor, "got", "sleeps")
            if not goers and self.somebody_wakes():
                continue
            idle += 1
            if idle > IDLE_STEPS_MAX or not (goers or self.hears_something()):
                raise HangError(self.where())
            for thread in goers:
                self.conductor.resume(thread)

    def to_end_by_itself(self, actor: int) -> None:
        """Let an actor go on to its end while all others stand still: what it waits for has a limit."""
        self.conductor.limit(actor, FREE)
        until = time.monotonic() + STOPPED_SECONDS
        while True:
            self.settle()
            if self.ended(actor):
                return
            if time.monotonic() > until:
                raise HangError(f"it waits for one that was stopped: {self.where()}")
            goers = self.movable(actor, "parked", "got", "sleeps")
            if not goers and not self.somebody_wakes():
                self.conductor.wait_for_any(HANG_SECONDS)
            for thread in goers:
                self.conductor.resume(thread)

    def to_end(self, actor: int, beside: list[int]) -> None:
        """Let an actor go on to its end; while it waits the others make single steps."""
        self.conductor.limit(actor, FREE)
        for other in beside:
            self.conductor.limit(other, 0)
        idle = 0
        while True:
            self.settle()
            if self.ended(actor):
                return
            goers = self.movable(actor, "parked", "got")
            if not goers and self.somebody_wakes():
                continue
            if not goers:
                goers = [*self.movable(actor, "sleeps"), *(t for other in beside for t in self.movable(other))]
                idle += 1
            if idle > IDLE_STEPS_MAX or not (goers or self.hears_something()):
                raise HangError(self.where())
            for thread in goers:
                self.conductor.resume(thread)

    def somebody_wakes(self) -> bool:
        """Whether a thread that was said to wait is awake again, and has not said so yet."""
        wakes = any(is_at_work(pid) for pid in self.pids.values())
        if wakes:
            self.conductor.wait_for_any(0.01)
        self._look_at_the_clock()
        return wakes

    def hears_something(self) -> bool:
        """Whether somebody who waits goes on after all: a thread that is no actor's may have done what he waits for."""
        before = [(thread.slot, thread.state) for thread in self.conductor.threads.values()]
        self.conductor.wait_for_any(HANG_SECONDS)
        while any(is_at_work(pid) for pid in self.pids.values()):
            self._look_at_the_clock()
            self.conductor.wait_for_any(0.1)
        return before != [(thread.slot, thread.state) for thread in self.conductor.threads.values()]

    def where(self) -> str:
        """Say where all threads are."""
        return "nobody goes on: " + ", ".join(
            f"{'ABCDEFGH'[thread.actor]} {thread.state} at {thread.label}" for thread in self.conductor.threads.values()
        )

    def fail(self, thread: Thread, error: int) -> None:
        """Let a thread go on whose step fails."""
        self.faulty[thread.actor] = thread.label
        self.conductor.resume(thread, error)

    def kill(self, actor: int) -> None:
        """Kill the process of an actor."""
        process = self.plans[actor].process
        pid = self.pids.pop(process)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for plan in self.plans:
            if plan.process == process:
                self.dead.add(plan.number)
                self.died_at[plan.number] = len(self.conductor.notes)
        self.conductor.forget_process(pid)

    # ---- ending ----

    def finish(self) -> None:
        """Close what is open, in order, and end the processes."""
        if self.crashes:
            for pid in self.pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            self.pids.clear()
        looks = len(self.pids) == 1 and not self.dead
        for process in list(self.pids):
            control = self.controls[process]
            control.send(self.question() if looks else None)
            closed = self._receive(control, "closing what is open does not end")
            if closed and not self.faulty:
                self.verdict.violations += closed if isinstance(closed, list) else [closed]
            if looks:
                self.findings = self._receive(control, "looking at the store does not end")
            os.waitpid(self.pids.pop(process), 0)

    def _receive(self, control: Connection, late: str) -> Any:
        deadline = time.monotonic() + RUN_SECONDS
        while not control.poll(0.2):
            if time.monotonic() > deadline:
                raise HangError(late)
        try:
            return control.recv()
        except EOFError:
            raise HangError("a process died at its end") from None

    def print_stacks(self) -> None:
        """Let the processes of a run that hangs say on stderr where they are."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)

    def end_all(self) -> None:
        """Kill what is left of a run that hangs."""
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.pids.clear()
        for connection in (*self.controls.values(), *self.results.values()):
            connection.close()

    # ---- judging ----

    def judge(self) -> None:
        """Compare what is there with what may be."""
        self.conductor.settle(0.0)
        asked = self.question()
        events = [self._events(plan) for plan in self.plans]
        self._judge_holders()
        findings = self.findings or look(self.world, asked)
        self.verdict.violations += findings.wrong
        torn = {"base.img", "moved.img"} if asked.half_merged else set()
        found = Found(findings.volumes, findings.snaps, findings.images, frozenset(findings.passed))
        faulty = bool(self.faulty)  # the death of a process loses nothing; a sync that failed may
        explanation = model.explain(self.before, events, found, faulty=faulty, torn=torn)
        if explanation.unknown and not explanation.found:
            self.verdict.unknown = True
        elif not explanation.found:
            self.verdict.violations.append(explanation.nearest)
        elif explanation.late:
            self.verdict.weak.append(explanation.late)

    def question(self) -> judging.Question:
        """Return what has to be looked at."""
        used = {
            volume
            for plan in self.plans
            for volume in (plan.place.volume, plan.place.other)[: 1 + (plan.verb.alone or plan.verb.both)]
        }
        used |= {"v", "c"} if used & {"v", "c"} else set()  # one stands on the other
        used |= {UNWRITTEN} if any(UNWRITTEN in one for plan in self.plans for one in plan.operations) else set()
        only = None if self.thorough or self.dead or self.faulty else frozenset(used)
        return judging.Question(self.half_merged(), bool(self.dead) or self.crashes, only)

    def half_merged(self) -> bool:
        """Whether a merge into the base did not end well: then its base may hold a part of it."""
        self.receive_outcomes()
        for plan in self.plans:
            for index, operation in enumerate(plan.operations):
                ended = self.outcomes[plan.number][index : index + 1]
                if operation[0] == "merge_base" and (not ended or ended[0][0] != "done"):
                    return True
        return False

    def receive_outcomes(self) -> None:
        """Take what the actors have told of their operations."""
        for number, results in self.results.items():
            with suppress(EOFError):
                while results.poll():
                    self.outcomes[number].append(results.recv())

    def _events(self, plan: Plan) -> list[Event]:
        begun, ended = {}, {}
        for at, note in enumerate(self.conductor.notes):
            words = note.text.split()
            if note.actor == plan.number and words[0] in ("begin", "end"):
                (begun if words[0] == "begin" else ended)[int(words[1])] = at
        outcomes = self.outcomes[plan.number]
        events = []
        for index, operation in enumerate(plan.operations):
            if index not in begun:
                break
            if index not in ended:
                status, result, text = "maybe", None, "killed"
            else:
                status, result, text = outcomes[index]
                if status == "raised":
                    status = self._judge_error(plan, operation, result, text)
                elif plan.number in self.faulty and operation[0] in ("check", "repair"):
                    result = []  # it says of the error what it should
                elif result == NO_HOLDER and self.faulty.get(plan.number, "").startswith("write volumes/"):
                    result = True  # a full disk keeps nobody from a volume: its file does not say then who holds it
            self.verdict.outcomes.append(f"{plan.place.actor} {operation[0]}: {text or status}")
            modelled = self._modelled(plan, operation, index)
            events.append(Event(modelled, status, result, begun[index], ended.get(index, 1 << 30)))
            if status == "maybe" and operation[0] in OPENS_WHAT_IT_MAKES:  # others may have seen it meanwhile
                events.append(replace(events[-1], operation=("take_back", modelled)))
        if plan.number in self.dead:
            at = self.died_at[plan.number]
            events = [replace(event, ended=min(event.ended, at)) for event in events]
            events.append(Event(("gone", (plan.place.handle, plan.place.own)), "done", None, at, at))
        return events

    def _judge_error(self, plan: Plan, operation: Operation, kind: str, text: str) -> str:
        may_fail = plan.number in self.faulty
        if kind == "busy" and operation[0] in ALWAYS_ANSWERED and not (self.faulty or self._closes(plan, operation[1])):
            kind = "refused"
        if kind == "unexpected" or (not may_fail and kind not in ("busy", "not found", "exists", "bounds")):
            self.verdict.violations.append(f"{plan.place.actor} {operation[0]} raised {text}")
            return "maybe"
        return "maybe" if may_fail else "raised"

    def _closes(self, plan: Plan, handle: str) -> bool:
        """Whether another actor closes a handle of this one."""
        return any(("close", handle) in other.operations for other in self.plans if other is not plan)

    def _modelled(self, plan: Plan, operation: Operation, index: int) -> Operation:
        if operation[0] in MAKES:
            return (*operation, f"made by {plan.number} {index}")
        if operation[0] == "apply":
            _, start, end = self.world.streams[plan.place.volume]
            return (*operation, "s3", end, start)
        return operation

    def _judge_holders(self) -> None:
        """No two handles may hold one head. The death of a process gives up what it held."""
        held: dict[int, str] = {}
        for index, note in enumerate(self.conductor.notes):
            held = {actor: head for actor, head in held.items() if self.died_at.get(actor, index + 1) > index}
            words = note.text.split()
            if words[0] == "holds":
                if words[1] in [head for actor, head in held.items() if actor != note.actor]:
                    self.verdict.violations.append("two handles hold one head")
                held[note.actor] = words[1]
            elif note.text == "gives up":
                held.pop(note.actor, None)


def is_at_work(pid: int) -> bool:
    """Whether any thread of a process runs or would like to: on a busy machine it may wait long for a processor."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return False
    for task in tasks:
        # One that has ended says nothing of the others.
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/task/{task}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def look(world: World, asked: judging.Question) -> judging.Findings:
    """Read the store in a process of its own."""
    mine, its = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        judging.find_and_send(world.root, its, asked)
    its.close()
    try:
        if not mine.poll(RUN_SECONDS):
            return judging.Findings(wrong=["the store cannot be looked at: nothing goes on"])
        found: judging.Findings = mine.recv()
        return found
    except EOFError:
        return judging.Findings(wrong=["the process that looked at the store died"])
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        mine.close()


def run_pair(
    conductor: Conductor,
    world: World,
    case: Case,
    *,
    trace: bool = False,
    trace_hangs: bool = False,
) -> Verdict:
    """Run one case and judge it."""
    run = Run(conductor, world, plans_of(case))
    shorten_waits(WAITS_SECONDS if case.fault == "stopped" else None)
    conductor.set_trace(trace)
    run.thorough = case.step % THOROUGH_EVERY == THOROUGH_EVERY - 1
    try:
        run.begin()
        _arrange_pair(run, case)
        run.verdict.steps = conductor.count(0)
        run.finish()
        run.judge()
    except HangError as hang:
        run.verdict.violations.append(f"hang: {hang}")
        if trace_hangs:
            run.print_stacks()
    finally:
        run.verdict.labels = [label for actor, _, label in sorted(conductor.trace) if actor == 0]
        run.end_all()
    return run.verdict


_WAITS = {
    "storage.locks": ("DIRECTORY_SECONDS", "STORE_SECONDS"),
    "storage.chain": ("LOCK_WAIT_SECONDS",),
    "operations.locked_maps": ("LOCK_WAIT_SECONDS",),
    "operations.group_snapshot": ("_OPEN_SECONDS",),
    "store": ("_CUT_WAIT_SECONDS",),
}
_waits_before: dict[tuple[str, str], float] = {}


def shorten_waits(seconds: float | None) -> None:
    """Let the processes that are forked from here on wait so long at most for others; None: as long as they do."""
    for module, names in _WAITS.items():
        of = importlib.import_module(f"onionskin.{module}")
        for name in names:
            before = _waits_before.setdefault((module, name), getattr(of, name))
            setattr(of, name, before if seconds is None else seconds)


def _arrange_pair(run: Run, case: Case) -> None:
    if case.step < 0:
        run.to_end(0, [1])
        run.to_end(1, [0])
        return
    reached = case.step == 0 or run.to_step(0, case.step)
    held = run.movable(0, "parked")
    run.verdict.at = held[0].label if reached and held else "its end"
    if case.fault == "kill first" and reached:
        run.verdict.met = case.fault
        run.kill(0)
    if case.fault == "unsynced" and reached:
        for thread in run.movable(0, "parked")[:1]:
            if thread.label.startswith(CAN_FAIL[case.fault]):
                run.verdict.met, run.crashes = case.fault, True
                run.conductor.limit(0, FREE)
                run.fail(thread, UNSYNCED)
                run.to_end(0, [])
    if case.fault == "stopped":
        run.verdict.met = case.fault
        run.to_end_by_itself(1)
    elif 1 not in run.dead:
        run.to_end(1, [0])
    if 0 in run.dead or run.ended(0):
        return
    if case.fault == "kill last":
        run.verdict.met = case.fault
        run.kill(0)
        return
    if case.fault in ERRORS:
        # Where the second one had to wait the first has gone on since: then what comes next fails.
        for thread in run.movable(0, "parked")[:1]:
            if thread.label.startswith(CAN_FAIL[case.fault]):
                run.verdict.met = case.fault
                run.conductor.limit(0, FREE)
                run.fail(thread, ERRORS[case.fault])
    run.to_end(0, [])
