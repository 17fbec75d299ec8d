"""The text of FILE_XFER_START: a key file with the name and the size of what is offered.

It is GLib's GKeyFile format: a ``[vdagent-file-xfer]`` group with ``name`` and ``size``; strings
escape backslash, newline, carriage return, tab and leading spaces with a backslash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import MessageError

GROUP = "vdagent-file-xfer"
_FIELD = "VDAgentFileXferStartMessage.data"
_AT = 4
_ESCAPES = {"s": " ", "n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_SIZE_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a sender says of a file.

    Attributes:
        name: as the sender gave it: it may hold anything, slashes included. Never use it as a path.
        size: bytes.
    """

    name: str
    size: int

    def pack(self) -> bytes:
        """Return the text, with the NUL at its end that newer agents insist on."""
        name = self.name
        for letter in "\\ntr":
            plain = _ESCAPES[letter]
            name = name.replace(plain, "\\" + letter)
        spaces = len(name) - len(name.lstrip(" "))
        name = "\\s" * spaces + name[spaces:]
        return f"[{GROUP}]\nname={name}\nsize={self.size}\n".encode("utf-8", "replace") + b"\0"

    @classmethod
    def unpack(cls, data: bytes) -> FileInfo:
        """Read the text; keys that we do not know are ignored. Raises MessageError."""
        try:
            text = data.split(b"\0", 1)[0].decode("utf-8")
        except UnicodeDecodeError as error:
            raise MessageError(_FIELD, _AT + error.start, "not UTF-8") from None
        keys = _keys(text)
        if "name" not in keys:
            raise MessageError(_FIELD, _AT, f"no name in the group [{GROUP}]")
        size = keys.get("size", "").strip()
        if not re.fullmatch(r"[0-9]{1,20}", size, re.ASCII) or int(size) > _SIZE_MAX:
            raise MessageError(_FIELD, _AT, f"size {size[:40]!r} is not a number of bytes")
        return cls(_unescape(keys["name"]), int(size))


def _keys(text: str) -> dict[str, str]:
    group = ""
    keys = {}
    for line in text.split("\n"):
        if line.startswith("[") and line.rstrip().endswith("]"):
            group = line.rstrip()[1:-1]
        elif group == GROUP and "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            keys[key.strip()] = value.lstrip(" \t")
    return keys


def _unescape(value: str) -> str:
    return re.sub(r"\\([sntr\\])", lambda found: _ESCAPES[found[1]], value)
