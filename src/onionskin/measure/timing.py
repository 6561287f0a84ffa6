"""Timing of contestants that take turns: what a shared machine does to one, it does to the other.

A round runs each contestant once, in an order that rotates; preparation is outside the timing. A contestant that times
itself (a program that prints its own seconds) returns them as a float, and that counts instead.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contestant:
    """One way to do the work: `run` is timed, `prepare` and `finish` are not; what `prepare` returns goes to both."""

    run: Callable[..., object]
    prepare: Callable[[], object] | None = None
    finish: Callable[..., object] | None = None


@dataclass
class Samples:
    """The seconds that each round took."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile, in seconds."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, as a part of the median."""
        low, high = self.quartiles
        return (high - low) / 2 / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{duration(self.median)} ±{self.spread:.0%}"


def one_round(contestant: Contestant) -> float:
    """Run a contestant once; returns the seconds of the work alone."""
    made = (contestant.prepare(),) if contestant.prepare else ()
    gc.collect()
    start = time.perf_counter()
    own = contestant.run(*made)
    seconds = time.perf_counter() - start
    if contestant.finish:
        contestant.finish(*made)
    return own if isinstance(own, float) else seconds


def interleave(contestants: Mapping[str, Contestant], rounds: int, *, warm_up: bool = True) -> dict[str, Samples]:
    """Let contestants take turns for some rounds. `warm_up` runs each once before, and forgets what it took."""
    samples = {name: Samples() for name in contestants}
    names = list(contestants)
    if warm_up:
        for name in names:
            one_round(contestants[name])
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].seconds.append(one_round(contestants[name]))
    return samples


def ratio(samples: Mapping[str, Samples], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median of the ratios of each round."""
    pairs = zip(samples[slow].seconds, samples[fast].seconds, strict=True)
    return statistics.median(s / f for s, f in pairs)


def duration(seconds: float) -> str:
    """Write a time with the unit that fits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
