"""Where the monitor's process of a service listens."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.socket import SocketOptions


@dataclass(frozen=True, slots=True)
class Monitored:
    """Addresses of the monitor's process, which is there if there is one.

    Attributes:
        qmp: of the monitors that speak QMP.
        metrics: where metrics are served.
    """

    qmp: tuple[SocketOptions, ...] = ()
    metrics: tuple[SocketOptions, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.qmp or self.metrics)
