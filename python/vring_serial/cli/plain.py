"""Text of others that goes to a terminal or into a line."""

from __future__ import annotations


def escaped(text: str, *, keep: str = "") -> str:
    """``text`` with what could break or forge a line, or drive a terminal, escaped.

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
