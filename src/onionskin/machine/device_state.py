"""The state of the devices as a store has it: behind the RAM, in a layer of a RAM volume.

What must hold: it is whole, or an error, before anything is touched for it. QEMU finds damage only as it loads the state,
over disks that were put back by then, or loads it without a word.
"""

import zlib
from typing import TYPE_CHECKING

from onionskin.errors import FormatError
from onionskin.operations import reclaim
from onionskin.storage.open_head import OpenView
from onionskin.volume import Volume

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
