"""Ends several things. If ending one of them fails, the others are ended all the same."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack


def call_all(calls: "Sequence[Callable[[], object]]") -> None:
    """Make all calls, the last one first. If some of them fail, make the rest too, and raise the first failure."""
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call)
