"""Reads the recorder's log and makes the states that a crash may leave.

What a crash may leave
----------------------

POSIX promises nothing but fsync. File systems promise a little more, and an engine must hold on the weakest
of those in use. The model is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI
2014) for what may be missing, and of CrashMonkey (Mohan et al., OSDI 2018) for where to look; its guarantees
are those that ext4 (data=ordered) and XFS share:

1. Bytes. A write is durable once an fsync or fdatasync of its file that *began after the write ended* has
   returned. Until then each of its 512-byte sectors is, by itself, old or new, and so writes are also
   reordered freely. A sector is never a mixture: drives write sectors whole, and what is written back is a
   page of the page cache as it was at one moment, so bytes bring all earlier ones of their sector along.
2. Sizes. Changes of one file's size (growing writes, truncations, allocations) reach the medium in their
   order: a prefix of them persists. Size and bytes are independent: where a file has grown and the bytes are
   missing, it reads zero, never old contents of the medium. Bytes past the persisted size do not exist. What
   is written after a truncation into the range that it cut off cannot persist without it.
3. Holes. Punching and zeroing a range is, until the next sync, done or not done for each 4 KiB of it.
4. Names. Creating, linking, unlinking and renaming are atomic each. Those of one directory persist in order,
   as a prefix; directories are independent of each other, except that an operation on two of them persists in
   both. They are durable once an fsync of the directory that began after them has returned, and may persist
   earlier, with or without the bytes and sizes of the files that they name. An fsync of a file does not make
   its name durable (POSIX; ext4 and XFS do it for new files, which the model does not grant).
5. sync and syncfs do 1 to 4 for everything. O_SYNC, O_DSYNC and sync_file_range are granted nothing.

A state is a point in the log (everything up to there was called) and the set of the operations not yet
durable at that point which persisted. Kinds of states:

    prefix   all of them: what SIGKILL leaves, and an orderly medium
    durable  none of them
    names    the names, but no bytes and no sizes: the file of length zero that a rename without fsync leaves
    bytes    bytes and sizes, but no names
    zeros    names and sizes, but no bytes
    dropped  all but one (and what cannot persist without it); of a growing write also its bytes alone
    torn     all, but one write only in part: first sector alone, last alone, all but the first, random ones
    random   a random set, with random sectors of writes

The points of `dropped`, `torn` and `random` are those at which the set is largest: before a sync returns,
before a marker, and at the end; a set at any other point is also a set at the next of these. Files that are mapped are left
out: those of SQLite, -shm, which it makes again, and what a volume has not flushed, .dirty, which is of one boot only.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTOR_BYTES = 512
PAGE_BYTES = 4096
ZERO_PAGE = bytes(PAGE_BYTES)
KINDS = ("prefix", "durable", "names", "bytes", "zeros", "dropped", "torn", "random")
RANDOM_STATES_PER_POINT = 4
TORN_STATES_PER_WRITE = 5

RECORD = struct.Struct("<IIQQqqqQQIIII")
RECORD_MAGIC = 0x3152434F
CREATE, TRUNCATE, WRITE, ALLOCATE, RENAME, UNLINK, LINK, SYNC_BEGIN, SYNC_END, MARK, MAP, MSYNC, REFUSED = range(1, 14)
CREATE_DIRECTORY, CREATE_UNNAMED = 1, 2
SYNC_ALL = 4
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


def _is_mapped(name: str) -> bool:
    return name.endswith("-shm") or ".dirty" in name


class LogError(Exception):
    """The log is not one of the recorder's, or the program did something that the model has no rule for."""


# ---- the log ----


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the log."""

    kind: int
    inode: tuple[int, int]
    offset: int
    length: int
    mtime_ns: int
    sync: int
    flags: int
    path: str
    path2: str
    data: bytes


def parse_log(log: bytes) -> tuple[list[Entry], bool]:
    """The records of a log, and whether its last one is cut off (the program was killed while writing it)."""
    entries: list[Entry] = []
    position = 0
    while position < len(log):
        if len(log) - position < RECORD.size:
            return entries, True
        (
            magic,
            kind,
            inode,
            device,
            offset,
            length,
            mtime_ns,
            sync,
            data_bytes,
            flags,
            path_bytes,
            path2_bytes,
            _,
        ) = RECORD.unpack_from(log, position)
        if magic != RECORD_MAGIC or not CREATE <= kind <= REFUSED:
            raise LogError(f"no record of the recorder at byte {position} of the log")
        path_at = position + RECORD.size
        path2_at = path_at + path_bytes
        data_at = path2_at + path2_bytes
        end = data_at + data_bytes
        if end > len(log):
            return entries, True
        path = log[path_at:path2_at].decode("utf-8", "surrogateescape")
        path2 = log[path2_at:data_at].decode("utf-8", "surrogateescape")
        data = bytes(log[data_at:end])
        entries.append(Entry(kind, (device, inode), offset, length, mtime_ns, sync, flags, path, path2, data))
        position = end
    return entries, False


# ---- file images ----


class Image:
    """The bytes of one file, as pages: copies share them.

    A page that was written is data, also where it is zero; what is not among the pages is a hole. A program that opens
    what another left tells them apart (SEEK_DATA). Zeros that a killed program had not synced are no hole in the page cache,
    and whoever wipes writes and syncs them again.
    """

    __slots__ = ("_digest", "mtime_ns", "pages", "size_bytes")

    def __init__(self, size_bytes: int = 0, pages: dict[int, bytes] | None = None, mtime_ns: int = 0) -> None:
        self.size_bytes = size_bytes
        self.pages: dict[int, bytes] = {} if pages is None else pages
        self.mtime_ns = mtime_ns
        self._digest: bytes | None = None

    @classmethod
    def of(cls, contents: bytes, mtime_ns: int = 0) -> Image:
        image = cls(len(contents), mtime_ns=mtime_ns)
        image.put(0, contents)
        return image

    def copy(self) -> Image:
        image = Image(self.size_bytes, dict(self.pages), self.mtime_ns)
        image._digest = self._digest
        return image

    def resize(self, size_bytes: int) -> None:
        self._digest = None
        if size_bytes < self.size_bytes:
            last, inside = divmod(size_bytes, PAGE_BYTES)
            self.pages = {index: page for index, page in self.pages.items() if index < last + (inside > 0)}
            if inside and last in self.pages:
                self._set(last, self.pages[last][:inside] + bytes(PAGE_BYTES - inside))
        self.size_bytes = size_bytes

    def put(self, offset: int, data: bytes) -> None:
        """Puts bytes where the file has room for them; what would lie past its end is left out."""
        self._digest = None
        data = data[: max(0, self.size_bytes - offset)]
        done = 0
        while done < len(data):
            index, inside = divmod(offset + done, PAGE_BYTES)
            part = data[done : done + PAGE_BYTES - inside]
            if len(part) == PAGE_BYTES:
                self._set(index, part)
            else:
                page = self.pages.get(index, bytes(PAGE_BYTES))
                self._set(index, page[:inside] + part + page[inside + len(part) :])
            done += len(part)

    def clear(self, offset: int, length: int) -> None:
        """Makes a range read zero, without the cost of its length where it holds nothing."""
        self._digest = None
        end = min(offset + length, self.size_bytes)
        first, last = -(-offset // PAGE_BYTES), end // PAGE_BYTES
        if last < first:
            self._clear_part(offset, end)
            return
        self._clear_part(offset, first * PAGE_BYTES)
        self._clear_part(last * PAGE_BYTES, end)
        if last - first > len(self.pages):
            self.pages = {index: page for index, page in self.pages.items() if not first <= index < last}
        else:
            for index in range(first, last):
                self.pages.pop(index, None)

    def _clear_part(self, begin: int, end: int) -> None:
        """Makes a part of one page read zero; where that is a hole it stays one."""
        if begin < end and begin // PAGE_BYTES in self.pages:
            self.put(begin, bytes(end - begin))

    def _set(self, index: int, page: bytes) -> None:
        self.pages[index] = ZERO_PAGE if page == ZERO_PAGE else page

    def is_zero(self, begin: int, end: int) -> bool:
        """Whether a range reads zero, as far as the file has it."""
        for index, page in self.pages.items():
            start = index * PAGE_BYTES
            part = page[max(0, begin - start) : max(0, end - start)]
            if part.count(0) < len(part):
                return False
        return True

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of each stretch that is data, clipped to the size."""
        run: list[bytes] = []
        start = -1
        for index in sorted(self.pages):
            if run and index != start + len(run):
                yield start * PAGE_BYTES, b"".join(run)
                run = []
            if not run:
                start = index
            run.append(self.pages[index])
        if run:
            yield start * PAGE_BYTES, b"".join(run)[: self.size_bytes - start * PAGE_BYTES]

    def contents(self) -> bytes:
        whole = bytearray(self.size_bytes)
        for offset, data in self.runs():
            whole[offset : offset + len(data)] = data
        return bytes(whole)

    def digest(self) -> bytes:
        if self._digest is not None:
            return self._digest
        state = hashlib.blake2b(str(self.size_bytes).encode(), digest_size=16)
        for offset, data in self.runs():
            state.update(b"%d:" % offset)
            state.update(data)
        self._digest = state.digest()
        return self._digest


# ---- operations that are not yet durable ----


@dataclass(slots=True, eq=False)
class FileChange:
    """A change of one file's bytes or size."""

    number: int  # of the entry in the log
    file: int
    label: str
    offset: int
    length: int
    data: bytes | None  # None: the range is made zero
    resizes_to: int | None  # the size after it, where it differs from the size before
    mtime_ns: int
    unit: int  # bytes that persist together

    def units(self) -> int:
        """How many sectors (or pages, of a hole) the change touches."""
        if self.length == 0:
            return 0
        return -(-(self.offset + self.length) // self.unit) - self.offset // self.unit

    def pieces(self, chosen: frozenset[int]) -> Iterator[tuple[int, int]]:
        """(offset, length) of the chosen units."""
        first = self.offset // self.unit
        for index in sorted(chosen):
            start = max(self.offset, (first + index) * self.unit)
            end = min(self.offset + self.length, (first + index + 1) * self.unit)
            yield start, end - start

    def apply_bytes(self, image: Image, offset: int, length: int) -> None:
        if self.data is None:
            image.clear(offset, length)
        else:
            image.put(offset, self.data[offset - self.offset : offset - self.offset + length])


@dataclass(slots=True, eq=False)
class NameChange:
    """A change of directory entries that persists as a whole: (directory, name) -> file, or None where it
    goes."""

    number: int
    label: str
    edits: list[tuple[int, str, int | None]]

    def directories(self) -> set[int]:
        return {directory for directory, _, _ in self.edits}


Change = FileChange | NameChange
Entries = dict[int, dict[str, int]]


@dataclass
class Selection:
    """Which of the changes that are not durable have persisted."""

    names: Callable[[NameChange], bool] = lambda change: True
    sizes: Callable[[FileChange], bool] = lambda change: True
    # None: all of the change's units
    units: Callable[[FileChange], frozenset[int] | None] = lambda change: None


ALL = Selection()
NOTHING: frozenset[int] = frozenset()


def settle_file(image: Image, changes: Sequence[FileChange], selection: Selection) -> Image:
    """What a file holds when the selected part of `changes` has persisted."""
    image = image.copy()
    sizes_persist = True
    cut_at: int | None = None  # the least size of a truncation that has not persisted: nothing later reaches past it
    cuts: list[FileChange] = []  # truncations that have persisted
    for position, change in enumerate(changes):
        if change.resizes_to is not None:
            sizes_persist = sizes_persist and selection.sizes(change)
            if sizes_persist:
                if change.resizes_to < image.size_bytes:
                    cuts.append(change)
                image.resize(change.resizes_to)
            elif change.length == 0 and (cut_at is None or change.resizes_to < cut_at):
                cut_at = change.resizes_to
            if sizes_persist:
                image.mtime_ns = change.mtime_ns
        if change.length == 0:
            continue
        chosen = selection.units(change)
        pieces = [(change.offset, change.length)] if chosen is None else change.pieces(chosen)
        for offset, length in pieces:
            if cut_at is not None:
                length = min(length, cut_at - offset)
            if length > 0:
                bring_along(image, changes[:position], cuts, offset, length)
                change.apply_bytes(image, offset, length)
                image.mtime_ns = change.mtime_ns
    return image


def bring_along(
    image: Image, earlier: Sequence[FileChange], cuts: Sequence[FileChange], offset: int, length: int
) -> None:
    """Makes the sectors that a range covers only in part be as the program saw them just before."""
    end = offset + length
    first, last = offset // SECTOR_BYTES, (end - 1) // SECTOR_BYTES
    for sector in {first} | {last}:
        start, stop = sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES
        if offset <= start and stop <= end:
            continue
        for change in earlier:
            if change in cuts and change.resizes_to is not None and change.resizes_to < stop:
                cleared = max(start, change.resizes_to)
                image.clear(cleared, stop - cleared)
            piece, piece_end = max(start, change.offset), min(stop, change.offset + change.length)
            if piece < piece_end:
                change.apply_bytes(image, piece, piece_end - piece)


def settle_names(entries: Entries, changes: Sequence[NameChange], selection: Selection) -> Entries:
    """The directory entries when the selected changes have persisted: of each directory, a prefix."""
    entries = {directory: dict(names) for directory, names in entries.items()}
    stopped: set[int] = set()
    for change in changes:
        directories = change.directories()
        if stopped & directories or not selection.names(change):
            stopped |= directories
            continue
        apply_names(entries, change)
    return entries


def apply_names(entries: Entries, change: NameChange) -> None:
    for directory, name, file in change.edits:
        if file is None:
            entries.setdefault(directory, {}).pop(name, None)
        else:
            entries.setdefault(directory, {})[name] = file


# ---- the file tree while the log is replayed ----

ROOT = 0


@dataclass(frozen=True, slots=True)
class InitialFile:
    """A file or directory that was there before recording began: durable."""

    path: str
    inode: tuple[int, int]
    is_directory: bool
    contents: bytes
    mtime_ns: int


class Tree:
    """Replays the log: what the program sees, what is durable, and the changes between the two."""

    def __init__(self, initial: Sequence[InitialFile], root_inode: tuple[int, int]) -> None:
        self.by_inode: dict[tuple[int, int], int] = {root_inode: ROOT}
        self.is_directory: dict[int, bool] = {ROOT: True}
        self.label: dict[int, str] = {ROOT: "."}
        self.entries: Entries = {ROOT: {}}
        self.current: dict[int, Image] = {}
        self.durable: dict[int, Image] = {}
        self.initial_files: dict[int, str] = {}
        self.begun: dict[int, int] = {}
        self.ignored: set[int] = set()
        self.file_changes: dict[int, list[FileChange]] = {}
        self.name_changes: list[NameChange] = []
        for found in sorted(initial, key=lambda file: file.path):
            file = self._new(found.inode, found.path, found.is_directory)
            directory, name = self._locate(found.path)
            self.entries[directory][name] = file
            if not found.is_directory:
                self.initial_files[file] = found.path
                self.current[file] = Image.of(found.contents, found.mtime_ns)
                self.durable[file] = self.current[file].copy()
        self.durable_entries: Entries = {directory: dict(names) for directory, names in self.entries.items()}

    def apply(self, number: int, entry: Entry) -> None:
        """Takes the next record of the log into account. Markers are the caller's."""
        match entry.kind:
            case 1:  # CREATE
                self._create(number, entry)
            case 5 | 6 | 7:  # RENAME, UNLINK, LINK
                self._change_names(number, entry)
            case 2 | 3 | 4:  # TRUNCATE, WRITE, ALLOCATE
                self._change_file(number, entry)
            case 8:  # SYNC_BEGIN
                self.begun[entry.sync] = number
            case 9:  # SYNC_END
                self._make_durable(entry)
            case 11:  # MAP
                if self._known(entry) not in self.ignored:
                    raise LogError(f"{entry.path}: mapped shared and writable; stores to it cannot be recorded")
            case 13:  # REFUSED
                raise LogError(f"the program made a change that has no model: {entry.path}")

    def file_at(self, path: str) -> int:
        """The file of this path, as the program sees it now."""
        directory, name = self._locate(path)
        return self.entries[directory][name]

    def pending(self) -> list[Change]:
        """The changes that are not durable yet, in their order."""
        changes: list[Change] = [*self.name_changes]
        for file_changes in self.file_changes.values():
            changes += file_changes
        return sorted(changes, key=lambda change: change.number)

    def _new(self, inode: tuple[int, int], path: str, is_directory: bool) -> int:
        file = len(self.is_directory)
        self.by_inode[inode] = file  # an inode number that is used again names the new file
        self.is_directory[file] = is_directory
        self.label[file] = path
        if is_directory:
            self.entries[file] = {}
        if _is_mapped(Path(path).name):
            self.ignored.add(file)
        return file

    def _locate(self, path: str) -> tuple[int, str]:
        """The directory that a path lies in, as the program sees it now, and the name in it."""
        *parents, name = path.split("/")
        directory = ROOT
        for parent in parents:
            try:
                directory = self.entries[directory][parent]
            except KeyError:
                raise LogError(f"{path}: the making of its directory was not recorded") from None
        return directory, name

    def _known(self, entry: Entry) -> int:
        try:
            return self.by_inode[entry.inode]
        except KeyError:
            raise LogError(f"{entry.path or entry.path2}: changed, but its making was not recorded") from None

    def _create(self, number: int, entry: Entry) -> None:
        is_directory = bool(entry.flags & CREATE_DIRECTORY)
        file = self._new(entry.inode, entry.path, is_directory)
        if is_directory:
            self.durable_entries[file] = {}
        else:
            self.current[file] = Image(0, mtime_ns=entry.mtime_ns)
            self.durable[file] = self.current[file].copy()
        if not entry.flags & CREATE_UNNAMED and file not in self.ignored:
            directory, name = self._locate(entry.path)
            self._add_names(NameChange(number, f"create {entry.path}", [(directory, name, file)]))

    def _change_names(self, number: int, entry: Entry) -> None:
        if entry.kind == LINK:
            target = self._locate(entry.path2)
            self._add_names(NameChange(number, f"link {entry.path2}", [(*target, self._known(entry))]))
            return
        directory, name = self._locate(entry.path)
        if _is_mapped(name):
            return
        file = self.entries[directory].get(name)
        if file is None:
            raise LogError(f"{entry.path}: unlinked or renamed, but its making was not recorded")
        if entry.kind == UNLINK:
            self._add_names(NameChange(number, f"unlink {entry.path}", [(directory, name, None)]))
            return
        directory2, name2 = self._locate(entry.path2)
        replaced = self.entries[directory2].get(name2)
        kept = replaced if entry.flags & RENAME_EXCHANGE else None
        if file != replaced:
            edits = [(directory, name, kept), (directory2, name2, file)]
            self._add_names(NameChange(number, f"rename {entry.path} to {entry.path2}", edits))

    def _add_names(self, change: NameChange) -> None:
        apply_names(self.entries, change)
        self.name_changes.append(change)

    def _change_file(self, number: int, entry: Entry) -> None:
        file = self._known(entry)
        if file in self.ignored:
            return
        change = file_change(number, file, entry, self.current[file].size_bytes)
        if change is None:
            return
        self.file_changes.setdefault(file, []).append(change)
        image = self.current[file]
        if change.resizes_to is not None:
            image.resize(change.resizes_to)
        if change.length:
            change.apply_bytes(image, change.offset, change.length)
        image.mtime_ns = entry.mtime_ns

    def _make_durable(self, entry: Entry) -> None:
        begun = self.begun.pop(entry.sync, None)
        if begun is None:
            raise LogError("a sync returned that never began")
        if entry.flags & SYNC_ALL:
            for file in self.is_directory:
                self._make_file_durable(file, begun)
            return
        file = self._known(entry)
        self._make_file_durable(file, begun)

    def _make_file_durable(self, file: int, begun: int) -> None:
        if self.is_directory[file]:
            self._make_names_durable(file, begun)
            return
        changes = self.file_changes.get(file, [])
        covered = [change for change in changes if change.number < begun]
        if covered:
            self.durable[file] = settle_file(self.durable[file], covered, ALL)
            self.file_changes[file] = changes[len(covered) :]

    def _make_names_durable(self, directory: int, begun: int) -> None:
        """Backwards, because a change drags along what came before it in any of its directories."""
        reached = {directory}
        covered: list[NameChange] = []
        for change in reversed(self.name_changes):
            if change.number < begun and reached & change.directories():
                reached |= change.directories()
                covered.append(change)
        for change in reversed(covered):
            apply_names(self.durable_entries, change)
            self.name_changes.remove(change)


def file_change(number: int, file: int, entry: Entry, size_bytes: int) -> FileChange | None:
    """The change that a record makes to a file of `size_bytes`; None where it changes nothing."""
    change = FileChange(number, file, "", 0, 0, None, None, entry.mtime_ns, SECTOR_BYTES)
    if entry.kind == TRUNCATE:
        if entry.length == size_bytes:
            return None
        change.label = f"truncate {entry.path} to {entry.length}"
        change.resizes_to = entry.length
        return change
    end = entry.offset + (len(entry.data) if entry.kind == WRITE else entry.length)
    if entry.kind == WRITE:
        change.label = f"write {len(entry.data)} bytes at {entry.offset} of {entry.path}"
        change.offset, change.length, change.data = entry.offset, len(entry.data), entry.data
    elif entry.flags & (PUNCH_HOLE | ZERO_RANGE):
        change.label = f"zero or punch {entry.length} bytes at {entry.offset} of {entry.path}"
        change.offset, change.length, change.unit = entry.offset, entry.length, PAGE_BYTES
        change.length = max(0, min(end, max(size_bytes, 0 if entry.flags & KEEP_SIZE else end)) - entry.offset)
    elif entry.flags & ~KEEP_SIZE:
        raise LogError(f"{entry.path}: fallocate mode {entry.flags} has no model")
    else:
        change.label = f"allocate {entry.path} to {end}"
    keeps_size = entry.kind == ALLOCATE and entry.flags & KEEP_SIZE
    if end > size_bytes and not keeps_size:
        change.resizes_to = end
    if change.resizes_to is None and change.length == 0:
        return None
    return change


# ---- states ----


@dataclass(frozen=True, slots=True)
class Marker:
    """A text that the program put into the log; every call before it had returned."""

    number: int
    text: str


@dataclass(frozen=True)
class StateFile:
    """A file of a state. `initial_path` is set where the file was there before recording began."""

    image: Image
    initial_path: str | None


@dataclass(frozen=True)
class State:
    """One thing that a crash may leave.

    Attributes
    ----------
    index
        How many records of the log had been made.
    kind, description
        One of KINDS, and what persisted or did not, for people.
    markers
        Those recorded before the crash, in order.
    directories, files
        Paths below the root, directories before what lies in them.
    """

    index: int
    kind: str
    description: str
    markers: list[Marker]
    directories: list[str]
    files: dict[str, StateFile]
    digest: bytes = field(repr=False)

    def materialise(self, root: Path, parked: Path | None = None) -> None:
        """Makes the directory `root` be this state.

        With `parked` (a directory of the same file system outside the root), files that were there before
        recording keep their inode: a program that tells files apart by inode and mtime knows them again.
        """
        if parked is not None:
            shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        for directory in self.directories:
            os.mkdir(f"{root}/{directory}")  # noqa: PTH102 - half the time of Path.mkdir, thousands of times
        for path, file in self.files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            if parked is not None and file.initial_path is not None:
                os.link(parked / parked_name(file.initial_path), f"{root}/{path}")
            descriptor = os.open(f"{root}/{path}", flags, 0o644)
            try:
                for offset, data in file.image.runs():
                    os.pwrite(descriptor, data, offset)
                os.ftruncate(descriptor, file.image.size_bytes)
                if file.initial_path is not None:
                    os.utime(descriptor, ns=(file.image.mtime_ns, file.image.mtime_ns))
            finally:
                os.close(descriptor)


def parked_name(path: str) -> str:
    return path.replace("%", "%25").replace("/", "%2F")


@dataclass(frozen=True, slots=True)
class Plan:
    """A state that is yet to be made: cheap, so that all can be listed before some are chosen."""

    index: int
    kind: str
    change: int = -1  # dropped, torn: the number of the change
    variant: int = 0


class Replay:
    """The states of one recording.

    Parameters
    ----------
    entries
        Of `parse_log`.
    initial
        What was below the root before.
    root_inode
        (device, inode) of the root.
    """

    def __init__(self, entries: Sequence[Entry], initial: Sequence[InitialFile], root_inode: tuple[int, int]) -> None:
        self._entries = entries
        self._initial = initial
        self._root_inode = root_inode

    @property
    def entries(self) -> Sequence[Entry]:
        return self._entries

    def tree(self) -> Tree:
        """The files before the first record."""
        return Tree(self._initial, self._root_inode)

    def inodes(self, index: int) -> dict[str, tuple[int, int]]:
        """The inodes of all that the program sees after `index` records, by path."""
        tree = self.tree()
        for number, entry in enumerate(self._entries[:index]):
            tree.apply(number, entry)
        inode_of = {file: inode for inode, file in tree.by_inode.items()}
        found: dict[str, tuple[int, int]] = {}
        unvisited = [("", ROOT)]
        while unvisited:
            prefix, directory = unvisited.pop()
            for name, file in tree.entries[directory].items():
                found[prefix + name] = inode_of[file]
                if tree.is_directory[file]:
                    unvisited.append((f"{prefix}{name}/", file))
        return found

    def plans(self, kinds: Sequence[str] = KINDS) -> list[Plan]:
        """All states of these kinds, in the order of the log; some may turn out to be equal."""
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"no such kinds of states: {sorted(unknown)}; there are {KINDS}")
        plans: list[Plan] = []
        tree = self.tree()
        for number, entry in enumerate([*self._entries, None]):
            if entry is None or entry.kind in (MARK, SYNC_END):
                plans += widest_plans(number, tree, kinds)
            if entry is None:
                break
            tree.apply(number, entry)
            if entry.kind not in (SYNC_BEGIN, MSYNC, MAP):
                plans += [Plan(number + 1, kind) for kind in ("prefix", "durable") if kind in kinds]
        return plans

    def states(self, plans: Sequence[Plan], seed: int = 0) -> Iterator[State]:
        """Makes the planned states, leaving out those equal to one before with the same markers."""
        tree = self.tree()
        markers: list[Marker] = []
        seen: set[tuple[bytes, int]] = set()
        number = 0
        for plan in sorted(plans, key=lambda plan: plan.index):
            while number < plan.index:
                entry = self._entries[number]
                if entry.kind == MARK:
                    markers.append(Marker(number, entry.data.decode("utf-8", "replace")))
                tree.apply(number, entry)
                number += 1
            state = make_state(tree, plan, markers, seed)
            if (state.digest, len(markers)) not in seen:
                seen.add((state.digest, len(markers)))
                yield state


def widest_plans(number: int, tree: Tree, kinds: Sequence[str]) -> list[Plan]:
    """The states at a point where most changes are not yet durable."""
    pending = tree.pending()
    if not pending:
        return []
    plans = [Plan(number, kind) for kind in ("names", "bytes", "zeros") if kind in kinds]
    for change in pending:
        grows_with_bytes = isinstance(change, FileChange) and change.resizes_to is not None and change.length > 0
        if "dropped" in kinds:
            plans += [Plan(number, "dropped", change.number, variant) for variant in range(1 + grows_with_bytes)]
        if "torn" in kinds and isinstance(change, FileChange) and change.units() > 1:
            plans += [Plan(number, "torn", change.number, variant) for variant in range(TORN_STATES_PER_WRITE)]
    if "random" in kinds:
        plans += [Plan(number, "random", variant=variant) for variant in range(RANDOM_STATES_PER_POINT)]
    return plans


def torn_units(change: FileChange, variant: int, source: random.Random) -> frozenset[int]:
    """Which units of a torn write persist: first alone, last alone, all but the first, random ones."""
    count = change.units()
    if variant == 0:
        return frozenset({0})
    if variant == 1:
        return frozenset({count - 1})
    if variant == 2:
        return frozenset(range(1, count))
    return frozenset(index for index in range(count) if source.random() < 0.5)


def make_selection(plan: Plan, pending: Sequence[Change], source: random.Random) -> tuple[Selection, str]:
    """What persists in a planned state, and a description of it."""
    dropped = next((change for change in pending if change.number == plan.change), None)
    label = dropped.label if dropped is not None else ""
    match plan.kind:
        case "prefix":
            return ALL, "everything persisted"
        case "durable":
            return Selection(lambda _: False, lambda _: False, lambda _: NOTHING), "only what was synced persisted"
        case "names":
            return Selection(sizes=lambda _: False, units=lambda _: NOTHING), "unsynced names, no unsynced bytes"
        case "bytes":
            return Selection(names=lambda _: False), "unsynced bytes, no unsynced names"
        case "zeros":
            return Selection(units=lambda _: NOTHING), "unsynced names and sizes, no unsynced bytes"
        case "dropped" if plan.variant == 1:
            return (
                Selection(units=lambda change: NOTHING if change is dropped else None),
                f"all but the bytes of: {label}",
            )
        case "dropped":
            return (
                Selection(
                    names=lambda change: change is not dropped,
                    sizes=lambda change: change is not dropped,
                    units=lambda change: NOTHING if change is dropped else None,
                ),
                f"all but: {label}",
            )
        case "torn":
            assert isinstance(dropped, FileChange)
            units = torn_units(dropped, plan.variant, source)
            text = f"of {dropped.units()} units only {sorted(units)[:16]} of: {label}"
            return Selection(units=lambda change: units if change is dropped else None), text
        case _:
            return random_selection(pending, source)


def random_selection(pending: Sequence[Change], source: random.Random) -> tuple[Selection, str]:
    """Each change persists, is dropped or is torn by lot; how likely each is differs from state to state."""
    keep = source.choice((0.2, 0.5, 0.8, 0.95))
    kept = {change.number: source.random() < keep for change in pending}
    units: dict[int, frozenset[int] | None] = {}
    for change in pending:
        if isinstance(change, FileChange) and change.length:
            lot = source.random()
            if lot < 0.25 and change.units() > 1:
                units[change.number] = torn_units(change, 3, source)
            else:
                units[change.number] = None if source.random() < keep else NOTHING
    persisted = [change.label for change in pending if kept[change.number]]
    return (
        Selection(
            names=lambda change: kept[change.number],
            sizes=lambda change: kept[change.number],
            units=lambda change: units.get(change.number),
        ),
        f"a random set of {len(persisted)} of {len(pending)} changes: {'; '.join(persisted[:8])}",
    )


def make_state(tree: Tree, plan: Plan, markers: Sequence[Marker], seed: int) -> State:
    source = random.Random(f"{seed} {plan.index} {plan.kind} {plan.change} {plan.variant}")
    selection, description = make_selection(plan, tree.pending(), source)
    if selection is ALL:
        entries = tree.entries
    else:
        entries = settle_names(tree.durable_entries, tree.name_changes, selection)
    directories: list[str] = []
    files: dict[str, StateFile] = {}
    settled: dict[int, Image] = {}
    unvisited = [("", ROOT)]
    digest = hashlib.blake2b(digest_size=16)
    while unvisited:
        prefix, directory = unvisited.pop()
        for name, file in sorted(entries.get(directory, {}).items()):
            path = f"{prefix}{name}"
            if tree.is_directory[file]:
                directories.append(path)
                unvisited.append((f"{path}/", file))
                digest.update(b"directory" + path.encode("utf-8", "surrogateescape"))
            elif file not in tree.ignored:
                if file not in settled:
                    settled[file] = settle(tree, file, selection)
                files[path] = StateFile(settled[file], tree.initial_files.get(file))
                digest.update(b"file" + path.encode("utf-8", "surrogateescape") + settled[file].digest())
    return State(plan.index, plan.kind, description, list(markers), directories, files, digest.digest())


def settle(tree: Tree, file: int, selection: Selection) -> Image:
    changes = tree.file_changes.get(file, [])
    if not changes:
        return tree.durable[file]
    if selection is ALL:
        return tree.current[file].copy()
    return settle_file(tree.durable[file], changes, selection)


# ---- what is given back to the file system ----


def freed_unwiped(replay: Replay, directories: Sequence[str]) -> list[str]:
    """What was punched or unlinked in directories of these names while the medium may have held bytes of it.

    No state shows that: the bytes are in no file any more. The header of a file, its first page, holds none.
    """
    problems = []
    tree = replay.tree()
    for number, entry in enumerate(replay.entries):
        if entry.kind in (ALLOCATE, UNLINK) and Path(entry.path).parent.name in directories:
            problems += unwiped_by(tree, entry)
        tree.apply(number, entry)
    return problems


def unwiped_by(tree: Tree, entry: Entry) -> list[str]:
    if entry.kind == UNLINK:
        file, begin, end = tree.file_at(entry.path), PAGE_BYTES, sys.maxsize
    elif entry.flags & PUNCH_HOLE:
        file, begin, end = tree.by_inode[entry.inode], entry.offset, entry.offset + entry.length
    else:
        return []
    under_way = [
        change.label
        for change in tree.file_changes.get(file, [])
        if change.data and change.data[max(0, begin - change.offset) : max(0, end - change.offset)].strip(b"\0")
    ]
    what = f"{'unlinked' if entry.kind == UNLINK else f'punched {begin} to {end}'}: {entry.path}"
    if under_way:
        return [f"{what}, while this was not durable, or zeros over it: {under_way[0]}"]
    return [] if tree.durable[file].is_zero(begin, end) else [f"{what}, while the medium held other bytes than zeros"]
