"""Takes each fix of a race out of the engine, one at a time, and says whether the harness of pairs finds the race again.

    python -m pairs.faults_taken_out [--only NAME ...] [SOURCE_TREE]

A fix is taken out by replacing a piece of a source file by what was there before it, or by what a hasty hand would write.
The tree is copied, the copy is changed, extensions are built again where C was changed, and the pairs that are named are
tried at every step until one is violated. A fault that is not found, or whose text is not in its file any more, makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from crash.drop_each_barrier import build, copy_tree

TREE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Edit:
    """A piece of a file, which is there once, and what is put in its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """A fix to take out, and the arguments of `python -m pairs` with which the race must be found."""

    name: str
    edits: tuple[Edit, ...]
    arguments: tuple[str, ...]


def _pairs(first: str, second: str, relation: str, place: str, wipe: str, fault: str = "none") -> tuple[str, ...]:
    return (
        "--all", "--stop", "--first", first, "--second", second, "--relation", relation, "--place", place,
        "--wipe", wipe, "--fault", fault,
    )  # fmt: skip


FAULTS = [
    Fault(
        "A4: a name means what it meant before the lock was held",
        (
            Edit(
                "src/onionskin/store.py",
                "            if row.id == id:\n                return row, lock\n            lock.close()\n",
                "            return row, lock\n",
            ),
        ),
        _pairs("open", "swap", "same", "processes", "release"),
    ),
]


class EditError(Exception):
    """A piece that is to be replaced is not in its file, or more than once."""


def take_out(tree: Path, fault: Fault) -> None:
    """Change a copy of the tree."""
    for edit in fault.edits:
        path = tree / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise EditError(f"{fault.name}: {edit.file} has its piece {text.count(edit.old)} times; write it anew")
        path.write_text(text.replace(edit.old, edit.new))
    if any(not edit.file.endswith(".py") for edit in fault.edits):
        build(tree)


def is_found(tree: Path, fault: Fault) -> str | None:
    """Return the first violation that is found in a tree, or None."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tests}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pairs", *fault.arguments, "--seed", "1"]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or "orders" not in done.stdout:
        raise RuntimeError(f"{fault.name}: the harness failed by itself: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith("VIOLATION")]
    return found[0] if found else None


def built_tree(work: Path, source: Path) -> Path:
    """Copy a tree, with its extensions in place: those that are installed, where they are built from the same sources."""
    tree = work / "tree"
    copy_tree(source, tree)
    import onionskin

    installed = Path(onionskin.__file__).parent
    modules = list(installed.glob("*.so"))
    if not modules:
        build(tree)
    for module in modules:
        shutil.copy(module, tree / "src" / "onionskin")
    return tree


def main() -> int:
    """Print a line for each fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tree", nargs="?", type=Path, default=TREE)
    parser.add_argument("--only", action="append", help="the beginning of a name; may be repeated")
    given = parser.parse_args()
    missed = 0
    for fault in FAULTS:
        if given.only and not any(fault.name.startswith(name) for name in given.only):
            continue
        with tempfile.TemporaryDirectory(prefix="pairs.") as work:
            try:
                tree = built_tree(Path(work), given.tree)
                take_out(tree, fault)
                found = is_found(tree, fault)
            except EditError as error:
                found = None
                print(error)
        missed += found is None
        print(f"{'found' if found else 'NOT FOUND'}: {fault.name}: {(found or '-')[:200]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
