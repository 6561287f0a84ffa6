"""Takes each barrier out of the engine, one at a time, and says which removals the crash workload notices.

    python -m crash.drop_each_barrier [--seeds N] [--steps N] [--states N] [--only NAME ...] [SOURCE_TREE]

A barrier that can be taken out unnoticed is either not needed, or not tested.

The convention: a barrier is one line that holds one whole call of onion_sync_file, onion_sync_directory,
fdatasync, fsync or syncfs (C), or of sync_file, sync_directory or os.fsync (Python), and ends with its name:

    status = onion_sync_file(fd); /* BARRIER: map frame */
    sync_directory(path.parent)  # BARRIER: catalog name

Here the call is replaced by 0 or None. Or the line sets SQLite's durability, and FULL becomes OFF:

    connection.execute("PRAGMA synchronous=FULL")  # BARRIER: catalog commits

Names are unique. A sync without a name is reported, because nothing tests it. Nothing of this is in the built
engine: the tree is copied, one line of the copy is changed, and its extensions are built again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"(?:/\*|#) BARRIER: (?P<name>[^*]+?)\s*(?:\*/)?$")
CALL = re.compile(
    r"\b(onion_sync_file|onion_sync_directory|os\.fsync|fdatasync|fsync|syncfs|sync_file|sync_directory)\("
)
DURABILITY = re.compile(r"(synchronous\s*=\s*)(FULL|EXTRA)", re.IGNORECASE)
# Where the calls themselves are defined: what they are made of is named where they are used.
DEFINITIONS = {"csrc/barrier.c", "csrc/barrier.h", "src/onionskin/barriers.py"}
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
    files = [*(tree / "csrc").glob("*.c"), *(tree / "src").rglob("*.py"), *(tree / "src").rglob("*.pyx")]
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
            elif CALL.search(line) and not line.lstrip().startswith(("*", "#", "def ")):
                unnamed.append(f"{path}:{number + 1}: {line.strip()}")
    return list(barriers.values()), unnamed


def copy_tree(tree: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.so", "tests", "bench", "docs")
    shutil.copytree(tree, target, ignore=ignored)


def build(tree: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the extensions cannot be built in {tree}:\n{done.stdout}{done.stderr}")


def take_out(tree: Path, barrier: Barrier) -> str:
    """Changes the barrier's line in a copy, builds it, and returns what the file was."""
    path = tree / barrier.path
    before = path.read_text()
    lines = before.splitlines()
    lines[barrier.line] = without_barrier(lines[barrier.line])
    path.write_text("\n".join(lines) + "\n")
    if path.suffix != ".py":
        build(tree)
    return before


def judge(source: Path, amount: Amount) -> str | None:
    """The first violation of workloads on the engine in `source`; None where there is none.

    In a process of its own, because the checker imports the engine that it judges.
    """
    command = [sys.executable, "-m", "crash.drop_each_barrier", "--judge", str(source)]
    command += ["--seeds", str(amount.seeds), "--steps", str(amount.steps), "--states", str(amount.states)]
    command += ["--recoveries", str(amount.recoveries)]
    command += [argument for wipe in amount.wipes for argument in ("--wipe", wipe)]
    tests = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        return f"the workload failed: {done.stderr.strip()[-400:]}"
    return done.stdout.strip() if done.returncode == 1 else None


def judge_here(source: Path, amount: Amount) -> int:
    """Runs in the process that `judge` starts: 1 and a description where there is a violation, else 0."""
    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    from crash.judging import first_violation

    violation = first_violation(
        source, range(amount.seeds), amount.wipes, amount.steps, amount.states, amount.recoveries
    )
    if violation is not None:
        print(violation)
    return int(violation is not None)


def main() -> int:
    """Reports each barrier; 1 where one was not noticed, has no name, or the whole engine has a violation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--states", type=int, default=400, help="states tried of each workload")
    parser.add_argument("--recoveries", type=int, default=6, help="recoveries crashed again, of each workload")
    parser.add_argument("--wipe", action="append", choices=WIPES, help="policies tried; both by default")
    parser.add_argument("--only", action="append", help="the name of a barrier; may be given more than once")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    amount = Amount(given.seeds, given.steps, given.states, given.recoveries, given.wipe or WIPES)
    if given.judge:
        return judge_here(given.judge, amount)
    barriers, unnamed = find_barriers(given.tree)
    for place in unnamed:
        print(f"a sync without a name: {place}")
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        copy_tree(given.tree, copy)
        build(copy)
        whole = judge(copy / "src", amount)
        print(f"all barriers: {whole or 'no violation'}", flush=True)
        if whole:
            return 1
        missed = 0
        for barrier in barriers:
            if given.only and barrier.name not in given.only:
                continue
            before = take_out(copy, barrier)
            violation = judge(copy / "src", amount)
            (copy / barrier.path).write_text(before)
            missed += violation is None
            print(
                f"{'noticed' if violation else 'NOT NOTICED'}: {barrier}: {(violation or '')[:300]}",
                flush=True,
            )
    return int(missed > 0 or bool(unnamed))


if __name__ == "__main__":
    sys.exit(main())
