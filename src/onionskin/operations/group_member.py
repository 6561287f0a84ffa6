"""A head that is sealed as one of a group whose transaction another process, the coordinator, writes.

What must hold: the volume goes on with its old head only when no transaction of the coordinator can name the new one any
more. The coordinator may be stopped before its transaction, and go on hours later. So whoever goes on with the old head
first gives it another spare segment in a transaction of its own, a fence: the coordinator's transaction checks that head and
spare are those that were described, and fails behind it. Where the coordinator is inside its transaction, the fence waits
for its end, and finds out how it ended. Only where the coordinator itself says that it gave up, none is needed. Readers and
writers go on meanwhile; flushes wait, as in every seal.

A fence may fail: the disk may be too full for it. If the coordinator is known to be dead, none is needed either: its
transaction has ended, and no other one comes. Else it is tried again for a while, since room may come, or the coordinator may
end. After that the volume takes no more writes until it is opened again, because neither head is known to be the right one.

The files of the next head are locked before the description is given away, so nobody can take them for unused.
"""

import time
from collections.abc import Callable, Sequence

from onionskin.base.lazy import logger
from onionskin.catalog import CommitUnknownError, SegmentRow
from onionskin.errors import StateError
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.seal import SealedHead, Sealing, spares_for
from onionskin.storage.chain import replace_spare
from onionskin.storage.open_head import OpenHead, if_begun

_log = logger(__name__)

_FENCE_TRIES = 5  # each waits for over a minute where somebody holds the catalog
_FENCE_SECONDS = 60.0  # for which it is tried at least
_FENCE_AGAIN_SECONDS = 0.2


class MemberSealing(Sealing):
    """The seal of a member. It is ended by `resolve`, which asks the catalog, and `settle`. In an operation of the volume.

    Parameters
    ----------
    volume : OpenHead
    spare : SegmentRow
        As for `Sealing`.
    parent : bytes or None
        What the head stands on.
    is_caller_dead : callable
        Whether the coordinator is known to be dead.

    Attributes
    ----------
    goes_on : bool
        Whether the volume goes on with the new head, once it is resolved.
    """

    def __init__(
        self, volume: OpenHead, spare: SegmentRow, parent: bytes | None, is_caller_dead: Callable[[], bool]
    ) -> None:
        super().__init__(volume, spare)
        self.goes_on: bool = False
        self._is_caller_dead = is_caller_dead
        self._parent = parent
        self._fence: SegmentRow | None = None

    def give(self, map_byte: int, spare_byte: int) -> SealedHead:
        """Lock the files of the next head by these bytes, and describe what was sealed."""
        what = self.describe(map_byte, spare_byte)
        self.share_next()
        return what

    def stay(self) -> None:
        """Go on with the old head when this is resolved: the coordinator names no other one, as it said or cannot know any.

        So no fence is needed, for which there may be no room: a full disk may be why it gave up.
        """
        self.next_head = None

    def resolve(self) -> None:
        """Go on with the new head if the catalog has it; else see to it that it never has, and go on with the old one."""
        volume = self.volume
        if self.next_head is None or volume.path.poisoned:
            if_begun(volume.path.seal_abort)
        elif self._has_new_head():
            self.go_on()
            self.goes_on = True
        else:
            if_begun(volume.path.seal_abort)
            if self._fence and not volume.path.has_spare:
                volume.path.set_spare(self._fence.id)

    def _has_new_head(self) -> bool:
        """Whether the catalog has the new head. If not, it never will, on the return."""
        if self._fence is not None:
            return False
        tries, deadline = 0, time.monotonic() + _FENCE_SECONDS
        while not self._is_committed():
            try:
                self._fence = self.volume.store.change(self._replace_spare)
            except CommitUnknownError:
                raise
            except (OSError, StateError) as error:
                tries += 1
                if self._is_caller_dead():  # it leaves no transaction behind, and begins none, so no fence is needed
                    return self._is_committed()
                if tries >= _FENCE_TRIES and time.monotonic() > deadline:
                    raise
                _log.warning("volume %r waits for a snapshot of a group to end: %s", self.volume.row.name, error)
                time.sleep(_FENCE_AGAIN_SECONDS)
            else:
                return self._fence is None
        return True

    def _is_committed(self) -> bool:
        new = self.next_head
        return new is not None and self.volume.store.catalog.head_of(self.volume.row) == new.head

    def _replace_spare(self) -> SegmentRow | None:
        """Give the old head another spare, and return it; None: the catalog has the new head. In a transaction."""
        if self._is_committed():  # while this waited for the coordinator's transaction to end
            return None
        spare = replace_spare(self.volume.store.catalog, self.volume.head)
        self.volume.share({spare.lock_byte: spare.id})
        return spare

    def settle(self, *, is_named: bool) -> None:
        """Do what follows from how it ended; the data path knows its head by then."""
        if not self.goes_on:
            self.give_back_reclaims()
            return
        self.finish()
        if (
            not is_named and self._parent is not None
        ):  # the cut before this one, where nothing else stands on it any more
            fold_where_unnamed(self.volume, [self._parent])


def begin_members(volumes: Sequence[OpenHead], is_caller_dead: Callable[[], bool]) -> list[MemberSealing]:
    """Make the seals of several members. In an operation of each volume."""
    spares = spares_for(volumes)
    catalog = volumes[0].store.catalog
    parents = {row.id: row.parent for row in catalog.layers_with_ids([volume.head for volume in volumes])}
    return [
        MemberSealing(volume, spare, parents[volume.head], is_caller_dead)
        for volume, spare in zip(volumes, spares, strict=True)
    ]
