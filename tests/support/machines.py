"""Machines for tests of the store, without a hypervisor: what one would write to RAM is written here."""

from collections.abc import Mapping, Sequence

import onionskin
from onionskin.operations import machines

BLOCK = 4096
MEMORY = 1 << 20
CONFIGURATION = '{"memory_bytes":1048576}'


def make_machine(store: onionskin.Store, name: str, disks: Sequence[str], wipe: str | None = None) -> None:
    """Make a machine with a MiB of RAM."""
    machines.create(store._opened, name, disks, configuration=CONFIGURATION, memory_bytes=MEMORY, wipe=wipe)


def snapshot_live(
    store: onionskin.Store,
    name: str,
    snapshot: str | None,
    written: Mapping[str, bytes],
    *,
    recorded: str = '{"version":"7.2"}',
) -> None:
    """Take a snapshot as of a machine that runs: `written` goes to the beginning of its volumes before it."""
    about = store.machine_info(name)
    with store._open_to_write(about.ram, for_machine=True) as ram:
        machines.note_running(store._opened, machines.find(store._opened.catalog, name).id)
        for volume, data in written.items():
            if volume == about.ram:
                ram.write(0, data)
                continue
            with store.open(volume) as disk:
                disk.write(0, data)
        with store._cut_machine(name) as cut:
            cut.seal()
            cut.commit(
                snapshot,
                mode="live",
                configuration=CONFIGURATION,
                recorded=recorded,
                ram=ram._opened.to_write(),
                state_bytes=BLOCK,
            )


def read_head(store: onionskin.Store, volume: str, length: int = 4) -> bytes:
    """Read the beginning of a volume that nobody has open."""
    with store.open(volume, mode="r") as head:
        return head.read(0, length)
