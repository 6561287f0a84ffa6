"""The names that volumes and snapshots may have.

`STORE/VOLUME@SNAPSHOT` must have only one reading, and a name must print on one line.
"""

from collections.abc import Iterable, Mapping, Sequence

from onionskin.base.limits import NAME_BYTES_MAX, NOTE_BYTES_MAX

NAMES_SHOWN = 10  # in a message
_CONTROLS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)))  # which end or break a line
# These characters change the look of the text around them, so a name with one can look like another name.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_name(kind: str, name: str) -> str:
    """Return `name` if a volume or snapshot (`kind`, for the message) may have it; else raise ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a {kind} is a string, not {name!r}")
    name = plain_name(name)
    fault = _fault(name)
    if fault:
        raise ValueError(f"{name!r} cannot be the name of a {kind}: {fault}")
    return name


def check_note(note: str) -> str:
    """Return a note that a snapshot may have; else raise TypeError or ValueError."""
    if not isinstance(note, str):
        raise TypeError(f"a note is a string, not {note!r}")
    note = str.__str__(note)
    if "\0" in note or _has_surrogate(note):
        raise ValueError("a note cannot have a zero byte, or text that UTF-8 cannot hold; take it out")
    if len(note.encode()) > NOTE_BYTES_MAX:
        raise ValueError(
            f"a note has at most {NOTE_BYTES_MAX} bytes, and this one has {len(note.encode())}; shorten it"
        )
    return note


def named(what: str, name: str) -> str:
    """Return a name; TypeError if it is no string. Of a machine, bytes would be its id."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a {what} is a str, not {name!r}")
    return name


def several(what: str, names: "str | Sequence[str]") -> list[str]:
    """Return one name or several as a list without repetitions; none at all is refused."""
    if not isinstance(names, str | Iterable) or isinstance(names, bytes):
        raise TypeError(f"the name of a {what} is a str, not {names!r}")
    found = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not found:
        raise ValueError(f"no {what} is named; nothing was changed")
    for name in found:
        named(what, name)
    return found


def plain_name(name: str) -> str:
    """Return a name as a str, also of a subclass such as NumPy's; TypeError if it is no string.

    A number or bytes would be written as text otherwise, and could be the name of something else. What a member of an enum
    of strings holds is its name, and not how it prints (`Disk.WEB`): SQLite, JSON and `==` take it so, too.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name is a string, not {name!r}")
    return str.__str__(name)


def refuse_no_mapping(labels: Mapping[str, str | None]) -> None:
    """Raise TypeError if labels are no mapping: of a text, Python would say that it has no `items`."""
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels are a mapping, such as {{'job': '17'}}, not {labels!r}")


def is_text(name: str) -> bool:
    """Whether UTF-8 can hold a name that is asked for. Of bytes in an argument that are no text it cannot."""
    return not _has_surrogate(plain_name(name))


def on_a_line(text: str) -> str:
    """Replace in a text what no name may have: a name comes out as it is, and a program that reads it finds what it means."""
    return "".join("\ufffd" if c in _CONTROLS or c in _BIDI or "\ud800" <= c <= "\udfff" else c for c in text)


def some_of(names: Sequence[str], at_most: int = NAMES_SHOWN) -> str:
    """List names for a message: a few, and how many more there are. A snapshot may have 100,000 clones."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more:,} more" if more > 0 else "")


def _fault(name: str) -> str | None:
    if not name:
        return "it is empty"
    if name in (".", ".."):
        return "it means a directory"
    if "/" in name or "@" in name:
        return "'/' and '@' stand between the parts of STORE/VOLUME@SNAPSHOT"
    if _has_surrogate(name):
        return "it is not text that UTF-8 can hold"
    if not _CONTROLS.isdisjoint(name):
        return "it has a control character"
    if _BIDI.intersection(name):
        return "it has a character that changes the direction of the text"
    if len(name.encode()) > NAME_BYTES_MAX:
        return f"it is longer than {NAME_BYTES_MAX} bytes"
    return None


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
