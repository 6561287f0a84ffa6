"""NumPy, which is imported with the first array and not with the package: the import takes longer than most verbs.

Modules write ``from onionskin.base.lazy import numpy`` (and tell type checkers ``import numpy``), and use it as usual.
"""

import importlib
from typing import Any


class Later:
    """A module that is imported when one of its names is first used. Any thread may use it first."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)  # from now on it is found without coming here
        return value


numpy = Later("numpy")
dtypes = Later("onionskin.base.dtypes")
