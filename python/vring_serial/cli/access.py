"""Who may connect to sockets: ``--socket-mode``, ``--socket-owner`` and ``--socket-group``."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from typing import Any

from vring_serial.errors import ConfigError
from vring_serial.unix_socket import SocketAccess


def parse_access(mode: str | None, owner: str | None, group: str | None) -> SocketAccess:
    """Return what the options say; None for one that was not given.

    Raises ConfigError, with the option's name.
    """
    return SocketAccess(
        None if mode is None else _mode(mode),
        -1 if owner is None else _number(owner, "owner", "user", pwd.getpwnam, "pw_uid"),
        -1 if group is None else _number(group, "group", "group", grp.getgrnam, "gr_gid"),
    )


def _mode(text: str) -> int:
    where = f"--socket-mode {text}"
    try:
        mode = int(text, 8)
    except ValueError:
        raise ConfigError("it is no octal number, as 0660 is", where) from None
    if not 0 <= mode <= 0o777:
        raise ConfigError("it is not between 0 and 0777", where)
    return mode


def _number(text: str, option: str, what: str, find: Callable[[str], Any], field: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    try:
        number: int = getattr(find(text), field)
    except (KeyError, ValueError):
        raise ConfigError(f"there is no {what} {text}", f"--socket-{option} {text}") from None
    return number
