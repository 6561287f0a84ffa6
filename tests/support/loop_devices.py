"""Loop devices: block devices over files."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MakeDevice = Callable[..., Path]


@contextmanager
def loop_devices() -> Iterator[MakeDevice]:
    """Give a function that makes a loop device over a file; all are detached at the end."""
    made: list[str] = []

    def make(file: Path, *options: str) -> Path:
        command = ["losetup", "--find", "--show", *options, file]
        attached = subprocess.run(command, check=True, capture_output=True, text=True)
        made.append(attached.stdout.strip())
        return Path(made[-1])

    try:
        yield make
    finally:
        for one in made:
            subprocess.run(["losetup", "--detach", one], check=True)
