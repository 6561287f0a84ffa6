"""What verbs say of volumes and snapshots: their JSON values, as docs/cli.md lists them, and what they take."""

from typing import TYPE_CHECKING, Any

from onionskin.cli import output
from onionskin.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onionskin.catalog.tree import Snapshot
    from onionskin.operations.listing import VolumeInfo
    from onionskin.operations.usage import SnapshotSpace
    from onionskin.store import Store

PROPERTIES = ("wipe", "size", "block-size", "base", "created", "expires", "labels")  # of a volume, as get calls them


def volume_value(info: "VolumeInfo") -> dict[str, Any]:
    """Return the JSON value of a volume."""
    return {
        "name": info.name,
        "size_bytes": info.size_bytes,
        "block_size": info.block_size,
        "wipe": info.wipe,
        "base": None if info.base is None else str(info.base),
        "created": output.timestamp(info.created),
        "snapshots": info.snapshots,
        "holder": info.holder,
        "used_bytes": info.used_bytes,
        "written_bytes": info.written_bytes,
        "expires": None if info.expires is None else output.timestamp(info.expires),
        "labels": dict(info.labels),
    }


def snapshot_value(snapshot: "Snapshot") -> dict[str, Any]:
    """Return the JSON value of a snapshot."""
    return {
        "name": snapshot.name,
        "guid": snapshot.guid,
        "created": output.timestamp(snapshot.created),
        "parent": snapshot.parent,
        "note": snapshot.note,
        "size_bytes": snapshot.size_bytes,
    }


def space_value(space: "SnapshotSpace | None") -> dict[str, Any]:
    """Return what a snapshot takes as JSON; null where it was not found out."""
    return {"used_bytes": space.used_bytes if space else None, "written_bytes": space.written_bytes if space else None}


def space_of(store: "Store", volume: str, *, wanted: bool | None) -> "dict[str, SnapshotSpace]":
    """Return what each snapshot takes, by name.

    It is empty if `wanted` is false, or if nobody said whether it is wanted (None) and it would take long.
    """
    if wanted is False:
        return {}
    from onionskin.operations import usage

    if wanted is None and not usage.is_quick(store._opened, volume):
        return {}
    try:
        return {one.snapshot: one for one in usage.snapshot_space(store._opened, volume)}
    except (FormatError, OSError):  # the names are listed all the same
        if wanted:
            raise
        return {}


def labels_text(labels: "Mapping[str, str]") -> str:
    """Write labels for people, as they are given to --label."""
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def holder(about: "VolumeInfo") -> str:
    """Write who has a volume open, for people; nothing if nobody has."""
    return "" if about.holder is None else f"process {about.holder}"
