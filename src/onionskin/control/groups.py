"""Volumes that are sealed as members of a group by the process that serves them: both ends of that conversation.

On one connection for each server, to the control socket of any of its volumes, the caller (the coordinator of the group)
asks for the verb `group` with the volumes that it looks for. Then both ends speak in steps:

    server: here      which of them this process serves
    caller: enter     server: entered   these volumes are held for this operation
    caller: begin     server: begun     most of the heads is durable
    caller: hold      server: held      the writers of all volumes wait
    caller: cut       server: done      the heads are swapped, and their writers go on
    caller: sync      server: synced    the rest is durable; this describes the sealed heads
    caller: end       server: result    the volumes go on with the heads that the catalog has

`enter` may come more than once, since volumes are held in the order of their ids, whoever has them. Before `begin` the caller
may say `wait`, which is not answered: it needs longer than a step may take, as QEMU does to be stopped whose disks are slow.
Instead of `sync` or `end` it may say `give up`: then the volumes go on with their old heads.

What must hold: writers wait from `hold` to `cut` only, and for HOLD_SECONDS at most; where one server has all volumes, it
hears both at once, so its writers wait for nobody, and it may answer as late as any sign of life. The words of both are fixed
texts, which C sends and reads, so that no interpreter is waited for. Whatever the other end does (it says nothing, something
else, too much, too slowly, or is gone), either end is done with it in a bounded time. What the server does then is in
`MemberSealing`.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import ETIME
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from onionskin.base.held import held_together
from onionskin.base.lazy import logger
from onionskin.base.limits import WIPE_POLICIES
from onionskin.base.naming import some_of
from onionskin.base.records import replaced
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.sockets import credentials_of
from onionskin.catalog import Catalog, VolumeRow, new_id, new_ids
from onionskin.catalog.tree import Snapshot
from onionskin.control import frames, lost_answers
from onionskin.control.client import LiveVolume, find, reach
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.kernels._volume import cut_when_told
from onionskin.operations.forks import Wanted
from onionskin.operations.group_member import MemberSealing, begin_members
from onionskin.operations.seal import NextHead, RemoteHead, SealedHead, begin_each, sync_each
from onionskin.operations.snapshots import OPERATION_SECONDS
from onionskin.storage.open_head import OpenHead

if TYPE_CHECKING:
    from onionskin.storage.open_store import OpenStore
    from onionskin.store import Store

_log = logger(__name__)

_Found = TypeVar("_Found")

# Writers that wait for longer go on, and their volume is not cut.
HOLD_SECONDS = 0.25
# How long the server waits for the next step. Its flushes wait meanwhile, for the slowest disk of the group.
STEP_SECONDS = 30.0
# How long the caller waits for a sign of life of the server, which gives one every ALIVE_SECONDS while it works.
SILENCE_SECONDS = 10.0
# How long the caller has for a group, whatever signs of life come. A server that waits for slow disks needs some of it.
GROUP_SECONDS = 120.0
SEGMENTS_MAX = 1 << 16


def _words() -> tuple[bytes, bytes, bytes, bytes, float]:
    hold, held, cut, done = (frames.packed({"step": step}) for step in ("hold", "held", "cut", "done"))
    return hold, held, cut, done, HOLD_SECONDS


# ---- the description ----


def pack_sealed(what: SealedHead) -> dict[str, Any]:
    """Describe what was sealed in a form that JSON can hold."""
    return {
        "volume": what.volume.hex(),
        "head": what.head.hex(),
        "spare": what.spare.hex(),
        "block_size": what.block_size,
        "wipe": what.wipe,
        "size_bytes": what.size_bytes,
        "map_length": what.map_length,
        "map_frames": what.map_frames,
        "map_crc": what.map_crc,
        "segments": [[id.hex(), slots] for id, slots in what.segments],
        "to_reclaim": [id.hex() for id in what.to_reclaim],
        "next_head": what.next.head.hex(),
        "next_spare": what.next.spare.hex(),
    }


def unpack_sealed(value: Any, map_byte: int, spare_byte: int) -> SealedHead:
    """Read a description that another process gave.

    Raises
    ------
    FormatError
        It is none, or a number in it is out of its range.
    """
    try:
        wipe = value["wipe"]
        if wipe not in WIPE_POLICIES:
            raise ValueError("wipe")
        return SealedHead(
            _id(value["volume"]),
            _id(value["head"]),
            _id(value["spare"]),
            _number(value["block_size"], 1 << 32),
            wipe,
            _number(value["size_bytes"]),
            _number(value["map_length"]),
            _number(value["map_frames"]),
            _number(value["map_crc"], 1 << 32),
            _segments(value["segments"]),
            tuple(_id(id) for id in _list(value["to_reclaim"])),
            NextHead(_id(value["next_head"]), _id(value["next_spare"]), map_byte, spare_byte),
        )
    except (KeyError, TypeError, ValueError):
        raise FormatError(
            "what a server said of the head that it sealed cannot be read; use the same onionskin at both ends"
        ) from None


def _id(text: Any) -> bytes:
    if type(text) is not str or len(text) != 32:
        raise ValueError("an id has 16 bytes")
    return bytes.fromhex(text)


def _number(value: Any, end: int = 1 << 62) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError("a number is out of its range")
    return value


def _segments(value: Any) -> tuple[tuple[bytes, int], ...]:
    found = tuple((_id(id), _number(slots, 1 << 48)) for id, slots in _list(value))
    if len(dict(found)) < len(found):  # one with slots and without would be dropped with its data
        raise ValueError("a segment is there twice")
    return found


def _list(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > SEGMENTS_MAX:
        raise ValueError("a list is too long")
    return value


# ---- the server's end ----


class GivenUpError(StateError):
    """The caller said that it changed nothing, and will change nothing by what was described to it."""


class Talk:
    """The server's end of the conversation, on a connection whose verb `group` runs.

    Parameters
    ----------
    connection : socket
    send : callable
        Sends one frame.
    be_silent : callable
        Turns the signs of life on that connection off (True) and on again.
    """

    def __init__(
        self, connection: socket.socket, send: Callable[[dict[str, Any]], None], be_silent: Callable[[bool], None]
    ) -> None:
        self._connection = connection
        self._send = send
        self._be_silent = be_silent

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Wait for the caller for STEP_SECONDS at most, whether it says nothing or takes nothing."""
        before = self._connection.gettimeout()
        self._connection.settimeout(STEP_SECONDS)
        try:
            yield
        finally:
            self._connection.settimeout(before)

    def say(self, step: str, **values: Any) -> None:
        """Send a step."""
        try:
            self._send({"step": step, **values})
        except TimeoutError:
            raise StateError(f"the group's caller has taken nothing for {STEP_SECONDS:.0f} s; it was stopped") from None

    def hear(self, *steps: str) -> dict[str, Any]:
        """Wait for one of these steps.

        Raises
        ------
        StateError
            The caller is gone, silent for too long, or has given up.
        """
        try:
            deadline = time.monotonic() + STEP_SECONDS
            found = frames.receive(self._connection, bytes_max=frames.REQUEST_BYTES_MAX, deadline=deadline)
        except TimeoutError:
            raise StateError(f"the group's caller has said nothing for {STEP_SECONDS:.0f} s; it was stopped") from None
        if found is None or "cancel" in found:
            raise StateError("the group's caller has gone away")
        if found.get("step") == "give up":
            raise GivenUpError("the group's caller gave it up")
        if found.get("step") not in steps:
            raise FormatError(f"the step {steps[0]!r} of a group was to come, and something else came")
        return found

    def cut(self, heads: Sequence[OpenHead]) -> None:
        """Say that the seals are begun, and cut the heads when the caller says so."""
        self._be_silent(True)  # before the caller reads words that are no frames of its own
        try:
            self.say("begun")
            paths, names = [head.path for head in heads], [head.row.name for head in heads]
            failed = cut_when_told(paths, names, self._connection.fileno(), _words(), STEP_SECONDS)
        finally:
            self._be_silent(False)
        if failed == ETIME:
            raise StateError("the group was not cut in time, and the writers of its volumes here went on")
        if failed:
            raise StateError("the group's caller has gone away, or gave it up")


class Caller:
    """The process at the other end of a connection: whether it lives."""

    def __init__(self, connection: socket.socket) -> None:
        self._process: int | None = None
        self._is_gone = False
        pid = credentials_of(connection)[0]
        try:
            self._process = os.pidfd_open(pid) if pid else None
        except ProcessLookupError:
            self._is_gone = True
        except OSError:  # it cannot be watched; then nobody says that it is dead
            _log.info("process %s, which takes a snapshot of a group, cannot be watched", pid)

    def is_dead(self) -> bool:
        """Whether it is known to be dead: then no transaction of it is under way, and none will come."""
        if self._process is not None and not self._is_gone:
            ended = select.poll()
            ended.register(self._process, select.POLLIN)
            self._is_gone = bool(ended.poll(0))
        return self._is_gone

    def close(self) -> None:
        """Watch it no more."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


def seal_for_caller(talk: Talk, caller: Caller, here: Mapping[str, OpenHead]) -> dict[str, Any]:
    """Seal volumes that this process serves, by their ids in hexadecimal: those of them that the caller says."""
    with talk.bounded(), ExitStack() as held:
        talk.say("here", volumes=list(here))
        heads = _enter(talk, here, held)
        sealings = begin_members(heads, caller.is_dead)
        is_named = True
        try:
            is_named = _seal(talk, sealings)
        finally:
            with ExitStack() as settling:  # an error of one keeps the others from nothing
                for sealing in sealings:
                    settling.callback(sealing.settle, is_named=is_named)
    return {"committed": all(sealing.goes_on for sealing in sealings)}


def _enter(talk: Talk, here: Mapping[str, OpenHead], held: ExitStack) -> list[OpenHead]:
    """Hold volumes as the caller says, until it says that their seals begin."""
    heads: dict[str, OpenHead] = {}
    deadline = time.monotonic() + OPERATION_SECONDS
    begun = time.monotonic()
    while (step := talk.hear("enter", "begin", "wait"))["step"] != "begin":
        if time.monotonic() - begun > GROUP_SECONDS:
            raise StateError(f"the group's caller has not begun within {GROUP_SECONDS:.0f} s; it was stopped")
        if step["step"] == "wait":
            continue
        ids = step.get("volumes")
        if not isinstance(ids, list) or not all(isinstance(id, str) and id in here for id in ids):
            raise FormatError("the group's caller wants to hold volumes that it was not told of")
        if not ids:  # it could go on so for ever, and what it holds would be held for ever
            raise FormatError("the group's caller wants to hold no volume")
        if len({*ids, *heads}) < len(ids) + len(heads):
            raise FormatError("the group's caller wants to hold a volume twice")
        for id in ids:
            within = max(0.0, deadline - time.monotonic())
            held.enter_context(here[id].operation(during_merge=True, within=within))
            here[id].refuse_half_merged()
            here[id].path.start_writing()  # the disk writes while both ends talk
            heads[id] = here[id]
        talk.say("entered")
    if not heads:
        raise FormatError("the group's caller wants to seal no volume")
    return list(heads.values())


def _seal(talk: Talk, sealings: Sequence[MemberSealing]) -> bool:
    """Go through the steps from the first flush on. Return whether what was sealed has names."""
    heads = [sealing.volume for sealing in sealings]
    with ExitStack() as stack:
        for sealing in sealings:
            stack.enter_context(sealing.volume.resolving(sealing.resolve))
        begin_each(sealings)
        talk.cut(heads)
        lock_bytes = _lock_bytes(heads, talk.hear("sync"))
        for described in _described(_sync(sealings, lock_bytes)):
            talk.say("synced", sealed=described)
        try:
            return talk.hear("end").get("named") is not False
        except GivenUpError:
            for sealing in sealings:
                sealing.stay()
            raise


def _sync(sealings: Sequence[MemberSealing], lock_bytes: Mapping[bytes, tuple[int, int]]) -> list[SealedHead]:
    """Make the rest durable, lock the files of the next heads, and describe what was sealed."""
    try:
        sync_each(sealings)
        return [sealing.give(*lock_bytes[sealing.volume.row.id]) for sealing in sealings]
    except BaseException:
        for sealing in sealings:
            sealing.stay()  # the caller knows of none
        raise


def _described(heads: Sequence[SealedHead]) -> Iterator[list[dict[str, Any]]]:
    """Yield the descriptions in lists that a frame can hold."""
    found: list[dict[str, Any]] = []
    room = SEGMENTS_MAX
    for what in heads:
        takes = 16 + len(what.segments) + len(what.to_reclaim)
        if found and takes > room:
            yield found
            found, room = [], SEGMENTS_MAX
        found.append(pack_sealed(what))
        room -= takes
    yield found


def _lock_bytes(heads: Sequence[OpenHead], asked: dict[str, Any]) -> dict[bytes, tuple[int, int]]:
    """Read the lock bytes that the caller drew for the next head of each volume: of its map, and of its spare."""
    given = asked.get("lock_bytes")
    try:
        if not isinstance(given, dict) or set(given) != {head.row.id.hex() for head in heads}:
            raise ValueError("other volumes")
        pairs = [tuple(_number(byte, 1 << 61) for byte in _list(given[head.row.id.hex()])) for head in heads]
        bytes_ = [byte for pair in pairs for byte in pair]
        last = heads[0].store.catalog.last_lock_byte()
        if {len(pair) for pair in pairs} != {2} or len(set(bytes_)) < len(bytes_) or not min(bytes_) > 0:
            raise ValueError("not two for each")
        if max(bytes_) > last:
            raise ValueError("not drawn")
    except ValueError:
        raise FormatError("the lock bytes that the group's caller gave for the next heads are none") from None
    return {head.row.id: (pair[0], pair[1]) for head, pair in zip(heads, pairs, strict=True)}


# ---- the caller's end ----


class ServedHead:
    """A head that a server seals for this process: see `seal.RemoteHead`."""

    def __init__(self, store: "OpenStore", row: VolumeRow, process: "GroupServer") -> None:
        self.store = store
        self.row = row
        self.name: str = row.name
        self.process = process
        self.described: SealedHead | None = None

    @property
    def sealed(self) -> SealedHead:
        """What the server described."""
        assert self.described is not None
        return self.described

    def refuse_half_merged(self) -> None:
        """Do nothing: the server does it."""


class GroupServer:
    """A server that seals heads for this process, on one connection: see `seal.RemoteProcess`."""

    def __init__(self, store: "OpenStore", live: LiveVolume, candidates: Mapping[str, VolumeRow]) -> None:
        """Take a connection to a server, and ask it which of these volumes it has, by their ids in hexadecimal."""
        self._store = store
        self._live = live
        self._candidates = candidates
        self._found: dict[str, ServedHead] = {}  # what it has
        self._heads: dict[str, ServedHead] = {}  # what it holds
        self._is_entering = False  # whether it was asked to hold some, and has not said yet that it does
        self._lock_bytes: Mapping[bytes, tuple[int, int]] = {}
        self._deadline = time.monotonic() + GROUP_SECONDS
        self._hold_seconds = HOLD_SECONDS
        self._process_here = os.getpid()
        self._live._connection.settimeout(SILENCE_SECONDS)
        self._live._request(frames.request("group", {"volumes": list(candidates)}))

    def heads(self) -> dict[str, ServedHead]:
        """Wait for its answer, and return the heads that it has, by their ids."""
        self._live._greeted(min(self._deadline, time.monotonic() + SILENCE_SECONDS))
        self._live._connection.settimeout(SILENCE_SECONDS)  # a server that is silent while it works knows no groups
        try:
            here = self._hear("here").get("volumes")
        except ValueError:
            raise _older(
                self._live, "seals nothing for others; start it again, or take the snapshots one by one"
            ) from None
        if not isinstance(here, list) or not all(isinstance(id, str) and id in self._candidates for id in here):
            raise FormatError(
                f"the server of volume {self._live.name!r} says that it has volumes of which nobody asked"
            )
        self._found = {id: ServedHead(self._store, self._candidates[id], self) for id in here}
        return self._found

    @property
    def peer(self) -> int:
        """The descriptor of the socket by which it is told to cut."""
        return self._live._connection.fileno()

    def words(self, *, is_alone: bool) -> tuple[bytes, bytes, bytes, bytes, float]:
        """What is said at the cut. A process that has all volumes has all words at once, and keeps no other's writers."""
        self._hold_seconds = SILENCE_SECONDS if is_alone else HOLD_SECONDS
        return (*_words()[:-1], self._hold_seconds)

    def close(self) -> None:
        """Leave the group. A server that was not told the end asks the catalog for it."""
        if os.getpid() == self._process_here:  # a forked child may have the connection too, and keep it open
            with suppress(OSError):
                self._live._connection.shutdown(socket.SHUT_RDWR)
        self._live.close()

    def enter(self, heads: Sequence[RemoteHead], within: float | None) -> None:
        """Have it hold these volumes, for one operation. It knows itself for how long it waits for another one."""
        self.entered()
        ids = [head.row.id.hex() for head in heads]
        self._say("enter", volumes=ids)
        self._is_entering = True
        self._heads |= {id: self._found[id] for id in ids}

    def entered(self) -> None:
        """Wait until it holds all that it was asked to hold."""
        if self._is_entering:
            self._hear("entered")
            self._is_entering = False

    def ask_to_wait(self) -> None:
        """Have it wait for as long again as it waits for a step."""
        self._say("wait")

    def ask_to_begin(self) -> None:
        """Have it make durable most of what was written."""
        self._say("begin")

    def begun(self) -> None:
        """Wait for that. Then it listens to the words of the cut."""
        self.entered()
        self._hear("begun")

    def cut_failed(self, number: int) -> StateError:
        """Return the error that says why it did not cut, or raise the server's own."""
        if number == ETIME:
            return StateError(
                f"process {self._live._pid}, which serves volume {self._live.name!r}, did not cut it within "
                f"{self._hold_seconds * 1000:.0f} ms; no snapshot was taken, and all go on; try again"
            )
        self._hear("done")
        return StateError(f"the server of volume {self._live.name!r} said something else than that it was cut")

    def ask_to_sync(self, lock_bytes: Mapping[bytes, tuple[int, int]]) -> None:
        """Have it make the rest durable, and hold the files of the next head of each volume by these lock bytes."""
        self._lock_bytes = lock_bytes
        self._say("sync", lock_bytes={id: lock_bytes[head.row.id] for id, head in self._heads.items()})

    def synced(self) -> None:
        """Wait for that. What it describes is checked in the transaction, by `seal.refuse_untrue`."""
        left = dict(self._heads)
        while left:
            sealed = self._hear("synced").get("sealed")
            if not isinstance(sealed, list) or not sealed:
                raise FormatError(f"the server of {self._names()} sealed nothing")
            for told in sealed:
                head = left.pop(_volume_of(told), None)
                if head is None:
                    raise FormatError(f"the server of {self._names()} sealed a volume that it was not asked for")
                head.described = unpack_sealed(told, *self._lock_bytes[head.row.id])

    def give_up(self) -> None:
        """Say that the catalog has not changed, and will not be by what it described, where that is sure.

        The transaction has ended. Any error may have come behind a commit, so the catalog is asked.
        """
        with suppress(OSError, OnionskinError, ValueError):
            described = [head for head in self._heads.values() if head.described is not None]
            if all(self._store.catalog.head_of(head.row) != head.sealed.next.head for head in described):
                self._say("give up")

    def ask_to_end(self, *, is_named: bool) -> None:
        """Have it go on with its new heads. It does so, too, when it is not told."""
        try:
            self._say("end", named=is_named)
        except (OSError, OnionskinError) as error:
            self._note_late(error)

    def ended(self) -> None:
        """Wait until it has gone on. What it does wrong now is logged: the catalog has changed."""
        try:
            self._hear("result", STEP_SECONDS)
        except (OSError, OnionskinError, ValueError) as error:
            self._note_late(error)

    def _note_late(self, error: Exception) -> None:
        for head in self._heads.values():
            _log.warning("volume %r is sealed and named; what its server did behind that failed: %s", head.name, error)

    def _say(self, step: str, **values: Any) -> None:
        self._live._request({"step": step, **values})

    def _hear(self, step: str, seconds: float | None = None) -> dict[str, Any]:
        """Wait for a step of the server, and raise what it raised. Each sign of life comes within so many seconds."""
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                raise StateError(
                    f"process {self._live._pid}, which serves volume {self._live.name!r}, has not done its part of a group "
                    f"within {GROUP_SECONDS:.0f} s; no snapshot was taken, and all others go on"
                )
            reply = self._live._receive(min(self._deadline, now + (seconds or SILENCE_SECONDS)))
            if "error" in reply:
                error = frames.unpack_error(reply["error"])
                if isinstance(error, StateError | FormatError):
                    raise type(error)(f"{self._names()}: {error}")
                raise error
            if step in reply or reply.get("step") == step:
                return reply
            if "alive" not in reply:
                raise FormatError(f"the server of {self._names()} said something else than {step!r}")

    def _names(self) -> str:
        names = [head.name for head in self._heads.values()] or [self._live.name]
        return f"volume {names[0]!r}" if len(names) == 1 else f"volumes {some_of(sorted(names))}"


def _volume_of(told: Any) -> str:
    volume = told.get("volume") if isinstance(told, dict) else None
    return volume if isinstance(volume, str) else ""


def find_served_heads(store: "Store", holders: Mapping[str, int], stack: ExitStack) -> dict[str, ServedHead]:
    """Find the servers that hold volumes, to have them sealed as members of a group. The stack takes what leaves them alone.

    Parameters
    ----------
    holders : mapping of str to int
        The volumes, each with the id of the process that holds it, or 0 where that is not known.

    Returns
    -------
    dict of str to ServedHead
        Those that a server holds.
    """
    catalog = store._opened.catalog
    while True:
        rows = catalog.volumes_called(holders)
        with held_together() as connections:
            found = _ask_servers(store._opened, rows, holders, connections)
            # The servers know ids alone; the names may mean other volumes by now.
            now = catalog.volumes_called(holders)
            if all(now[name].id == row.id for name, row in rows.items()):
                with DeferredInterrupt():
                    stack.push(connections.pop_all())
                return found


def _ask_servers(
    store: "OpenStore", rows: Mapping[str, VolumeRow], holders: Mapping[str, int], connections: ExitStack
) -> dict[str, ServedHead]:
    """Ask each holder, by the first of its volumes, for all of them; who did not name a volume is asked by that one."""
    left = {row.id.hex(): name for name, row in rows.items()}
    found: dict[str, ServedHead] = {}
    while left:
        servers: dict[str, GroupServer] = {}
        for of_process in _by_process(left, holders):
            first = of_process[0]
            row = rows[left[first]]
            with DeferredInterrupt():
                connection = reach(store, row, left[first])
                if connection is None:
                    del left[first]  # its holder serves nothing
                    continue
                # The greeting is waited for later, so that all servers greet at the same time.
                live = LiveVolume(connection, left[first], row.id, store, greet=False)
                connections.callback(live.close)
                candidates = {id: rows[left[id]] for id in of_process}
                servers[first] = server = GroupServer(store, live, candidates)
                connections.callback(server.close)
        for first, server in servers.items():
            heads = server.heads()
            if first not in heads:
                raise StateError(f"volume {left[first]!r} is another one by now, or served no more; try again")
            for id, head in heads.items():
                found[left.pop(id)] = head
    return found


def _by_process(left: Mapping[str, str], holders: Mapping[str, int]) -> list[list[str]]:
    """Put the volumes of one process together; where the process is not known, each is by itself."""
    by_process: dict[object, list[str]] = {}
    for id, name in left.items():
        by_process.setdefault(holders[name] or id, []).append(id)
    return list(by_process.values())


def snapshot_group_served(
    store: "Store", rows: Mapping[str, VolumeRow], names: Mapping[str, str | None], note: str
) -> dict[str, Snapshot] | None:
    """Have the server that holds all these volumes take their snapshots, as one operation of its own.

    What must hold: on the return, and on an error, it is known what the catalog has, and it gets no more of it, whatever the
    server does. So where the outcome is not heard, this hangs up, and then looks for it in a transaction: in its own, the
    server looks whether this has hung up.

    Returns
    -------
    dict of str to Snapshot, or None
        None: no server holds all of them, or it is of an older version. Nothing was taken.
    """
    catalog = store._opened.catalog
    first = next(iter(rows))
    connection = reach(store._opened, rows[first], first)
    if connection is None:
        return None
    guids = {row.id: new_id() for row in rows.values()}
    with LiveVolume(connection, first, rows[first].id, store._opened, greet=False) as live:
        live._greeted(time.monotonic() + SILENCE_SECONDS)
        now = catalog.volumes_called(names)  # the server knows ids alone; the names may mean other volumes by now
        if any(now[name].id != row.id for name, row in rows.items()):
            return None
        try:
            taken = _have_taken(live, {row.id.hex(): names[name] or "" for name, row in rows.items()}, guids, note)
        except BaseException as raised:
            live._hang_up()
            error = raised.error if isinstance(raised, _ServerError) else raised
            if isinstance(error, ValueError) and "is no verb" in str(error):
                return None
            found = _outcome(store._opened, list(rows.values()), guids, error, has_ended=error is not raised)
            if found is None or not isinstance(error, Exception):
                raise error from None
            _log.warning("volumes %s are sealed and named; what was heard instead: %s", some_of(sorted(rows)), error)
            taken = found
    by_id = None if taken is None else dict(zip(guids, taken, strict=True))
    return None if by_id is None else {name: by_id[rows[name].id] for name in names}


class _ServerError(Exception):
    """What a server raised, as it said: so its operation has ended."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def _have_taken(
    live: LiveVolume, names: dict[str, str], guids: Mapping[bytes, bytes], note: str
) -> list[Snapshot] | None:
    """Say what is wanted, and wait for what was taken."""
    deadline = time.monotonic() + GROUP_SECONDS
    wanted = {"names": names, "guids": {id.hex(): guid.hex() for id, guid in guids.items()}, "note": note}
    live._connection.settimeout(SILENCE_SECONDS)
    live._request(frames.request("snapshot_group", wanted))
    parts: list[Any] = []
    while True:
        now = time.monotonic()
        if now >= deadline:
            raise StateError(
                f"process {live._pid}, which serves volume {live.name!r}, has not taken the snapshots of a group within "
                f"{GROUP_SECONDS:.0f} s"
            )
        reply = live._receive(min(deadline, now + SILENCE_SECONDS))
        if "error" in reply:
            raise _ServerError(frames.unpack_error(reply["error"]))
        parts += reply.get("part", [])
        if "result" in reply:
            rest = reply["result"]
            return None if rest is None else [frames.unpack_snapshot(value) for value in parts + rest]


def _outcome(
    store: "OpenStore",
    volumes: Sequence[VolumeRow],
    guids: Mapping[bytes, bytes],
    error: BaseException,
    *,
    has_ended: bool,
) -> list[Snapshot] | None:
    """Return what a server that was hung up on has taken, or None: nothing, and it takes nothing any more.

    `has_ended`: it said that its operation has ended. Then it is enough to read the catalog where no transaction can be had,
    such as on a disk that is too full for one: what is not there by now will not be.
    """
    found = lost_answers.asked_after(
        store, partial(lost_answers.snapshots_with, store.catalog, volumes, guids), error, has_ended
    )
    if dropped := [row.name for row in volumes if found and row.id not in found]:
        raise StateError(f"{error}; the snapshots were taken, but others dropped that of {some_of(dropped)} since")
    return [found[row.id] for row in volumes] if found else None


def fork_served(store: "Store", wanted: Wanted) -> list[str] | None:
    """Have the server that holds a volume fork its disk as it is now; None if no server holds it.

    What must hold: as for `snapshot_group_served`. The forks are known by their ids.
    """
    live = find(store, wanted.volume)
    if live is None:
        return None
    ids = wanted.ids or tuple(new_ids(wanted.count))
    with live:
        try:
            return live._fork(replaced(wanted, ids=ids))
        except BaseException as error:
            if isinstance(error, ValueError) and "is no verb" in str(error):
                raise _older(live, "forks nothing for others; start it again, or fork a snapshot") from None
            has_ended = live._connection.fileno() >= 0  # else its answer was waited for in vain
            with DeferredInterrupt():
                live._hang_up()
                found = lost_answers.asked_after(
                    store._opened, partial(_names_with, store._opened.catalog, ids), error, has_ended
                )
            if not found or not isinstance(error, Exception):
                raise
            if len(found) < len(ids):
                raise StateError(f"{error}; the forks were made, but others dropped some of them since") from error
            _log.warning("%s were forked; what was heard instead: %s", some_of(found), error)
            return found


def _names_with(catalog: Catalog, ids: Sequence[bytes]) -> list[str]:
    """Return what the volumes with these ids are called, in their order; those that are not there are left out."""
    names = {row.id: row.name for row in catalog.volumes_with_ids(ids)}
    return [names[id] for id in ids if id in names]


def revert_served(store: "Store", name: str, snapshot: str, guid: str, machine: str) -> bool:
    """Have the server that holds a disk of a machine put it back; False if no server holds it."""
    live = find(store, name)
    if live is None:
        return False
    with live:
        live._revert_for_machine(snapshot, guid, machine)
    return True


def revert_machine_served(
    store: "Store", first: str, disks: Mapping[bytes, tuple[str, str]], machine: bytes, snapshot: bytes
) -> bool:
    """Have the server that holds all disks of a machine put them back in one transaction; False if none holds all of them.

    Parameters
    ----------
    first : str
        The name of one of the disks.
    disks : mapping of bytes to (str, str)
        For the id of each disk the name and the GUID of its snapshot.
    machine, snapshot : bytes
        The machine, and the snapshot of it that it is noted to be put back to.
    """
    live = find(store, first)
    if live is None:
        return False
    with live:
        try:
            return live._revert_machine(machine, snapshot, disks)
        except ValueError as error:
            if "is no verb" not in str(error):
                raise
            return False  # it is of an older version, which puts back one by one


def agrees_to_revert(store: "Store", name: str) -> bool:
    """Whether a server holds a volume, which lets its disk change; False if no server holds it.

    Raises
    ------
    StateError
        A server holds it that does not let its disk change.
    """
    live = find(store, name)
    if live is None:
        return False
    with live:
        if not live.info()["allow_revert"]:
            raise StateError(
                f"volume {name!r} is served by process {live._pid}, and its disk would change under the clients; stop them "
                "and the server first, or serve with --allow-revert; nothing was changed"
            )
    return True


def tidy_served(store: "Store", name: str) -> bool:
    """Have the server that holds a volume fold layers that lost their names; False if no server holds it."""
    live = find(store, name)
    if live is None:
        return False
    with live:
        live._tidy()
    return True


def _older(live: LiveVolume, what: str) -> StateError:
    return StateError(f"the server of volume {live.name!r} (process {live._pid}) is of an older version, which {what}")
