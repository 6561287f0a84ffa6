"""How many examples a property test draws.

A test names the number that is thorough. The quick tests draw a third of it, `.ci/run` draws all in a run of its own, and
a search for a rare fault asks for more: ``ONIONSKIN_EXAMPLES_PERCENT`` says how many of the hundred.
"""

import os

PERCENT = int(os.environ.get("ONIONSKIN_EXAMPLES_PERCENT", "33"))


def examples(thorough: int) -> int:
    """Return how many of the ``thorough`` examples this run draws; at least one."""
    return max(1, thorough * PERCENT // 100)
