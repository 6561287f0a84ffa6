"""Lengths of time as people write them: "90s", "15m", "2h", "7d", "2w", or a number of seconds."""

import re
from datetime import timedelta

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)
_SECONDS_MAX = 100 * 366 * 86400
_NANOSECONDS_END = 1 << 63  # since 1970: what a store has room for


def end_of(start_ns: int, lifetime_ns: int) -> int:
    """Return the time at which a lifetime is over, in nanoseconds since 1970.

    Raises
    ------
    ValueError
        A store cannot note a time as late as that.
    """
    if start_ns + lifetime_ns >= _NANOSECONDS_END:
        raise ValueError(
            "a lifetime of that length would end behind 2262-04-11, which is the last day that a store can note; give a "
            "shorter one, or none"
        )
    return start_ns + lifetime_ns


def parse_duration(value: str | float | timedelta) -> int:
    """Return a length of time in nanoseconds.

    Raises
    ------
    ValueError
        It is none, is not above 0, or is more than a hundred years.
    TypeError
        It is neither a text nor a number nor a timedelta.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | timedelta):
        raise TypeError(f"a time is a text such as '2h', a number of seconds or a timedelta, not {value!r}")
    if isinstance(value, str):
        found = _DURATION.fullmatch(value)
        if not found:
            raise ValueError(f"{value!r} is no time; write a number and s, m, h, d or w, such as 90s, 2h or 7d")
        seconds: float = int(found[1]) * _UNITS[found[2]]
    else:
        seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not 0 < seconds <= _SECONDS_MAX:
        raise ValueError(f"{value!r} is no time that can be: it is above 0, and at most a hundred years")
    return max(int(seconds * 1_000_000_000), 1)
