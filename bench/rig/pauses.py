"""Runs ``writer_pause.c``, built from the engine's own kernels: the longest pause of a writer, without Python's lock."""

import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("writer_pause.c")
ROOMS = ("base", "index", "layer", "bulk", "volume")


@dataclass(frozen=True)
class Window:
    """One snapshot (or idle window): seconds it took, and of the longest write beside it, run-queue wait apart."""

    took: float
    longest: float
    waited_for_cpu: float

    @property
    def pause(self) -> float:
        """The longest write, less the time in which other programs had the processor."""
        return max(0.0, self.longest - self.waited_for_cpu)


def measure_pauses(directory: Path, snapshots: int) -> dict[str, list[Window]]:
    """Return the windows of each kind: `snapshot`, `idle` and `flush`."""
    program, store = directory / "writer_pause", directory / "pause-store"
    kernels = [kernel for room in ROOMS for kernel in (ROOT / "csrc" / room).glob("*.c")]
    command = ["gcc", "-O2", "-std=gnu11", f"-I{ROOT / 'csrc'}", "-pthread", "-o", program, SOURCE, *kernels]
    subprocess.run(command, check=True)
    store.mkdir()
    printed = subprocess.run([program, store, str(snapshots)], check=True, capture_output=True, text=True).stdout
    windows = defaultdict(list)
    for line in printed.splitlines():
        kind, *microseconds = line.split()
        windows[kind].append(Window(*(float(value) / 1e6 for value in microseconds)))
    return dict(windows)
