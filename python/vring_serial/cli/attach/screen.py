"""What a console's output does to the terminal that shows it, and how it is undone."""

from __future__ import annotations

import re

#: Private modes that programs set, and whether a terminal has them when it starts.
_MODES = {
    **dict.fromkeys((1, 5, 6, 9, 45, 47, 66, 69), False),
    **dict.fromkeys((7, 25), True),
    **dict.fromkeys((1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 1016), False),
    **dict.fromkeys((1047, 1048, 1049, 2004, 2026, 2031, 2048), False),
}
#: Those of the alternate screen; leaving them puts the cursor back, so they come first.
_ALTERNATE = (1049, 1047, 47)

_CONTROL = re.compile(
    rb"\x1b(?:\[\?([0-9;]{1,80})([hl])"  # private modes
    rb"|(c)"  # reset
    rb"|\[([0-9;]{0,40})r"  # scroll region
    rb"|\[([>=<][0-9;]{0,40})u"  # keyboard protocol
    rb"|\[>(4[0-9;]{0,40})m)"  # modified keys
)
#: What a terminal answers. In history, nobody waits for the answer, and the guest would read it as
#: if somebody had typed it.
_QUERY = re.compile(
    rb"\x05"
    rb"|\x1bZ"
    rb"|\x1b\[[>=?]?[0-9;]{0,40}[cnx]"
    rb"|\x1b\[\??[0-9;]{0,40}\$p"
    rb"|\x1b\[>[0-9;]{0,40}q"
    rb"|\x1b\[\?[0-9;]{0,40}u"
    rb"|\x1b\[(?:1[1-9]|2[01])[0-9;]{0,40}t"
    rb"|\x1b\[[0-9;]{0,40}\*y"
    rb"|\x1b\][^\x07\x1b]{0,80};\?[^\x07\x1b]{0,80}(?:\x07|\x1b\\)"
    rb"|\x1bP[+$]q[^\x07\x1b]{0,400}\x1b\\"
)
#: The beginning of a sequence whose end is not there yet.
_BEGUN = re.compile(
    rb"\x1b(?:\[[<-?]?[0-9;]{0,80}[ -/]{0,2}|\][^\x07\x1b]{0,200}\x1b?|P[^\x07\x1b]{0,404}\x1b?)?\Z"
)
#: Ends a sequence that was begun, and goes back to plain letters: something is left out here.
CUT = b"\x18\x1b\\\x1b[m\x1b(B\x0f"
#: Ends inserting and the keypad's other keys.
_PLAIN = b"\x1b[4l\x1b>"


class Screen:
    """Follows the output, so that a terminal is left as it was found.

    Whoever shows the output passes all of it through here, history by :meth:`history` and what is
    new by :meth:`live`.
    """

    def __init__(self) -> None:
        self._changed: set[int] = set()
        self._region = self._keyboard = self._keys = False
        self._seen = b""  # a sequence that was begun in what was shown
        self._held = b""  # and one in history, which was not

    def history(self, data: bytes, *, last: bool) -> bytes:
        """Return what of history is to be shown: all but questions to the terminal.

        Args:
            last: nothing of history follows.
        """
        data = self._held + data
        begun = None if last else _BEGUN.search(data)
        at = len(data) if begun is None else begun.start()
        self._held = data[at:]
        shown = _QUERY.sub(b"", data[:at])
        self.live(shown)
        return shown

    def live(self, data: bytes) -> None:
        """Take note of what is shown."""
        data = self._seen + data
        for found in _CONTROL.finditer(data):
            self._note(found)
        begun = _BEGUN.search(data)
        self._seen = b"" if begun is None else data[begun.start() :]

    @property
    def undo(self) -> bytes:
        """What puts the terminal in order."""
        parts = [CUT]
        alternate = [mode for mode in _ALTERNATE if mode in self._changed]
        for mode in [*alternate, *sorted(self._changed.difference(_ALTERNATE))]:
            parts.append(b"\x1b[?%d%c" % (mode, b"h" if _MODES[mode] else b"l"))
        if self._region:
            parts.append(b"\x1b7\x1b[r\x1b8")
        if self._keyboard:
            parts.append(b"\x1b[<16u\x1b[=0u")
        if self._keys:
            parts.append(b"\x1b[>4m")
        return b"".join([*parts, _PLAIN])

    def _note(self, found: re.Match[bytes]) -> None:
        modes, action, reset, region, keyboard, keys = found.groups()
        if reset is not None:
            self._changed.clear()
            self._region = self._keyboard = self._keys = False
        elif modes is not None:
            for text in modes.split(b";"):
                mode = int(text or b"0")
                if mode in _MODES:
                    is_changed = (action == b"h") != _MODES[mode]
                    (self._changed.add if is_changed else self._changed.discard)(mode)
        elif region is not None:
            self._region = bool(region)
        elif keyboard is not None:
            self._keyboard = True
        else:
            self._keys = keys != b"4"
