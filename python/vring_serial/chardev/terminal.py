"""Raw mode and size of terminals."""

from __future__ import annotations

import os
import termios


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Return columns and rows in characters; None if they are not set or it is no terminal."""
    try:
        cols, rows = os.get_terminal_size(fd)
    except OSError:
        return None
    return (cols, rows) if cols and rows else None


def set_raw(fd: int, *, keep_output: bool = False, keep_signals: bool = False) -> None:
    """Set raw mode: every byte passes unchanged, at once and without echo (cfmakeraw).

    Args:
        fd: either side of the terminal.
        keep_output: leave output processing on, so that the process's own lines start at the left.
        keep_signals: Ctrl-C and similar keys still send signals.

    Raises:
        termios.error: not a terminal.
    """
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(fd)
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    if not keep_output:
        oflag &= ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    if not keep_signals:
        lflag &= ~termios.ISIG
    cc[termios.VMIN] = 1
    cc[termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])


def set_line(fd: int) -> None:
    """Set raw mode, 115200 baud, 8 bits, no parity, 1 stop bit and no flow control.

    Raises termios.error: not a terminal.
    """
    set_raw(fd)
    iflag, oflag, cflag, lflag, _, _, cc = termios.tcgetattr(fd)
    cflag &= ~(termios.CSTOPB | termios.PARODD | termios.CRTSCTS)
    cflag |= termios.CREAD
    speed = termios.B115200
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, speed, speed, cc])
