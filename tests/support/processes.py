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


def children_of(pid: int) -> list[int]:
    """Return the processes whose parent is a process."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended
                if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(process.name))
    return found


def spare_of(pid: int) -> int | None:
    """Return the supervisor that waits for a machine which a process of another one forks, if there is one."""
    for forking in children_of(pid):
        with suppress(OSError):
            if b"onionskin.machine.fork" in Path(f"/proc/{forking}/cmdline").read_bytes():
                for child in children_of(forking):
                    if str(Path(f"/proc/{child}/fd/2").readlink()) == "/dev/null":
                        return child
    return None
