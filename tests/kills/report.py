"""What is told of the rounds: as they are made, and at the end."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from kills.plan import OF_A_SUPERVISOR, VERBS, Gap
from kills.rounds import Result

TELL_SECONDS = 30.0


class Report:
    """The rounds so far."""

    def __init__(self, gaps: Sequence[Gap]) -> None:
        self._gaps = gaps
        self._rounds: Counter[Gap] = Counter()
        self._kills: Counter[tuple[str, str]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._failures: list[Result] = []
        self._not_there = 0
        self._begun = self._told = time.monotonic()

    def add(self, result: Result) -> None:
        """Take note of a round, and tell of one that failed."""
        self._rounds[result.gap] += 1
        self._kills[result.gap.verb, result.victim] += result.is_met
        self._seconds[result.gap.verb] += result.seconds
        self._not_there += not result.is_met
        if result.failure:
            self._failures.append(result)
            print(
                f"FAILED: {_line(result)}\n{result.failure}\n  it left {result.left}\n  again: {_again(result)}",
                flush=True,
            )
        now = time.monotonic()
        if now - self._told > TELL_SECONDS:
            self._told = now
            print(
                f"{now - self._begun:6.0f} s: {sum(self._rounds.values())} rounds, {len(self._failures)} failed",
                flush=True,
            )

    def show(self) -> int:
        """Tell of all. Return the exit status."""
        for verb in VERBS:
            counts = [self._rounds[gap] for gap in self._gaps if gap.verb == verb]
            if not counts:
                continue
            victims = ", ".join(f"{self._kills[verb, one]} {one}" for one in (*OF_A_SUPERVISOR, "itself"))
            print(
                f"{verb}: {len(counts)} gaps, {min(counts)} to {max(counts)} rounds each, {sum(counts)} together, "
                f"of {self._seconds[verb] / max(sum(counts), 1):.1f} s; killed: {victims}"
            )
        print(f"{self._not_there} rounds in which the victim was not there yet")
        print(f"{len(self._failures)} failed, in {time.monotonic() - self._begun:.0f} s")
        for result in self._failures:
            print(f"  {_line(result)}: {result.failure.splitlines()[0]}\n    again: {_again(result)}")
        return 1 if self._failures or not self._rounds else 0


def _line(result: Result) -> str:
    return f"{result.gap.verb}, {result.gap.where}, {result.victim} ({result.seconds:.1f} s)"


def _again(result: Result) -> str:
    return f"python -m kills --verb {result.gap.verb} --gap '{result.gap.where}' --victim {result.victim}"
