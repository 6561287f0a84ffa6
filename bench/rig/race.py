"""A race: contestants that took turns, those that could not, and what they did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onionskin.measure.timing import Contestant, Samples, interleave, ratio

ENGINE = "onionskin"


@dataclass(frozen=True)
class Setting:
    """What a race runs on: a directory of its own, the size of the disk, how many rounds."""

    directory: Path
    size_bytes: int
    rounds: int


@dataclass
class Race:
    """Samples by member; `info` is of all members, `own` of one; the engine's member is the one ratios are against."""

    samples: dict[str, Samples]
    info: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: str = ENGINE

    def info_of(self, member: str) -> dict[str, Any]:
        """Return bytes, block size, depth, cache state, and how many times as long as the engine this member took."""
        times = ratio(self.samples, member, self.engine)
        return {"times_the_engine": round(times, 3), "spread": round(self.samples[member].spread, 3)} | (
            self.info | self.own.get(member, {})
        )


def run_race(
    contestants: Mapping[str, Contestant | str], rounds: int, *, engine: str = ENGINE, warm_up: bool = True, **info: Any
) -> Race:
    """Let contestants take turns. One that is given as a text is skipped, and the text is the reason."""
    running = {name: one for name, one in contestants.items() if isinstance(one, Contestant)}
    skipped = {name: one for name, one in contestants.items() if isinstance(one, str)}
    return Race(interleave(running, rounds, warm_up=warm_up), info, skipped, engine=engine)


class ReplayClock:
    """A timer that shows durations one after the other: each two calls are as far apart as the next sample."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, seconds: Sequence[float]) -> None:
        """Set what the next rounds will have taken."""
        self._seconds, self._running = list(seconds), False

    def __call__(self) -> float:
        if self._running and self._seconds:
            self._now += self._seconds.pop(0)
        self._running = not self._running
        return self._now


CLOCK = ReplayClock()
