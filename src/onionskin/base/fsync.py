"""The two syncs of Python code. Every sync goes through here, so that the crash tests can remove each one by name.

A call site names its barrier in a comment at the end of its line: `# BARRIER: name`.
"""

import os

from onionskin.base.paths import FilePath


def sync_directory(path: FilePath) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Make the contents and size of an open file durable."""
    os.fsync(descriptor)
