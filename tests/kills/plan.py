"""Which gaps there are, and who may be killed in each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from support.gap_places import (
    OF_A_REVERT,
    OF_A_SERVER_THAT_CUTS,
    OF_A_SERVER_THAT_REVERTS,
    OF_A_SNAPSHOT,
    OF_A_SPARE,
    OF_A_START,
    OF_WHO_ASKS,
    OF_WHO_FORKS,
    places_of,
)

VERBS = ("snapshot", "revert", "fork")
# The verb is the process that asked for it, as the command line or a program does.
OF_A_SUPERVISOR = ("verb", "supervisor", "server", "hypervisor")
OF_ONE_THAT_ASKS, OF_A_SERVER = ("verb",), ("itself",)


@dataclass(frozen=True)
class Gap:
    """A gap before or after a step of a verb.

    Attributes
    ----------
    verb : str
        One of VERBS.
    where : str
        As `Gap.arm` takes it: "MachineCut.seal before".
    victims : tuple of str
        Who may be killed there.
    """

    verb: str
    where: str
    victims: tuple[str, ...]

    def victims_of(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Return who may be killed there, and is wanted; by default anybody."""
        return tuple(one for one in self.victims if not wanted or one in wanted)


def plan() -> list[Gap]:
    """Return all gaps."""
    steps = [
        ("snapshot", OF_A_SNAPSHOT, OF_A_SUPERVISOR),
        ("snapshot", OF_WHO_ASKS, OF_ONE_THAT_ASKS),
        ("snapshot", OF_A_SERVER_THAT_CUTS, OF_A_SERVER),
        ("revert", OF_A_REVERT, OF_A_SUPERVISOR),
        ("revert", OF_WHO_ASKS, OF_ONE_THAT_ASKS),
        ("revert", OF_A_SERVER_THAT_REVERTS, OF_A_SERVER),
        ("fork", OF_A_START, OF_A_SUPERVISOR),
        ("fork", OF_A_SPARE, OF_A_SUPERVISOR),
        ("fork", OF_WHO_FORKS, OF_ONE_THAT_ASKS),
    ]
    return [Gap(verb, where, victims) for verb, of, victims in steps for where in places_of(of)]


def rounds_of(gaps: Sequence[Gap], count: int, seed: int, wanted: Sequence[str] | None) -> Iterator[tuple[Gap, str]]:
    """Draw the rounds: each gap once before any is tried again, with the next victim each time."""
    draw = random.Random(seed)
    firsts = [draw.randrange(len(gap.victims_of(wanted))) for gap in gaps]
    for number in range(count):
        for at in draw.sample(range(len(gaps)), len(gaps)):
            victims = gaps[at].victims_of(wanted)
            yield gaps[at], victims[(firsts[at] + number) % len(victims)]
