"""The rows of the catalog's tables, as Python sees them: named tuples, which cost a start less than dataclasses."""

import os
from struct import Struct, unpack
from typing import TypeVar

from onionskin.base.named_tuples import NamedTuple

_ID = Struct(">QQ")
_HALF_MAX = (1 << 64) - 1  # of an id


class BaseRow(NamedTuple):
    """A raw image that volumes stand on, and how it looked when they were made: see `onionskin.storage.base_looks`."""

    id: bytes
    path: str
    inode: int
    size_bytes: int
    mtime_ns: int
    digest: bytes | None


class LayerRow(NamedTuple):
    """One layer.

    map_length, map_frames and map_crc describe the map file. For a sealed layer the description is exact, and length 0
    means that there is no map file. For a head it is a lower bound: the log has a frame with the number `map_frames`
    that ends at `map_length` with the checksum `map_crc`. Zeros mean that nothing is known.
    """

    id: bytes
    parent: bytes | None
    base: bytes | None
    block_size: int
    wipe: str
    size_bytes: int
    sealed: int
    map_id: bytes
    map_lock_byte: int
    map_length: int
    map_frames: int
    map_crc: int
    created_ns: int


class SegmentRow(NamedTuple):
    """One segment. role: `own` (the head writes it), `spare` (kept for the next head), `sealed` (read only)."""

    id: bytes
    layer: bytes
    role: str
    slots: int
    lock_byte: int


class VolumeRow(NamedTuple):
    """One volume. A name that begins with '@' belongs to a staged volume, which no list shows and no user can name.

    From `expires_ns` on, by the clock that tells the date, it may be dropped; None: never.
    """

    id: bytes
    name: str
    head: bytes
    created_ns: int
    expires_ns: int | None = None


class SnapshotRow(NamedTuple):
    """A name for a sealed layer. `number` grows in the order of taking, whatever the clock says."""

    volume: bytes
    name: str
    layer: bytes
    guid: bytes
    created_ns: int
    note: str
    number: int


class HoldRow(NamedTuple):
    """Somebody who needs the snapshot of a layer: as long as there is one, its name is not dropped."""

    layer: bytes
    holder: str
    created_ns: int


class LabelRow(NamedTuple):
    """A label of a volume."""

    volume: bytes
    key: str
    value: str


class LineageRow(NamedTuple):
    """Where a volume comes from: `parent` is the volume that it was cloned or forked from, or None.

    `snapshot` and `guid` are those of the snapshot that it began as, which had that name then; None: it began as the head
    of its parent. The row outlives the volume, from `dropped_ns` on, as long as another row has it for its parent.
    """

    volume: bytes
    parent: bytes | None
    name: str
    snapshot: str | None
    guid: bytes | None
    created_ns: int
    dropped_ns: int | None = None


class ForkCallRow(NamedTuple):
    """A fork that was asked for under a key, and the names that it made, as JSON. `digest` is that of its arguments."""

    key: str
    digest: bytes
    names: str
    created_ns: int


class MachineRow(NamedTuple):
    """A machine: what runs from several disks, with a RAM volume of its own, which is held for as long as it runs.

    `configuration` is JSON that `machine/` understands. `stands_on` is the snapshot of it that it was at last.
    `resumes` 0: the next start boots from the disks as they are. 1: the disks are being put back to `stands_on`. 2: they are
    as `stands_on` says, and the next start goes on from its RAM; where that is None, as in a fork that never ran, from the
    head of the RAM volume, with `state_bytes` of device state behind it, which `recorded` (JSON) says more of.
    """

    id: bytes
    name: str
    ram: bytes
    configuration: str
    created_ns: int
    stands_on: bytes | None = None
    resumes: int = 0
    state_bytes: int = 0
    recorded: str = ""


class MachineDiskRow(NamedTuple):
    """A disk of a machine. `name` is what it is called there. If `owned`, the volume goes with the machine."""

    machine: bytes
    position: int
    name: str
    volume: bytes
    owned: int


class MachineSnapshotRow(NamedTuple):
    """A snapshot of a machine: `ram` is the layer of the RAM volume's snapshot, None if the machine was off.

    `number` grows in the order of taking. `state_bytes` of device state lie in the RAM volume behind the RAM.
    `configuration` and `recorded` are those of the machine then.
    """

    id: bytes
    machine: bytes
    name: str
    parent: bytes | None
    number: int
    mode: str
    note: str
    ram: bytes | None
    state_bytes: int
    configuration: str
    recorded: str
    created_ns: int


class MachineSnapshotDiskRow(NamedTuple):
    """The snapshot of a disk, by its layer, that a snapshot of its machine binds: its name is not dropped alone."""

    snapshot: bytes
    position: int
    layer: bytes


class WorkRow(NamedTuple):
    """Work that has to be done before it is forgotten.

    kind `map` or `segment`: wipe (policy `zero`) and unlink that file. While a file is being made, its row is here too,
    and its maker holds `lock_byte` alone. `scrub`: free the slots of that segment that its owner's map does not name.
    `volume`: unlink the lock file of a volume that was removed, and its unflushed records. `base-merge`: fold the
    layers up to that one into their base; the first `done_bytes` of the disk are durable in the base already.
    """

    id: int
    kind: str
    target: bytes
    lock_byte: int
    wipe: str
    done_bytes: int = 0


Row = TypeVar(
    "Row",
    BaseRow,
    LayerRow,
    SegmentRow,
    VolumeRow,
    SnapshotRow,
    HoldRow,
    LabelRow,
    LineageRow,
    ForkCallRow,
    MachineRow,
    MachineDiskRow,
    MachineSnapshotRow,
    MachineSnapshotDiskRow,
    WorkRow,
)
TABLES: dict[type, str] = {
    BaseRow: "bases",
    LayerRow: "layers",
    SegmentRow: "segments",
    VolumeRow: "volumes",
    SnapshotRow: "snapshots",
    HoldRow: "holds",
    LabelRow: "labels",
    LineageRow: "lineage",
    ForkCallRow: "fork_calls",
    MachineRow: "machines",
    MachineDiskRow: "machine_disks",
    MachineSnapshotRow: "machine_snapshots",
    MachineSnapshotDiskRow: "machine_snapshot_disks",
    WorkRow: "pending",
}
# The column that says which row is meant, where it is not `id`.
KEYS: dict[type, str] = {
    SnapshotRow: "layer",
    HoldRow: "layer",
    LabelRow: "volume",
    LineageRow: "volume",
    ForkCallRow: "key",
    MachineDiskRow: "volume",
    MachineSnapshotDiskRow: "layer",
}
COLUMNS: dict[type, tuple[str, ...]] = {kind: tuple(kind.__annotations__) for kind in TABLES}
STAGED_PREFIX = "@"


def new_id() -> bytes:
    """Draw a random 128-bit id."""
    return os.urandom(16)


def new_ids(count: int) -> list[bytes]:
    """Draw ids that lie side by side: their first 7 bytes count on from a random number, and the last 8 are random.

    So the rows of one call lie side by side in each tree of the catalog, and a commit writes few pages of it. They differ
    in the first 7 bytes, since these say which byte of the lock file stands for a volume. The byte between is random, too,
    and one for all.
    """
    first, *rest = unpack(f">{count + 1}Q", os.urandom(8 * (count + 1)))
    return [_ID.pack(first + (number << 8) & _HALF_MAX, half) for number, half in enumerate(rest)]
