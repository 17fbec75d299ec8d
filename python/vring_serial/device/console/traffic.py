"""What went through one direction of a port, for people and monitoring."""

from __future__ import annotations

from dataclasses import dataclass

from vring import FlowCounters


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts since the process began, each ascending.

    Attributes:
        bytes: moved between guest and host end.
        chains: buffers of the driver that were used.
        kicks: notifications of the driver, for ends that are descriptors.
        calls: interrupts that the driver got, likewise.
        calls_saved: interrupts that it did not need, likewise.
        throttled_ns: nanoseconds for which the slower side held the other one up, likewise.
        dropped: bytes of the guest that a console's host end did not take.
    """

    bytes: int = 0
    chains: int = 0
    kicks: int = 0
    calls: int = 0
    calls_saved: int = 0
    throttled_ns: int = 0
    dropped: int = 0

    def __add__(self, other: FlowCounters | Traffic) -> Traffic:
        return Traffic(
            self.bytes + other.bytes,
            self.chains + other.chains,
            self.kicks + other.kicks,
            self.calls + other.calls,
            self.calls_saved + other.calls_saved,
            self.throttled_ns + other.throttled_ns,
            self.dropped + other.dropped,
        )
