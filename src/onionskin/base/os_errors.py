"""Errors of the system as a part of a sentence: Python's own text has the number and quotes."""

import os


def words_of(error: BaseException) -> str:
    """Say what an error says: of one of the system, what could not be done to which file, without its number."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    what = error.strerror or os.strerror(error.errno)
    return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"
