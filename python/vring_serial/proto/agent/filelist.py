"""The clipboard type FILE_LIST: what was copied or cut, and its paths."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import MessageError

PATHS_MAX = 4096
"""Paths of one list that are believed."""

_FIELD = "VDAgentClipboard.data"
_ACTIONS = (b"copy", b"cut")


@dataclass(frozen=True, slots=True)
class FileList:
    """Files on a clipboard.

    Attributes:
        paths: absolute paths where the files come from; they mean nothing here.
        cut: they are to be moved, not copied.
    """

    paths: tuple[str, ...]
    cut: bool = False

    def pack(self) -> bytes:
        """Return the clipboard data: the action and the paths, with NULs between them."""
        items = [_ACTIONS[self.cut], *(path.encode("utf-8", "replace") for path in self.paths)]
        return b"\0".join(items)

    @classmethod
    def unpack(cls, data: bytes) -> FileList:
        """Read clipboard data. Raises MessageError."""
        action, *items = data.removesuffix(b"\0").split(b"\0")
        if action not in _ACTIONS:
            raise MessageError(_FIELD, 0, f"{action[:20]!r} is neither copy nor cut")
        if len(items) > PATHS_MAX:
            raise MessageError(_FIELD, 0, f"{len(items)} paths, at most {PATHS_MAX}")
        try:
            paths = tuple(item.decode() for item in items)
        except UnicodeDecodeError as error:
            raise MessageError(_FIELD, error.start, "a path is not UTF-8") from None
        return cls(paths, action == b"cut")
