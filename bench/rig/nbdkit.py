"""nbdkit with its cow filter over a raw image: another copy-on-write layer that a user might pick."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onionskin.measure import peers


@contextmanager
def cow_server(image: Path) -> Iterator[str]:
    """Serve an image read-only below a fresh overlay; gives the URI."""
    path = image.with_suffix(".sock")
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "--filter=cow", "file", str(image)])
    try:
        for _ in range(200):
            if path.exists():
                break
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait(timeout=30)
        path.unlink(missing_ok=True)


def nbd_bench(uri: str, *, count: int, step: int, write: bool = False, depth: int = 16) -> float:
    """Return the seconds that qemu-img bench takes over NBD for requests of 4 KiB."""
    return peers.qemu_bench(uri, count=count, step=step, write=write, depth=depth, kind="raw")
