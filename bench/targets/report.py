"""A row of the table of targets: what was measured, what must be reached, what was found."""

from dataclasses import dataclass, field
from typing import Any

from onionskin.measure.timing import Samples, ratio


@dataclass
class Figure:
    """One row: what was measured, what must be reached, what was found. passed None: skipped."""

    what: str
    target: str
    measured: str
    passed: bool | None
    detail: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "skipped"}[self.passed]
        return f"| {self.what} | {self.target} | {self.measured} | {verdict} |"


def skipped(what: str, target: str, reason: str) -> Figure:
    return Figure(what, target, reason, None)


def versus(what: str, least: float, samples: dict[str, Samples], slow: str, fast: str, **detail: Any) -> Figure:
    """A row in which `fast` has to be at least `least` times faster than `slow`."""
    found = ratio(samples, slow, fast)
    text = f"{found:.3g} x ({fast} {samples[fast]}, {slow} {samples[slow]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f">= {least:g} x", text, found >= least, {"ratio": found, "seconds": seconds, **detail})


def within(what: str, most: float, samples: dict[str, Samples], one: str, other: str) -> Figure:
    """A row in which `one` may take at most `most` times as long as `other`."""
    found = ratio(samples, one, other)
    text = f"{found:.3g} x ({one} {samples[one]}, {other} {samples[other]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f"<= {most:g} x", text, found <= most, {"ratio": found, "seconds": seconds})
