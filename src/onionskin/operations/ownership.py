"""What belongs to machines: volumes that are their disks or their RAM, and snapshots that a snapshot of a machine binds.

What must hold: each verb on volumes asks here, inside the transaction that changes something, so that no machine comes
between the question and the change. What a machine does itself names the machine, or is not asked.
"""

from collections.abc import Iterable

from onionskin.base.naming import some_of
from onionskin.catalog import Catalog
from onionskin.errors import StateError


def refuse_owned(
    catalog: Catalog, volumes: Iterable[bytes], what: str, advice: str, *, besides: bytes | None = None
) -> None:
    """Raise StateError where one of these volumes is a disk or the RAM of a machine other than `besides`.

    `what` says what would be done to it, and `advice` what to do instead, where {machine} stands for the machine's name.
    """
    found = {volume: row for volume, row in catalog.machines_of_volumes(volumes).items() if row.id != besides}
    if not found:
        return
    volume = min(found)
    names = {row.id: row.name for row in catalog.volumes_with_ids(found)}
    machine = found[volume].name
    raise StateError(
        f"volume {names.get(volume, volume.hex())!r} belongs to machine {machine!r}, so it is not {what} alone; "
        f"nothing was changed; {advice.format(machine=machine)}"
    )


def refuse_removed(catalog: Catalog, volumes: Iterable[bytes]) -> None:
    """Raise StateError where one of these volumes belongs to a machine. Inside the transaction that would remove them."""
    refuse_owned(catalog, volumes, "deleted", "delete the machine, with 'onionskin machine delete {machine}'")


def refuse_put_back(catalog: Catalog, volume: bytes, for_machine: bytes | None = None) -> None:
    """Raise StateError where a volume belongs to a machine, to which its disk must not change alone.

    Inside the transaction that would change it. `for_machine`: the machine on whose behalf that happens.
    """
    advice = "put the machine back, with 'onionskin machine revert {machine}@SNAPSHOT'"
    refuse_owned(catalog, [volume], "put back", advice, besides=for_machine)


def refuse_ram(catalog: Catalog, volume: bytes) -> None:
    """Raise StateError where a volume is the RAM of a machine, which is not opened for writing by itself."""
    machine = catalog.machine_of_ram(volume)
    if machine is not None:
        raise StateError(
            f"volume {machine.name + '.ram'!r} belongs to machine {machine.name!r}, as its RAM; start the machine, with "
            f"'onionskin machine start {machine.name}', or open the volume to read it"
        )


def refuse_bound(catalog: Catalog, layers: Iterable[bytes], what: str = "dropped") -> None:
    """Raise StateError where a snapshot of a machine binds the snapshot of one of these layers."""
    bound = catalog.machine_snapshots_of_layers(layers)
    if not bound:
        return
    names = []
    for layer, taken in bound.items():
        row, machine = catalog.snapshot_of_layer(layer), catalog.machine_with_id(taken.machine)
        volume = catalog.volume_with_id(row.volume) if row else None
        of = f"{volume.name}@{row.name}" if row and volume else layer.hex()  # in a damaged catalog
        names.append(f"{of} to {machine.name if machine else taken.machine.hex()}@{taken.name}")
    raise StateError(
        f"snapshots belong to snapshots of machines: {some_of(sorted(names))}; nothing was {what}; "
        "'onionskin machine discard' and 'onionskin machine merge' drop those as a whole"
    )
