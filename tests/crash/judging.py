"""Workloads, their states, and recoveries that are crashed again, until the first violation."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from crash.checker import workload_checker
from crash.harness import Recording, check_states, resume
from crash.replay import SYNC_END
from crash.workload import record

RECOVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from crash.checker import recover
recover(Path(sys.argv[2]))
"""


def first_violation(
    source: Path, seeds: Iterable[int], wipes: Iterable[str], steps: int, states: int, recoveries: int
) -> str | None:
    """Describes the first violation found on the engine in `source`, which this process imports too."""
    for seed in seeds:
        for wipe in wipes:
            with tempfile.TemporaryDirectory(dir=state_parent()) as directory:
                root = Path(directory) / "root"
                violation = violation_of(root, source, seed, wipe, steps, states, recoveries)
            if violation is not None:
                return f"seed {seed}, policy {wipe}: {violation}"
    return None


def violation_of(
    root: Path, source: Path, seed: int, wipe: str, steps: int, states: int, recoveries: int
) -> str | None:
    recording = record(root, seed, wipe, steps, source)
    checker = workload_checker(seed, wipe, steps)
    report = check_states(recording, checker, limit=states, seed=seed, violations_max=1)
    print(f"seed {seed}, policy {wipe}: {report}")  # how many states, how many violations: shown by pytest -s
    if report.violations:
        return str(report.violations[0])
    for index in recovery_points(recording, seed, recoveries):
        resumed = resume(recording, index, [sys.executable, "-c", RECOVER, str(source), str(root)])
        report = check_states(resumed, checker, limit=states // recoveries, seed=seed, violations_max=1, begin=index)
        if report.violations:
            return f"crashed again in or after a recovery: {report.violations[0]}"
    return None


def recovery_points(recording: Recording, seed: int, count: int) -> list[int]:
    """Where most is not durable yet: before a sync returns."""
    points = [number for number, entry in enumerate(recording.entries) if entry.kind == SYNC_END]
    return sorted(random.Random(seed).sample(points, min(count, len(points))))


def state_parent() -> str | None:
    """A file system in memory, where there is one: thousands of states are made."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
