"""Landlock by its system calls: rules about paths, TCP ports and signals (landlock(7))."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable

from vring_serial.service.reach import Reach

_CREATE_RULESET, _ADD_RULE = 444, 445  # on every architecture that Linux has had since
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2

WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_FILE = 1 << 5
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_SYM = 1 << 12
_OF_FILES = WRITE_FILE | READ_FILE
#: The first version knew 13 kinds of access; later ones know others beside them.
_FIRST = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT, _SCOPE_SIGNAL = 1, 2

VERSION_WITH_TCP = 4
VERSION_WITH_SCOPES = 6

_libc = ctypes.CDLL(None, use_errno=True)


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def version() -> int:
    """Return the version that the kernel has; 0 for none."""
    found: int = _libc.syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(found, 0)


def make_ruleset(reach: Reach, version: int) -> int:
    """Return the descriptor of a ruleset that allows ``reach`` and no more.

    Nothing can be executed. Paths that do not exist are left out.

    Args:
        reach: paths and peers.
        version: of the kernel's Landlock.

    Raises:
        OSError: the kernel refused it.
    """
    attr = _RulesetAttr(_FIRST, 0, 0)
    for since, access in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if version >= since:
            attr.handled_access_fs |= access
    if version >= VERSION_WITH_TCP:
        attr.handled_access_net = _BIND_TCP | _CONNECT_TCP
    if version >= VERSION_WITH_SCOPES:
        attr.scoped = _SCOPE_SIGNAL | (0 if reach.abstract else _SCOPE_ABSTRACT)
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)
    try:
        for access, paths in (
            (READ_FILE | READ_DIR, reach.read),
            (WRITE_FILE | READ_FILE, reach.written),
            (WRITE_FILE | MAKE_REG, reach.made_in),
            (attr.handled_access_fs & _TRUNCATE, reach.emptied_in),
            (REMOVE_FILE, reach.removed_in),
            (READ_FILE | WRITE_FILE | MAKE_REG | REMOVE_FILE, reach.scratch),
            (READ_FILE | WRITE_FILE | attr.handled_access_fs & _IOCTL_DEV, reach.terminals),
            (
                READ_FILE
                | WRITE_FILE
                | MAKE_REG
                | MAKE_SOCK
                | MAKE_SYM
                | REMOVE_FILE
                | attr.handled_access_fs & (_TRUNCATE | _IOCTL_DEV),
                reach.changed_in,
            ),
        ):
            for path in paths if access else ():
                _allow_path(ruleset, path, access)
        if version >= VERSION_WITH_TCP:
            for port in reach.tcp:
                _add_rule(ruleset, _RULE_NET_PORT, _NetPort(_CONNECT_TCP, port))
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow_path(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            access &= _OF_FILES | _IOCTL_DEV
        # A pipe that has a path in /dev/fd is in no file system; Landlock lets it be opened.
        if not stat.S_ISFIFO(mode) or not os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
            _add_rule(ruleset, _RULE_PATH_BENEATH, _PathBeneath(access, fd))
    finally:
        os.close(fd)


def _add_rule(ruleset: int, kind: int, rule: ctypes.Structure) -> None:
    _call(_ADD_RULE, ruleset, kind, ctypes.byref(rule), 0)


def _call(number: int, *arguments: object) -> int:
    call: Callable[..., int] = _libc.syscall
    done = call(number, *arguments)
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return done
