"""The reserve of a store: room on the disk that is given up if something must be freed and the disk is full.

What must hold: the room that an operation gives up stays free for that operation until it ends. No thread and no
process sets it aside again meanwhile. If the disk has no room for a reserve, the store goes without one.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from errno import EDQUOT, ENOSPC
from typing import TypeVar

from onionskin.base.modes import make_file
from onionskin.catalog.copy_on_write import refuse_without_room
from onionskin.storage.layout import Layout
from onionskin.storage.locks import locked_directory

Result = TypeVar("Result")

RESERVE_BYTES = 8 << 20
_MISSING_BYTES = (0, 64 << 10, 256 << 10, 1 << 20, 4 << 20)  # tried in turn
CATALOG_ROOM_BYTES = 256 << 10
CATALOG_INDEX_BYTES = 48 << 10  # 32 KiB, and the room for the log and for the names of both files


class Reserve:
    """The room that a store has set aside. Any thread may call it.

    Attributes
    ----------
    read_only : bool
        Whether the store can only be read. In that case nothing is set aside.
    """

    def __init__(self, layout: Layout, *, read_only: bool) -> None:
        self._layout = layout
        self.read_only = read_only
        self._is_owed = False  # whether the room was given up here, and not set aside again since

    def retry(self, change: "Callable[[], Result]") -> "Result":
        """Run a change that frees space, at once or later. If the disk is full, give the reserve up and run it again.

        The change is run again even if there is no reserve, because another operation may just have given it up.
        """
        try:
            return change()
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
        try:
            with self.is_kept():
                self._give_up()
                return change()
        finally:
            self.make()

    def is_kept(self) -> "AbstractContextManager[bool]":
        """Keep every thread and process from setting the room aside again that this operation gives up.

        Where one that sets it aside just now was stopped in the middle, it is not waited for without end, and may take it.
        """
        return locked_directory(self._layout.root, alone=False)

    def make_room_for_catalog(self) -> None:
        """Give the reserve up before SQLite makes the index of its log on a disk that is nearly full.

        The caller has entered `is_kept`. SQLite writes one byte of each page of the index and maps the page. If the
        blocks of the file system are smaller than a page, the rest of the page has no block yet. If the disk has no
        block left then, the first access to the rest is SIGBUS, and no error could report it. The reserve may have had
        no blocks, so this method tries afterwards whether there is room. If there is none, the store is not opened.

        Raises
        ------
        OSError
            There is no room for the index (ENOSPC or EDQUOT).
        """
        with suppress(FileNotFoundError, PermissionError):
            found = os.statvfs(self._layout.root)
            is_short = found.f_bavail * found.f_frsize < CATALOG_ROOM_BYTES and not found.f_flag & os.ST_RDONLY
            if is_short:
                self._give_up()
                refuse_without_room(self._layout.catalog, CATALOG_INDEX_BYTES)

    def _give_up(self) -> None:
        """Free the room that is set aside, if there is any. The caller has locked the directory."""
        with suppress(FileNotFoundError):
            self._layout.reserve.unlink()
            self._is_owed = True

    def make_again(self) -> None:
        """Set aside the room that was given up here, at the end of an opening that may only have looked.

        Else whoever fills the disk has it, and the next one that would free something cannot.
        """
        if self._is_owed:
            self._make()

    def _is_made(self) -> bool:
        """Whether room is set aside. After a kill, or in a copy that keeps holes, the file may have no blocks."""
        try:
            found = self._layout.reserve.lstat()
        except FileNotFoundError:
            return False
        return found.st_size >= RESERVE_BYTES and found.st_blocks > 0

    def make(self) -> None:
        """Set room aside, unless the disk has none left or another operation uses the room that was given up.

        That operation sets the room aside again when it has ended.
        """
        if not self.read_only:
            self._make()

    def _make(self) -> None:
        if self._is_made():
            self._is_owed = False
            return
        with suppress(OSError), locked_directory(self._layout.root, alone=True) as is_unused:
            if not is_unused:
                return
            if self._is_made():  # by another thread or process, which had the lock a moment ago
                self._is_owed = False
                return
            self._give_up()
            descriptor = make_file(self._layout.reserve)
            try:
                if self._allocate(descriptor):
                    self._is_owed = False
                else:
                    self._layout.reserve.unlink()
            finally:
                os.close(descriptor)

    def _allocate(self, descriptor: int) -> bool:
        """Give the file its room. What was given up here is rarely there to the last block: a little less is taken then.

        A file that is shorter than it should be is made anew when there may be room.
        """
        for missing in _MISSING_BYTES if self._is_owed else (0,):
            with suppress(OSError):
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES - missing)
                return True
            with suppress(OSError):
                os.truncate(descriptor, 0)
        return False
