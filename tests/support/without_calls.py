"""Run a command where system calls are forbidden, as containers and old kernels have it.

Usage: ``without_calls.py CALL=ERRNO... -- COMMAND ARGUMENT...``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys


def main() -> None:
    """Make the filter, and become the command."""
    middle = sys.argv.index("--")
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(0x7FFF0000))  # all others are allowed
    for word in sys.argv[1:middle]:
        call, _, error = word.partition("=")
        action = 0x00050000 | getattr(errno, error)
        number = lib.seccomp_syscall_resolve_name(call.encode())
        assert not lib.seccomp_rule_add_array(context, action, number, 0, None), word
    assert not lib.seccomp_load(context)
    command = sys.argv[middle + 1 :]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
