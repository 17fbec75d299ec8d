"""What systemd gives a service that it starts, and what it wants to hear (sd_notify(3)).

Other service managers speak the same protocols.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import MutableMapping

from vring_serial.errors import ConfigError, ResourceError
from vring_serial.service.descriptor_store import Notifier

#: The first descriptor that is passed (SD_LISTEN_FDS_START).
_FIRST = 3
#: What a manager calls a socket that has no name.
_NAMELESS = "unknown"
Environment = MutableMapping[str, str]


def listen_fds(environment: Environment) -> list[tuple[str, int]]:
    """Return name and number of each descriptor that was passed, which are the caller's then.

    They are close-on-exec, and the environment forgets them. Those meant for another process are
    left alone.

    Raises ConfigError: what the environment says of them makes no sense.
    """
    found = [environment.pop(f"LISTEN_{what}", None) for what in ("PID", "FDS", "FDNAMES")]
    pid, count, names = found
    if pid is None or count is None:
        return []
    if not pid.isdecimal() or not count.isdecimal():
        raise ConfigError(f"LISTEN_PID={pid}, LISTEN_FDS={count}: they are numbers")
    if int(pid) != os.getpid():
        return []
    called = names.split(":") if names else [_NAMELESS] * int(count)
    if len(called) != int(count):
        raise ConfigError(f"LISTEN_FDNAMES has {len(called)} names for {count} descriptors")
    passed = [(name, _FIRST + number) for number, name in enumerate(called)]
    for name, fd in passed:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS: {name} is not open: {error.strerror}") from None
    return passed


def watchdog_seconds(environment: Environment) -> float | None:
    """Return within how many seconds the manager wants to hear of us again; None: it does not.

    The environment forgets it. Raises ConfigError: it makes no sense.
    """
    microseconds = environment.pop("WATCHDOG_USEC", None)
    pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
    if microseconds is None or pid != str(os.getpid()):
        return None
    if not microseconds.isdecimal() or not int(microseconds):
        raise ConfigError(f"WATCHDOG_USEC={microseconds}: it is a number")
    return int(microseconds) / 1e6


class ServiceManager:
    """Whoever started the service, as far as it wants to hear of it.

    Args:
        notifier: to it; None: it wants to hear nothing.
        watchdog: see :func:`watchdog_seconds`.
    """

    def __init__(self, notifier: Notifier | None, watchdog: float | None = None) -> None:
        self._notifier = notifier
        self.watchdog = watchdog if notifier is not None else None

    @classmethod
    def from_environment(
        cls, environment: Environment, *, may_be_gone: bool = False
    ) -> ServiceManager:
        """Return the one of this environment, which stays as it is.

        Args:
            environment: the process's.
            may_be_gone: it was reached before, by the code that this process goes on for: one that
                waited for READY=1 alone hears nothing any more.

        Raises ConfigError, ResourceError: it cannot be reached.
        """
        copy = dict(environment)
        try:
            notifier = Notifier.from_environment(copy)
        except ResourceError:
            if not may_be_gone:
                raise
            notifier = None
        return cls(notifier, watchdog_seconds(copy))

    def ready(self, status: str) -> None:
        """Say that the service serves, as this process."""
        self._say("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the service is about to open logs anew, or to be upgraded; ready follows."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the service ends."""
        self._say("STOPPING=1", "STATUS=stopping")

    def status(self, text: str) -> None:
        """Say in one line how the service is."""
        self._say(f"STATUS={text}")

    def alive(self) -> None:
        """Answer the watchdog."""
        self._say("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing any more. Safe to call twice."""
        if self._notifier is not None:
            self._notifier.close()
            self._notifier = None

    def _say(self, *lines: str) -> None:
        if self._notifier is not None:
            with contextlib.suppress(ResourceError):  # the service serves, whoever hears
                self._notifier.notify(*lines)
