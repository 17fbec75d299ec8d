"""The escape key of ``vring attach``."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import click


class Command(enum.Enum):
    """What a key after the escape key asks for."""

    LEAVE = enum.auto()
    HELP = enum.auto()


@dataclass(frozen=True, slots=True)
class Escape:
    """An escape key.

    Attributes:
        key: the byte that it is; empty for none.
    """

    key: bytes

    def __str__(self) -> str:
        if not self.key:
            return "none"
        code = self.key[0]
        return f"^{chr(code ^ 0x40)}" if code < 0x20 or code == 0x7F else chr(code)


class EscapeKey(click.ParamType[Escape]):
    """``^X``, one character of ASCII, or ``none``."""

    name = "key"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Escape:
        if isinstance(value, Escape):
            return value
        if value == "none":
            return Escape(b"")
        if len(value) == 2 and value[0] == "^" and "?" <= value[1].upper() <= "_":
            return Escape(bytes([ord(value[1].upper()) ^ 0x40]))
        if len(value) == 1 and " " < value < "\x7f":
            return Escape(value.encode())
        return self.fail(f"{value!r} is no key: one character, ^X for Ctrl-X, or none", param, ctx)


class Keys:
    """Takes the escape key and what follows it out of what somebody types.

    A character that can be printed is the escape key only at the start of a line, as in ssh.
    """

    def __init__(self, escape: Escape) -> None:
        self._escape = escape.key
        self._anywhere = bool(escape.key) and not 0x20 < escape.key[0] < 0x7F
        self._at_start = True
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[Command]]:
        """Return what is for the guest, and what was asked for; nothing counts after LEAVE."""
        if not self._escape:
            return data, []
        passed = bytearray()
        commands: list[Command] = []
        for i in range(len(data)):
            key = data[i : i + 1]
            if self._escaped:
                self._escaped = False
                if key in (b".", b"\x04"):
                    return bytes(passed), [*commands, Command.LEAVE]
                if key == b"?":
                    commands.append(Command.HELP)
                    continue
                if key != self._escape:
                    passed += self._escape
            elif key == self._escape and (self._anywhere or self._at_start):
                self._escaped = True
                continue
            passed += key
            self._at_start = key in b"\r\n"
        return bytes(passed), commands
