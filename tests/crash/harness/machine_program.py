"""Snapshots and reverts of a machine, crashed: the programs, and what must hold of each state that they leave.

A snapshot of a machine has two transactions: its disks are cut, and later all of it gets its name. Whatever a crash leaves,
each snapshot is there with all its disks and its RAM as at its cut, or no part of it is.

A revert of a machine that runs has two as well: all disks go back with the note that it is being put back, and the RAM with
the note that its guest may write.
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


# ---- a revert ----


def revert_machine(root: Path) -> None:
    """Puts a machine back as one that runs is put back, and goes on writing."""
    import onionskin
    from onionskin.operations import machine_tree, machines

    store = onionskin.Store(root / "store")
    for name in DISKS:
        store.create(name, size=4 * BLOCK_BYTES, block_size=BLOCK_BYTES).close()
    machines.create(store._opened, "lab", DISKS, configuration=CONFIGURATION, memory_bytes=MEMORY, wipe=None)
    opened = {name: store._open_to_write(name, for_machine=True) for name in (*DISKS, RAM)}
    write_all(opened, 1)
    with store._cut_machine("lab") as cut:
        cut.seal()
        cut.commit(
            "1", mode="live", configuration=CONFIGURATION, ram=opened[RAM]._opened.to_write(), state_bytes=BLOCK_BYTES
        )
    write_all(opened, 2)
    mark(root, "written")
    going_back = machine_tree.RevertInPlace(store._opened, "lab", "1")
    going_back.put_disks_back(store._put_back_together, store._put_back)
    mark(root, "disks")
    going_back.put_ram_back(opened[RAM]._opened.to_write())
    mark(root, "all")
    store.close()


def write_all(opened: Any, number: int) -> None:
    for name, volume in opened.items():
        volume.write(0, content(number, name))
        volume.flush()


def check_revert(directory: Path, markers: Sequence[str]) -> list[str]:
    """All disks are put back or none, and where they are not noted as being put back, RAM agrees with them."""
    import onionskin
    from onionskin.operations import machines

    if "written" not in markers:
        return []
    with onionskin.Store(directory / "store", create=False) as store:
        is_reverting = machines.beginning(store._opened, "lab").is_reverting
        found = {}
        for name in (*DISKS, RAM):
            with store._open_to_write(name, for_machine=True) as volume:
                found[name] = bytes(volume.read(0, BLOCK_BYTES))
    at = {name: next((n for n in (1, 2) if content(n, name) == held), 0) for name, held in found.items()}
    back, before = dict.fromkeys(at, 1), dict.fromkeys(at, 2)
    allowed = {
        "written": [(before, False), (back | {RAM: 2}, True)],
        "disks": [(back | {RAM: 2}, True), (back, False)],
        "all": [(back, False)],
    }[markers[-1]]
    problems = [] if (at, is_reverting) in allowed else [f"{at}, being put back: {is_reverting}, after {markers[-1]!r}"]
    return problems + check_openings(directory / "store")
