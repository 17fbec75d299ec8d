"""Host to guest: a port's receiveq."""

from __future__ import annotations

import os

from vring import FlowEvent, RingError
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.device.console.direction import Direction, Mode, Sides
from vring_serial.device.virtqueue import RunningQueue


class Receive(Direction):
    """The direction from the host to the guest.

    Bytes move while the guest has the port open. Nothing is read from the host otherwise.
    """

    is_transmit = False

    def stop(self) -> None:
        mode, self._mode = self._mode, Mode.IDLE
        if self._flow is not None:
            flow, self._flow = self._flow, None
            flow.detach()
            self._before += flow.counters
        if mode is Mode.TRANSPORT:
            assert self._sides.session is not None
            self._sides.session.stop_receiveq()

    def _wanted(self, sides: Sides) -> Mode:
        if not sides.guest_open:
            return Mode.IDLE
        if isinstance(sides.end, DescriptorEnd):
            return Mode.IDLE if sides.end.read_fd < 0 or self._over else Mode.PUMP
        if sides.session is None or sides.session.ending:
            return Mode.IDLE
        return Mode.TRANSPORT

    def _start(self, mode: Mode, running: RunningQueue) -> None:
        if mode is Mode.PUMP:
            assert isinstance(self._sides.end, DescriptorEnd)
            self._flow = self._user.pump.host_to_guest(
                running.queue,
                read_fd=self._sides.end.read_fd,
                kick_fd=running.kick_fd,
                call_fd=running.call_fd,
                on_event=self._flow_event,
                kept=self._sides.end.kept,
                relay=self._sides.end.read_relay,
            )
        else:
            assert self._sides.session is not None
            self._sides.session.start_receiveq(running)

    def _flow_event(self, event: FlowEvent, detail: int | RingError | None) -> None:
        if isinstance(detail, RingError):
            self.break_queue(detail)
        elif event == FlowEvent.INEXACT:
            self._user.end_is_inexact()
        else:
            self._ended(OSError(detail, os.strerror(detail)) if detail else None)
