"""The names that volumes and snapshots may have.

`STORE/VOLUME@SNAPSHOT` must have only one reading, and a name must print on one line.
"""

import unicodedata
from collections.abc import Sequence

from onionskin.base.limits import NAME_BYTES_MAX, NOTE_BYTES_MAX

NAMES_SHOWN = 10  # in a message
# These characters change the look of the text around them, so a name with one can look like another name.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_name(kind: str, name: str) -> str:
    """Return `name` if a volume or snapshot (`kind`, for the message) may have it; else raise ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a {kind} is a string, not {name!r}")
    name = str(name)  # of a subclass too, such as NumPy's
    fault = _fault(name)
    if fault:
        raise ValueError(f"{name!r} cannot be the name of a {kind}: {fault}")
    return name


def check_note(note: str) -> str:
    """Return a note that a snapshot may have; else raise TypeError or ValueError."""
    if not isinstance(note, str):
        raise TypeError(f"a note is a string, not {note!r}")
    note = str(note)
    if "\0" in note or any(unicodedata.category(character) == "Cs" for character in note):
        raise ValueError("a note cannot have a zero byte, or text that UTF-8 cannot hold; take it out")
    if len(note.encode()) > NOTE_BYTES_MAX:
        raise ValueError(
            f"a note has at most {NOTE_BYTES_MAX} bytes, and this one has {len(note.encode())}; shorten it"
        )
    return note


def is_text(name: object) -> bool:
    """Whether UTF-8 can hold a name that is asked for. Of bytes in an argument that are no text it cannot."""
    return not (isinstance(name, str) and any("\ud800" <= character <= "\udfff" for character in name))


def some_of(names: Sequence[str]) -> str:
    """List names for a message: a few, and how many more there are. A snapshot may have 100,000 clones."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _fault(name: str) -> str | None:
    if not name:
        return "it is empty"
    if name in (".", ".."):
        return "it means a directory"
    if "/" in name or "@" in name:
        return "'/' and '@' stand between the parts of STORE/VOLUME@SNAPSHOT"
    if any(unicodedata.category(character) == "Cs" for character in name):
        return "it is not text that UTF-8 can hold"
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        return "it has a control character"
    if _BIDI.intersection(name):
        return "it has a character that changes the direction of the text"
    if len(name.encode()) > NAME_BYTES_MAX:
        return f"it is longer than {NAME_BYTES_MAX} bytes"
    return None
