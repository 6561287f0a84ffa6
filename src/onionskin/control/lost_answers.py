"""Whether a server has done what it was asked for, where its answer did not come.

What must hold: a server that answered has ended its operation. One that did not was hung up on, and the transaction in which
the catalog is looked at comes before any that it may still begin, which it gives up then: so it does nothing more.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import Catalog, SnapshotRow, VolumeRow
from onionskin.catalog.tree import Snapshot, describe_snapshots
from onionskin.errors import OnionskinError, StateError

if TYPE_CHECKING:
    from onionskin.storage.open_store import OpenStore

_Found = TypeVar("_Found")
Outcome = Literal["reverted", "dropped", "renamed"]


def asked_after(store: "OpenStore", look: Callable[[], _Found], error: BaseException, has_ended: bool) -> _Found:
    """Look in a transaction for what a server has done that was hung up on, so that it does no more.

    `has_ended`: it said that its operation has ended. Then it is enough to read the catalog where no transaction can be had,
    such as on a disk that is too full for one: what is not there by now will not be.
    """
    try:
        with DeferredInterrupt():
            try:
                return store.change(look)
            except (OSError, OnionskinError):
                if not has_ended:
                    raise
                with store.catalog.reading():
                    return look()
    except (OSError, OnionskinError) as failure:
        raise _unknown(error, failure) from error


def _unknown(error: BaseException, failure: BaseException) -> StateError:
    return StateError(
        f"{error}; whether it was done is not known, because the catalog cannot be asked either ({failure}); look for it "
        "later"
    )


def snapshots_with(
    catalog: Catalog, volumes: Sequence[VolumeRow], guids: Mapping[bytes, bytes]
) -> dict[bytes, Snapshot]:
    """Return the snapshots of volumes that have these GUIDs, by the ids of the volumes. In one state of the catalog."""
    rows = {row.id: one for row in volumes for one in catalog.snapshots_of(row.id) if one.guid == guids[row.id]}
    there = [row for row in volumes if row.id in rows]
    described = describe_snapshots(catalog, [(row, rows[row.id], catalog.layer(rows[row.id].layer)) for row in there])
    return {row.id: one for row, one in zip(there, described, strict=True)}


def taken_though_unheard(
    opened: "OpenStore", volume: bytes, guid: bytes, error: BaseException, *, has_ended: bool
) -> Snapshot | None:
    """Return the snapshot with a GUID that a server was asked to take, where an error was heard or nothing, or None.

    `has_ended`: the server answered. An interrupt stays one, also where the snapshot was taken.
    """
    with ExitStack() as stack:
        store = _open_again_if_closed(opened, stack, error)

        def look() -> Snapshot | None:
            row = store.catalog.volume_with_id(volume)
            return None if row is None else snapshots_with(store.catalog, [row], {row.id: guid}).get(row.id)

        found = None
        if has_ended:  # so what is not there by now will not be
            with suppress(OSError, OnionskinError), store.catalog.reading():
                found = look()
        else:
            found = asked_after(store, look, error, has_ended)
    return found if isinstance(error, Exception) else None


class Before(NamedTuple):
    """A volume as it was before a server was asked to change it, with those of its snapshots that are named there."""

    volume: VolumeRow
    snapshots: Sequence[SnapshotRow]


def before(opened: "OpenStore", volume: bytes, names: Sequence[str]) -> Before | None:
    """Return what a volume is, or None where that cannot be known, or a snapshot is not there, which the server says."""
    with suppress(OSError, OnionskinError, ValueError), ExitStack() as stack:
        catalog = _open_again_if_closed(opened, stack, StateError("")).catalog
        with catalog.reading():
            row = catalog.volume_with_id(volume)
            found = [catalog.snapshot_named(volume, name) for name in names]
            if row is not None and None not in found:
                return Before(row, [one for one in found if one is not None])
    return None


def is_done(
    opened: "OpenStore", known: Before | None, outcome: Outcome, new_name: str | None, error: Exception
) -> bool:
    """Whether a server that was hung up on, or is gone, has done what it was asked for. What is not done by now, is not.

    Raises
    ------
    StateError
        It cannot be told, since it is not known what was there before, or others have changed that.
    """
    found = None
    if known is not None:
        with ExitStack() as stack:
            store = _open_again_if_closed(opened, stack, error)
            found = asked_after(store, partial(_is_done, store.catalog, known, outcome, new_name), error, False)
    if found is None:
        raise StateError(
            f"{error}; whether it was done cannot be told; look at the volume before you ask again"
        ) from error
    return found


def _is_done(catalog: Catalog, known: Before, outcome: Outcome, new_name: str | None) -> bool | None:
    """Whether a volume has become what was asked for. None: it is neither that nor as it was."""
    row = catalog.volume_with_id(known.volume.id)
    if row is None:
        return None
    if outcome == "renamed":
        is_as_it_was, is_so = row.name == known.volume.name, row.name == new_name
    elif outcome == "reverted":
        is_as_it_was = row.head == known.volume.head
        is_so = catalog.layer(row.head).parent == known.snapshots[0].layer
    else:
        there = {one.guid for one in catalog.snapshots_of(row.id)}
        is_there = [one.guid in there for one in known.snapshots]
        is_as_it_was, is_so = all(is_there), not any(is_there)
    return False if is_as_it_was else True if is_so else None


def _open_again_if_closed(opened: "OpenStore", stack: ExitStack, error: BaseException) -> "OpenStore":
    """Return a store, opened again if the caller has closed it, for as long as the stack."""
    if not opened.closed:
        return opened
    from onionskin.store import Store

    try:  # the caller has opened it before, so it is trusted
        return stack.enter_context(Store(opened.path, create=False, trust=True))._opened
    except (OSError, OnionskinError) as failure:
        raise _unknown(error, failure) from error
