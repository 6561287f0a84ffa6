"""The state of the devices as a store has it: behind the RAM, in a layer of a RAM volume.

What must hold: it is whole, or an error, before anything is touched for it. QEMU finds damage only as it loads the state,
over disks that were put back by then, or loads it without a word.
"""

import struct
import zlib
from typing import TYPE_CHECKING

from onionskin.errors import FormatError
from onionskin.operations import reclaim
from onionskin.storage.open_head import OpenView
from onionskin.volume import Volume

_CLUSTER_BYTES = 16384  # as fast as QEMU's 65536, and half a MiB less
_DISK_BYTES = 1 << 20  # of the guest's data: QEMU wants some
# Magic, version, backing file (offset, length), bits of a cluster, size, encryption, L1 table (entries, offset), table of
# reference counts (offset, clusters), snapshots (count, offset), features (three sets), bits of a count, length; and then the
# kind of compression, none of which is used.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")

if TYPE_CHECKING:
    from onionskin.catalog import VolumeRow
    from onionskin.machine.hypervisor import Recorded
    from onionskin.store import Store


def open_layer(store: "Store", volume: "VolumeRow", layer: bytes) -> Volume:
    """Open a layer of a RAM volume for reading, by its id, as a snapshot is opened by its name."""
    opened = store._opened
    chain = opened.views.take(layer, lambda: opened.open_layer(layer, verify=False))
    try:
        view = OpenView(opened, volume, chain, snapshot=layer.hex(), free_waiting=reclaim.work_soon)
    except BaseException:
        opened.views.give_back(layer)
        raise
    opened.register(view)
    return Volume(view, store)


def empty_file() -> bytes:
    """Return an empty qcow2 file, in which a hypervisor stores a state beside the guest's data, of which there is none.

    It has a header without extensions, a table of reference counts, a block of them for the four clusters that there are,
    and a table of no L2 tables. QEMU itself makes the same by a job, which took 5 to 10 ms of a machine's first snapshot.
    """
    bits = _CLUSTER_BYTES.bit_length() - 1
    table, block, level1 = (number * _CLUSTER_BYTES for number in (1, 2, 3))
    parts = {
        0: _HEADER.pack(
            b"QFI\xfb", 3, 0, 0, bits, _DISK_BYTES, 0, 1, level1, table, 1, 0, 0, 0, 0, 0, 4, _HEADER.size, 0
        ),
        table: struct.pack(">Q", block),
        block: struct.pack(">4H", 1, 1, 1, 1),
        level1: struct.pack(">Q", 0),
    }
    return b"".join(part.ljust(_CLUSTER_BYTES, b"\0") for part in parts.values())


def crc32_of(state: "bytes | memoryview") -> str:
    """Return the checksum of a state, for `Recorded.state_crc32`."""
    return f"{zlib.crc32(state):08x}"


def read_state(volume: Volume, ram_bytes: int, state_bytes: int, crc32: str) -> bytes:
    """Return what a RAM volume, or a snapshot of it, has behind the RAM.

    Raises
    ------
    FormatError
        It is not what was stored there, as far as there is a checksum.
    """
    if not 0 < state_bytes <= volume.size_bytes - ram_bytes:
        raise FormatError(f"the state of the devices has {state_bytes} bytes, which are not behind the RAM")
    state = volume.read(ram_bytes, state_bytes)
    if crc32 and (now := crc32_of(state)) != crc32:
        raise FormatError(
            f"the state of the devices in the RAM volume {volume.name!r} is damaged: its checksum is {now}, and was {crc32} "
            "when it was taken; another snapshot of the machine may have a whole one"
        )
    return state


def refuse_damaged(store: "Store", ram: bytes, state_bytes: int, recorded: "Recorded") -> None:
    """Raise FormatError where the state of the devices that a snapshot of a machine has, in a layer of RAM, is damaged."""
    catalog = store._opened.catalog
    found = catalog.snapshot_of_layer(ram)
    volume = catalog.volume_with_id(found.volume) if found else None
    if volume is not None and recorded.state_crc32:
        with open_layer(store, volume, ram) as view:
            read_state(view, recorded.memory_bytes, state_bytes, recorded.state_crc32)
