"""Which processes belong to the machines of a store."""

from contextlib import suppress
from pathlib import Path


def processes_in(directory: Path) -> dict[int, str]:
    """Return the processes that work or log in directories below one, and the names of those, which may be gone."""
    root = f"{directory.resolve()}/"
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for link in ("cwd", "fd/2"):
                with suppress(OSError):  # it has ended
                    at = str((process / link).readlink())
                    if at.startswith(root):
                        found[int(process.name)] = at.removeprefix(root).partition("/")[0].removesuffix(" (deleted)")
    return found
