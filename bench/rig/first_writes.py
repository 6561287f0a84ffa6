"""Contestants that write blocks for the first time over a full base, and make them durable."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

_names = count()


def into_new_volumes(
    store: onionskin.Store,
    base: Path,
    wanted: Any,
    data: Any,
    *,
    write: Callable[[onionskin.Volume], object] | None = None,
    verify: bool = False,
) -> Contestant:
    """Write blocks to a new volume each time, by `write_blocks` if not by `write`, and flush; it is deleted after."""

    def run(volume: onionskin.Volume) -> None:
        if write:
            write(volume)
        else:
            volume.write_blocks(wanted, data)
        volume.flush()

    def gone(volume: onionskin.Volume) -> None:
        if verify:
            assert np.array_equal(volume.read_blocks(wanted).reshape(-1), data)
        name = volume.name
        volume.close()
        store.delete(name)
        store._opened.finish_work()

    return Contestant(run, lambda: store.create(f"v{next(_names)}", base=base), gone)


def into_qcow2(image: Path, base: Path, *, options: str, writes: int, step: int, depth: int) -> Contestant:
    """Have qemu-img bench write to a new image over the base."""
    return Contestant(
        lambda _: peers.qemu_bench(image, count=writes, step=step, write=True, depth=depth),
        lambda: peers.create_qcow2(image, backing=base, options=options),
        lambda _: image.unlink(),
    )
