"""A volume that is sealed as one of a group by the process that serves it: both ends of that conversation.

On a connection of the control socket to the volume, the caller (the coordinator of the group) asks for the verb `group`.
Then both ends speak in steps:

    server: entered   the volume is held for this operation
    caller: begin     server: begun     most of the head is durable
    caller: lead      server: leading   this connection cuts all volumes of the group that this server has
    caller: hold      server: held      their writers wait
    caller: cut       server: done      the heads are swapped, and their writers go on
    caller: sync      server: synced    the rest is durable; this describes it
    caller: end       server: result    the volume goes on with the head that the catalog has

Instead of `sync` or `end` the caller may say `give up`: then the volume goes on with its old head.

Each volume has its own connection, on which all of that is said, except that one connection of each server leads: so the
volumes of a server are held and cut by one thread, as those of one process are.

What must hold: writers wait from `hold` to `cut` only, and for HOLD_SECONDS at most; the words of both are fixed texts,
which C sends and reads, so that no interpreter is waited for. Whatever the other end does (it says nothing, something else,
too much, or is gone), either end is done with it in a bounded time. What the server does then is in `MemberSealing`.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import ETIME
from typing import TYPE_CHECKING, Any

from onionskin.base.lazy import logger
from onionskin.base.limits import WIPE_POLICIES
from onionskin.catalog import VolumeRow
from onionskin.control import frames
from onionskin.control.client import LiveVolume, find
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.kernels._volume import cut_when_told
from onionskin.operations.forks import Wanted
from onionskin.operations.group_member import MemberSealing
from onionskin.operations.seal import NextHead, RemoteHead, SealedHead
from onionskin.operations.snapshots import OPERATION_SECONDS
from onionskin.storage.open_head import OpenHead

if TYPE_CHECKING:
    from onionskin.storage.open_store import OpenStore
    from onionskin.store import Store

_log = logger(__name__)

# Writers that wait for longer go on, and their volume is not cut.
HOLD_SECONDS = 0.25
# How long the server waits for the next step. Its flushes wait meanwhile, for the slowest disk of the group.
STEP_SECONDS = 30.0
# How long the caller waits for a sign of life of the server, which gives one every ALIVE_SECONDS while it works.
SILENCE_SECONDS = 10.0
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
        """Cut heads when the caller says so."""
        self._be_silent(True)  # before the caller reads words that are no frames of its own
        try:
            self.say("leading")
            paths, names = [head.path for head in heads], [head.row.name for head in heads]
            failed = cut_when_told(paths, names, self._connection.fileno(), _words(), STEP_SECONDS)
        finally:
            self._be_silent(False)
        if failed == ETIME:
            raise StateError("the group was not cut in time, and the writers of its volumes here went on")
        if failed:
            raise StateError("the group's caller has gone away, or gave it up")


class _Party:
    """The volumes of this process that are sealed for one caller. A volume leaves before its seal is ended."""

    def __init__(self) -> None:
        self.connections = 0  # under `_parties_guard`
        self._guard = threading.Lock()  # held while one connection cuts: nobody ends a seal meanwhile
        self._begun: dict[str, OpenHead] = {}

    def join(self, head: OpenHead) -> None:
        """Have a head, whose seal was begun, cut by whoever leads."""
        with self._guard:
            self._begun[head.row.id.hex()] = head

    def leave(self, head: OpenHead) -> None:
        """Have it cut no more."""
        with self._guard:
            self._begun.pop(head.row.id.hex(), None)

    def cut(self, talk: Talk, asked: Any) -> None:
        """Cut the heads that the caller asks for."""
        with self._guard:
            if not isinstance(asked, list) or not all(isinstance(id, str) and id in self._begun for id in asked):
                raise StateError("a volume of the group is sealed no more; try again")
            talk.cut([self._begun[id] for id in asked])


_PROCESS = os.urandom(16).hex()  # who has the same can be led by one connection
_parties_guard = threading.Lock()
_parties: dict[str, _Party] = {}


@contextmanager
def _party_of(name: str) -> Iterator[_Party]:
    with _parties_guard:
        party = _parties.setdefault(name, _Party())
        party.connections += 1
    try:
        yield party
    finally:
        with _parties_guard:
            party.connections -= 1
            if not party.connections:
                del _parties[name]


def seal_for_caller(talk: Talk, volume: OpenHead, group: str) -> dict[str, Any]:
    """Seal a volume as one of the caller's group, which the caller gave this name."""
    is_named = True
    with (
        _party_of(group) as party,
        volume.operation(during_merge=True, within=OPERATION_SECONDS),
        talk.bounded(),
    ):
        volume.refuse_half_merged()
        talk.say("entered", volume=volume.row.id.hex(), process=_PROCESS)
        talk.hear("begin")
        sealing = MemberSealing(volume)

        def resolve() -> None:
            party.leave(volume)
            sealing.resolve()

        try:
            with volume.resolving(resolve):
                sealing.begin()
                party.join(volume)
                talk.say("begun")
                asked = talk.hear("sync", "lead")
                if asked["step"] == "lead":
                    party.cut(talk, asked.get("volumes"))
                    asked = talk.hear("sync")
                sealing.sync()
                talk.say("synced", sealed=pack_sealed(sealing.give(*_lock_bytes(asked))))
                try:
                    is_named = talk.hear("end").get("named") is not False
                except GivenUpError:
                    sealing.stay()
                    raise
        finally:
            sealing.settle(is_named=is_named)
    return {"committed": sealing.goes_on}


def _lock_bytes(asked: dict[str, Any]) -> tuple[int, int]:
    try:
        map_byte, spare_byte = _number(asked.get("map_byte"), 1 << 61), _number(asked.get("spare_byte"), 1 << 61)
    except ValueError:
        map_byte = spare_byte = 0
    if not (map_byte and spare_byte) or map_byte == spare_byte:
        raise FormatError("the lock bytes that the group's caller gave for the next head are none")
    return map_byte, spare_byte


# ---- the caller's end ----


class ServedHead:
    """A head that a server seals for this process: see `seal.RemoteHead`."""

    def __init__(self, store: "OpenStore", row: VolumeRow, live: LiveVolume, group: str) -> None:
        self.store = store
        self.row = row
        self.name: str = row.name
        self.process: str = ""
        self._group = group
        self._live = live
        self._sealed: SealedHead | None = None
        self._lock_bytes = (0, 0)
        self._process_here = os.getpid()

    @property
    def peer(self) -> int:
        """The descriptor of the socket by which it is told to cut."""
        return self._live._connection.fileno()

    @property
    def words(self) -> tuple[bytes, bytes, bytes, bytes, float]:
        """What is said at the cut."""
        return _words()

    @property
    def sealed(self) -> SealedHead:
        """What the server described."""
        assert self._sealed is not None
        return self._sealed

    def close(self) -> None:
        """Leave the group. A server that was not told the end asks the catalog for it."""
        if os.getpid() == self._process_here:  # a forked child may have the connection too, and keep it open
            with suppress(OSError):
                self._live._connection.shutdown(socket.SHUT_RDWR)
        self._live.close()

    @contextmanager
    def operation(self, *, during_merge: bool, within: float | None) -> Iterator[None]:
        """Have the server hold the volume for this operation."""
        self._live._connection.settimeout(SILENCE_SECONDS)
        self._live._request(frames.request("group", {"group": self._group}))
        self._live._greeted()
        self._live._connection.settimeout(SILENCE_SECONDS)  # a server that is silent while it works knows no groups
        try:
            entered = self._hear("entered")
        except ValueError:
            raise _older(
                self._live, "seals nothing for others; start it again, or take the snapshots one by one"
            ) from None
        if entered.get("volume") != self.row.id.hex():
            raise StateError(f"volume {self.name!r} is another one by now; try again")
        self.process = str(entered.get("process"))
        yield

    def refuse_half_merged(self) -> None:
        """Do nothing: the server does it."""

    def ask_to_begin(self) -> None:
        """Have it make durable most of what was written."""
        self._say("begin")

    def begun(self) -> None:
        """Wait for that."""
        self._hear("begun")

    def ask_to_lead(self, heads: Sequence[RemoteHead]) -> None:
        """Have its connection cut all of these, which are of one process."""
        self._say("lead", volumes=[head.row.id.hex() for head in heads])

    def leads(self) -> None:
        """Wait until it listens."""
        self._hear("leading")

    def cut_failed(self, number: int) -> StateError:
        """Return the error that says why it was not cut, or raise the server's own."""
        if number == ETIME:
            return StateError(
                f"process {self._live._pid}, which serves volume {self.name!r}, did not cut it within "
                f"{HOLD_SECONDS * 1000:.0f} ms; no snapshot was taken, and all go on; try again"
            )
        self._hear("done")
        return StateError(f"the server of volume {self.name!r} said something else than that it was cut")

    def ask_to_sync(self, map_byte: int, spare_byte: int) -> None:
        """Have it make the rest durable, and hold the files of its next head by these lock bytes."""
        self._lock_bytes = (map_byte, spare_byte)
        self._say("sync", map_byte=map_byte, spare_byte=spare_byte)

    def synced(self) -> None:
        """Wait for that, and check what it describes as far as that goes without a transaction."""
        sealed = unpack_sealed(self._hear("synced").get("sealed"), *self._lock_bytes)
        layer = self.store.catalog.layer(sealed.head)
        segments = self.store.catalog.segments_with_ids([id for id, _ in sealed.segments])
        if (
            sealed.volume != self.row.id
            or sealed.block_size != layer.block_size
            or any(row.layer != sealed.head or row.role != "own" for row in segments)
        ):
            raise FormatError(f"what the server of volume {self.name!r} sealed is not what the catalog has of it")
        self._sealed = sealed

    def give_up(self) -> None:
        """Say that the catalog has not changed, and will not be by what it described, where that is sure.

        The transaction has ended. Any error may have come behind a commit, so the catalog is asked.
        """
        with suppress(OSError, OnionskinError, ValueError):
            if self._sealed is None or self.store.catalog.head_of(self.row) != self._sealed.next.head:
                self._say("give up")

    def ask_to_end(self, *, is_named: bool) -> None:
        """Have it go on with its new head. It does so, too, when it is not told."""
        try:
            self._say("end", named=is_named)
        except (OSError, OnionskinError) as error:
            self._note_late(error)

    def ended(self) -> None:
        """Wait until it has gone on. What it does wrong now is logged: the catalog has changed."""
        try:
            self._live._connection.settimeout(STEP_SECONDS)
            self._hear("result")
        except (OSError, OnionskinError, ValueError) as error:
            self._note_late(error)

    def _note_late(self, error: Exception) -> None:
        _log.warning("volume %r is sealed and named; what its server did behind that failed: %s", self.name, error)

    def _say(self, step: str, **values: Any) -> None:
        self._live._request({"step": step, **values})

    def _hear(self, step: str) -> dict[str, Any]:
        """Wait for a step of the server, and raise what it raised."""
        while True:
            reply = self._live._receive()
            if "error" in reply:
                error = frames.unpack_error(reply["error"])
                if isinstance(error, StateError | FormatError):
                    raise type(error)(f"volume {self.name!r}: {error}")
                raise error
            if step in reply or reply.get("step") == step:
                return reply
            if "alive" not in reply:
                raise FormatError(f"the server of volume {self.name!r} said something else than {step!r}")


def find_served_head(store: "Store", name: str, group: str) -> ServedHead | None:
    """Find the server that holds a volume, to have it sealed by it as one of a group; None if none does."""
    live = find(store, name, greet=False)  # so that all servers of a group greet at the same time
    if live is None:
        return None
    try:
        return ServedHead(store._opened, store._opened.catalog.volume(name), live, group)
    except BaseException:
        live.close()
        raise


def fork_served(store: "Store", wanted: Wanted) -> list[str] | None:
    """Have the server that holds a volume fork its disk as it is now; None if no server holds it."""
    live = find(store, wanted.volume)
    if live is None:
        return None
    with live:
        try:
            return live._fork(wanted)
        except ValueError as error:
            if "is no verb" not in str(error):
                raise
            raise _older(live, "forks nothing for others; start it again, or fork a snapshot") from None


def revert_served(store: "Store", name: str, snapshot: str, guid: str, machine: str) -> bool:
    """Have the server that holds a disk of a machine put it back; False if no server holds it."""
    live = find(store, name)
    if live is None:
        return False
    with live:
        live._revert_for_machine(snapshot, guid, machine)
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
