"""Finds races between the verbs of a store.

    python -m pairs [--seconds N] [--seed S]              every pair at a few steps, as many as there is time for
    python -m pairs --all [--first VERB] [--second VERB]  every step of every pair, in every way
    python -m pairs --all --behind-commits                what the handle of the first one does not know yet
    python -m pairs --random --seconds N [--seed S]       three actors and more, in a random order, with random faults
    python -m pairs --aftermath --seconds N [--seed S]    a verb in the store that another one left, which was interrupted
    python -m pairs --one FIRST SECOND --relation same --place threads --wipe zero --step 17   one run, told in full

It runs in tests/ with the Python that has onionskin installed. Each violation is printed with the line that repeats it.
The end says how many pairs, orders, kills and errors were tried; the exit status is 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from pairs import steps


def under_steps() -> None:
    """Run this program again under steps.c, where it does not."""
    if not steps.preloaded():
        environment = {
            **os.environ,
            "LD_PRELOAD": str(steps.build()),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])))),
        }
        os.execve(sys.executable, [sys.executable, "-m", "pairs", *sys.argv[1:]], environment)


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = argparse.ArgumentParser(prog="python -m pairs", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every step of every pair")
    what.add_argument("--random", action="store_true", help="three actors and more, in a random order")
    what.add_argument("--aftermath", action="store_true", help="a verb in the store that an interrupted one left")
    what.add_argument("--one", nargs=2, metavar=("FIRST", "SECOND"), help="one run of a pair, told in full")
    what.add_argument("--one-random", type=int, metavar="NUMBER", help="one run of --random, told in full")
    parser.add_argument("--first", action="append", help="only pairs that are begun by this verb; may be repeated")
    parser.add_argument("--second", action="append", help="only pairs with this verb beside; may be repeated")
    parser.add_argument("--relation", action="append", help="same, related or other; may be repeated")
    parser.add_argument("--place", action="append", help="threads, stores or processes; may be repeated")
    parser.add_argument("--wipe", action="append", help="release or zero; may be repeated")
    parser.add_argument(
        "--fault",
        action="append",
        help="none, 'kill first', 'kill last', EIO, ENOSPC, unsynced or stopped; may be repeated",
    )
    parser.add_argument("--step", type=int, default=-1, help="of --one: where the first one is held; -1 is its end")
    parser.add_argument(
        "--behind-commits",
        action="store_true",
        help="of --all: only the steps at which the first one has just committed",
    )
    parser.add_argument("--then", help="of --aftermath with --step: a verb that is killed too, behind the first one")
    parser.add_argument("--then-step", type=int, default=1, help="where that one is killed")
    parser.add_argument("--seconds", type=float, help="end after so long")
    parser.add_argument("--seed", type=int, help="what the order of what is tried is drawn from")
    parser.add_argument("--part", default="0/1", help="of several that run side by side, which: 0/2 and 1/2")
    parser.add_argument("--stop", action="store_true", help="end at the first violation")
    parser.add_argument("--directory", type=Path, help="where the stores are made; /dev/shm where there is one")
    return parser


def main() -> int:
    """Run what the arguments ask for."""
    given = parser().parse_args()
    under_steps()
    from pairs.exploring import Explorer

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="pairs.", dir=given.directory or (memory if memory.is_dir() else None)
    ) as root:
        return Explorer(given, Path(root)).run()


if __name__ == "__main__":
    sys.exit(main())
