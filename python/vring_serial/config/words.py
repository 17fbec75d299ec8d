"""Values in the user's input, and suggestions for unknown words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_INTEGER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}")
_SIZE = re.compile(r"([0-9]{1,12})([kKmMgG]?)")
_SIZE_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30}
#: Longer words are not compared.
_LONGEST_WORD = 64


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown word: the closest known word, and all of them."""
    known = sorted(known)
    close = get_close_matches(word[:_LONGEST_WORD].lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def parse_bool(text: str) -> bool:
    """Parse on/off, yes/no, true/false or y/n, as QEMU and libvirt do. Raises ValueError."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{shorten(text)} is neither on nor off")


def parse_int(text: str) -> int:
    """Parse a number ≥ 0, decimal or, with 0x, hexadecimal. Raises ValueError."""
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{shorten(text)} is not a number")
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def parse_size(text: str) -> int:
    """Parse a number of bytes, with K, M or G for powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shorten(text)} is not a size such as 65536 or 64K")
    return int(match[1]) << _SIZE_SHIFTS[match[2].lower()]


def shorten(text: str) -> str:
    """Return ``text`` quoted and shortened, for a message of one readable line."""
    return repr(text if len(text) <= _LONGEST_WORD else text[:_LONGEST_WORD] + "…")
