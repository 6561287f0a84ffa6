"""A context that lets go of what it holds at the end of its block, also where an interrupt comes just beside the block.

What must hold: an interrupt comes before it holds anything, or in its block, or when it has let go. A `contextmanager` of
contextlib does not give that: it begins and ends in Python, where an interrupt is raised before the generator goes on. Then
what that holds is held until the exception is forgotten, and let go of by whichever thread forgets it.

Python looks for signals where a function in Python begins and behind a call, but not between the end of `__enter__` and the
block, nor as it calls an `__exit__` in C. `io.IOBase` has one, which calls `close`.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from onionskin.base.signals import DeferredInterrupt

Given = ParamSpec("Given")
Held = TypeVar("Held")


class _Holding(io.IOBase):
    def __init__(self, steps: "Iterator[Held]") -> None:
        self._steps = steps
        self._was_entered = False
        self.close = steps.close  # type: ignore[attr-defined,method-assign]  # what `__exit__` calls; it is C as well

    def __enter__(self) -> object:  # type: ignore[override]
        if self._was_entered:  # a second step of the generator would let go of what the first block holds
            raise RuntimeError("a context of this kind is entered once: make another one for another block")
        self._was_entered = True
        try:
            return next(self._steps)
        except BaseException:  # or an interrupt came when the generator had reached its yield
            self.close()
            raise


def held(steps: Callable[Given, Iterator[Held]]) -> Callable[Given, AbstractContextManager[Held]]:
    """Make a context of a generator that yields once, as `contextmanager` does; its `finally` lets go.

    The generator is closed at its yield, whatever the block raised: it is told no exception but GeneratorExit. A `finally` of
    more than one call does the rest also where an interrupt comes in it.
    """

    @wraps(steps)
    def hold(*given: Given.args, **named: Given.kwargs) -> AbstractContextManager[Held]:
        return cast("AbstractContextManager[Held]", _Holding(steps(*given, **named)))

    return hold


@held
def held_together() -> Iterator[ExitStack]:
    """Hold several things by a stack of contexts, which is left as a whole: an interrupt waits for that.

    They are put on the stack by `enter`, or with interrupts held back: a stack takes and leaves them in Python.
    """
    stack = ExitStack()
    try:
        yield stack
    finally:
        try:
            _leave(stack)
        except BaseException:  # an interrupt, before it was held back
            _leave(stack)
            raise


def enter(stack: ExitStack, context: Callable[[], AbstractContextManager[Held]]) -> Held:
    """Make and enter a context, and put it on a stack: where an interrupt comes, it is there, or nothing is held."""
    with DeferredInterrupt():
        return stack.enter_context(context())


def _leave(stack: ExitStack) -> None:
    with DeferredInterrupt():
        stack.close()
