"""Snapshots of a machine, crashed: the program, and what must hold of each state that it leaves.

A snapshot of a machine has two transactions: its disks are cut, and later all of it gets its name. Whatever a crash leaves,
each snapshot is there with all its disks and its RAM as at its cut, or no part of it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crash.harness.model import BLOCK_BYTES, CANARY_BYTES, SECTOR_BYTES, canary
from crash.harness.run import mark
from support.strays import strays

DISKS = ("web", "data")
RAM = "lab.ram"
MEMORY = 4 * BLOCK_BYTES
CONFIGURATION = f'{{"memory_bytes":{MEMORY}}}'
TAKEN = (1, 3)  # 2 is abandoned
OPENINGS_MAX = 4


def content(number: int, volume: str, *, after: bool = False) -> bytes:
    """Return what a volume has at its beginning at a cut, or what the guest wrote after it."""
    place = (*DISKS, RAM).index(volume)
    return canary(1000 * number + 10 * place + after) * (BLOCK_BYTES // CANARY_BYTES)


def snapshot_machine(root: Path) -> None:
    """Takes two snapshots of a machine whose guest writes meanwhile, abandons one between them, and drops one."""
    import onionskin
    from onionskin.operations import machines

    store = onionskin.Store(root / "store")
    for name in DISKS:
        store.create(name, size=4 * BLOCK_BYTES, block_size=BLOCK_BYTES).close()
    machines.create(store._opened, "lab", DISKS, configuration=CONFIGURATION, memory_bytes=MEMORY, wipe=None)
    mark(root, "made 0")
    opened = {name: store._open_to_write(name, for_machine=True) for name in (*DISKS, RAM)}
    for number in (1, 2, 3):
        for name, volume in opened.items():
            volume.write(0, content(number, name))
        with store._cut_machine("lab") as cut:
            cut.seal()
            mark(root, f"cut {number}")
            for name in DISKS:
                opened[name].write(0, content(number, name, after=True))
                opened[name].flush()
            if number in TAKEN:
                cut.commit(
                    str(number),
                    mode="live",
                    configuration=CONFIGURATION,
                    ram=opened[RAM]._opened.to_write(),
                    state_bytes=BLOCK_BYTES,
                )
        mark(root, f"done {number}")
    store._merge_machine_snapshots("lab", "1")
    mark(root, "merged 1")
    store.close()


def check_machine(directory: Path, markers: Sequence[str]) -> list[str]:
    """What is wrong with a state: it is before the step that was under way, or after it."""
    import onionskin

    words = [marker.split() for marker in markers]
    if ["made", "0"] not in words:
        return []
    with onionskin.Store(directory / "store", create=False) as store:
        heads = {name: read_head(store, name) for name in DISKS}
        problems = check_snapshots(store, words) + check_heads(heads, words)
    return problems + check_openings(directory / "store")


def read_head(store: Any, name: str) -> bytes:
    with store.open(name) as disk:
        return bytes(disk.read(0, BLOCK_BYTES))


def check_snapshots(store: Any, words: Sequence[Sequence[str]]) -> list[str]:
    """Each that was acknowledged is there, and each that is there is whole."""
    done = [word[1] for word in words if word[0] == "done" and int(word[1]) in TAKEN]
    under_way = words[-1][1] if words[-1][0] == "cut" and int(words[-1][1]) in TAKEN else None
    allowed = [done, [*done, under_way]] if under_way else [done]
    if done == ["1", "3"]:
        allowed = [["3"]] if words[-1][0] == "merged" else [done, ["3"]]
    found = [one.name for one in store.machine_snapshots("lab")]
    problems = [] if found in allowed else [f"snapshots {found} instead of one of {allowed}"]
    for volume in (*DISKS, RAM):
        names = [one.name for one in store.snapshots(volume)]
        problems += [] if names == found else [f"volume {volume} has snapshots {names}, and the machine {found}"]
        for name in names:
            with store.open(volume, snapshot=name) as view:
                if view.read(0, BLOCK_BYTES) != content(int(name), volume):
                    problems.append(f"{volume}@{name} is not what it was at the cut")
    at = store.machine_info("lab").stands_on
    return problems if at == (found[-1] if found else None) else [*problems, f"the machine stands on {at} of {found}"]


def check_heads(heads: dict[str, bytes], words: Sequence[Sequence[str]]) -> list[str]:
    """What was flushed is there, or something that was written since."""
    number = max((int(word[1]) for word in words if word[0] in ("cut", "done")), default=0)
    is_done = words[-1][0] != "cut"
    problems = []
    for name, found in heads.items():
        allowed = [content(number + 1, name), content(number, name, after=True) if number else bytes(BLOCK_BYTES)]
        allowed += [] if is_done or not number else [content(number, name)]
        sectors = (slice(first, first + SECTOR_BYTES) for first in range(0, BLOCK_BYTES, SECTOR_BYTES))
        if not all(found[at] in [one[at] for one in allowed] for at in sectors):
            problems.append(f"the head of {name} begins with {found[:CANARY_BYTES]!r}")
    return problems


def check_openings(path: Path) -> list[str]:
    """Nothing is left of a snapshot that was under way, once every volume was opened."""
    import onionskin

    left: list[Any] = []
    for _ in range(OPENINGS_MAX):
        with onionskin.Store(path, create=False) as store:
            for name in (*DISKS, RAM):
                store._open_to_write(name, for_machine=True).close()
            left = [one for one in store.check() if not one.what.endswith("users may get at it")]
            left += [f"staged volume {row.name}" for row in store._opened.catalog.staged_volumes()]
            for name in DISKS:
                volume = store._opened.catalog.volume(name)
                left += [
                    f"a layer of {name} without a name" for _ in store._opened.catalog.unnamed_of_volume(volume.id)
                ]
        if not left:
            break
    return [f"still there after {OPENINGS_MAX} openings: {one}" for one in left] + [str(one) for one in strays(path)]
