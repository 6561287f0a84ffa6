"""An image of QEMU's with changes over a raw one, and the contestant that commits them."""

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from onionskin.measure import peers
from onionskin.measure.timing import Contestant
from rig.disks import make_flat

_names = count()


def overlay(directory: Path, size: int, offsets: Sequence[int], extent: int) -> tuple[Path, Path]:
    """Make a full raw image, and a qcow2 over it with these extents; return (base, top)."""
    base = make_flat(directory / f"under-qcow2-{next(_names)}.raw", size)
    top = peers.create_qcow2(base.with_suffix(".qcow2"), backing=base)
    peers.qemu_io_write(top, offsets, extent, 90)
    return base, top


def qemu_commit(
    directory: Path,
    size: int,
    offsets: Sequence[int],
    extent: int,
    *,
    check: Callable[[Path], None] = lambda base: None,
) -> Contestant:
    """Commit such extents by qemu-img; `check` looks at the base then."""

    def finish(made: tuple[Path, Path]) -> None:
        check(made[0])
        for path in made:
            path.unlink()

    return Contestant(
        lambda made: peers.run("qemu-img", "commit", "-q", "-d", made[1]),
        lambda: overlay(directory, size, offsets, extent),
        finish,
    )
