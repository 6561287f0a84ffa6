"""Plans written by hand, each for one part of the engine that drawn steps seldom reach in a way that shows a lost sync.

A script gets a planner that has made the main volume, and adds its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crash.harness.model import BASE_BYTES, BLOCK_BYTES, MAIN_CLONE, Planner


@dataclass(frozen=True)
class Script:
    """`has_base`: whether the volume stands on a base file."""

    steps: Callable[[Planner], None]
    has_base: bool = False


def make(planner: Planner) -> None:
    """A store, a volume, and the first flush in it."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.flush()


def write_again(planner: Planner) -> None:
    """Overwrites in place, and new blocks, each flushed; a snapshot right after a store was opened."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.flush()
    planner.reopen()
    planner.snapshot()
    planner.write_at(BLOCK_BYTES, 3 * BLOCK_BYTES)
    planner.flush()
    planner.write_at(BLOCK_BYTES, 3 * BLOCK_BYTES)
    planner.flush()


def compact(planner: Planner) -> None:
    """Merges until a sealed layer has four segments, of which an opening makes one."""
    for number in range(4):
        planner.write_at(2 * number * BLOCK_BYTES, 2 * BLOCK_BYTES)
        planner.snapshot()
    for name in ("s1", "s2", "s3"):
        planner.merge_named(name)
    planner.reopen()
    planner.write_at(0, BLOCK_BYTES)
    planner.flush()


def flatten(planner: Planner) -> None:
    planner.write_at(BLOCK_BYTES, 3 * BLOCK_BYTES)
    planner.snapshot()
    planner.clear_at("zero", 2 * BLOCK_BYTES, BLOCK_BYTES)
    planner.flatten()
    planner.write_at(0, BLOCK_BYTES)
    planner.flush()


def export(planner: Planner) -> None:
    planner.write_at(BLOCK_BYTES, 3 * BLOCK_BYTES)
    planner.flush()
    planner.export()


def free(planner: Planner) -> None:
    """Frees slots by trim, files by discard, and what a merge hides."""
    planner.write_at(0, 6 * BLOCK_BYTES)
    planner.flush()
    planner.clear_at("trim", BLOCK_BYTES, 2 * BLOCK_BYTES)
    planner.flush()
    planner.snapshot()
    planner.write_at(0, BLOCK_BYTES)
    planner.merge_named("s1")
    planner.flush()


def merge_into_base(planner: Planner) -> None:
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.snapshot()
    planner.write_at(BLOCK_BYTES, 2 * BLOCK_BYTES)
    planner.finish()


def merge_into_longer_base(planner: Planner) -> None:
    """The base is longer than the disk that is merged into it."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.resize_to(BASE_BYTES - 8 * BLOCK_BYTES)
    planner.finish()


def delete(planner: Planner) -> None:
    """A volume that was opened goes, and work that its files leave is done."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.snapshot()
    planner.clone()
    planner.write_clone()
    planner.delete_clone()
    planner.reopen()


def fork(planner: Planner) -> None:
    """Forks of a disk as it is, written to and then not, and of a snapshot."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.fork(None, "a", "b")
    planner.fork(None, "c")
    planner.write_at(BLOCK_BYTES, 2 * BLOCK_BYTES)
    planner.snapshot()
    planner.fork("s1", "d", "e")


def snapshot_group(planner: Planner) -> None:
    """A disk and its clone are cut together, twice: at the second time the files of both next heads are there."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.fork(None, MAIN_CLONE)
    planner.snapshot_group("g1")
    planner.snapshot_group("g2")


def first_snapshot(planner: Planner) -> None:
    """A served disk has its first snapshots: files are made beforehand, and what is made is used or goes."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.expect_seal()
    planner.write_at(BLOCK_BYTES, 2 * BLOCK_BYTES)
    planner.flush()
    planner.snapshot()
    planner.write_at(0, BLOCK_BYTES)
    planner.flush()
    planner.snapshot()
    planner.reopen()
    planner.expect_seal()
    planner.reopen()
    planner.write_at(2 * BLOCK_BYTES, BLOCK_BYTES)
    planner.flush()


def delete_several(planner: Planner) -> None:
    """Forks go together, one that was written to and has a snapshot, and one that nobody opened; their files go too."""
    planner.write_at(0, 2 * BLOCK_BYTES)
    planner.fork(None, MAIN_CLONE, "a", "b")
    planner.snapshot_group("g1")
    planner.delete_several("a", MAIN_CLONE)
    planner.write_at(4 * BLOCK_BYTES, BLOCK_BYTES)
    planner.flush()
    planner.reopen()


SCRIPTS = {
    "make": Script(make),
    "write again": Script(write_again),
    "compact": Script(compact),
    "flatten": Script(flatten, has_base=True),
    "export": Script(export, has_base=True),
    "free": Script(free),
    "delete": Script(delete),
    "fork": Script(fork),
    "snapshot group": Script(snapshot_group),
    "first snapshot": Script(first_snapshot),
    "delete several": Script(delete_several),
    "merge into base": Script(merge_into_base, has_base=True),
    "merge into longer base": Script(merge_into_longer_base, has_base=True),
}
