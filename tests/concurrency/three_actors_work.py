"""Actors of test_three_actors.py in one process: `three_actors_work.py STORE SOCKET NAMES SEED STEPS`.

Each letter of NAMES is an actor, a thread of its own; all use one `Store`. An actor uses it by the library, by the control
sockets of a server, and as a client of that server, in a random order. Each operation is said when it begins and when it has
ended, with its result and both times, as lines of JSON.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.nbd_client import NbdClient

import onionskin
from onionskin import errors
from onionskin.delta import CRC, DATA, END, HEADER, RECORD, delta

BLOCK = 4096
BLOCKS = 8
_PIECE = struct.Struct("<QQ")  # the number that a block was written with, and where
SNAPSHOTS = ["s0", "s1", "s2"]
VOLUMES = ["web", "db", *(f"f{number}" for number in range(5))]
KEYS = ["k0", "k1"]
ALIEN = -1
# What is done how often, compared with the others.
ON_HEAD = (
    "write write write write trim read flush snapshot snapshot revert merge discard flatten merge_base "
    "close close close close close"
)
ON_STORE = (
    "open open open open view view view fork fork fork fork_head fork_head fork_head fork_head fork_key fork_key "
    "fork_key group group group group fork_group delete delete delete delete delete rename rename rename expire "
    "expire list list export delta check temporary temporary nbd nbd nbd nbd nbd_view live live live renew hold "
    "unhold forks_of"
)
_SAYING = threading.Lock()


def block_bytes(stamp: int, block: int) -> bytes:
    """Return a block that names itself; 0 is a block of zeros."""
    return _PIECE.pack(stamp, block) * (BLOCK // _PIECE.size) if stamp else bytes(BLOCK)


def stamps_of(data: bytes, first: int = 0) -> list[int]:
    """Return the number of each block, or ALIEN where it is of another place, or of more than one."""
    found = []
    for at in range(0, len(data), BLOCK):
        stamp, _ = _PIECE.unpack_from(data, at)
        right = block_bytes(stamp, first + at // BLOCK)
        found.append(stamp if data[at : at + BLOCK] == right else ALIEN)
    return found


class Work:
    """What one process does."""

    def __init__(self, store: onionskin.Store, socket: Path, name: str, seed: int) -> None:
        self.store, self.socket, self.name = store, socket, name
        self.random = random.Random(seed)
        self.stamp = (int.from_bytes(name.encode(), "little") << 40) + (seed << 16)
        self.heads: dict[str, Any] = {}
        self.views: dict[str, tuple[Any, Any]] = {}
        self.lives: dict[str, Any] = {}
        self.clients: dict[str, NbdClient] = {}
        self.temporaries: dict[str, Any] = {}
        self.count = 0

    # ---- saying ----

    def do(self, op: str, *arguments: Any) -> Any:
        """Do one operation and say so; returns whether it was done."""
        self.say(b=time.monotonic_ns(), op=[op, *arguments])
        try:
            result = getattr(self, f"do_{op}")(*arguments)
        except BaseException as error:
            self.say(e=time.monotonic_ns(), x=kind_of(error), why=f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise
            return False
        self.say(e=time.monotonic_ns(), r=result)
        return True

    def say(self, **what: object) -> None:
        with _SAYING:
            sys.stdout.write(json.dumps({"w": self.name, **what}) + "\n")
            sys.stdout.flush()

    # ---- choosing ----

    def new_handle(self) -> str:
        self.count += 1
        return f"{self.name}{self.count}"

    def new_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def volume(self) -> str:
        there = list(self.store)
        return self.random.choice(there if there and self.random.random() < 0.85 else VOLUMES)

    def new_volume(self) -> str:
        there = set(self.store)
        free = [name for name in VOLUMES if name not in there]
        return self.random.choice(free if free and self.random.random() < 0.85 else VOLUMES)

    def snap(self, name: str) -> str:
        try:
            there = [one.name for one in self.store.snapshots(name)]
        except errors.VolumeNotFoundError:
            there = []
        return self.random.choice(there if there and self.random.random() < 0.85 else SNAPSHOTS)

    def block(self) -> int:
        return self.random.randrange(BLOCKS)

    def step(self) -> None:
        draw = self.random.random()
        if self.heads and draw < 0.35:
            self.on_head(self.random.choice(sorted(self.heads)))
        elif self.clients and draw < 0.55:
            self.on_client(self.random.choice(sorted(self.clients)))
        elif self.lives and draw < 0.65:
            self.on_live(self.random.choice(sorted(self.lives)))
        elif self.views and draw < 0.75:
            handle = self.random.choice(sorted(self.views))
            self.do(self.random.choice(["look", "look", "look", "unview"]), handle)
        else:
            self.on_store()

    def on_head(self, handle: str) -> None:
        verb = self.random.choice(ON_HEAD.split())
        if verb == "close" and handle in self.temporaries:
            verb = "end_temporary"
        if verb == "write":
            self.do(verb, handle, self.block(), self.new_stamp())
        elif verb == "trim":
            self.do(verb, handle, self.block())
        elif verb == "snapshot":
            self.do(verb, handle, self.random.choice(SNAPSHOTS))
        elif verb in ("revert", "merge", "discard"):
            self.do(verb, handle, self.snap(self.heads[handle].name))
        else:
            self.do(verb, handle)

    def on_client(self, handle: str) -> None:
        verb = self.random.choice([*["nwrite"] * 6, *["nread"] * 4, "nflush", "nclose"])
        if verb == "nwrite":
            self.do(verb, handle, self.block(), self.new_stamp())
        elif verb == "nread":
            self.do(verb, handle, self.block())
        else:
            self.do(verb, handle)

    def on_live(self, handle: str) -> None:
        verb = self.random.choice(
            ["lsnapshot", "lsnapshot", "lrevert", "lmerge", "ldiscard", "ltrim", "lrename"] * 2 + ["lclose"]
        )
        if verb == "ltrim":
            self.do(verb, handle, self.block())
        elif verb == "lrename":
            self.do(verb, handle, self.new_volume())
        elif verb == "lclose":
            self.do(verb, handle)
        else:
            self.do(verb, handle, self.random.choice(SNAPSHOTS))

    def on_store(self) -> None:
        name = self.volume()
        verb = self.random.choice(ON_STORE.split())
        many = len(set(self.store)) >= len(VOLUMES)
        if verb in ("fork", "fork_head", "fork_key", "fork_group", "temporary") and many:
            verb = "delete"
        if verb in ("open", "nbd", "live"):
            full = {"open": self.heads, "nbd": self.clients, "live": self.lives}[verb]
            if len(full) < 2:
                self.do(verb, self.new_handle(), name)
        elif verb == "view":
            if len(self.views) < 3:
                self.do(verb, self.new_handle(), name, self.snap(name))
        elif verb == "fork":
            self.do(verb, name, self.snap(name), self.new_names(), self.random.random() < 0.3)
        elif verb == "fork_head":
            self.do(verb, name, self.new_names(), self.random.random() < 0.3)
        elif verb == "fork_key":
            snap = self.snap(name) if self.random.random() < 0.5 else None
            self.do(verb, name, snap, self.random.choice(KEYS), self.new_names())
        elif verb in ("group", "fork_group"):
            names = sorted({name, self.volume()})
            snap = self.random.choice(SNAPSHOTS)
            if verb == "group":
                self.do(verb, names, snap)
            else:
                self.do(verb, [[one, self.snap(one) if self.random.random() < 0.5 else None] for one in names])
        elif verb == "delete":
            names = sorted({name, self.volume()} if self.random.random() < 0.3 else {name})
            self.do(verb, names, self.random.random() < 0.6)
        elif verb == "rename":
            self.do(verb, name, self.new_volume())
        elif verb in ("expire", "list", "check"):
            self.do(verb)
        elif verb in ("export", "nbd_view"):
            self.do(verb, name, self.snap(name))
        elif verb == "delta":
            self.do(verb, name, self.snap(name), self.snap(name))
        elif verb == "temporary":
            if len(self.heads) < 2:
                snap = self.snap(name) if self.random.random() < 0.5 else None
                self.do(verb, self.new_handle(), name, snap, self.new_volume())
        elif verb in ("hold", "unhold"):
            self.do(verb, name, self.snap(name), self.name)
        else:
            self.do(verb, name)

    def new_names(self) -> list[str]:
        return sorted({self.new_volume() for _ in range(self.random.choice((1, 1, 2)))})

    # ---- a volume that is open here ----

    def do_open(self, handle: str, name: str) -> None:
        self.heads[handle] = self.store.open(name)

    def do_write(self, handle: str, block: int, stamp: int) -> None:
        self.heads[handle].write(block * BLOCK, block_bytes(stamp, block))

    def do_trim(self, handle: str, block: int) -> None:
        self.heads[handle].trim(block * BLOCK, BLOCK)

    def do_read(self, handle: str) -> list[int]:
        return stamps_of(self.heads[handle].read(0, BLOCKS * BLOCK))

    def do_flush(self, handle: str) -> None:
        self.heads[handle].flush()

    def do_snapshot(self, handle: str, snap: str) -> None:
        self.heads[handle].snapshot(snap)

    def do_revert(self, handle: str, snap: str) -> None:
        self.heads[handle].revert(snap)

    def do_merge(self, handle: str, snap: str) -> None:
        self.heads[handle].merge(snap)

    def do_discard(self, handle: str, snap: str) -> None:
        self.heads[handle].discard(snap)

    def do_flatten(self, handle: str) -> None:
        self.heads[handle].flatten()

    def do_merge_base(self, handle: str) -> None:
        self.heads[handle].merge_into_base()

    def do_close(self, handle: str) -> None:
        self.heads.pop(handle).close()

    def do_temporary(self, handle: str, name: str, snap: str | None, new: str) -> None:
        block = self.store.temporary(name, snap, name=new)
        self.heads[handle] = block.__enter__()
        self.temporaries[handle] = block

    def do_end_temporary(self, handle: str) -> None:
        del self.heads[handle]
        self.temporaries.pop(handle).__exit__(None, None, None)

    # ---- a view that lives for long ----

    def do_view(self, handle: str, name: str, snap: str) -> list[int]:
        view = self.store.open(name, snapshot=snap)
        self.views[handle] = view, view.view(0, BLOCKS * BLOCK)
        return self.do_look(handle)

    def do_look(self, handle: str) -> list[int]:
        view, array = self.views[handle]
        by_array, by_read = stamps_of(array.tobytes()), stamps_of(view.read(0, BLOCKS * BLOCK))
        if by_array != by_read:
            raise AssertionError(f"the array has {by_array}, and a read gives {by_read}")
        return by_read

    def do_unview(self, handle: str) -> None:
        self.views.pop(handle)[0].close()

    # ---- the store ----

    def do_fork(self, name: str, snap: str, names: list[str], is_short: bool) -> list[str]:
        return self.store.fork(name, snap, names=names, lifetime=0.001 if is_short else None)

    def do_fork_head(self, name: str, names: list[str], is_short: bool) -> list[str]:
        return self.store.fork(name, names=names, lifetime=0.001 if is_short else None)

    def do_fork_key(self, name: str, snap: str | None, key: str, names: list[str]) -> list[str]:
        return self.store.fork(name, snap, names=names, idempotency_key=key)

    def do_fork_group(self, sources: list[list[Any]]) -> list[list[str]]:
        return list(self.store.fork_group(dict(sources), pattern="{source}-{n}").values())

    def do_group(self, names: list[str], snap: str) -> None:
        self.store.snapshot_group(dict.fromkeys(names, snap))

    def do_delete(self, names: list[str], recursive: bool) -> None:
        self.store.delete(*names, recursive=recursive)

    def do_rename(self, name: str, new: str) -> None:
        self.store.rename(name, new)

    def do_expire(self) -> list[str]:
        return self.store.expire()

    def do_renew(self, name: str) -> None:
        self.store.set_lifetime(name, None)

    def do_hold(self, name: str, snap: str, holder: str) -> None:
        self.store.hold(name, snap, holder)

    def do_unhold(self, name: str, snap: str, holder: str) -> None:
        self.store.unhold(name, snap, holder)

    def do_forks_of(self, name: str) -> list[str]:
        return self.store.forks_of(name)

    def do_list(self) -> list[str]:
        return sorted(self.store)

    def do_check(self) -> list[str]:
        return [f"{one.what} ({one.where})" for one in self.store.check() if one.severity == "error"]

    def do_export(self, name: str, snap: str) -> list[int]:
        path = self.socket.parent / f"{self.name}.img"
        with self.store.open(name, snapshot=snap) as view:
            view.export(path)
        data = path.read_bytes()
        path.unlink()
        return stamps_of(data)

    def do_delta(self, name: str, a: str, b: str) -> list[list[int]]:
        out = io.BytesIO()
        said = delta(self.store, name, a, b, out)
        stream = out.getvalue()
        at = HEADER.size + len(said.name.encode()) + len(said.note.encode()) + CRC.size
        found: dict[int, int] = {}
        while True:
            kind, _, offset, length = RECORD.unpack_from(stream, at)
            at += RECORD.size
            if kind == END:
                return [list(one) for one in sorted(found.items())]
            first = offset // BLOCK
            if kind == DATA:
                found.update(enumerate(stamps_of(stream[at : at + length], first), first))
                at += length
            else:
                found.update(dict.fromkeys(range(first, first + length // BLOCK), 0))

    # ---- a served volume ----

    def do_nbd(self, handle: str, name: str) -> None:
        self.clients[handle] = NbdClient.unix(self.a_socket(), name)

    def a_socket(self) -> Path:
        """Choose one of the servers."""
        return self.random.choice([path for path in (self.socket, self.socket.with_name("nbd-web")) if path.exists()])

    def do_nwrite(self, handle: str, block: int, stamp: int) -> None:
        self.of_client(handle, lambda client: client.write(block * BLOCK, block_bytes(stamp, block)))

    def do_nread(self, handle: str, block: int) -> int:
        data = self.of_client(handle, lambda client: client.read(block * BLOCK, BLOCK))
        return stamps_of(data, block)[0]

    def do_nflush(self, handle: str) -> None:
        self.of_client(handle, lambda client: client.flush())

    def of_client(self, handle: str, call: Any) -> Any:
        try:
            return call(self.clients[handle])
        except ConnectionError:  # the server was killed
            self.clients.pop(handle).close()
            raise

    def do_nclose(self, handle: str) -> None:
        self.clients.pop(handle).close()

    def do_nbd_view(self, name: str, snap: str) -> list[int]:
        with NbdClient.unix(self.a_socket(), f"{name}@{snap}") as client:
            return [stamps_of(client.read(block * BLOCK, BLOCK), block)[0] for block in range(BLOCKS)]

    def do_live(self, handle: str, name: str) -> None:
        self.lives[handle] = onionskin.connect(self.store, name)

    def of_live(self, handle: str, verb: str, *arguments: Any) -> None:
        getattr(self.lives[handle], verb)(*arguments)

    def do_lsnapshot(self, handle: str, snap: str) -> None:
        self.of_live(handle, "snapshot", snap)

    def do_lrevert(self, handle: str, snap: str) -> None:
        self.of_live(handle, "revert", snap)

    def do_lmerge(self, handle: str, snap: str) -> None:
        self.of_live(handle, "merge", snap)

    def do_ldiscard(self, handle: str, snap: str) -> None:
        self.of_live(handle, "discard", snap)

    def do_lrename(self, handle: str, new: str) -> None:
        self.of_live(handle, "rename", new)

    def do_ltrim(self, handle: str, block: int) -> None:
        self.of_live(handle, "trim", block * BLOCK, BLOCK)

    def do_lclose(self, handle: str) -> None:
        self.lives.pop(handle).close()

    def end(self) -> None:
        """Close all."""
        for handle in sorted(self.heads):
            self.do("end_temporary" if handle in self.temporaries else "close", handle)
        for verb, handles in (("unview", self.views), ("lclose", self.lives), ("nclose", self.clients)):
            for handle in sorted(handles):
                self.do(verb, handle)


def kind_of(error: BaseException) -> str:
    """Return what an exception means to the model; `unexpected` where no caller could foresee it."""
    if isinstance(error, errors.VolumeNotFoundError | errors.SnapshotNotFoundError):
        return "not found"
    if isinstance(error, errors.VolumeExistsError | errors.SnapshotExistsError):
        return "exists"
    if isinstance(error, errors.StateError | errors.ChainError | ConnectionRefusedError):
        return "busy"
    if isinstance(error, ConnectionError | FileNotFoundError):
        return "gone"
    if isinstance(error, ValueError):
        return "value"
    return "unexpected"


def work(store: onionskin.Store, socket: Path, name: str, seed: int, steps: int) -> None:
    """Work for so many steps, and close all."""
    actor = Work(store, socket, name, seed)
    for _ in range(steps):
        actor.step()
    actor.end()


def main() -> None:
    """Let all actors of this process work."""
    root, socket, names, seed, steps = sys.argv[1:]
    with onionskin.Store(root) as store, ThreadPoolExecutor(len(names)) as threads:
        made = [
            threads.submit(work, store, Path(socket), name, int(seed) + number, int(steps))
            for number, name in enumerate(names)
        ]
        for one in made:
            one.result()


if __name__ == "__main__":
    main()
