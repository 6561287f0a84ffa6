"""The steps of a demonstration: each is timed, and reported as it ends."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onionskin.errors import VerifyError


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what was done, how long it took, and what was proved by it.

    ``operation`` is true for what onionskin promises to be quick, false for preparations and proofs.
    """

    what: str
    seconds: float
    operation: bool = False
    proof: str = ""


class Steps:
    """What a demonstration does, step by step.

    Parameters
    ----------
    steps : list of Step
        Takes each one as it ends.
    report : callable
        Called with each one then.
    again : str
        The command that shows it again and leaves everything, for who reports that a proof failed.
    """

    def __init__(self, steps: list[Step], report: Callable[[Step], None], again: str) -> None:
        self._steps = steps
        self._report = report
        self._again = again

    @contextlib.contextmanager
    def _step(self, what: str, *, operation: bool = False) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._add(Step(what, time.perf_counter() - begun, operation))

    def _prove(self, what: str, holds: Callable[[], bool]) -> None:
        begun = time.perf_counter()
        if not holds():
            raise VerifyError(f"it does not hold that {what}; run {self._again} and report what it leaves")
        self._add(Step(what, time.perf_counter() - begun, proof="proved"))

    def _add(self, step: Step) -> None:
        self._steps.append(step)
        self._report(step)
