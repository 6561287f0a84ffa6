"""Verbs that only an aftermath tries, beside those of verbs.py: what they do, and what the model says of them.

A verb here may look at a whole store or change what no disk shows, so beside another verb it would say little.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from typing import Any

from pairs import model, worker
from pairs.model import Operation, State
from pairs.units import numbers_of
from pairs.verbs import VERBS, Place, Verb
from support.nbd_client import NbdClient

from onionskin.errors import StateError

# ---- what they do ----


def _open_to_read(process: Any, actor: Any, handle: str, name: str) -> None:
    process.handles[handle] = process.stores[actor.store].open(name, mode="r")


def _export_qcow2(process: Any, actor: Any, handle: str, path: str) -> None:
    from onionskin.images import export_image

    target = process.path(path)
    converted = target.with_suffix(".qcow2")
    converted.unlink(missing_ok=True)
    export_image(process.handles[handle], converted, format="qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", converted, target], check=True)


def _hold_briefly(process: Any, actor: Any, name: str, snap: str) -> None:
    store = process.stores[actor.store]
    store.hold(name, snap, "somebody")
    found = [hold.holder for hold in store.holds(name, snap)]
    store.unhold(name, snap, "somebody")
    assert found == ["somebody"], found


def _look_around(process: Any, actor: Any) -> None:
    """Ask all that can be asked without opening a disk."""
    store = process.stores[actor.store]
    store.store_info()
    for info in store.volumes():
        name = info.name
        store.info(name)
        for ask in (store.chain, store.lineage, store.usage, store.usage_of_forks, store.layering, store.forks_of):
            ask(name)
        for snapshot in store.snapshots(name):
            store.chain(name, snapshot.name)
            store.bytes_freed_by_merge(name, snapshot.name)
            store.diff(name, snapshot.name)
            store.set_note(name, snapshot.name, "a note")
            store.rename_snapshot(name, snapshot.name, "other")
            store.rename_snapshot(name, "other", snapshot.name)


def _serve(process: Any, actor: Any, name: str, snap: str) -> tuple[tuple[int, ...], ...]:
    """Serve the whole store, and read a disk and a snapshot of it as a client."""
    from onionskin.nbd.server import Limits, Server

    process.stores[actor.store].open(name, snapshot=snap).close()  # a client is not told why there is no such export
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    try:
        server.exports.add_store(process.root / "store")
        if name not in server.exports.table.served:
            server.exports.add_volume(process.root / "store", name)  # it says why
        return _read_over_nbd(server, name), _read_over_nbd(server, f"{name}@{snap}")
    finally:
        server.close()


def _read_over_nbd(server: Any, export: str) -> tuple[int, ...]:
    mine, its = socket.socketpair()
    server.serve(its, "a client")
    with NbdClient(mine, export) as client:
        return numbers_of(client.read(0, client.size_bytes))


def _relocate_copy(process: Any, actor: Any, name: str, path: str) -> None:
    """Move the base to another place; the old file stays, since others know it by its inode."""
    store = process.stores[actor.store]
    base = store.info(name).base
    if base is None:
        raise StateError("there is no base")
    shutil.copy2(base, process.path(path))
    store.relocate(name, base=process.path(path), trust=True)


worker.DO |= {
    "relocate_copy": _relocate_copy,
    "serve": _serve,
    "open_to_read": _open_to_read,
    "export_qcow2": _export_qcow2,
    "hold_briefly": _hold_briefly,
    "look_around": _look_around,
    "finish_work": lambda process, actor: process.stores[actor.store].finish_work(),
}

# ---- what the model says ----


def open_to_read(state: State, result: Any, handle: str, name: str) -> State:
    return state.with_handle(handle, state.volume(name).disk)


def hold_briefly(state: State, result: Any, name: str, snap: str) -> State:
    state.snap(state.volume(name).key, snap)
    return state


def serve(state: State, result: Any, name: str, snap: str) -> State:
    volume = state.volume(name)
    disks = volume.disk, state.snap(volume.key, snap).disk
    if result is not None and result != disks:
        raise model.WrongResultError(f"over NBD {result} instead of {disks}")
    return state.with_volume(name, volume.flushed())


def relocate_copy(state: State, result: Any, name: str, path: str) -> State:
    base = state.volume(name).base
    if base is None:
        raise model.RefusedError("needed")
    return model.relocate(state.with_image(path, state.images[base]), None, name, path)


model.RULES |= {
    "relocate_copy": relocate_copy,
    "serve": serve,
    "open_to_read": open_to_read,
    "export_qcow2": model.export,
    "hold_briefly": hold_briefly,
    "look_around": model.nothing,
    "finish_work": model.nothing,
}

# ---- the verbs ----


def _open_to_read_verb(at: Place) -> list[Operation]:
    return [("open_to_read", at.own, at.volume), ("read", at.own, 0), ("export", at.own, f"{at.actor}-read.img"),
            ("close", at.own)]  # fmt: skip


def _end_in_base(at: Place) -> list[Operation]:
    """Take away what needs the base as it is, and make one file of the whole volume."""
    h = at.handle
    return [("delete", "c"), ("merge", h, "s1"), ("merge", h, "s2"), ("write", h, 2, at.stamp + 1, 3),
            ("merge_base", h, None), ("read", h, 0)]  # fmt: skip


MORE = [
    Verb("end in base", _end_in_base, handle=True),
    Verb("open to read", _open_to_read_verb, reads=True),
    Verb("export qcow2", lambda at: [("export_qcow2", at.handle, f"{at.actor}.img")], handle=True, reads=True),
    Verb("merge all into base", lambda at: [("merge_base", at.handle, None)], handle=True),
    Verb("relocate a copy", lambda at: [("relocate_copy", at.volume, f"{at.actor}-copy.img")]),
    Verb("serve", lambda at: [("serve", at.volume, "s1")], alone=True),
    Verb("hold", lambda at: [("hold_briefly", at.volume, "s1"), ("hold_briefly", at.volume, "s2")]),
    Verb("look around", lambda at: [("look_around",)], reads=True),
    Verb("finish work", lambda at: [("finish_work",)]),
    Verb("snapshot group as they are", lambda at: [("snapshot_group", (at.volume, at.other), f"{at.actor}-group")],
         both=True),
]  # fmt: skip
# What holds a snapshot keeps the interrupted verb, which is run again, from it.
SECOND_VERBS = [*(verb for verb in VERBS if verb.name not in ("take hold", "let go")), *MORE]
# A server waits for clients in a way that no step shows, a conversion is done by another program, and the model does not
# know who holds a snapshot, nor a name that one has for a moment.
NEVER_FIRST = ("serve", "export qcow2", "hold", "look around")
FIRST_VERBS = [verb for verb in SECOND_VERBS if verb.name not in NEVER_FIRST]
SECOND_BY_NAME = {verb.name: verb for verb in SECOND_VERBS}
