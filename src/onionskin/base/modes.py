"""The users who may use the files of a store: its owner alone, or also the members of a group.

What must hold: a file has its mode before anything is written to it, whatever the umask. The directory alone decides. A
directory whose group may write, with the set-group-ID bit, is shared with its group, as in git's shared repositories. What
root makes in the store of another user belongs to that user, who must be able to use it then; SQLite does the same.
`onion_make_file` (csrc/base/store_file.c) does the same for the files that C makes.
"""

import os
import stat
from contextlib import suppress

from onionskin.base.paths import FilePath
from onionskin.errors import StateError

_SHARED = stat.S_ISGID | stat.S_IRWXG


def is_shared(directory: FilePath) -> bool:
    """Whether the members of a directory's group may use what is in it."""
    return directory.stat().st_mode & _SHARED == _SHARED


def file_mode(directory: FilePath) -> int:
    """Return the mode that a new file in a directory of a store has."""
    return 0o660 if is_shared(directory) else 0o600


def make_file(path: "str | os.PathLike[str]") -> int:
    """Make a file of a store, and return its descriptor.

    Raises
    ------
    FileExistsError
        Something has that name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        share_file(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def share_file(descriptor: int, path: "str | os.PathLike[str]") -> None:
    """Let those use a file that was just made who may use its directory: its owner, and its group if it is shared."""
    directory = FilePath(path).parent
    if is_shared(directory):
        os.fchmod(descriptor, 0o660)
    _give_to_owner(descriptor, directory)


def give_directory_to_owner(made: "str | os.PathLike[str]", directory: FilePath) -> None:
    """Give a directory that root just made in another one to whoever owns that."""
    if os.geteuid() == 0:
        descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _give_to_owner(descriptor, directory)
        finally:
            os.close(descriptor)


def _give_to_owner(descriptor: int, directory: FilePath) -> None:
    found = directory.stat()
    if os.geteuid() != 0 or found.st_uid == 0:
        return
    made = os.fstat(descriptor)
    if stat.S_ISDIR(made.st_mode) or made.st_nlink == 1:  # what has another name elsewhere is not this user's
        with suppress(OSError):  # in a sandbox whose root may not, or does not know that user
            os.fchown(descriptor, found.st_uid, found.st_gid)


def make_shared(directory: FilePath, group: str | int) -> None:
    """Share a directory that was just made with a group."""
    os.chown(directory, -1, group_id(group))
    os.chmod(directory, 0o2770)  # noqa: PTH101


def group_id(group: str | int) -> int:
    """Return the number of a group.

    Raises
    ------
    ValueError
        There is no group of that name.
    """
    if isinstance(group, bool):
        raise TypeError(f"a group is a name or a number, not {group!r}")
    if isinstance(group, int):
        return group
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {group!r} on this machine") from None


def refuse_other_group(directory: FilePath, group: str | int) -> None:
    """Refuse a store that is not shared with the named group. Only a new store can be given to a group."""
    if not is_shared(directory) or directory.stat().st_gid != group_id(group):
        raise StateError(
            f"the store {directory} was not made for group {group}; to give it to that group, close it, and run "
            f"'chgrp -R {group} {directory}', 'chmod -R ug+rwX,o= {directory}' and "
            f"'find {directory} -type d -exec chmod g+s {{}} +'"
        )
