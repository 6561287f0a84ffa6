"""This module checks a store: everything that its catalog names, and whatever else lies in its directories.

What must hold: a check writes, frees and makes nothing, so that it can be run on a damaged store and on a read-only
file system. It reads each layer's map once, and compares it with the segments that the layer owns. It also compares the
layer with the layer below. If all layers of a chain pass these checks, the chain can be opened.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from errno import EIO, ENXIO
from typing import TYPE_CHECKING

from onionskin.base.files import CANNOT_LOOK, read_all
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.modes import is_shared
from onionskin.base.paths import FilePath
from onionskin.catalog import BaseRow, Catalog, LayerRow, SegmentRow, SnapshotRow, VolumeRow, WorkRow
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.kernels._maplog import MAGIC_SEGMENT, decode_header
from onionskin.operations.locked_maps import locked_maps
from onionskin.operations.unflushed import has_unflushed
from onionskin.storage.block_maps import load_map, open_map
from onionskin.storage.chain import ChainBusyError, check_base, refuse_written_next
from onionskin.storage.layout import listed
from onionskin.storage.locks import stands_for_many, volume_holder
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import Severity

SEGMENTS_MAX = 0xFFFE  # the segments that a chain can have, because an index has 16 bits for their numbers
RESTORE = "restore the file from a copy of the store"
_RESTORE_CATALOG = "restore the catalog from a copy"
_OUR_NAME = re.compile(r"[0-9a-f]{32}\.(seg|map|lock|control|dirty(\.[0-3])?)")

_STAGED_DIRTY_FILES = [f"dirty.{number}" for number in range(4)]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `check` found. `severity` is `error` (data is at risk) or `notice` (work is left)."""

    severity: "Severity"
    what: str
    where: str
    advice: str


@dataclass(slots=True)
class _Rows:
    """All rows of a store, as they were at one time."""

    layers: list[LayerRow]
    segments: list[SegmentRow]
    volumes: list[VolumeRow]
    snapshots: list[SnapshotRow]
    bases: list[BaseRow]
    work: list[WorkRow]
    segments_of: dict[bytes, list[SegmentRow]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.segments:
            self.segments_of.setdefault(row.layer, []).append(row)


def check(store: OpenStore) -> list[Problem]:
    """Check everything that the catalog names. This reads headers and maps, and no block data."""
    # The directories are listed before the catalog is read: a file that is made or freed meanwhile has a row then.
    listed = list(_list_files(store))
    with locked_maps(store, lambda: _read_rows(store), lambda rows: rows.layers) as rows:
        unsound = _unsound_rows(store)
        problems = [*unsound, *_check_layers(store, rows), *_check_chains(store, rows)]
        problems += _check_bases(store, rows)
        problems += _check_left(store, rows)
    problems += [Problem("notice", f"pending work: {row.kind}", row.target.hex(), _when_done(row)) for row in rows.work]
    orphans = (
        f"{_RESTORE_CATALOG} first: a row that cannot be read may name it" if unsound else "'check --repair' removes it"
    )
    return [*problems, *_check_files(rows, listed, orphans), *_check_modes(store)]


def _when_done(work: WorkRow) -> str:
    if work.kind == "base-merge":
        return "end it from its volume, with 'onionskin merge --into-base'"
    return "it is done when the store is next written"


def _read_rows(store: OpenStore) -> _Rows:
    catalog = store.catalog
    return _Rows(
        catalog.all_sound(LayerRow),
        catalog.all_sound(SegmentRow),
        catalog.all_sound(VolumeRow),
        catalog.all_sound(SnapshotRow),
        catalog.all_sound(BaseRow),
        catalog.all_sound(WorkRow),
    )


def _unsound_rows(store: OpenStore) -> list[Problem]:
    why = store.catalog.is_not_its_own
    other = [] if why is None else [Problem("error", why, str(store.layout.catalog), "as it says")]
    return other + [
        Problem(
            "error", what, f"{store.layout.catalog}{f', table {table}, row {id}' if table else ''}", _RESTORE_CATALOG
        )
        for table, id, what in store.catalog.unsound_rows()
    ]


# ---- layers and their segments ----


def _check_layers(store: OpenStore, rows: _Rows) -> Iterator[Problem]:
    heads = {volume.head: volume for volume in rows.volumes}
    for layer in rows.layers:
        segments = rows.segments_of.get(layer.id, [])
        try:
            ends = _slots_named(store, layer)
        except (OnionskinError, OSError) as error:
            yield Problem("error", str(error), str(store.layout.map_file(layer.map_id)), RESTORE)
            if layer.id in heads:
                yield from _data_without_map(store, heads[layer.id], layer, {}, segments)
            continue
        yield from _check_segments(store, layer, ends, segments)
        if layer.id in heads:
            yield from _data_without_map(store, heads[layer.id], layer, ends, segments)
            yield from _check_next(store, heads[layer.id], segments)


def _check_next(store: OpenStore, volume: VolumeRow, segments: list[SegmentRow]) -> Iterator[Problem]:
    """Report a head whose successor was written to, so that an opening refuses it: the catalog is older than the files."""
    for row in segments:
        try:
            if row.role == "spare":
                refuse_written_next(store.layout, row.id)
        except FormatError as error:
            if store.catalog.head_of(volume) == volume.head:  # else it became the head since the rows were read
                yield Problem("error", str(error), f"volume {volume.name}", "as it says")


def _slots_named(store: OpenStore, layer: LayerRow) -> dict[bytes, int]:
    """Return one more than the highest slot that a layer's map names in each segment.

    The map of a head must hold at least what the catalog says is durable in it.
    """
    if not layer.map_length and (layer.sealed or not os.path.lexists(store.layout.map_file(layer.map_id))):
        return {}
    if layer.map_length and not layer.sealed:
        load_map(store, layer._replace(sealed=1)).close()
    with closing(open_map(store, layer)) as layer_map:
        return {id: end for id, (_, end) in layer_map.segment_use().items()}


def _check_segments(
    store: OpenStore, layer: LayerRow, ends: dict[bytes, int], segments: list[SegmentRow]
) -> Iterator[Problem]:
    """Compare the slots that a map names with the segments that the map's layer owns, and with their files."""
    owned = {row.id for row in segments}
    for id in ends:
        if id not in owned:
            where = str(store.layout.segment_file(id))
            yield Problem("error", "a map names a segment of another layer", where, RESTORE)
    for row in segments:
        end = ends.get(row.id, 0)
        if row.role == "sealed":
            end = max(end, row.slots)
        elif not end and not layer.sealed:
            continue  # the file is made when it is first needed
        path = store.layout.segment_file(row.id)
        fault = _segment_fault(path, row.id, layer.block_size, end)
        # A segment that was freed meanwhile may be overwritten or gone. Its row was removed before that.
        if fault and store.catalog.has_segment(row.id):
            yield Problem("error", fault, str(path), RESTORE)


def _segment_fault(path: FilePath, id: bytes, block_size: int, slots: int) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in CANNOT_LOOK - {EIO}:  # that is no fault of the segment
            raise
        return str(error)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "it is not a regular file"
        header = decode_header(read_all(descriptor, HEADER_BYTES), MAGIC_SEGMENT, path=str(path))
        size = os.fstat(descriptor).st_size
    except (OSError, FormatError) as error:
        return str(error)
    finally:
        os.close(descriptor)
    if header.uuid != id or header.block_size != block_size:
        return "it is not the segment that the catalog names"
    if size < HEADER_BYTES + slots * block_size:
        return f"it is truncated: {size} bytes, and slot {slots - 1} is named"
    return None


def _data_without_map(
    store: OpenStore, volume: VolumeRow, head: LayerRow, ends: dict[bytes, int], segments: list[SegmentRow]
) -> Iterator[Problem]:
    """Report data in a head's own segments behind the last block that its map names, unless the volume has a writer."""
    found = []
    for path, id in ((store.layout.segment_file(row.id), row.id) for row in segments if row.role == "own"):
        offset = _data_from(path, HEADER_BYTES + ends.get(id, 0) * head.block_size)
        if offset is not None:
            found.append((path, offset))
    if found and not _is_held(store, volume):
        for path, offset in found:
            yield Problem(
                "notice",
                f"data that no map names, from byte {offset} on: written and never flushed, or its map is not the "
                f"one that volume {volume.name!r} had",
                str(path),
                "opening the volume for writing takes it over, frees it, or says why it cannot; if its map was lost or "
                "replaced, put that back first",
            )


def _data_from(path: FilePath, offset: int) -> int | None:
    """Return where the first data at or behind an offset of a file lies, or None if there is no data or no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in CANNOT_LOOK:
            raise
        return None  # `_check_segments` reports a file that is needed
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        return None if error.errno == ENXIO else offset
    finally:
        os.close(descriptor)


def _check_left(store: OpenStore, rows: _Rows) -> Iterator[Problem]:
    """Report what a killed process left of a head if an opening would refuse to take it over.

    No lock is taken that would keep somebody from opening the volume. So if somebody does so meanwhile, nothing is said.
    """
    for volume in rows.volumes:
        dirty = store.layout.dirty_file(volume.id)
        if not has_unflushed(store, volume.id) or _is_held(store, volume):
            continue
        found = _looks(dirty)
        try:
            opened = store.open_layer(volume.head, dirty=dirty)
        except ChainBusyError:
            pass  # since the rows were read, others got another head for it; or they wipe, and an opening waits for them
        except StateError as error:
            if not _is_held(store, volume) and _looks(dirty) == found:
                yield Problem("error", f"volume {volume.name!r} cannot be opened: {error}", str(dirty), "as it says")
        except (OnionskinError, OSError):
            pass  # the layers and the bases are checked by themselves
        else:
            opened.path.close()
            opened.locks.close()
            if opened.base_lock:
                opened.base_lock.close()


def _is_held(store: OpenStore, volume: VolumeRow) -> bool:
    try:
        return volume_holder(store.layout.volume_lock(volume.id)) is not None
    except (StateError, FormatError):
        return False  # it is no lock, so nobody has one: `_check_files` reports it


def _looks(path: FilePath) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# ---- chains and bases ----


def _check_chains(store: OpenStore, rows: _Rows) -> Iterator[Problem]:
    """Check how layers stand on each other.

    Each layer or base that is named must exist, and no chain may have more segments than an index can number.
    """
    layers, bases = {layer.id: layer for layer in rows.layers}, {base.id for base in rows.bases}
    counts = _segments_in_chains(rows)
    for name, id in _tops(rows):
        if id not in layers:
            yield Problem("error", "its layer is not in the catalog", name, _RESTORE_CATALOG)
        elif id not in counts:
            yield Problem("error", "the layers below it do not end", name, _RESTORE_CATALOG)
        elif counts[id] > SEGMENTS_MAX:
            what = f"it stands on {counts[id]} segments, and no more than {SEGMENTS_MAX} can be opened"
            yield Problem("error", what, name, "merge some of the snapshots below it")
    for layer in rows.layers:
        fault = _fault_below(layer, layers, bases)
        if fault:
            where = f"{store.layout.catalog}, layer {layer.id.hex()}"
            yield Problem("error", fault, where, _RESTORE_CATALOG)


def _tops(rows: _Rows) -> Iterator[tuple[str, bytes]]:
    """Yield everything that can be opened, as a name for messages and the id of the top layer."""
    names = {volume.id: volume.name for volume in rows.volumes}
    for volume in rows.volumes:
        yield f"volume {volume.name}", volume.head
    for row in rows.snapshots:
        yield f"snapshot {names.get(row.volume, row.volume.hex())}@{row.name}", row.layer


def _segments_in_chains(rows: _Rows) -> dict[bytes, int]:
    """Count the segments in the chain of each layer. A layer above a circle or above a missing layer has no count."""
    children: dict[bytes | None, list[bytes]] = {}
    for layer in rows.layers:
        children.setdefault(layer.parent, []).append(layer.id)
    counts: dict[bytes, int] = {}
    todo = [(id, 0) for id in children.get(None, [])]
    while todo:
        id, below = todo.pop()
        counts[id] = below + len(rows.segments_of.get(id, []))
        todo += [(child, counts[id]) for child in children.get(id, [])]
    return counts


def _fault_below(layer: LayerRow, layers: dict[bytes, LayerRow], bases: set[bytes]) -> str | None:
    if layer.base is not None and layer.base not in bases:
        return "it stands on a base that is not in the catalog"
    if layer.parent is None:
        return None
    parent = layers.get(layer.parent)
    if parent is None:
        return "it stands on a layer that is not in the catalog"
    if parent.block_size != layer.block_size:
        return f"it has blocks of {layer.block_size} bytes, and the layer below it of {parent.block_size}"
    return None if parent.sealed else "it stands on a layer that is not sealed"


def _check_bases(store: OpenStore, rows: _Rows) -> Iterator[Problem]:
    for base in rows.bases:
        row: BaseRow | None = base
        while row:
            try:
                check_base(store.catalog, row)
                break
            except (OnionskinError, OSError) as error:
                before, row = row, _other_row(store.catalog, row)
                if row == before:
                    yield Problem("error", str(error), before.path, "see 'onionskin relocate --help'")
                    break


def _other_row(catalog: Catalog, base: BaseRow) -> BaseRow | None:
    """Read the row of a base again, because its file is not as the row says. A merge into it may have ended meanwhile.

    Returns None if the row is gone. Returns None too if a merge into the base is unfinished, which its row of pending
    work shows.
    """
    with catalog.reading():
        merged = {layer.base for work in catalog.base_merges() for layer in catalog.chain(work.target)}
        return None if base.id in merged else catalog.base_with_id(base.id)


# ---- the directories ----


def _list_files(store: OpenStore) -> Iterator[os.DirEntry[str]]:
    for directory in (store.layout.layers, store.layout.segments, store.layout.volumes):
        with listed(directory) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)


def _check_files(rows: _Rows, listed: list[os.DirEntry[str]], orphans: str) -> Iterator[Problem]:
    named, needed = _named_files(rows), _files_of_openings(rows)
    for entry in listed:
        path = FilePath(entry.path)
        ours = bool(_OUR_NAME.fullmatch(entry.name))
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue  # the file was removed meanwhile
        what = _foreign(found, ours)
        if what and ours and entry.name.endswith(".lock") and stands_for_many(path):
            what = None  # a server holds several volumes, or did until it died
        if what and entry.name in needed and not stat.S_ISREG(found.st_mode):
            yield Problem(
                "error", what, str(path), "its volume cannot be opened while it is there; move it out of the store"
            )
        elif what:
            yield Problem("notice", what, str(path), "nothing here touches it; move it out of the store")
        if ours and not what and entry.name not in named:
            yield Problem("notice", "a file that no row names", str(path), orphans)


def _check_modes(store: OpenStore) -> Iterator[Problem]:
    """Report modes that give rights to other users. A user who may read the lock files can keep the owner out."""
    layout = store.layout
    shared = is_shared(layout.root)
    for path in (layout.root, layout.layers, layout.segments, layout.volumes, *layout.files):
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            directory = stat.S_ISDIR(mode)
            if mode & (0o007 if shared else 0o077):
                wanted = ("2770" if directory else "660") if shared else ("700" if directory else "600")
                who = "the owner and the group" if shared else "the owner"
                advice = f"nobody but {who} needs it: chmod {wanted}"
                yield Problem(
                    "notice", f"its mode is {stat.S_IMODE(mode):o}, so other users may get at it", str(path), advice
                )


def _named_files(rows: _Rows) -> set[str]:
    named = {f"{row.map_id.hex()}.map" for row in rows.layers} | {f"{row.id.hex()}.seg" for row in rows.segments}
    # The id of a spare segment is also the id of the next head's map.
    named |= {f"{row.id.hex()}.map" for row in rows.segments if row.role == "spare"}
    for row in rows.work:
        named |= {f"{row.target.hex()}.map", f"{row.target.hex()}.seg"}
    volumes = [volume.id for volume in rows.volumes] + [row.target for row in rows.work if row.kind == "volume"]
    for id in volumes:
        named |= {f"{id.hex()}.{kind}" for kind in ("lock", "control", "dirty")}
    return named


def _files_of_openings(rows: _Rows) -> set[str]:
    """Return the names that an opening opens or makes, so that it is refused where something else has one of them."""
    needed = {f"{row.map_id.hex()}.map" for row in rows.layers} | {f"{row.id.hex()}.seg" for row in rows.segments}
    return needed | {f"{volume.id.hex()}.lock" for volume in rows.volumes}


def _foreign(found: os.stat_result, ours: bool) -> str | None:
    """Return why an entry of a store's directories is not a file of the store, or None if it is one."""
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link, which no file of a store is"
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        return f"a file with {found.st_nlink} names: what is written or wiped here changes it under the others too"
    if ours and (stat.S_ISREG(found.st_mode) or stat.S_ISSOCK(found.st_mode)):
        return None
    return "a directory that is not the store's" if stat.S_ISDIR(found.st_mode) else "a file that is not the store's"


__all__ = ["Problem", "check"]
