"""Small trials, each for a few barriers: scripts of the workload (.scripts), and programs with a checker of their own.

`SCENARIOS` says which barriers each is for. With all barriers in place none has a violation; with one of its own taken
out it must have one (crash.harness.drop_each_barrier).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash.harness.judge import RECOVERIES_DRAWN, Outcome, Trial, drawn, try_workload, unwiped
from crash.harness.machine_program import check_machine, check_revert, revert_machine, snapshot_machine
from crash.harness.model import BLOCK_BYTES, CANARY_BYTES, canary, plan
from crash.harness.replay import MARK, SYNC_END
from crash.harness.run import Recording, check_states, mark, run


@dataclass(frozen=True)
class Scenario:
    """A trial, and the barriers of which none can be taken out without a violation in it."""

    name: str
    trial: Trial
    barriers: Sequence[str]


# ---- scripts ----


def scripted(
    name: str,
    *barriers: str,
    wipe: str = "release",
    recover_in: Sequence[str] = (),
    first_states: int | None = None,
    resumed_states: int | None = None,
) -> Scenario:
    """A script of the workload. Recoveries begin before each sync of the operations named `recover_in`.

    `first_states` are those of the script itself, where another scenario has them all, and `resumed_states` those of each
    recovery, where all are too many. Where states are drawn, a few recoveries are, and as many states of them.
    """

    def trial(root: Path, source: Path, states: int | None) -> Outcome:
        def choose_recoveries(recording: Recording) -> Sequence[int]:
            points = syncs_in(recording, name, wipe, recover_in)
            return points if states is None else drawn(points, RECOVERIES_DRAWN)

        return try_workload(
            root,
            source,
            seed=name,
            wipe=wipe,
            steps=0,
            states=first_states or states,
            choose_recoveries=choose_recoveries,
            resumed_states=resumed_states if states is None else states // RECOVERIES_DRAWN,
        )

    again = f", crashed again in {' and '.join(recover_in)}" if recover_in else ""
    return Scenario(f"{name}, {wipe}{again}", trial, barriers)


def syncs_in(recording: Recording, name: str, wipe: str, operations: Sequence[str]) -> list[int]:
    """The points before each sync returns that belongs to a step with one of these operations."""
    steps = plan(name, wipe).steps
    inside, points = False, []
    for number, entry in enumerate(recording.entries):
        if entry.kind == MARK:
            word, step = entry.data.decode().split()
            inside = word == "begin" and steps[int(step)].operation in operations
        elif entry.kind == SYNC_END and inside:
            points.append(number)
    return points


# ---- programs ----

CONTENT = b"".join(canary(number) * (BLOCK_BYTES // CANARY_BYTES) for number in range(1, 9))
IMAGE = "made.image"


def program_scenario(
    name: str,
    program: Callable[[Path], None],
    check: Callable[[Path, Sequence[str]], list[str]],
    *barriers: str,
    wipes: bool = False,
    states_max: int | None = None,
) -> Scenario:
    """A program that works below a directory; with `wipes` all that it gives back must be overwritten before.

    `states_max`: so many states are drawn, where all are too many.
    """

    def trial(root: Path, source: Path, states: int | None) -> Outcome:
        root.mkdir()
        home = program.__module__
        text = f"import sys; sys.path.insert(0, sys.argv[1]); from {home} import {program.__name__} as program"
        command = [sys.executable, "-c", f"{text}; from pathlib import Path; program(Path(sys.argv[2]))"]
        recording = run([*command, str(source), str(root)], root)
        report = check_states(recording, check, limit=states or states_max, violations_max=1)
        print(f"{name}: {report}")
        violation = str(report.violations[0]) if report.violations else None
        return Outcome(report.tried, violation or (unwiped(recording) if wipes else None))

    return Scenario(name, trial, barriers)


def make_volume(root: Path) -> tuple[Any, Any]:
    import onionskin

    store = onionskin.Store(root / "store")
    volume = store.create("main", size=len(CONTENT), block_size=BLOCK_BYTES)
    volume.write(0, CONTENT)
    volume.snapshot("s")
    return store, volume


def make_store(root: Path) -> None:
    """Two stores: what `Store` made is there once it has returned, before there is any volume."""
    import onionskin

    onionskin.Store(root / "on" / "the" / "way").close()
    mark(root, "on/the/way")
    onionskin.Store(root / "second").close()
    mark(root, "second")


def check_made_stores(directory: Path, markers: Sequence[str]) -> list[str]:
    import onionskin

    for made in markers:
        with onionskin.Store(directory / made, create=False) as store:
            store.create("main", size=BLOCK_BYTES).close()
    return []


def convert_image(root: Path) -> None:
    """Exports to another format; what stands in for qemu-img only copies."""
    from onionskin import images
    from onionskin.exchange import qemu_img

    store, volume = make_volume(root)

    def convert(_disk: int, target: int, _kind: str, **_: Any) -> None:
        os.pwrite(target, volume.read(0, volume.size_bytes), 0)

    qemu_img.write_image = convert
    qemu_img.program = lambda: ""
    images.export_image(volume, root / IMAGE, format="qcow2")
    mark(root, "done")
    store.close()


def check_converted(directory: Path, markers: Sequence[str]) -> list[str]:
    path = directory / IMAGE
    if not path.exists():
        return ["the image is gone"] if markers else []
    return [] if path.read_bytes() == CONTENT else ["the image is not what the disk read"]


def write_delta(root: Path) -> None:
    """Writes a delta to a file with the command line's verb."""
    from onionskin.cli.exchange import delta

    make_volume(root)[0].close()
    arguments = [f"{root / 'store'}/main@s", "--output", str(root / IMAGE), "--json"]
    delta.main(arguments, standalone_mode=False)
    mark(root, f"done {hashlib.sha256((root / IMAGE).read_bytes()).hexdigest()}")


def stream_delta(root: Path) -> None:
    """Writes a delta to stdout, where the shell has put a file. Its name is the shell's business."""
    from onionskin.cli.exchange import delta

    make_volume(root)[0].close()
    file = os.open(root / IMAGE, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.fsync(file)
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.dup2(file, 1)
    delta.main([f"{root / 'store'}/main@s"], standalone_mode=False)
    mark(root, f"done {hashlib.sha256((root / IMAGE).read_bytes()).hexdigest()}")


def check_delta(directory: Path, markers: Sequence[str]) -> list[str]:
    path = directory / IMAGE
    if not markers:
        return []  # it may be there in part
    if not path.exists():
        return ["the delta is gone"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return [] if [f"done {digest}"] == markers else ["the delta is not what was written"]


FORKS = ["main-1", "main-2", "main-3"]


def fork_under_key(root: Path) -> None:
    """Forks a disk that is open, as it is."""
    store, volume = make_volume(root)
    volume.write(0, CONTENT[::-1])
    mark(root, "made")
    store.fork("main", count=len(FORKS), idempotency_key="once", labels={"task": "42"}, lifetime="1d")
    mark(root, "forked")
    store.close()


def check_asked_again(directory: Path, markers: Sequence[str]) -> list[str]:
    """The same call again makes nothing where the forks are there, and else all of them."""
    import onionskin

    if not markers:
        return []
    with onionskin.Store(directory / "store", create=False) as store:
        before = [info.name for info in store.volumes(labels={"task": "42"})]
        wanted = [FORKS] if markers[-1] == "forked" else [FORKS, []]
        problems = [] if before in wanted else [f"the forks {before}"]
        if store.fork("main", count=len(FORKS), idempotency_key="once", labels={"task": "42"}, lifetime="1d") != FORKS:
            problems.append("the same call made others")
        for name in FORKS if before == FORKS else ():
            with store.open(name) as fork:
                problems += [] if fork[:] == CONTENT[::-1] else [f"{name} is not what the disk was"]
        if store.forks_of("main") != FORKS or any(store.info(name).expires is None for name in FORKS):
            problems.append("nobody knows where they come from, or until when they live")
        return problems


def fail_to_write_map(root: Path) -> None:
    """Writes a block map for which there is no room: what was written of it is wiped."""
    from onionskin.storage import block_maps

    (root / "layers").mkdir()
    layer_map = block_maps.empty_map(BLOCK_BYTES)
    number = layer_map.add_segment(bytes(range(16)))
    for block_index in range(2000):
        layer_map.set(2 * block_index, 1, number << 32 | block_index)
    fsync = os.fsync

    def fail_once(descriptor: int) -> None:
        os.fsync = fsync
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fail_once
    with contextlib.suppress(OSError):
        layer_map.write(str(root / "layers" / "new.map"), map_id=bytes(16), wipe_zero=True, size_bytes=None)
    assert not (root / "layers" / "new.map").exists()


def check_nothing(directory: Path, markers: Sequence[str]) -> list[str]:
    return []


SCENARIOS = (
    scripted(
        "write again",
        "segment data", "segment name", "map header", "map name", "map frame", "catalog commits",
    ),
    scripted(
        "make",
        "opened map", "opened segments directory", "opened layers directory", "catalog schema",
        recover_in=("create", "write", "flush"),
    ),
    scripted("write again", "opened catalog", "opened segment", first_states=1, recover_in=("reopen", "snapshot", "flush")),
    scripted(
        "compact", "compacted segment", "compacted segment name", "compacted map name",
        "written map", "folded map name",
    ),
    scripted("flatten", "flat segment", "flat segment name", "flat map name"),
    scripted("delete", "freed map name", "freed segment name", "freed lock name"),
    scripted("fork", "segment data", "map frame", "catalog commits"),
    scripted("fork", first_states=1, recover_in=("fork",), resumed_states=40),
    scripted("snapshot group", "segment data", "map frame", "catalog commits"),
    scripted("snapshot group", first_states=1, recover_in=("snapshot_group",), resumed_states=40),
    scripted("first snapshot", "segment data", "segment name", "map header", "map name", "map frame", "catalog commits"),
    scripted("first snapshot", first_states=1, recover_in=("expect_seal",), resumed_states=40),
    scripted("delete several", "freed map name", "freed segment name", "freed lock name", "catalog commits"),
    scripted("delete several", first_states=1, recover_in=("delete_several",), resumed_states=40),
    scripted("export", "exported image", "exported image name"),
    scripted("merge into base", "merged base"),
    scripted("merge into base", "merged base", first_states=1, recover_in=("merge_into_base",)),
    scripted("merge into longer base", "shortened base"),
    scripted("free", "wiped bytes", "rewritten map", "rewritten map name", wipe="zero"),
    scripted("free", wipe="zero", first_states=1, recover_in=("merge",), resumed_states=40),
    program_scenario("two stores are made", make_store, check_made_stores, "store name"),
    program_scenario(
        "an image is converted", convert_image, check_converted, "exported image", "exported image name"
    ),
    program_scenario("a fork is asked for again", fork_under_key, check_asked_again, "catalog commits"),
    program_scenario("a machine is snapshot", snapshot_machine, check_machine, states_max=1000),
    program_scenario("a machine is put back", revert_machine, check_revert, states_max=1000),
    program_scenario("a delta is written", write_delta, check_delta, "written delta name"),
    program_scenario("a delta goes to stdout", stream_delta, check_delta, "streamed file"),
    program_scenario(
        "a block map finds no room", fail_to_write_map, check_nothing, "overwritten staged map", wipes=True
    ),
)  # fmt: skip
