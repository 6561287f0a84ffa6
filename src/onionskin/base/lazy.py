"""Modules that are imported when they are first used: NumPy with the first array, logging with the first message.

A verb of the command line is a process, and would else spend most of its time on imports. Modules write
``from onionskin.base.lazy import numpy`` (and tell type checkers ``import numpy``), and use it as usual.
"""

import importlib
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import logging


# What the loader of libraries says where the limit of memory (ulimit -v) is reached.
_NO_MEMORY = ("failed to map segment", "cannot allocate memory")


class Later:
    """A module that is imported when one of its names is first used. Any thread may use it first."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        try:
            module = importlib.import_module(self._module)
        except (ImportError, SystemError) as error:  # a library that is not mapped, a module that is not compiled
            if isinstance(error, SystemError) or any(said in str(error).lower() for said in _NO_MEMORY):
                raise MemoryError(f"no memory to load {self._module}") from error
            raise
        value = getattr(module, name)
        setattr(self, name, value)  # from now on it is found without coming here
        return value


class _LaterLogger:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module("logging").getLogger(self._name), attribute)


def logger(name: str) -> "logging.Logger":
    """Return the logger of a module; the module logging is imported with the first message."""
    return cast("logging.Logger", _LaterLogger(name))


numpy = Later("numpy")
dtypes = Later("onionskin.base.dtypes")
