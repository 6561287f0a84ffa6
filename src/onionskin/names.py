"""Which names volumes and snapshots may have.

`STORE/VOLUME@SNAPSHOT` must always be read in one way, and a name must print on one line.
"""

import unicodedata

NAME_BYTES_MAX = 255


def check_name(kind: str, name: str) -> str:
    """Return `name` if a volume or snapshot (`kind`, for the message) may have it; else raise ValueError."""
    fault = _fault(name)
    if fault:
        raise ValueError(f"{name!r} cannot be the name of a {kind}: {fault}")
    return name


def _fault(name: str) -> str | None:
    if not isinstance(name, str):
        return "a name is a string"
    if not name:
        return "it is empty"
    if name in (".", ".."):
        return "it means a directory"
    if "/" in name or "@" in name:
        return "'/' and '@' stand between the parts of STORE/VOLUME@SNAPSHOT"
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        return "it has a control character"
    if len(name.encode()) > NAME_BYTES_MAX:
        return f"it is longer than {NAME_BYTES_MAX} bytes"
    return None
