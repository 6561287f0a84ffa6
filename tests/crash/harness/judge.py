"""Trials: workloads and scenarios, the states that a crash of them may leave, and recoveries that are crashed again.

A trial runs a program on an engine and says how many states it judged and what it found wrong first.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crash.harness.checker import workload_checker
from crash.harness.model import Seed
from crash.harness.replay import SYNC_END, freed_unwiped
from crash.harness.run import Recording, check_states, resume
from crash.harness.workload import record

RECOVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from crash.harness.checker import recover
recover(Path(sys.argv[2]))
"""
# What a recovery made durable is missing in these; sampled where all are too many.
RESUMED_KINDS = ("durable", "names", "bytes")


@dataclass(frozen=True)
class Outcome:
    """How many states were judged, and the first violation."""

    tried: int
    violation: str | None = None


# (where the recorded root is to be, a src/ directory with the engine, how many states to draw: None for all of them) ->
# what came of it
Trial = Callable[[Path, Path, int | None], Outcome]
# Of those that a trial draws recoveries for, where it does not try all.
RECOVERIES_DRAWN = 2


def try_all(trials: Iterable[tuple[str, Trial]], source: Path, states: int | None = None) -> tuple[str, Outcome]:
    """Runs trials up to the first violation: the name of the last one, and how many states all of them judged.

    `source` is what this process imports, too.
    """
    tried, name = 0, ""
    for name, trial in trials:
        with tempfile.TemporaryDirectory(dir=state_parent()) as directory:
            outcome = trial(Path(directory) / "root", source, states)
        tried += outcome.tried
        if outcome.violation is not None:
            return name, Outcome(tried, outcome.violation)
    return name, Outcome(tried)


def try_workload(
    root: Path,
    source: Path,
    *,
    seed: Seed,
    wipe: str,
    steps: int,
    states: int | None,
    choose_recoveries: Callable[[Recording], Sequence[int]],
    resumed_kinds: Sequence[str] = RESUMED_KINDS,
    resumed_states: int | None = None,
) -> Outcome:
    """A plan's steps, crashed; and recoveries from chosen points of them, crashed again."""
    recording = record(root, seed, wipe, steps, source)
    checker = workload_checker(seed, wipe, steps)
    report = check_states(recording, checker, limit=states, seed=0, violations_max=1)
    tried = report.tried
    print(f"{seed}, policy {wipe}: {report}")  # how many states, how many violations: shown by pytest -s
    if report.violations:
        return Outcome(tried, str(report.violations[0]))
    violation = unwiped(recording) if wipe == "zero" else None
    if violation is not None:
        return Outcome(tried, violation)
    for index in choose_recoveries(recording):
        resumed = resume(recording, index, [sys.executable, "-c", RECOVER, str(source), str(root)])
        report = check_states(
            resumed, checker, kinds=resumed_kinds, limit=resumed_states, seed=0, violations_max=1, begin=index
        )
        tried += report.tried
        violation = str(report.violations[0]) if report.violations else unwiped(resumed) if wipe == "zero" else None
        if violation is not None:
            return Outcome(tried, f"crashed again in or after a recovery: {violation}")
    print(f"{seed}, policy {wipe}: {tried} states with those of recoveries, 0 violations")
    return Outcome(tried)


def unwiped(recording: Recording) -> str | None:
    """The first range or file of a store that was given back before zeros were durable in it."""
    found = freed_unwiped(recording.replay(), ("segments", "layers"))
    return f"not wiped: {found[0]}" if found else None


def drawn_trial(seed: int, wipe: str, steps: int, states: int, recoveries: int) -> tuple[str, Trial]:
    """A workload whose steps are drawn, as far as `states` states and a few recoveries show it."""

    def trial(root: Path, source: Path, _: int | None) -> Outcome:
        return try_workload(
            root,
            source,
            seed=seed,
            wipe=wipe,
            steps=steps,
            states=states,
            choose_recoveries=lambda recording: some_syncs(recording, seed, recoveries),
            resumed_states=states // recoveries if recoveries else None,
        )

    return f"seed {seed}, {wipe}", trial


def some_syncs(recording: Recording, seed: int, count: int) -> list[int]:
    """Where most is not durable yet: before a sync returns."""
    points = [number for number, entry in enumerate(recording.entries) if entry.kind == SYNC_END]
    return sorted(random.Random(seed).sample(points, min(count, len(points))))


def drawn(points: Sequence[int], count: int) -> list[int]:
    """So many of some points of a recording, the same ones each time."""
    return sorted(random.Random(len(points)).sample(points, min(count, len(points))))


def state_parent() -> str | None:
    """A file system in memory, where there is one: thousands of states are made."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
