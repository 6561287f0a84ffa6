"""Measures every figure that onionskin has to reach, and says which it reaches.

    cd bench && python -m targets [--directory DIR] [--only WORD ...] [--on disk ext4 xfs] [--runs 5] [--save FILE]
    cd bench && python -m targets --summary FILE ...

Each row is measured beside its peers in one run, contestants taking turns; a ratio is the median of the ratios of each
round. Needs a directory with 20 GiB free; a peer that is missing makes its row `skipped`. `--on` measures on the disk
that the directory is on, or on a loop image in it: ext4 with a journal, or XFS. Each row of each run is one line of JSON
in FILE, to which a later call appends; `--summary` makes a table of medians and ranges of all lines.
"""

import argparse
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rig.file_system import describe
from rig.mounts import loop_mount, mount_missing

from targets import flushes, forks, groups, merge, opening, read, revert, snapshot, wipe, write
from targets.report import Figure, summary
from targets.workspace import workspace

GROUPS: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "snapshot-copy": snapshot.snapshot_against_copy,
    "snapshot-qemu": snapshot.snapshot_against_qemu,
    "snapshot-size": snapshot.snapshot_of_a_large_disk,
    "read": read.batch_reads,
    "read-qcow2": read.reads_against_qcow2,
    "write": write.first_writes,
    "write-qcow2": write.first_writes_against_qcow2,
    "flush": write.flush_syncs,
    "pause": snapshot.writer_pause,
    "open": opening.opens,
    "memory": opening.memory_of_a_sequence,
    "merge": merge.merges,
    "merge-xfs": merge.merge_on_xfs,
    "wipe": wipe.wipes,
    "revert": revert.reverts,
    "device": flushes.device_flushes,
    "fork": forks.hundred_forks,
    "fork-elsewhere": forks.hundred_copies_elsewhere,
    "fork-many": forks.fork_among_many,
    "fork-read": forks.first_read,
    "fork-nbd": forks.first_read_over_nbd,
    "fork-drop": forks.drop_of_forks,
    "group": groups.groups,
}


def measured(group: str, directory: Path) -> Iterator[Figure]:
    """The rows of a group; one that breaks is a failed row, and the others go on."""
    with workspace(directory) as path:
        try:
            yield from GROUPS[group](path)
        except Exception as error:
            traceback.print_exc()
            yield Figure(group, "", f"broke: {error}", False)


PLACES = {"disk": None, "ext4": "ext4", "xfs": "xfs"}
IMAGE_BYTES = 10 << 30  # gone afterwards


@contextmanager
def place(name: str, directory: Path) -> Iterator[Path]:
    """Give a directory on the file system of this name."""
    kind = PLACES[name]
    with workspace(directory) as path:
        if kind is None:
            yield path
        elif reason := mount_missing(kind):
            raise SystemExit(f"{name}: {reason}")
        else:
            with loop_mount(path, kind, IMAGE_BYTES, is_sparse=False) as mounted:
                yield mounted


def run(options: argparse.Namespace) -> None:
    print("| what | must reach | measured | |\n|---|---|---|---|", flush=True)
    for name in options.on:
        with place(name, options.directory) as directory:
            where = describe(directory) + ("" if name == "disk" else ", loop image")
            print(f"on {where}, {platform.system()} {platform.release()}", file=sys.stderr)
            for number in range(options.runs):
                for group in options.only:
                    for figure in measured(group, directory):
                        print(figure, flush=True)
                        keep(options.save, {"place": where, "run": number, "group": group, **asdict(figure)})


def keep(path: Path | None, line: dict[str, Any]) -> None:
    if path:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--on", nargs="+", choices=PLACES, default=["disk"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--summary", nargs="+", type=Path)
    options = parser.parse_args()
    if options.summary:
        print(summary(json.loads(line) for path in options.summary for line in path.read_text().splitlines()))
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
