"""Takes each barrier out of the engine, one at a time, and says which removals the crash trials notice.

    python -m crash.harness.drop_each_barrier [--only NAME ...] [--own] [--seeds N] [--jobs N] [SOURCE_TREE]

An engine is judged by the scenarios (crash.harness.scenarios), those that are for the barrier first, then by drawn
workloads, to the first violation. A barrier that can be taken out unnoticed is either not needed, or not tested. The
extensions are built, so Cython and setuptools have to be there.

The convention: a barrier is one line that holds one whole call of onion_sync_file, onion_sync_directory,
fdatasync, fsync or syncfs (C), or of sync_file, sync_directory, os.fsync or os.fdatasync (Python), and ends
with its name:

    status = onion_sync_file(fd); /* BARRIER: map frame */
    sync_directory(path.parent)  # BARRIER: catalog name

Here the call is replaced by 0 or None. Or the line sets SQLite's durability, and FULL becomes OFF:

    connection.execute("PRAGMA synchronous=FULL")  # BARRIER: catalog commits

Names are unique. A sync without a name is reported, because nothing tests it, unless `EXEMPT` says why it is no
barrier. Nothing of this is in the built engine: the tree is copied, one line of the copy is changed, and what is made
of it is built again.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

MARK = re.compile(r"(?:/\*|#) BARRIER: (?P<name>[^*]+?)\s*(?:\*/)?$")
CALL = re.compile(
    r"\b(onion_sync_file|onion_sync_directory|os\.fsync|os\.fdatasync|fdatasync|fsync|syncfs|sync_file|sync_directory)\("
)
DURABILITY = re.compile(r"(synchronous\s*=\s*)(FULL|EXTRA)", re.IGNORECASE)
# Where the calls themselves are defined: what they are made of is named where they are used.
DEFINITIONS = {"csrc/base/barrier.c", "csrc/base/barrier.h", "src/onionskin/base/fsync.py"}
# Files and folders whose syncs promise nothing: why.
EXEMPT = {
    "src/onionskin/measure/": "times full copies and what others do, in files that it deletes",
    "src/onionskin/exchange/block_devices.py": "syncs a device, and the trials replay files",
}
WIPES = ("release", "zero")


class BarrierError(Exception):
    """A line that is marked as a barrier does not follow the convention."""


@dataclass(frozen=True)
class Amount:
    """How much is tried of each engine."""

    seeds: int
    steps: int
    states: int
    recoveries: int
    wipes: Sequence[str]
    own_only: bool = False  # no scenario but those for the barrier


@dataclass(frozen=True)
class Verdict:
    """How many states of an engine were judged, the trial that was the last, and the violation that it ended with."""

    trial: str
    tried: int
    violation: str | None


@dataclass(frozen=True)
class Barrier:
    """A marked line: `path` below the source tree, `line` counted from 0."""

    name: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.name} ({self.path}:{self.line + 1})"


def without_barrier(line: str) -> str:
    """The line with its sync taken out, and its mark."""
    code = MARK.sub("", line).rstrip()
    nothing = "None" if "# BARRIER" in line else "0"
    if DURABILITY.search(code):
        return DURABILITY.sub(r"\1OFF", code)
    calls = list(CALL.finditer(code))
    if len(calls) != 1:
        raise BarrierError(f"a barrier line holds one sync, not {len(calls)}: {line.strip()}")
    end = closing_bracket(code, calls[0].end())
    return code[: calls[0].start()] + nothing + code[end:]


def closing_bracket(code: str, position: int) -> int:
    """The end of a call whose arguments begin at `position`."""
    depth = 1
    while depth and position < len(code):
        depth += {"(": 1, ")": -1}.get(code[position], 0)
        position += 1
    if depth:
        raise BarrierError(f"a barrier's call must end on its line: {code.strip()}")
    return position


def source_files(tree: Path) -> list[Path]:
    files = [*(tree / "csrc").rglob("*.c"), *(tree / "src").rglob("*.py"), *(tree / "src").rglob("*.pyx")]
    paths = sorted(file.relative_to(tree) for file in files)
    return [path for path in paths if str(path) not in DEFINITIONS]


def find_barriers(tree: Path) -> tuple[list[Barrier], list[str]]:
    """The marked lines of a source tree, and the places of syncs that are not marked."""
    barriers: dict[str, Barrier] = {}
    unnamed = []
    for path in source_files(tree):
        for number, line in enumerate((tree / path).read_text().splitlines()):
            found = MARK.search(line)
            if found:
                barrier = Barrier(found["name"], path, number)
                without_barrier(line)
                if barrier.name in barriers:
                    raise BarrierError(f"two barriers have one name: {barrier}, {barriers[barrier.name]}")
                barriers[barrier.name] = barrier
            elif CALL.search(line) and not line.lstrip().startswith(("*", "#", "def ")) and not is_exempt(path):
                unnamed.append(f"{path}:{number + 1}: {line.strip()}")
    return list(barriers.values()), unnamed


def is_exempt(path: Path) -> bool:
    return str(path).startswith(tuple(EXEMPT))


def copy_tree(tree: Path, target: Path) -> None:
    """Copies what is needed to build an engine, and what was built of it: its objects save most of the time."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "bench", "docs")
    shutil.copytree(tree, target, ignore=ignored)


def build(tree: Path, only: str | None = None) -> None:
    """Builds the extensions; only those that are made of one file, where its path in the tree is given."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, **({"ONIONSKIN_ONLY": only} if only else {})}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the extensions cannot be built in {tree}:\n{done.stdout}{done.stderr}")


@contextmanager
def taken_out(tree: Path, barrier: Barrier) -> Iterator[None]:
    """Changes the barrier's line in a copy and builds it, for the time of a with block."""
    path = tree / barrier.path
    before = path.read_text()
    built = {module: module.read_bytes() for module in (tree / "src").rglob("*.so")} if path.suffix != ".py" else {}
    lines = before.splitlines()
    lines[barrier.line] = without_barrier(lines[barrier.line])
    path.write_text("\n".join(lines) + "\n")
    try:
        if built:
            build(tree, str(barrier.path))
        yield
    finally:
        path.write_text(before)
        for module, contents in built.items():
            if module.read_bytes() != contents:
                module.write_bytes(contents)


def judge(source: Path, amount: Amount, first: str | None = None) -> Verdict:
    """Judges an engine by the scenarios, those for the barrier `first` before others, and by drawn workloads.

    In a process of its own, because the checker imports the engine that it judges.
    """
    command = [sys.executable, "-m", "crash.harness.drop_each_barrier", "--judge", str(source)]
    command += ["--seeds", str(amount.seeds), "--steps", str(amount.steps), "--states", str(amount.states)]
    command += ["--recoveries", str(amount.recoveries)]
    command += [argument for wipe in amount.wipes for argument in ("--wipe", wipe)]
    command += ["--first", first] if first else []
    command += ["--own"] if amount.own_only else []
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(tests)}
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a trial failed by itself: {done.stderr.strip()[-2000:]}")
    return Verdict(**json.loads(done.stdout.splitlines()[-1]))


def judge_here(source: Path, amount: Amount, first: str | None) -> None:
    """Runs in the process that `judge` starts; the last line that it prints is the verdict."""
    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    from crash.harness.judge import drawn_trial, try_all
    from crash.harness.scenarios import SCENARIOS

    own = [scenario for scenario in SCENARIOS if first in scenario.barriers]
    others = [scenario for scenario in SCENARIOS if scenario not in own]
    trials = [(scenario.name, scenario.trial) for scenario in [*own, *([] if amount.own_only else others)]]
    trials += [
        drawn_trial(seed, wipe, amount.steps, amount.states, amount.recoveries)
        for seed in range(amount.seeds)
        for wipe in amount.wipes
    ]
    name, outcome = try_all(trials, source)
    print(json.dumps({"trial": name, "tried": outcome.tried, "violation": outcome.violation}))


class Table:
    """Prints one line for each engine as it is judged, and counts those that are not as they should be."""

    def __init__(self) -> None:
        self.failed = 0
        self._guard = threading.Lock()
        print("| barrier taken out | noticed by | states tried | first violation |\n|---|---|---|---|", flush=True)

    def add(self, barrier: Barrier | None, verdict: Verdict) -> None:
        name = str(barrier) if barrier else "none"
        by = verdict.trial if verdict.violation else "NOT NOTICED" if barrier else "no violation"
        with self._guard:
            self.failed += (verdict.violation is None) != (barrier is None)
            print(f"| {name} | {by} | {verdict.tried} | {(verdict.violation or '-')[:240]} |", flush=True)


def judge_each(
    tree: Path, work: queue.SimpleQueue[Barrier | None], amount: Amount, whole: Amount, table: Table
) -> None:
    """Works on one copy of the tree until nothing is left to do. None stands for the engine with all barriers."""
    while True:
        try:
            barrier = work.get_nowait()
        except queue.Empty:
            return
        if barrier is None:
            table.add(None, judge(tree / "src", whole))
            continue
        with taken_out(tree, barrier):
            table.add(barrier, judge(tree / "src", amount, barrier.name))


def main() -> int:
    """Prints a table; 1 where a barrier was not noticed or a sync has no name, or the whole engine has a violation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parents[3])
    parser.add_argument("--seeds", type=int, default=3, help="drawn workloads of each policy, after the scenarios")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--states", type=int, default=400, help="states tried of each drawn workload")
    parser.add_argument("--recoveries", type=int, default=4, help="recoveries crashed again, of each drawn workload")
    parser.add_argument("--wipe", action="append", choices=WIPES, help="policies tried; both by default")
    parser.add_argument("--only", action="append", help="the name of a barrier; may be given more than once")
    parser.add_argument(
        "--own", action="store_true", help="judge by the scenarios that are for the barrier, and no others"
    )
    parser.add_argument("--jobs", type=int, default=2, help="engines judged at the same time")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    given = parser.parse_args()
    wipes = tuple(given.wipe or WIPES)
    amount = Amount(given.seeds, given.steps, given.states, given.recoveries, wipes, given.own)
    if given.judge:
        judge_here(given.judge, amount, given.first)
        return 0
    barriers, unnamed = find_barriers(given.tree)
    for place in unnamed:
        print(f"a sync without a name: {place}")
    work: queue.SimpleQueue[Barrier | None] = queue.SimpleQueue()
    if not given.only:
        work.put(None)
    for barrier in barriers:
        if not given.only or barrier.name in given.only:
            work.put(barrier)
    failed = drop_each(given.tree, work, amount, given.jobs)
    return int(failed > 0 or bool(unnamed))


def drop_each(tree: Path, work: queue.SimpleQueue[Barrier | None], amount: Amount, jobs: int) -> int:
    """Judges the engines in `work` with as many copies of the tree as there are jobs; how many are not as they should be."""
    if amount.own_only:
        amount = replace(amount, seeds=0)
    whole = replace(amount, own_only=False)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(jobs) as pool:
        copies = [Path(directory) / f"tree-{number}" for number in range(jobs)]
        copy_tree(tree, copies[0])
        build(copies[0])
        for copy in copies[1:]:
            shutil.copytree(copies[0], copy)
        table = Table()
        for done in [pool.submit(judge_each, copy, work, amount, whole, table) for copy in copies]:
            done.result()
    return table.failed


if __name__ == "__main__":
    sys.exit(main())
