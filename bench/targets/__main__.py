"""Measures every figure that onionskin has to reach, and says which it reaches.

    cd bench && python -m targets [--directory DIR] [--only WORD ...] [--json FILE]

Each row is measured beside its peers in one run, contestants taking turns; a ratio is the median of the ratios of each
round. Needs a directory on ext4 with 20 GiB free; a peer that is missing makes its row `skipped`.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from targets import forks, merge, opening, read, revert, snapshot, wipe, write
from targets.report import Figure
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
    "fork": forks.hundred_forks,
    "fork-many": forks.fork_among_many,
    "fork-read": forks.first_read,
    "fork-nbd": forks.first_read_over_nbd,
    "fork-drop": forks.drop_of_forks,
}


def measured(group: str, directory: Path) -> Iterator[Figure]:
    """The rows of a group; one that breaks is a failed row, and the others go on."""
    with workspace(directory) as path:
        try:
            yield from GROUPS[group](path)
        except Exception as error:
            traceback.print_exc()
            yield Figure(group, "", f"broke: {error}", False)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = []
    print("| what | must reach | measured | |\n|---|---|---|---|", flush=True)
    for group in options.only:
        for figure in measured(group, options.directory):
            print(figure, flush=True)
            figures.append(figure)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
