"""How often a test that repeats itself does so: a few times in `.ci/run`, and all the times with ONIONSKIN_ALL_ROUNDS=1."""

import os

ALL = os.environ.get("ONIONSKIN_ALL_ROUNDS", "") not in ("", "0")


def rounds(few: int, thorough: int) -> int:
    """Return how many of the thorough number of rounds this run makes."""
    return thorough if ALL else few
