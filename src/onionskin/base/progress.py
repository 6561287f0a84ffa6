"""How an operation that takes long says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total), in bytes
