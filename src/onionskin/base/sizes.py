"""Sizes as people write and read them. K, M, G, T and P are powers of 1024, with or without `iB`."""

import operator
import re

from onionskin.base.limits import OFFSET_MAX

_UNITS = ("", "K", "M", "G", "T", "P", "E")
_SIZE = r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGTPE]?)(?:I?B)?\s*"  # compiled at its first use, as few verbs take a size


def parse_size(text: str | int) -> int:
    """Read a size such as ``"20G"``, ``"1.5 MiB"``, ``"512"`` or ``4096``.

    Parameters
    ----------
    text : str or int
        Digits, and one of K, M, G, T, P or E (powers of 1024), optionally followed by ``B`` or ``iB``. An ``int`` is a
        number of bytes.

    Returns
    -------
    int
        Bytes, from 0 to 2**63 - 1.

    Raises
    ------
    ValueError
        The text is not a size, is not a whole number of bytes, or is too large.
    TypeError
        `text` is neither a string nor a whole number of Python or NumPy.
    """
    if not isinstance(text, str):
        if isinstance(text, bool):
            raise TypeError(f"a size is a number of bytes or a text such as 20G, not {text!r}")
        size_bytes = operator.index(text)
    else:
        match = re.fullmatch(_SIZE, text.upper(), re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G, T or P, such as 20G")
        whole, _, fraction = match[1].partition(".")
        unit = int(1024 ** _UNITS.index(match[2]))
        tenths = 10 ** len(fraction)
        size_bytes, rest = divmod(int(whole + fraction) * unit, tenths)
        if rest:
            raise ValueError(f"{text!r} is not a whole number of bytes: write it with fewer decimals")
    if not 0 <= size_bytes <= OFFSET_MAX:
        raise ValueError(f"{text!r} is not a size: it must be between 0 and 2**63 - 1 bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Write a number of bytes for people: at most four digits, and the largest unit that keeps them below 1024.

    Parameters
    ----------
    size_bytes : int
        Not below 0.

    Returns
    -------
    str
        With a power of 1024 as its unit.

    Examples
    --------
    >>> format_size(20 << 30), format_size(1536), format_size(10)
    ('20 GiB', '1.5 KiB', '10 B')
    """
    if size_bytes < 1024:
        return f"{size_bytes} B"
    exponent = min((size_bytes.bit_length() - 1) // 10, len(_UNITS) - 1)
    if round(size_bytes / 1024**exponent, 1) >= 1024 and exponent < len(_UNITS) - 1:
        exponent += 1
    number = f"{size_bytes / 1024**exponent:.1f}".removesuffix(".0")
    return f"{number} {_UNITS[exponent]}iB"
