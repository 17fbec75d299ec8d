"""The log of a device's events: at which level, and how many of them.

Each record has two attributes for programs: ``event``, the event's class in snake case, and
``fields``, a dict of ``where`` (the controller, and the port if there is one) and the event's own
fields, as bool, int or str.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import re

from vring_serial.device.console import events as ev
from vring_serial.device.console.events import DeviceEvent
from vring_serial.ratelimit import LogBudget, RateLimitedLog

log = logging.getLogger(__name__)

_WARNINGS = (ev.MessageRefused, ev.QueueBroken, ev.OutputDropped)
# A guest can open and close a port, or start, break and reset, in a loop.
_LIMITED_BY_PORT = (ev.PortOpened, ev.PortClosed, ev.PortReady)
_LIMITED_BY_KIND = (
    ev.QueueBroken,
    ev.FeaturesNegotiated,
    ev.DriverReady,
    ev.DeviceReset,
    ev.EmergencyWrite,
)


class EventLog:
    """Logs what happens to one device, within limits that no guest gets past.

    Each port and each kind of event has a limit of its own, so that one that fills it drowns no
    other, and all of them share a budget.

    Attributes:
        failures: for what callbacks raise.
    """

    def __init__(self) -> None:
        # Devices with more than 511 ports have that many lines to log as they start.
        self._budget = LogBudget(burst=4000, rate=2, resume=100)
        self._refused = RateLimitedLog(log, budget=self._budget)
        self._others = RateLimitedLog(log, burst=2000, budget=self._budget)
        self._limited: dict[int | type[DeviceEvent], RateLimitedLog] = {}
        self.failures = RateLimitedLog(log, budget=self._budget)

    def write(self, where: str, event: DeviceEvent) -> None:
        """Log an event, or count it.

        Args:
            where: the controller, and the port if there is one.
            event: what happened.
        """
        level = logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO
        extra = {"event": _name(type(event).__name__), "fields": {"where": where, **_fields(event)}}
        self._limit(event).log(level, "%s: %s", where, event, extra=extra)

    def _limit(self, event: DeviceEvent) -> RateLimitedLog:
        if isinstance(event, ev.MessageRefused):
            return self._refused
        if isinstance(event, _LIMITED_BY_PORT):
            return self._limited_by(event.nr)
        if isinstance(event, _LIMITED_BY_KIND):
            return self._limited_by(type(event))
        return self._others

    def _limited_by(self, key: int | type[DeviceEvent]) -> RateLimitedLog:
        if key not in self._limited:
            self._limited[key] = RateLimitedLog(log, burst=20, seconds=10, budget=self._budget)
        return self._limited[key]


@functools.cache
def _name(class_name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", class_name).lower()


def _fields(event: DeviceEvent) -> dict[str, bool | int | str]:
    def plain(value: object) -> bool | int | str:
        if isinstance(value, enum.Enum):
            value = value.value
        return value if isinstance(value, (bool, int)) else str(value)

    return {f.name: plain(getattr(event, f.name)) for f in dataclasses.fields(event)}
