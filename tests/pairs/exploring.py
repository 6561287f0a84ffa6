"""Which runs are made, in which order, and what is told of them."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pairs import world
from pairs.runs import CAN_FAIL, FAULTS, PLACES, RELATIONS, Case, Verdict, can_be, run_pair
from pairs.steps import Conductor
from pairs.verbs import BY_NAME, VERBS

WIPES = ("release", "zero")
SHOWN_MAX = 40
STEPS_GUESSED = 60


@dataclass
class Tally:
    """What was tried and found."""

    pairs: set[tuple[str, str]] = field(default_factory=set)
    runs: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    weak: Counter[str] = field(default_factory=Counter)


class Explorer:
    """Makes runs until the time is over or all are made, and tells what it found."""

    def __init__(self, given: argparse.Namespace, root: Path) -> None:
        self.given, self.root = given, root
        self.seed = given.seed if given.seed is not None else int(time.time())
        self.random = random.Random(self.seed)
        load_all()
        self.conductor = Conductor()
        self.worlds: dict[str, world.World] = {}
        self.tally = Tally()
        self.said = time.monotonic()
        self.steps_of: dict[tuple[str, str], int] = {}
        self.until = time.monotonic() + given.seconds if given.seconds else None

    def world(self, wipe: str) -> world.World:
        if wipe not in self.worlds:
            # The images of each world keep their inodes, so each has a place of its own.
            self.worlds[wipe] = world.build(self.root / wipe, wipe)
        return self.worlds[wipe]

    def is_over(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    # ---- what is asked for ----

    def run(self) -> int:
        if self.given.one:
            return self._one()
        print(f"seed {self.seed}", flush=True)
        if self.given.random or self.given.one_random is not None:
            from pairs.crowds import explore_random

            explore_random(self)
        elif self.given.aftermath:
            from pairs.aftermath import explore_aftermath

            explore_aftermath(self)
        elif self.given.all:
            self._all()
        else:
            self._few()
        return self._tell()

    def _chosen(self, name: str, all_of: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(getattr(self.given, name) or all_of)

    def _combinations(self) -> list[Case]:
        """List every pair at every place, without steps."""
        names = tuple(verb.name for verb in VERBS)
        part, parts = map(int, self.given.part.split("/"))
        cases = [
            Case(first, second, relation, place, wipe)
            for first in self._chosen("first", names)
            for second in self._chosen("second", names)
            for relation in self._chosen("relation", RELATIONS)
            for place in self._chosen("place", PLACES)
            for wipe in self._chosen("wipe", WIPES)
            if can_be(BY_NAME[first], BY_NAME[second], relation, place)
        ]
        return cases[part::parts]

    def _one(self) -> int:
        first, second = self.given.one
        (relation,), (place,) = self._chosen("relation", ("same",)), self._chosen("place", ("threads",))
        (wipe,), (fault,) = self._chosen("wipe", ("release",)), self._chosen("fault", ("none",))
        case = Case(first, second, relation, place, wipe, fault, self.given.step)
        verdict = run_pair(self.conductor, self.world(wipe), case, trace=True, trace_hangs=True)
        for number, label in enumerate(verdict.labels):
            print(f"{number:5} {label}{'   <- held here' if number == case.step else ''}")
        print(*verdict.outcomes, sep="\n")
        print(*[f"violation: {what}" for what in verdict.violations] or ["no violation"], sep="\n")
        print(*[f"weak: {what}" for what in verdict.weak], sep="\n")
        return bool(verdict.violations)

    def _all(self) -> None:
        cases = self._combinations()
        if self.given.seconds:
            self.random.shuffle(cases)
        for case in cases:
            if self.is_over():
                return
            verdict = self._try(case, trace=True)
            for step in range(verdict.steps):
                if self.given.behind_commits and not is_behind_commit(verdict.labels, step):
                    continue
                for fault in self._faults(case, verdict, step):
                    if self.is_over():
                        return
                    self._try(replace(case, fault=fault, step=step))

    def _faults(self, case: Case, verdict: Verdict, step: int) -> Iterator[str]:
        for fault in self._chosen("fault", FAULTS):
            if not self._can_meet(case, fault):
                continue
            label = verdict.labels[step] if step < len(verdict.labels) else ""
            if fault in CAN_FAIL and not label.startswith(CAN_FAIL[fault]):
                continue
            yield fault

    def _few(self) -> None:
        """Every pair once, at a step, a place and with a fault that are drawn, then all again, as long as there is time."""
        pairs: dict[tuple[str, str], list[Case]] = {}
        for case in self._combinations():
            pairs.setdefault((case.first, case.second), []).append(case)
        order = sorted(pairs)
        while not self.is_over():
            self.random.shuffle(order)
            for pair in order:
                if self.is_over():
                    return
                self._drawn(self.random.choice(pairs[pair]))

    def _drawn(self, case: Case) -> None:
        faults = [fault for fault in self._chosen("fault", FAULTS) if self._can_meet(case, fault)]
        weights = [6 if fault == "none" else 1 for fault in faults]
        (fault,) = self.random.choices(faults, weights)
        # How many steps there are is known when the verb was run once; a step behind the end is the end.
        step = self.random.randrange(self.steps_of.get((case.first, case.place), STEPS_GUESSED) + 1)
        verdict = self._try(replace(case, step=step, fault=fault))
        self.steps_of[case.first, case.place] = max(8, verdict.steps)

    def _can_meet(self, case: Case, fault: str) -> bool:
        return case.place == "processes" or not fault.startswith(("kill", "stopped"))

    # ---- one run ----

    def say_how_far(self) -> None:
        """Say each minute how much was tried."""
        if time.monotonic() > self.said + 60:
            self.said = time.monotonic()
            print(f"  {sum(self.tally.runs.values())} runs of {len(self.tally.pairs)} pairs so far", flush=True)

    def _try(self, case: Case, *, trace: bool = False) -> Verdict:
        verdict = run_pair(self.conductor, self.world(case.wipe), case, trace=trace)
        self.say_how_far()
        self.tally.pairs.add((case.first, case.second))
        self.tally.runs[verdict.met] += 1
        self.add(verdict, f"python -m pairs --one {case}", f"{case.first} / {case.second}")
        return verdict

    def add(self, verdict: Verdict, again: str, who: str) -> None:
        """Count what a run found, and print what was not seen before."""
        for what in verdict.weak:
            self.tally.weak[what] += 1
        for what in verdict.violations:
            kind = f"{who}: {_without_ids(what)}"
            self.tally.violations[kind] += 1
            if self.tally.violations[kind] == 1:
                at = f" [held at {verdict.at}]" if verdict.at else ""
                print(f"VIOLATION {kind[:400]}{at}\n    {again}", flush=True)
        if verdict.violations and self.given.stop:
            self.until = 0.0

    def _tell(self) -> int:
        runs, tally = self.tally.runs, self.tally
        kills = sum(count for fault, count in runs.items() if fault.startswith("kill"))
        errors = runs["EIO"] + runs["ENOSPC"] + runs["unsynced"]
        print(
            f"pairs {len(tally.pairs)} of {len(VERBS) ** 2}, orders {sum(runs.values())}, kills {kills}, errors {errors}, "
            f"stopped {runs['stopped']}, "
            f"runs with a violation {sum(tally.violations.values())} (kinds {len(tally.violations)}), "
            f"raised though done {sum(tally.weak.values())}"
        )
        for what, count in tally.weak.most_common(SHOWN_MAX):
            print(f"  weak, {count} times: {what}")
        return int(bool(tally.violations))


def is_behind_commit(labels: list[str], step: int) -> bool:
    """Whether an actor that is held at a step has just committed: its handle does not know yet what the catalog knows."""
    return 0 < step <= len(labels) and labels[step - 1] == "catalog: COMMIT"


def load_all() -> None:
    """Import what the engine would import when it is first used: forked processes have it then."""
    import numpy

    import onionskin

    for module in ("layering", "usage", "copy", "compact_segments"):
        importlib.import_module(f"onionskin.operations.{module}")
    for module in ("images", "delta", "base.background", "store"):
        importlib.import_module(f"onionskin.{module}")
    # So that segments are copied together in a world that has only a few of them.
    compact_segments = importlib.import_module("onionskin.operations.compact_segments")
    compact_segments.SEGMENTS_MAX, compact_segments.SEGMENTS_KEPT = 1, 0  # type: ignore[attr-defined]
    numpy.unique(numpy.zeros(2))
    assert onionskin.Store
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()


def _without_ids(text: str) -> str:
    text = re.sub(r"[0-9a-f]{32}", "<id>", text)
    text = re.sub(r"/\S*/(store|release|zero)/", "", text)
    text = re.sub(r"\b(map|segment|layer) [0-9a-f]{4,8}\b", r"\1 <id>", text)
    return re.sub(r"process \d+", "process <pid>", text)
