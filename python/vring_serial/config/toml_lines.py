"""Finds the line of every key of a TOML document, which ``tomllib`` does not tell."""

from __future__ import annotations

import re
import tomllib

#: Keys of tables and indices of arrays, from the outermost.
Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN = re.compile(r"[^,\]}\n#]*")
#: Strings by what begins them, the longer beginnings first.
_STRINGS = {
    '"""': re.compile(r'"""(?:[^\\]|\\.)*?"""(?:""?)?', re.DOTALL),
    "'''": re.compile(r"'''.*?'''(?:''?)?", re.DOTALL),
    '"': re.compile(r'"(?:[^"\\]|\\.)*"'),
    "'": re.compile(r"'[^']*'"),
}


def find_lines(text: str) -> dict[Path, int]:
    """Return the line of each table and key, by its path; of an array's elements too.

    Args:
        text: a document that ``tomllib`` has accepted.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0  # line feeds before here are in _line
        self._lines: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}  # of tables: how many so far

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip(_BLANK) < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _header(self) -> Path:
        line = self._here()
        width = 2 if self._text.startswith("[[", self._at) else 1
        self._at += width
        keys = self._keys()
        self._at += width
        path: Path = ()
        for i, key in enumerate(keys):
            path = (*path, key)
            self._lines.setdefault(path, line)
            if i == len(keys) - 1 and width == 2:
                self._arrays[path] = self._arrays.get(path, 0) + 1
            if path in self._arrays:
                path = (*path, self._arrays[path] - 1)
                self._lines.setdefault(path, line)
        return path

    def _pair(self, table: Path) -> None:
        line = self._here()
        path = table
        for key in self._keys():
            path = (*path, key)
            self._lines.setdefault(path, line)
        self._at += 1  # the equals sign
        self._value(path)

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_SPACE)
            if self._text[self._at] in "\"'":
                keys.append(_unquoted(self._string()))
            else:
                start = self._at
                keys.append(self._text[start : self._skip(_BARE)])
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _value(self, path: Path) -> None:
        self._skip(_BLANK)
        first = self._text[self._at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._elements(path)
        elif first == "{":
            self._elements(path, is_table=True)
        else:
            self._skip(_PLAIN)

    def _elements(self, path: Path, *, is_table: bool = False) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip(_BLANK)
            if self._text[self._at] in "]}":
                self._at += 1
                return
            if is_table:
                self._pair(path)
            else:
                self._lines[(*path, index)] = self._here()
                self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self._text[self._at] == ",":
                self._at += 1

    def _string(self) -> str:
        start = self._at
        for quote, pattern in _STRINGS.items():
            if self._text.startswith(quote, start):
                return self._text[start : self._skip(pattern)]
        raise AssertionError("tomllib accepted it")

    def _skip(self, pattern: re.Pattern[str]) -> int:
        found = pattern.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        return self._at

    def _here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line


def _unquoted(text: str) -> str:
    """Return what a quoted key stands for."""
    if text.startswith("'"):
        return text[1:-1]
    value = tomllib.loads(f"key = {text}")["key"]
    assert isinstance(value, str)
    return value
