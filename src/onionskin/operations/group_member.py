"""A head that is sealed as one of a group whose transaction another process, the coordinator, writes.

What must hold: the volume goes on with its old head only when no transaction of the coordinator can name the new one any
more. The coordinator may be stopped before its transaction, and go on hours later. So whoever goes on with the old head
first gives it another spare segment in a transaction of its own, a fence: the coordinator's transaction checks that head and
spare are those that were described, and fails behind it. Where the coordinator is inside its transaction, the fence waits
for its end, and finds out how it ended. Only where the coordinator itself says that it gave up, none is needed. Readers and
writers go on meanwhile; flushes wait, as in every seal.

The files of the next head are locked before the description is given away, so nobody can take them for unused.
"""

from onionskin.base.lazy import logger
from onionskin.catalog import SegmentRow
from onionskin.errors import StateError
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.seal import SealedHead, Sealing
from onionskin.storage.chain import replace_spare
from onionskin.storage.open_head import OpenHead, if_begun

_log = logger(__name__)

_FENCE_TRIES = 5  # each waits for over a minute where somebody holds the catalog


class MemberSealing(Sealing):
    """The seal of a member. It is ended by `resolve`, which asks the catalog, and `settle`. In an operation of the volume.

    Attributes
    ----------
    goes_on : bool
        Whether the volume goes on with the new head, once it is resolved.
    """

    def __init__(self, volume: OpenHead) -> None:
        super().__init__(volume)
        self.goes_on: bool = False
        self._parent = volume.store.catalog.layer(volume.head).parent
        self._fence: SegmentRow | None = None

    def give(self, map_byte: int, spare_byte: int) -> SealedHead:
        """Lock the files of the next head by these bytes, and describe what was sealed."""
        what = self.describe(map_byte, spare_byte)
        try:
            self.share_next()
        except BaseException:
            self.next_head = None  # nobody knows of it
            raise
        return what

    def stay(self) -> None:
        """Go on with the old head when this is resolved. The coordinator has said that it names no other one.

        So no fence is needed, for which there may be no room: a full disk may be why it gave up.
        """
        self.next_head = None

    def resolve(self) -> None:
        """Go on with the new head if the catalog has it; else see to it that it never has, and go on with the old one."""
        volume = self.volume
        if self.next_head is None or volume.path.poisoned:
            if_begun(volume.path.seal_abort)
        elif (fence := self._fence_off()) is None:
            self.go_on()
            self.goes_on = True
        else:
            if_begun(volume.path.seal_abort)
            if not volume.path.has_spare:
                volume.path.set_spare(fence.id)

    def _fence_off(self) -> SegmentRow | None:
        """Give the old head another spare, and return it; None: the catalog has the new head."""
        if self._fence is None and not self._is_committed():
            self._fence = self._replace_spare()
        return self._fence

    def _is_committed(self) -> bool:
        new = self.next_head
        return new is not None and self.volume.store.catalog.head_of(self.volume.row) == new.head

    def _replace_spare(self) -> SegmentRow | None:
        volume = self.volume

        def change() -> SegmentRow | None:
            if self._is_committed():  # while this waited for the coordinator's transaction to end
                return None
            spare = replace_spare(volume.store.catalog, volume.head)
            volume.share({spare.lock_byte: spare.id})
            return spare

        for _ in range(_FENCE_TRIES - 1):
            try:
                return volume.store.change(change)
            except StateError as error:  # the coordinator may be stopped inside its transaction
                _log.warning("volume %r waits for a snapshot of a group to end: %s", volume.row.name, error)
        return volume.store.change(change)

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
