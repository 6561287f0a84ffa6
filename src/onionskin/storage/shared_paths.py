"""Sealed layers that are open in this process: views of the same layer share one data path.

What must hold: the contents of a sealed layer never change, so one folded index serves all its views, and a second
opening costs only a look-up in a table. The shared locks are held until the last view of the layer is closed and the
last array over it is gone. The data path is closed with the last view.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from onionskin.base.records import record
from onionskin.errors import ChainError
from onionskin.storage.base_looks import BaseLooks, looks_in, looks_of, what_differs
from onionskin.storage.chain import Chain
from onionskin.storage.locks import BaseLock, ByteLocks

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath


@record(frozen=False)
class OpenChain:
    """The open data path of a chain, with the locks that keep its files.

    `base_looks` is given where a merge into the base has begun and not ended, so that the row of the base does not say
    what the file looks like: it is what the file looked like when it was locked.
    """

    chain: Chain
    path: "DataPath"
    locks: ByteLocks
    base_lock: BaseLock | None
    base_looks: BaseLooks | None = None
    users: int = 0


def refuse_changed_base(opened: OpenChain) -> None:
    """Raise ChainError if the file, or the device, that is locked as the base looks otherwise than it should.

    It should look as the chain says, or, where a merge into it has not ended, as it did when it was locked.

    An operation that copies from the base calls this again at the end. If the base changed meanwhile, parts of the copy
    are from before the change and parts from after it, so the copy is not the disk of any time.
    """
    base = opened.chain.base
    if base is None:
        return
    assert opened.base_lock is not None
    expected = opened.base_looks or looks_in(base)
    if looks_of(opened.base_lock.descriptor) != expected:
        raise ChainError(
            f"the base {base.path} has changed since the volume was opened ({what_differs(base)}), so what was "
            "read is no disk that there was: put it back, or name the right one with 'onionskin relocate'"
        )


class SealedViews:
    """The sealed layers that a store has open. Any thread may call the methods."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open: dict[bytes, OpenChain] = {}
        self._dropped: deque[bytes] = deque()

    def take(self, layer: bytes, make: Callable[[], OpenChain]) -> OpenChain:
        """Return the view of a layer, and make it if it is not open. Each `take` needs one `give_back`.

        The view is made without a lock. If two threads make it at once, one of the two views is closed again.
        """
        self.end_dropped()
        with self._guard:
            if layer in self._open:
                return self._use(layer)
        made = make()
        with self._guard:
            first = layer not in self._open
            if first:
                self._open[layer] = made
            view = self._use(layer)
        if not first:
            made.path.close()
        return view

    def _use(self, layer: bytes) -> OpenChain:
        view = self._open[layer]
        view.users += 1
        return view

    def drop(self, use: list[bytes]) -> None:
        """End a use from a finalizer, which may run inside any of these methods: the next call does it. As `end`."""
        with suppress(IndexError):
            self._dropped.append(use.pop())

    def end(self, use: list[bytes]) -> None:
        """End a use that several may end, and nobody more than once: a list that holds its layer until then.

        Where an interrupt comes, both the handle that got the use and whoever took it for that handle may end it. Twice,
        it would be the use of somebody else.
        """
        with suppress(IndexError):
            self.give_back(use.pop())

    def end_dropped(self) -> None:
        """End the uses that were dropped."""
        with suppress(IndexError):  # another thread may take the last one
            while self._dropped:
                self._end(self._dropped.popleft())

    def give_back(self, layer: bytes) -> None:
        """End one use of a layer. The last one closes the data path, and waits for reads that are under way."""
        self.end_dropped()
        self._end(layer)

    def _end(self, layer: bytes) -> None:
        with self._guard:
            view = self._open[layer]
            view.users -= 1
            if view.users:
                return
            del self._open[layer]
        view.path.close()


def closed_path(path: "DataPath") -> "DataPath":
    """Return a closed data path of the same size. A view that closes gets it if others still use its real one."""
    from onionskin.kernels._volume import DataPath

    closed = DataPath(
        block_size=path.block_size,
        size_bytes=path.size_bytes,
        segments_directory="",
        layers_directory="",
        wipe_zero=False,
        writable=False,
    )
    closed.close()
    return closed
