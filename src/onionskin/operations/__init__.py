"""One module for each operation on a store or a volume; `Store` and `Volume` only call them.

`Store` and `Volume` import a module of these when they first need it. A program that runs for long calls `load_all` first.
"""

import importlib

_is_loaded = False


def load_all() -> None:
    """Import all operations now, so that an upgrade of the package under this process mixes no versions of them.

    Further calls do nothing, nor do those of processes that were forked from this one.
    """
    global _is_loaded
    if _is_loaded:
        return
    import pkgutil

    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    _is_loaded = True
