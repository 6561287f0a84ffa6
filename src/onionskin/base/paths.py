"""A path that is a text, with the methods of `pathlib.Path` that opening a store needs.

To import `pathlib` takes 5 ms in Python 3.11, since it brings `urllib` and `ipaddress`, and a verb of the command line is a
process. What the package hands to its users is a `pathlib.Path`.

What must hold: each method does what that of `pathlib.Path` does, and raises what it raises. One that is not here is that
of `pathlib.Path`, which is imported then; for what both have, such as `replace`, a path is a text.
"""

import os
import stat
from collections.abc import Sequence
from errno import EBADF, ELOOP, ENOENT, ENOTDIR
from typing import TYPE_CHECKING, Any

_NOT_THERE = (ENOENT, ENOTDIR, EBADF, ELOOP)


def is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two looks are at one file, or at one block device, which may have several nodes."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


class FilePath(str):
    """A path of a file."""

    __slots__ = ()

    def __new__(cls, path: "str | os.PathLike[str]" = ".") -> "FilePath":
        """Make one of a text, without parts that say nothing: `.`, and the second of two slashes."""
        if type(path) is cls:
            return path
        text = os.fspath(path)
        if not isinstance(text, str):
            raise TypeError(f"a path is a str or an os.PathLike of one, and not {type(text).__name__}")
        if "//" in text or "./" in text or "/." in text or text[-1:] in "./":
            root = "" if not text.startswith("/") else "//" if text.startswith("//") and text[2:3] != "/" else "/"
            text = root + "/".join([part for part in text.split("/") if part not in ("", ".")]) or "."
        return super().__new__(cls, text)

    def __truediv__(self, name: str) -> "FilePath":
        return FilePath(os.path.join(self, name))

    @property
    def name(self) -> str:
        """The last part."""
        return "" if self == "." else os.path.basename(self)

    @property
    def suffix(self) -> str:
        """What follows the last dot of the last part, with the dot."""
        found = os.path.splitext(self.name)[1]
        return "" if found == "." else found

    @property
    def parent(self) -> "FilePath":
        """The directory; of one that has none the path itself."""
        return FilePath(os.path.dirname(self) or ".")

    @property
    def parents(self) -> "Sequence[FilePath]":
        """The directory, that of the directory, and so on."""
        found = []
        at = self
        while (above := at.parent) != at:
            found.append(above)
            at = above
        return found

    def with_name(self, name: str) -> "FilePath":
        """Return a path beside this one."""
        return FilePath(os.path.join(os.path.dirname(self), name))

    def with_suffix(self, suffix: str) -> "FilePath":
        """Return the path with another suffix."""
        return FilePath(os.path.splitext(self)[0] + suffix)

    def absolute(self) -> "FilePath":
        """Return the path from the root on; links and `..` stay in it."""
        return self if self.startswith("/") else FilePath(os.path.join(os.getcwd(), self))

    def resolve(self, *, strict: bool = False) -> "FilePath":
        """Return the path from the root on, without links."""
        return FilePath(os.path.realpath(self, strict=strict))

    def is_relative_to(self, other: str) -> bool:
        """Whether it leads to or below another path."""
        return self == other or self.startswith(other.rstrip("/") + "/")

    def stat(self) -> os.stat_result:
        """Return what the file system says of it."""
        return os.stat(self)

    def lstat(self) -> os.stat_result:
        """Return what the file system says of it, and not of what a link leads to."""
        return os.lstat(self)

    def exists(self) -> bool:
        """Whether there is something. An error that does not say that there is nothing is raised."""
        return self._mode() is not None

    def is_file(self) -> bool:
        """Whether it is a regular file."""
        mode = self._mode()
        return mode is not None and stat.S_ISREG(mode)

    def is_dir(self) -> bool:
        """Whether it is a directory."""
        mode = self._mode()
        return mode is not None and stat.S_ISDIR(mode)

    def is_block_device(self) -> bool:
        """Whether it is a block device."""
        mode = self._mode()
        return mode is not None and stat.S_ISBLK(mode)

    def _mode(self) -> int | None:
        try:
            return os.stat(self).st_mode
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
        except ValueError:  # a NUL in the path
            pass
        return None

    def mkdir(self, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        """Make a directory."""
        try:
            os.mkdir(self, mode)
        except OSError:  # also where the error is that of a directory that cannot be written
            if not exist_ok or not self.is_dir():
                raise

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the name of a file."""
        try:
            os.unlink(self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    if not TYPE_CHECKING:  # a checker is to see what costs an import

        def __getattr__(self, name: str) -> Any:
            from pathlib import Path

            return getattr(Path(self), name)
