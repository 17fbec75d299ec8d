"""Sets of capabilities that grow by words, and the message layouts that follow from two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .constants import AGENT_AWAY, AGENT_FULL, FILES_FROM_GUEST, Capability

_OURS = {
    FILES_FROM_GUEST: "FILES_FROM_GUEST",
    AGENT_AWAY: "AGENT_AWAY",
    AGENT_FULL: "AGENT_FULL",
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The words of ANNOUNCE_CAPABILITIES, bits that nobody has named yet included.

    Attributes:
        words: 32 capabilities each, the first word holding the numbers 0 to 31.
    """

    words: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, *capabilities: int) -> Capabilities:
        """Return the set of these capability numbers."""
        return cls().with_(*capabilities)

    def __contains__(self, capability: int) -> bool:
        word, bit = divmod(capability, 32)
        return word < len(self.words) and bool(self.words[word] >> bit & 1)

    def __iter__(self) -> Iterator[int]:
        for index, word in enumerate(self.words):
            for bit in range(32):
                if word >> bit & 1:
                    yield index * 32 + bit

    def __bool__(self) -> bool:
        return any(self.words)

    def with_(self, *capabilities: int) -> Capabilities:
        """Return this set and these."""
        words = list(self.words)
        for capability in capabilities:
            word, bit = divmod(capability, 32)
            words.extend([0] * (word + 1 - len(words)))
            words[word] |= 1 << bit
        return Capabilities(tuple(words))

    def without(self, *capabilities: int) -> Capabilities:
        """Return this set without these; the number of words stays."""
        words = list(self.words)
        for capability in capabilities:
            word, bit = divmod(capability, 32)
            if word < len(words):
                words[word] &= ~(1 << bit)
        return Capabilities(tuple(words))

    def names(self) -> list[str]:
        """Names for people, in order; unknown ones as ``CAP_40``."""
        return [capability_name(number) for number in self]

    def __str__(self) -> str:
        return " ".join(self.names()) or "none"


def capability_name(number: int) -> str:
    """Name of a capability without its prefix, or ``CAP_n`` if vd_agent.h has none."""
    if number in _OURS:
        return _OURS[number]
    try:
        return Capability(number).name
    except ValueError:
        return f"CAP_{number}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which optional fields the clipboard messages carry: both ends must have announced them.

    Attributes:
        selections: clipboard messages begin with a selection (CLIPBOARD_SELECTION).
        serials: CLIPBOARD_GRAB has a serial number (CLIPBOARD_GRAB_SERIAL).
    """

    selections: bool = False
    serials: bool = False

    @classmethod
    def negotiated(cls, ours: Iterable[int], theirs: Iterable[int]) -> Layout:
        """Return the layout that two announcements lead to."""
        both = set(ours) & set(theirs)
        return cls(
            selections=Capability.CLIPBOARD_SELECTION in both,
            serials=Capability.CLIPBOARD_GRAB_SERIAL in both,
        )
