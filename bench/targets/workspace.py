"""Where a group of rows does its work."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A directory for one group of rows, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="targets-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path)
