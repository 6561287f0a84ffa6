"""What a thread would have taken on a machine of its own: the time in which it could run and had no processor, apart."""

import time
from collections.abc import Callable
from pathlib import Path


def cpu_wait_seconds() -> float:
    """How long the calling thread was runnable without a processor, since it began."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Stopwatch:
    """A context manager: `seconds` that passed, and `undisturbed`, of which other programs' turns are taken off."""

    seconds = 0.0
    undisturbed = 0.0

    def __enter__(self) -> "Stopwatch":
        self._waited = cpu_wait_seconds()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.undisturbed = self.seconds - (cpu_wait_seconds() - self._waited)


def undisturbed(work: Callable[[], object]) -> Callable[[], float]:
    """Let a contestant that works in the calling thread alone report its undisturbed time."""

    def run() -> float:
        with Stopwatch() as watch:
            work()
        return watch.undisturbed

    return run
