"""One module for each operation on a store or a volume; `Store` and `Volume` only call them.

`Store` and `Volume` import a module of these when they first need it. A program that runs for long calls `load_all` first.
"""

import importlib


def load_all() -> None:
    """Import all operations now, so that an upgrade of the package under this process mixes no versions of them."""
    import pkgutil

    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
