"""Says where the files of a store are. No path is kept of a file in the store, so that it can be moved as a whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from onionskin.base.paths import FilePath

CATALOG = "catalog.db"
_ID_DIGITS = 32
DIRECTORIES = ("layers", "segments", "volumes")


class Layout:
    """The paths of one store. Making a path takes as long as a small system call, so those of the store are kept.

    Attributes
    ----------
    root : FilePath
        Its directory.
    catalog : FilePath
        The SQLite file. The store exists if and only if this file does.
    lock : FilePath
        The lock file: one byte for each segment and map file, and byte 0 for the store.
    reserve : FilePath
        The file whose room is given up when the disk is full and something must be freed.
    mark : FilePath
        The file that says how far the catalog had come when the store was last changed.
    layers, segments, volumes : FilePath
        The directories of block maps; of segments; and of the writers' locks, their unflushed records, and the servers'
        control sockets.
    """

    __slots__ = ("catalog", "layers", "lock", "mark", "reserve", "root", "segments", "volumes")

    def __init__(self, root: FilePath) -> None:
        self.root: FilePath = root
        self.catalog: FilePath = root / CATALOG
        self.lock: FilePath = root / "lock"
        self.reserve: FilePath = root / "reserve"
        self.mark: FilePath = root / "mark"
        layers, segments, volumes = DIRECTORIES
        self.layers: FilePath = root / layers
        self.segments: FilePath = root / segments
        self.volumes: FilePath = root / volumes

    @property
    def files(self) -> tuple[FilePath, ...]:
        """The files directly in the store's directory, those that SQLite makes included."""
        return (self.catalog, *self.made_by_sqlite, self.lock, self.reserve, self.mark)

    def is_of_store(self, name: str) -> bool:
        """Whether a name directly in the store's directory is one of a store, or of a catalog that is being made."""
        names = {*DIRECTORIES, *(file.name for file in self.files)}
        return name in names or (name.startswith(f"{CATALOG}.") and name.endswith((".new", ".new-journal")))

    @property
    def made_by_sqlite(self) -> tuple[FilePath, ...]:
        """The files that SQLite makes beside the catalog, and removes."""
        return tuple(self.catalog.with_name(f"{CATALOG}{suffix}") for suffix in ("-wal", "-shm", "-journal"))

    def map_file(self, map_id: bytes) -> FilePath:
        """The block map with this id."""
        return FilePath(self.map_path(map_id))

    def map_path(self, map_id: bytes) -> str:
        """That file as a text, for those who ask for ten thousand at once."""
        return f"{self.layers}/{map_id.hex()}.map"

    def segment_file(self, segment_id: bytes) -> FilePath:
        """The segment with this id."""
        return FilePath(self.segment_path(segment_id))

    def segment_path(self, segment_id: bytes) -> str:
        """That file as a text, for those who ask for ten thousand at once."""
        return f"{self.segments}/{segment_id.hex()}.seg"

    def volume_lock(self, uuid: bytes) -> FilePath:
        """The lock of the one writer of a volume."""
        return FilePath(self.volume_lock_path(uuid))

    def volume_lock_path(self, uuid: bytes) -> str:
        """That file as a text, for those who ask for a thousand at once."""
        return f"{self.volumes}/{uuid.hex()}.lock"

    def dirty_file(self, uuid: bytes) -> FilePath:
        """The records that the writer of a volume has not flushed. If it dies, the next one in the same boot reads them."""
        return FilePath(self.dirty_path(uuid))

    def dirty_path(self, uuid: bytes) -> str:
        """That file as a text."""
        return f"{self.volumes}/{uuid.hex()}.dirty"

    def staged_dirty_files(self, uuid: bytes) -> list[str]:
        """The names under which such a file is made. One that exists while nobody writes the volume was left by a kill."""
        stem = f"{self.volumes}/{uuid.hex()}.dirty."
        return [f"{stem}{number}" for number in range(4)]

    def files_of_volume(self, uuid: bytes) -> list[str]:
        """The files of a volume that go with its row: texts, as they may be asked for of a thousand volumes at once."""
        stem = f"{self.volumes}/{uuid.hex()}"
        return [
            *self.staged_dirty_files(uuid),
            f"{stem}.dirty",
            self.volume_control_path(uuid),
            self.volume_lock_path(uuid),
        ]

    def holds(self, path: FilePath) -> bool:
        """Whether a path leads into the store, by whatever links."""
        return path.resolve().is_relative_to(self.root.resolve())

    def volume_control(self, uuid: bytes) -> FilePath:
        """The control socket of the server of a volume."""
        return self.volumes / f"{uuid.hex()}.control"

    def volume_control_path(self, uuid: bytes) -> str:
        """The same as text, which takes a fraction of the time to make."""
        return f"{self.volumes}/{uuid.hex()}.control"


def bytes_in(path: FilePath | str) -> int:
    """Return the size of a file, and 0 if there is none."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - half the time of FilePath.stat
    except FileNotFoundError:
        return 0


def allocated_bytes(status: os.stat_result) -> int:
    """Return what a file takes on the disk."""
    return status.st_blocks * 512  # POSIX leaves the unit open, and Linux counts these


def allocated_files(directory: FilePath, suffix: str) -> Iterator[tuple[bytes, int]]:
    """Yield (id, bytes on the disk) of each file that has an id for its name. One that goes meanwhile may be left out."""
    with listed(directory) as entries:
        for entry in entries:
            if len(entry.name) == _ID_DIGITS + len(suffix) and entry.name.endswith(suffix):
                with suppress(FileNotFoundError, ValueError):
                    yield bytes.fromhex(entry.name[:_ID_DIGITS]), allocated_bytes(entry.stat(follow_symlinks=False))


@contextmanager
def listed(directory: FilePath) -> "Iterator[Iterator[os.DirEntry[str]]]":
    """List a directory of a store. A missing one counts as empty: a copy of a store may leave out empty directories."""
    try:
        entries = os.scandir(directory)
    except FileNotFoundError:
        yield iter(())
        return
    with entries:
        yield entries
