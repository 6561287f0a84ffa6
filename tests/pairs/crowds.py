"""Three actors and more at once, in a random order, with random kills and errors: all drawn from one number."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pairs import steps
from pairs.runs import CAN_FAIL, ERRORS, IDLE_STEPS_MAX, HangError, Plan, Run, Verdict
from pairs.verbs import NEEDS_CLONE, VERBS, Place, program
from pairs.world import World

if TYPE_CHECKING:
    from pairs.exploring import Explorer

ACTORS = "ABCDE"
STEPS_MAX = 25  # that an actor makes before another one may have its turn


def explore_random(explorer: Explorer) -> None:
    """Make runs until the time is over."""
    if explorer.given.one_random is not None:
        _one(explorer, explorer.given.one_random, tell=True)
        return
    while not explorer.is_over():
        _one(explorer, explorer.random.randrange(1 << 32), tell=False)


def _one(explorer: Explorer, number: int, *, tell: bool) -> None:
    source = random.Random(number)
    world = explorer.world(source.choice(explorer.given.wipe or ("release", "zero")))
    plans = draw_plans(source)
    fault = source.choice(("none", "none", "none", "kill", "EIO", "ENOSPC"))
    who = " + ".join(f"{plan.verb.name} {plan.place.volume}" for plan in plans)
    crowd = Crowd(explorer.conductor, world, plans, source, fault)
    verdict = crowd.run(tell=tell)
    explorer.tally.runs["kill" if crowd.dead else fault if crowd.faulty else "none"] += 1
    explorer.tally.pairs |= {(a.verb.name, b.verb.name) for a in plans for b in plans if a is not b}
    explorer.add(verdict, f"python -m pairs --one-random {number}", who)
    if tell:
        print(who, *verdict.outcomes, *verdict.violations or ["no violation"], sep="\n")


def draw_plans(source: random.Random) -> list[Plan]:
    """Draw actors: their verbs, volumes, processes and stores."""
    plans: list[Plan] = []
    holders: dict[str, tuple[int, int]] = {}
    for number in range(source.choice((3, 3, 4))):
        verb = source.choice(VERBS)
        volume = source.choice("vcw" if verb.name not in NEEDS_CLONE else "cw")
        process, store = source.randrange(2), source.randrange(2)
        where = holders.get(volume)
        if verb.handle and where and source.random() < 0.7:
            process, store = where
        opens = verb.handle and (where not in (None, (process, store)) or verb.at_s2 or source.random() < 0.2)
        if verb.handle and not opens:
            holders[volume] = process, store
        handle = f"{volume}-{process}-{store}"
        place = Place(ACTORS[number], volume, "v" if volume == "w" else "w", handle, 100 * (number + 1))
        held = (handle, volume, False) if verb.handle and not opens else None
        plans.append(Plan(number, store, process, verb, place, held, program(verb, place, opens=opens)))
    return plans


class Crowd(Run):
    """A run in a random order."""

    def __init__(
        self, conductor: steps.Conductor, world: World, plans: list[Plan], source: random.Random, fault: str
    ) -> None:
        super().__init__(conductor, world, plans)
        self.source, self.fault = source, fault
        self.fault_at = source.randrange(2, 40)

    def run(self, *, tell: bool) -> Verdict:
        """Run it and judge it."""
        self.conductor.set_trace(tell)
        try:
            self.begin()
            self.arrange()
            self.finish()
            self.judge()
        except HangError as hang:
            self.verdict.violations.append(f"hang: {hang}")
            if tell:
                self.print_stacks()
        finally:
            if tell:
                for actor, number, label in self.conductor.trace:
                    print(f"{ACTORS[actor]} {number:5} {label}")
            self.end_all()
        return self.verdict

    def arrange(self) -> None:
        """Give each turn to one that can go on. One that waits is asked again when nobody else can."""
        idle = turn = 0
        while any(not self.ended(plan.number) for plan in self.plans):
            self.settle()
            ready = [plan.number for plan in self.plans if self.movable(plan.number, "parked", "got")]
            if not ready and self.somebody_wakes():
                continue
            if not ready:
                idle += 1
                sleepers = [t for plan in self.plans for t in self.movable(plan.number, "sleeps")]
                everybody_ended = all(self.ended(plan.number) for plan in self.plans)
                if idle > IDLE_STEPS_MAX or not (sleepers or everybody_ended or self.hears_something()):
                    raise HangError(self.where())
                for thread in sleepers:
                    self.conductor.resume(thread)
                continue
            turn += 1
            self._go_on(self.source.choice(ready), turn)

    def _go_on(self, actor: int, turn: int) -> None:
        if self.fault == "kill" and turn == self.fault_at:
            self.kill(actor)
            return
        self.conductor.limit(actor, self.conductor.count(actor) + self.source.randrange(STEPS_MAX))
        for thread in [*self.movable(actor, "parked", "got"), *self.movable(actor, "sleeps")]:
            may_fail = self.fault in ERRORS and turn >= self.fault_at and not self.faulty and thread.state == "parked"
            if may_fail and thread.label.startswith(CAN_FAIL[self.fault]):
                self.fail(thread, ERRORS[self.fault])
            else:
                self.conductor.resume(thread)
