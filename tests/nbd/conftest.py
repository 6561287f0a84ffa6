"""A served volume for the protocol's tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Serving, served_volume

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Serving, Any]]:
    """(server on a socket, its volume): 64 MiB that read zero, the export `web` and the default one."""
    with served_volume(tmp_path, size=SIZE) as both:
        yield both


@pytest.fixture
def at(served: tuple[Serving, Any]) -> Path:
    """The socket's path."""
    return served[0].path
