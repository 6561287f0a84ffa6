"""The type of the function by which a long operation reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total), in bytes
