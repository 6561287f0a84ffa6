"""Opening a volume that is to be served.

A group snapshot, or a fork of a disk as it is now, opens a volume that nobody holds, and closes it again. A server that
starts at that moment waits for it, for a bounded time. A volume that is served already is refused at once.
"""

import time

from onionskin.errors import StateError
from onionskin.storage.locks import volume_holder
from onionskin.store import Store
from onionskin.volume import Volume

WAIT_SECONDS = 2.0
_AGAIN_SECONDS = 0.01


def open_to_serve(store: Store, name: str, *, is_one_of_many: bool = False) -> Volume:
    """Open a volume for writing. Raise StateError if it is held for longer than a group or a fork holds it.

    One of many shares the file of its lock with the others of its store.
    """
    layout = store._opened.layout
    deadline = time.monotonic() + WAIT_SECONDS
    was_free = False
    while True:
        try:
            return store._open_to_write(name, is_one_of_many=is_one_of_many)
        except StateError:
            id = store._opened.catalog.volume(name).id
            is_held = volume_holder(layout.volume_lock(id)) is not None
            is_served = is_held and layout.volume_control(id).exists()
            if is_served or (was_free and not is_held) or time.monotonic() > deadline:
                raise
            was_free = was_free or not is_held  # given up meanwhile; if the next try fails too, that is not why
        time.sleep(_AGAIN_SECONDS)
