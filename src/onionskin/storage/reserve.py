"""The reserve of a store: room on the disk that is given up where something must be freed and nothing else is left.

What must hold: what is given up is kept for who gave it up, until that is done: nobody, in any process, sets it aside again
meanwhile. A disk that has none left goes without a reserve.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from errno import EDQUOT, ENOSPC
from typing import TypeVar

from onionskin.base.modes import make_file
from onionskin.storage.layout import Layout
from onionskin.storage.locks import locked_directory

Result = TypeVar("Result")

RESERVE_BYTES = 8 << 20
CATALOG_ROOM_BYTES = 256 << 10
CATALOG_INDEX_BYTES = 48 << 10  # 32 KiB, and what the log and the names of both take


class Reserve:
    """What a store has set aside. Any thread may call it.

    Attributes
    ----------
    read_only : bool
        Whether the store can only be read: then nothing is set aside.
    """

    def __init__(self, layout: Layout, *, read_only: bool) -> None:
        self._layout = layout
        self.read_only = read_only

    def retry(self, change: "Callable[[], Result]") -> "Result":
        """Run what frees space, or frees it later; where the disk is too full for it, give the reserve up and try again.

        Also where there is no reserve: somebody else may just have given it up.
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
        """Keep everybody, in any process, from setting aside again what is given up for this one."""
        return locked_directory(self._layout.root, alone=False)

    def make_room_for_catalog(self) -> None:
        """Give the reserve up before SQLite makes its index on a disk that is all but full. While it is kept.

        SQLite writes one byte of each page of the index and maps it. Where a block of the file system is smaller than a page
        the others have no block then, and with none left the first access to one of them is SIGBUS: no error could tell.
        It is tried whether there is room then, since a reserve may have had no blocks: where there is none the store is not
        opened.

        Raises
        ------
        OSError
            ENOSPC.
        """
        with suppress(FileNotFoundError, PermissionError):
            found = os.statvfs(self._layout.root)
            is_short = found.f_bavail * found.f_frsize < CATALOG_ROOM_BYTES and not found.f_flag & os.ST_RDONLY
            if is_short:
                self._give_up()
                self._try_room()

    def _try_room(self) -> None:
        try:
            descriptor = os.open(self._layout.root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, CATALOG_INDEX_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise OSError(error.errno, os.strerror(error.errno), str(self._layout.catalog)) from None

    def _give_up(self) -> None:
        """Free what is set aside for a full disk, if anything is. While the room is kept."""
        self._layout.reserve.unlink(missing_ok=True)

    def _is_made(self) -> bool:
        """Whether room is set aside: a copy of a store that keeps holes, or a kill, leaves a file without blocks."""
        try:
            found = self._layout.reserve.lstat()
        except FileNotFoundError:
            return False
        return found.st_size >= RESERVE_BYTES and found.st_blocks > 0

    def make(self) -> None:
        """Set space aside; a disk that has none left goes without, and so does one where somebody uses what was given up.

        Who does sets it aside again when he has done.
        """
        if self.read_only or self._is_made():
            return
        with suppress(OSError), locked_directory(self._layout.root, alone=True) as is_unused:
            if not is_unused:
                return
            self._give_up()
            descriptor = make_file(self._layout.reserve)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            except OSError:
                self._layout.reserve.unlink()
            finally:
                os.close(descriptor)
