"""Kills processes of a machine, with SIGKILL, in the gaps of a snapshot, a revert and a fork: many rounds in each gap.

    python -m kills [--minutes M] [--rounds N] [--seed S]    every gap of every verb, each time with another victim
    python -m kills --verb snapshot --gap 'MachineCut.seal before' --victim server    one gap alone; each may be repeated
    python -m kills --qemu '/opt/q10/usr/bin/qemu-system-x86_64 -L ...'               with another QEMU

It runs in tests/ with the Python that has onionskin installed, as many rounds at a time as there are processors. The end
says how many rounds each gap had, and which failed, each with the line that repeats it; the exit status is 1 where one did.

What must hold behind each round is in `rounds.py`. tests/machine/test_gaps.py tries the same gaps, and those of other verbs,
once each.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from kills.plan import VERBS, Gap, plan
from kills.report import Report
from kills.workers import run_all


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = argparse.ArgumentParser(prog="python -m kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, help="end after so long; by default when all rounds were made")
    parser.add_argument("--rounds", type=int, default=30, help="how many rounds each gap has; by default 30")
    parser.add_argument("--seed", type=int, default=0, help="what the order is drawn from")
    parser.add_argument("--verb", action="append", choices=VERBS, help="only gaps of this verb; may be repeated")
    parser.add_argument("--gap", action="append", help="only this gap, as 'MachineCut.seal before'; may be repeated")
    parser.add_argument("--victim", action="append", help="only rounds in which this one is killed; may be repeated")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="how many rounds are made at a time")
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="the command, and its first arguments")
    parser.add_argument("--stop", action="store_true", help="end at the first failure, and leave its store")
    parser.add_argument("--directory", type=Path, help="where the stores are made; by default that of temporary files")
    return parser


def main() -> int:
    """Make the rounds, and report."""
    given = parser().parse_args()
    gaps = [gap for gap in plan() if is_wanted(gap, given)]
    if not gaps:
        print("there is no such gap; these are:", *sorted({gap.where for gap in plan()}), sep="\n  ")
        return 2
    deadline = None if given.minutes is None else time.monotonic() + given.minutes * 60
    with tempfile.TemporaryDirectory(prefix="kills.", dir=given.directory, ignore_cleanup_errors=True) as root:
        report = Report(gaps)
        for result in run_all(gaps, given, shlex.split(given.qemu), Path(root), deadline):
            report.add(result)
            if given.stop and result.failure:
                print(f"what it left: {result.left}")
                os._exit(1)
        return report.show()


def is_wanted(gap: Gap, given: argparse.Namespace) -> bool:
    """Whether the arguments ask for a gap, and for somebody who is killed there."""
    is_there = (not given.verb or gap.verb in given.verb) and (not given.gap or gap.where in given.gap)
    return is_there and bool(gap.victims_of(given.victim))


if __name__ == "__main__":
    sys.exit(main())
