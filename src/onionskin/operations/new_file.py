"""Makes a file that has its name only when all of it is there and durable.

What must hold: no file is replaced, also none that takes the name meanwhile. An error removes what was written; a process
that is killed leaves it under another name, which ends in .part.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from onionskin.base.fsync import sync_file
from onionskin.base.paths import FilePath
from onionskin.operations.export import give_name, staged_name


@contextmanager
def new_file(path: FilePath) -> Iterator[IO[bytes]]:
    """Give a new file to write, and its name at the end of the block. Until then the caller makes its contents durable.

    Raises
    ------
    FileExistsError
        There is a file of that name: at the beginning, or at the end.
    """
    try:
        directory = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        staged = staged_name(path)
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
        try:
            with open(descriptor, "wb") as file:
                yield file
            give_name(directory, staged, path, replace=False)
        except BaseException:
            with suppress(FileNotFoundError):  # it has got its name just before an interrupt
                os.unlink(staged, dir_fd=directory)
            raise
        sync_file(directory)  # BARRIER: written delta name
    finally:
        os.close(directory)
