"""Ending several things, of which none may keep the others from being ended."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack


def call_all(calls: "Sequence[Callable[[], object]]") -> None:
    """Make all calls, the last one first, whatever fails; the first failure is raised."""
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call)
