"""What runs in the processes that are conducted: handles, and the programs of actors.

What must hold: each operation is told to the conductor when it begins and when it ends, in that order with its result;
what comes out of it is a plain value, compared with the model elsewhere. Handles that a program does not open itself
are open before the first step.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import io
import mmap
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pairs import judging, steps
from pairs.model import Operation
from pairs.units import UNIT_BYTES, disk_bytes, numbers_of, values_of

PR_SET_PDEATHSIG = 1


@dataclass
class Actor:
    """One actor of a process: its program, the connection that its results go to, and what it needs open before.

    `store` says which of the process's stores is its own. `handle` is (handle, volume, whether to revert to s2 before).
    An operation that raises ends the program, or the part of it before `goes_on_at`.
    """

    number: int
    program: list[Operation]
    results: Connection
    store: int
    handle: tuple[str, str, bool] | None
    streams: dict[str, bytes] = field(default_factory=dict)
    goes_on_at: int = 0


class Process:
    """A forked process with its actors."""

    def __init__(self, root: Path, actors: list[Actor], *, in_main_thread: bool = False) -> None:
        self.root, self.actors, self.in_main_thread = root, actors, in_main_thread
        self.stores: dict[int, Any] = {}
        self.handles: dict[str, Any] = {}
        self.temporary: dict[str, Any] = {}

    def run(self, control: Connection) -> None:
        """Set up, run the programs side by side, and close what is left when told to. Never returns."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        gc.disable()  # a process lives for a fraction of a second
        import onionskin
        from onionskin.base import background

        faulthandler.register(signal.SIGUSR1, all_threads=True)
        background.LINGER_SECONDS = 0.0  # so that each thread of it belongs to the actor that woke it
        try:
            for actor in self.actors:
                if actor.store not in self.stores:
                    self.stores[actor.store] = onionskin.Store(self.root / "store")
                if actor.handle and actor.handle[0] not in self.handles:
                    handle, name, at_s2 = actor.handle
                    self.handles[handle] = self.stores[actor.store].open(name)
                    if at_s2:
                        self.handles[handle].revert("s2")
            for store in self.stores.values():
                store.finish_work()
            control.send("ready")
            if self.in_main_thread:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                with suppress(KeyboardInterrupt):
                    self._act(*self.actors)
            else:
                self._act_side_by_side()
            asked = control.recv()
            control.send(self._close_all())
            if asked:  # this process is the one that looks
                self.stores.clear()
                control.send(judging.find(self.root, asked))
        except BaseException as error:
            control.send(f"the harness failed: {type(error).__name__}: {error}")
        finally:
            os._exit(0)

    def _act_side_by_side(self) -> None:
        threads = [threading.Thread(target=self._act, args=(actor,)) for actor in self.actors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _close_all(self) -> list[str]:
        wrong = []
        for name, what in [*self.handles.items(), *((f"store {n}", s) for n, s in self.stores.items())]:
            try:
                what.close()
            except BaseException as error:
                wrong.append(f"close of {name}: {type(error).__name__}: {error}")
        return wrong

    def _act(self, actor: Actor) -> None:
        with steps.as_actor(actor.number):
            steps.step("begin")
            raised = False
            for index, operation in enumerate(actor.program):
                raised = raised and index != actor.goes_on_at
                if raised:
                    actor.results.send(("skipped", None, ""))
                    continue
                if index:
                    steps.step(f"between {actor.program[index - 1][0]} and {operation[0]}")
                steps.note(f"begin {index}")
                outcome = self._outcome(actor, operation)
                actor.results.send(outcome)
                steps.note(f"end {index}")
                raised = outcome[0] == "raised"
                if raised and index >= actor.goes_on_at:
                    break
            self.stores[actor.store].finish_work()

    def _outcome(self, actor: Actor, operation: Operation) -> tuple[str, Any, str]:
        name, *arguments = operation
        try:
            return "done", DO[name](self, actor, *arguments), ""
        except BaseException as error:
            return "raised", kind_of(error), f"{type(error).__name__}: {error}"

    def path(self, name: str) -> Path:
        return self.root / name


def kind_of(error: BaseException) -> str:
    """Return what an exception means to the model; `unexpected` where no caller could foresee it."""
    import onionskin
    from onionskin import errors

    if isinstance(error, errors.VolumeNotFoundError | errors.SnapshotNotFoundError):
        return "not found"
    if isinstance(error, errors.VolumeExistsError | errors.SnapshotExistsError):
        return "exists"
    if isinstance(error, errors.StateError | errors.ChainError):
        return "busy"
    if isinstance(error, onionskin.OnionskinError):
        return "damage"
    if isinstance(error, OSError):
        return f"system {errno.errorcode.get(error.errno or 0, '?')}"
    return "bounds" if isinstance(error, ValueError) else "unexpected"


# ---- the operations ----


def _read(process: Process, actor: Actor, handle: str, first: int) -> list[frozenset[int]]:
    """Read the whole disk; the copy of each page is a step of its own, behind the look-up."""
    volume = process.handles[handle]
    length = volume.size_bytes - first * UNIT_BYTES
    buffer = mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE)
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    library = steps.library()
    library.pairs_guard(ctypes.addressof(place), len(buffer))
    try:
        volume.readinto(first * UNIT_BYTES, memoryview(buffer)[:length])
    finally:
        library.pairs_unguard()
    return values_of(bytes(place[:length]), first)


def _write(process: Process, actor: Actor, handle: str, first: int, stamp: int, count: int) -> None:
    process.handles[handle].write(first * UNIT_BYTES, disk_bytes([stamp] * count, first))


def _open(process: Process, actor: Actor, handle: str, name: str) -> None:
    _holds(process, actor, handle, process.stores[actor.store].open(name))


def _create(process: Process, actor: Actor, handle: str, name: str, units: int, base: str | None) -> None:
    path = process.path(base) if base else None
    size = units * UNIT_BYTES
    _holds(process, actor, handle, process.stores[actor.store].create(name, base=path, size=size))


def _holds(process: Process, actor: Actor, handle: str, volume: Any) -> None:
    steps.note(f"holds {volume._opened.head.hex()}")
    process.handles[handle] = volume


def _close(process: Process, actor: Actor, handle: str) -> None:
    volume = process.handles[handle]
    if volume.writable:
        steps.note("gives up")
    volume.close()


def _view(process: Process, actor: Actor, handle: str, name: str, snap: str) -> None:
    process.handles[handle] = process.stores[actor.store].open(name, snapshot=snap)


def _held(process: Process, actor: Actor, handle: str) -> Any:
    """Whether the volume of a handle is held, as others see it."""
    import onionskin

    volume = process.handles[handle]
    with steps.unseen(), onionskin.Store(process.root / "store") as store:
        while True:
            name = volume.name
            found = [info.holder for info in store.volumes() if info.name == name]
            if volume.name == name:  # nobody renamed it meanwhile
                break
    holder = found[0] if found else "nobody: the volume is gone"
    return True if holder == os.getpid() else f"the holder is {holder}"


def _temporary(process: Process, actor: Actor, handle: str, name: str, snap: str | None, new: str) -> None:
    context = process.stores[actor.store].temporary(name, snap, name=new)
    process.handles[handle] = context.__enter__()
    process.temporary[handle] = context


def _end_temporary(process: Process, actor: Actor, handle: str) -> None:
    process.temporary[handle].__exit__(None, None, None)


def _delta(process: Process, actor: Actor, name: str, a: str | None, b: str) -> tuple[str, dict[int, int]]:
    from onionskin.delta import delta

    stream = io.BytesIO()
    said = delta(process.stores[actor.store], name, a, b, stream)
    return said.name, _units_of(stream.getvalue(), said)


def _units_of(stream: bytes, said: Any) -> dict[int, int]:
    """Return what a stream writes, by unit."""
    from onionskin.delta import CRC, DATA, END, HEADER, RECORD

    at = HEADER.size + len(said.name.encode()) + len(said.note.encode()) + CRC.size
    units: dict[int, int] = {}
    while True:
        kind, _, offset, length = RECORD.unpack_from(stream, at)
        at += RECORD.size
        if kind == END:
            return units
        first = offset // UNIT_BYTES
        if kind == DATA:
            units.update(enumerate(numbers_of(stream[at : at + length], first), first))
            at += length
        else:
            units.update(dict.fromkeys(range(first, first + length // UNIT_BYTES), 0))


def _apply(process: Process, actor: Actor, handle: str) -> None:
    from onionskin.delta import apply

    volume = process.handles[handle]
    apply(io.BytesIO(actor.streams[handle]), volume)


def _import(process: Process, actor: Actor, path: str, name: str) -> None:
    from onionskin.images import import_image

    import_image(process.stores[actor.store], process.path(path), name, format="raw")


def _import_stream(process: Process, actor: Actor, path: str, name: str) -> None:
    """Import from a pipe, which holds all of the image."""
    from onionskin.images import import_image

    data = process.path(path).read_bytes()
    reads, writes = os.pipe()
    with open(reads, "rb", buffering=0) as stream:
        with open(writes, "wb", buffering=0) as whole:
            assert whole.write(data) == len(data)
        import_image(process.stores[actor.store], stream, name, format="raw")


def _compare(process: Process, actor: Actor, a: tuple[str, str], b: tuple[str, str]) -> int | None:
    """Return the unit in which two snapshots first differ."""
    from onionskin.cli.compare import OpenVolume
    from onionskin.exchange.comparison import first_difference

    store = process.stores[actor.store]
    with store.open(a[0], snapshot=a[1]) as one, store.open(b[0], snapshot=b[1]) as other:
        found = first_difference(OpenVolume(one), OpenVolume(other))
    return None if found is None else found // UNIT_BYTES


def _delta_across(process: Process, actor: Actor, a: tuple[str, str], b: tuple[str, str]) -> tuple[str, dict[int, int]]:
    from onionskin.delta import delta

    stream = io.BytesIO()
    said = delta(process.stores[actor.store], None, "@".join(a), "@".join(b), stream)
    return said.name, _units_of(stream.getvalue(), said)


def _prune(process: Process, actor: Actor, name: str) -> tuple[str, ...]:
    kept = process.stores[actor.store].prune(name, keep_last=1)
    return tuple(one.snapshot for one in kept if not one.kept_by)


def _set_wipe(process: Process, actor: Actor, name: str) -> None:
    store = process.stores[actor.store]
    other = "release" if store.info(name).wipe == "zero" else "zero"
    store.set_wipe(name, other)


def _fork_group(
    process: Process, actor: Actor, sources: tuple[tuple[str, str | None], ...]
) -> tuple[tuple[str, ...], ...]:
    forks = process.stores[actor.store].fork_group(dict(sources), pattern="{source}g{n}")
    return tuple(tuple(names) for names in forks.values())


def _diff(process: Process, actor: Actor, name: str, a: str, b: str | None) -> set[int]:
    return _units_in(process.stores[actor.store].diff(name, a, b))


def _parent(process: Process, actor: Actor, handle: str) -> str | None:
    found = process.handles[handle].parent
    return found.name if found else None


def _extents(process: Process, actor: Actor, handle: str) -> None:
    for offset, length, _ in process.handles[handle].extents().tolist():
        assert offset >= 0 < length <= 64 * UNIT_BYTES, (offset, length)


def _units_in(found: Any) -> set[int]:
    units: set[int] = set()
    for offset, length, _ in found.tolist():
        units.update(range(offset // UNIT_BYTES, -(-(offset + length) // UNIT_BYTES)))
    return units


def _layering(process: Process, actor: Actor, name: str, snap: str | None) -> int:
    extents = process.stores[actor.store].layering(name, snap).extents
    return int(extents["length"].sum()) // UNIT_BYTES


def _problems(found: list[Any]) -> list[str]:
    return [f"{problem.what} ({Path(problem.where).name})" for problem in found if problem.severity == "error"]


def _tree(process: Process, actor: Actor) -> set[str]:
    names: set[str] = set()
    todo = list(process.stores[actor.store].tree())
    while todo:
        node = todo.pop()
        todo += node.children
        if node.kind in ("head", "snapshot"):
            names.add(node.name)
    return names


def _store(process: Process, actor: Actor) -> None:
    import onionskin

    onionskin.Store(process.root / "store").close()


def _handle(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda process, actor, handle, *arguments: (call(process.handles[handle], *arguments), None)[1]


def _on_store(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda process, actor, *arguments: call(process.stores[actor.store], *arguments)


DO: dict[str, Callable[..., Any]] = {
    "read": _read,
    "write": _write,
    "trim": _handle(lambda volume, first, count: volume.trim(first * UNIT_BYTES, count * UNIT_BYTES)),
    "flush": _handle(lambda volume: volume.flush()),
    "resize": _handle(lambda volume, units: volume.resize(units * UNIT_BYTES, force=True)),
    "snapshot": _handle(lambda volume, name: volume.snapshot(name)),
    "revert": _handle(lambda volume, name: volume.revert(name)),
    "discard": _handle(lambda volume, name, recursive: volume.discard(name, recursive=recursive)),
    "merge": _handle(lambda volume, name: volume.merge(name)),
    "merge_base": _handle(lambda volume, name: volume.merge_into_base(name)),
    "flatten": _handle(lambda volume: volume.flatten()),
    "export": lambda process, actor, handle, path: process.handles[handle].export(process.path(path)),
    "apply": _apply,
    "close": _close,
    "open": _open,
    "view": _view,
    "held": _held,
    "create": _create,
    "import": _import,
    "delta": _delta,
    "clone": _on_store(lambda store, name, snap, new: store.clone(name, snap, new)),
    "fork": _on_store(lambda store, name, snap, new: store.fork(name, snap, names=new)),
    "fork_numbered": _on_store(lambda store, name, snap, count: store.fork(name, snap, count=count)),
    "fork_with_key": _on_store(
        lambda store, name, snap, key, asked: store.fork(
            name, snap, idempotency_key=key, **({"count": asked} if isinstance(asked, int) else {"names": asked})
        )
    ),
    "temporary": _temporary,
    "end_temporary": _end_temporary,
    "snapshot_group": _on_store(lambda store, names, snap: (store.snapshot_group(dict.fromkeys(names, snap)), None)[1]),
    "hold": _on_store(lambda store, name, snap, holder: store.hold(name, snap, holder)),
    "unhold": _on_store(lambda store, name, snap, holder: store.unhold(name, snap, holder)),
    "holds": _on_store(lambda store, name: {(one.snapshot, one.holder) for one in store.holds(name)}),
    "rename_snapshot": _on_store(lambda store, name, old, new: store.rename_snapshot(name, old, new)),
    "set_note": _on_store(lambda store, name, snap, note: store.set_note(name, snap, note)),
    "set_defaults": _on_store(lambda store: (store.set_defaults(wipe="zero"), None)[1]),
    "prune": _prune,
    "prune_open": lambda process, actor, handle: _prune(process, actor, process.handles[handle].name),
    "set_wipe": _set_wipe,
    "fork_group": _fork_group,
    "import_stream": _import_stream,
    "compare": _compare,
    "delta_across": _delta_across,
    "expire": _on_store(lambda store: store.expire()),
    "delete_several": _on_store(lambda store, names: (store.delete(*names, recursive=True), None)[1]),
    "delete": _on_store(lambda store, name: store.delete(name, recursive=True)),
    "rename": _on_store(lambda store, name, new: store.rename(name, new)),
    "relocate": lambda process, actor, name, path: process.stores[actor.store].relocate(name, base=process.path(path)),
    "diff": _diff,
    "parent": _parent,
    "changed": lambda process, actor, handle: process.handles[handle].head_changed,
    "extents": _extents,
    "own_diff": lambda process, actor, handle, a: _units_in(process.handles[handle].diff(a)),
    "own_usage": lambda process, actor, handle: {u.snapshot for u in process.handles[handle].usage()} - {None},
    "own_layering": lambda process, actor, handle: (
        int(process.handles[handle].layering().extents["length"].sum()) // UNIT_BYTES
    ),
    "usage_of_forks": _on_store(lambda store, name: {usage.fork for usage in store.usage_of_forks(name)} - {None}),
    "usage": _on_store(lambda store, name: {usage.snapshot for usage in store.usage(name)} - {None}),
    "layering": _layering,
    "check": _on_store(lambda store: _problems(store.check())),
    "repair": _on_store(lambda store: _problems(store.check(repair=True))),
    "tree": _tree,
    "volumes": _on_store(lambda store: {info.name: info.snapshots for info in store.volumes()}),
    "store": _store,
}
