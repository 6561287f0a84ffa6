"""Errors of the system in words."""

import errno

import pytest

from onionskin.base.os_errors import words_of


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", b"/vms/a"), "/vms/a: No space left on device"),
        (OSError(errno.ENOSPC, None), "No space left on device"),
        (OSError("one without a number"), "one without a number"),
        (ValueError("another one"), "another one"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_told_without_its_number_and_with_the_file(error: Exception, words: str) -> None:
    assert words_of(error) == words
