"""What workers answer about themselves, read with suspicion: a guest may have taken one over.

Whatever a worker answers, the readings of others stay as they are, and the text that is made of
them can be parsed: numbers are counts, texts are short, and nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vring_serial.device.console.traffic import Traffic

#: Most controllers and ports of a VM that are read: a thousand take a quarter of a second.
CONTROLLERS_MAX = 64
PORTS_MAX = 2048
#: Characters of a text.
TEXT_MAX = 256
_COUNT_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PortReading:
    """One port.

    Attributes:
        nr: port number.
        name, chardev: of it and of its host end.
        console: whether it is one.
        guest_open, host_open: whether either side has it open.
        host_connects: how often a host end connected.
        out, back: from the guest, and to it.
    """

    nr: int
    name: str
    chardev: str
    console: bool
    guest_open: bool
    host_open: bool
    host_connects: int
    out: Traffic
    back: Traffic


@dataclass(frozen=True, slots=True)
class ControllerReading:
    """One controller.

    Attributes:
        id: its name.
        frontend: whether one is connected.
        frontend_connects: how often one connected.
        needs_reset: whether the driver broke the device.
        ports: by number.
    """

    id: str
    frontend: bool
    frontend_connects: int
    needs_reset: bool
    ports: tuple[PortReading, ...]


@dataclass(frozen=True, slots=True)
class VmReading:
    """One VM.

    Attributes:
        name: of the VM.
        restarts: how many workers served it before this one; None: the worker did not answer.
        controllers: by name; none if the worker did not answer.
    """

    name: str
    restarts: int | None = None
    controllers: tuple[ControllerReading, ...] = ()


def read_vm(name: str, answer: object) -> VmReading:
    """Return the reading of what a worker described itself with; None: it did not answer."""
    if not isinstance(answer, Mapping):
        return VmReading(name)
    found: dict[str, ControllerReading] = {}
    left = PORTS_MAX
    for item in _objects(answer.get("controllers"), CONTROLLERS_MAX):
        ports: dict[int, PortReading] = {}
        for port in _objects(item.get("ports"), left):
            reading = _port(port)
            ports.setdefault(reading.nr, reading)
        controller = ControllerReading(
            _text(item.get("id")),
            item.get("frontend") is True,
            _count(item.get("frontend_connects")),
            item.get("needs_reset") is True,
            tuple(ports.values()),
        )
        if found.setdefault(controller.id, controller) is controller:
            left -= len(ports)
    return VmReading(name, _count(answer.get("restarts")), tuple(found.values()))


def _port(item: Mapping[str, Any]) -> PortReading:
    return PortReading(
        _count(item.get("nr")),
        _text(item.get("name")),
        _text(item.get("chardev")),
        item.get("console") is True,
        item.get("guest_open") is True,
        item.get("host_open") is True,
        _count(item.get("host_connects")),
        _flow(item.get("out")),
        _flow(item.get("in")),
    )


def _flow(item: object) -> Traffic:
    counts = item if isinstance(item, Mapping) else {}
    return Traffic(*(_count(counts.get(field.name)) for field in fields(Traffic)))


def _objects(items: object, most: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(items, list):
        for item in items[:most]:
            if isinstance(item, Mapping):
                yield item


def _count(value: object) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _COUNT_MAX
    return value if is_count and isinstance(value, int) else 0


def _text(value: object) -> str:
    """Return a text that UTF-8 can encode."""
    text = value[:TEXT_MAX] if isinstance(value, str) else ""
    return text.encode(errors="replace").decode()
