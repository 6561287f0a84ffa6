"""What lies in a directory of a store that is in use: its background makes and removes files at any time."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def found_in(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Return the files in a directory, with what the kernel says of each; one that went since it was listed is left out."""
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            yield path, path.stat()


def files_with(directory: Path, data: bytes) -> list[Path]:
    """Return the files in a directory that hold these bytes somewhere; one that went meanwhile is left out."""
    holding = []
    for path, _ in found_in(directory):
        with suppress(FileNotFoundError):
            if data in path.read_bytes():
                holding.append(path)
    return holding
