"""What was logged by one part of the package alone.

`caplog` has the records of all threads of the process, and a thread that an earlier test has left (of a store that it
did not close, as one that was killed) may log at any time. So a test that counts records names the logger.
"""

import pytest


def words_of(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    """Return the messages that one logger was given, in order."""
    return [record.getMessage() for record in caplog.records if record.name == logger]
