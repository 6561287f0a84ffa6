"""A row of the table of targets: what was measured, what must be reached, what was found; and several runs of it."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from onionskin.measure.timing import Samples, duration, ratio


@dataclass
class Figure:
    """One row: what was measured, what must be reached, what was found. passed None: skipped.

    `value` is what was found as a number, in `unit`: "x", "s" or nothing.
    """

    what: str
    target: str
    measured: str
    passed: bool | None
    detail: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "skipped"}[self.passed]
        return f"| {self.what} | {self.target} | {self.measured} | {verdict} |"


def number(value: float) -> str:
    """Return a number as a reader writes it: three digits that count, and no power of ten."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def skipped(what: str, target: str, reason: str) -> Figure:
    return Figure(what, target, reason, None)


def versus(what: str, least: float, samples: dict[str, Samples], slow: str, fast: str, **detail: Any) -> Figure:
    """A row in which `fast` has to be at least `least` times faster than `slow`."""
    found = ratio(samples, slow, fast)
    text = f"{number(found)} x ({fast} {samples[fast]}, {slow} {samples[slow]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f">= {least:g} x", text, found >= least, {"seconds": seconds, **detail}, found, "x")


def within(what: str, most: float, samples: dict[str, Samples], one: str, other: str) -> Figure:
    """A row in which `one` may take at most `most` times as long as `other`."""
    found = ratio(samples, one, other)
    text = f"{number(found)} x ({one} {samples[one]}, {other} {samples[other]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f"<= {most:g} x", text, found <= most, {"seconds": seconds}, found, "x")


def several(what: str, target: str, seconds: list[float], most: float, *, at: float = 0.5) -> Figure:
    """A row of one operation that was timed often: its median, or the part `at` of all, may be at most so long."""
    ordered = sorted(seconds)
    median, late = statistics.median(ordered), ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    found = median if at == 0.5 else ordered[min(len(ordered) - 1, int(len(ordered) * at))]
    text = f"{duration(median)} p50, {duration(late)} p99 ({len(ordered)} times)"
    return Figure(what, target, text, found <= most, {"seconds": seconds}, found, "s")


def summary(lines: Iterable[dict[str, Any]]) -> str:
    """Return a table of several runs: for each place the median of what was found, and the least and the greatest.

    What is bold missed what must be reached, in one run at least.
    """
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    places: dict[str, None] = {}
    for line in lines:
        places[line["place"]] = None
        rows.setdefault((line["what"], line["target"]), {}).setdefault(line["place"], []).append(line)
    head = ["what", "must reach", *places]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (what, target), found in rows.items():
        cells = [_cell(found.get(place, [])) for place in places]
        table.append(f"| {what} | {target} | {' | '.join(cells)} |")
    return "\n".join(table)


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    mark = "**" if any(run["passed"] is False for run in runs) else ""
    values = [run["value"] for run in runs if run["value"] is not None]
    if not values:
        return f"{mark}{runs[-1]['measured']}{mark}"
    show = duration if runs[0]["unit"] == "s" else number
    unit = " x" if runs[0]["unit"] == "x" else ""
    middle, low, high = statistics.median(values), min(values), max(values)
    spread = f" ({show(low)} to {show(high)})" if len(values) > 1 and show(low) != show(high) else ""
    return f"{mark}{show(middle)}{unit}{spread}{mark}"
