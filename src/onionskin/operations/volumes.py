"""What is done to a volume by its name or its id, whether it is open or not.

What must hold: what a name means is asked inside the transaction that changes it.
"""

from onionskin.base.naming import check_name
from onionskin.catalog import VolumeRow
from onionskin.errors import VolumeExistsError, VolumeNotFoundError
from onionskin.storage.open_store import OpenStore


def rename(store: OpenStore, name: str, new_name: str) -> None:
    """Give the volume that has a name now another one."""
    new_name = check_name("volume", new_name)

    def change() -> None:
        row = store.catalog.volume(name)
        refuse_taken(store, new_name)
        store.catalog.update(VolumeRow, row.id, name=new_name)

    store.change(change)


def rename_volume(store: OpenStore, id: bytes, new_name: str) -> None:
    """Give the volume with this id another name, whatever it is called now."""
    new_name = check_name("volume", new_name)

    def change() -> None:
        if store.catalog.volume_with_id(id) is None:
            raise VolumeNotFoundError(f"the volume {id.hex()} of {store.path} is gone")
        refuse_taken(store, new_name)
        store.catalog.update(VolumeRow, id, name=new_name)

    store.change(change)


def refuse_taken(store: OpenStore, name: str) -> None:
    """Raise VolumeExistsError where there is a volume of that name."""
    if store.catalog.has_volume_named(name):
        raise VolumeExistsError(f"the store {store.path} already has a volume {name!r}; choose another name")
