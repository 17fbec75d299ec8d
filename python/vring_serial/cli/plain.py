"""Untrusted text that is printed to a terminal or in a line."""

from __future__ import annotations


def escaped(text: str, *, keep: str = "") -> str:
    """Return ``text`` with characters escaped that break or forge lines or control a terminal.

    Args:
        keep: characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
