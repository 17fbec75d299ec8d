"""Guest to host: a port's transmitq."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from vring import Backlog, Flow, FlowEvent, RingError, recorded
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.device.console.direction import Direction, DirectionUser, Mode, Sides
from vring_serial.device.console.residue import ResidueWriter
from vring_serial.device.console.state import BACKLOG_MAX
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.served import Discarder
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.control import PortState


class Transmit(Direction):
    """The direction from the guest to the host.

    Nothing moves before the driver can use the port; then bytes are discarded until the guest opens
    the port for the first time, so that nobody reads what was meant for nobody; then they are
    delivered, also what was written before the guest closed it. Without a host end nothing is
    popped, but by a console, which must never hold its driver up. What is delivered, or dropped for
    that reason, is logged.

    Args:
        backlog: a console's, which a successor of this process finds, or None. While no flow has
            it, it holds the chain's residue, if there is room.
    """

    is_transmit = True

    def __init__(self, sides: Sides, user: DirectionUser, backlog: Backlog | None = None) -> None:
        super().__init__(sides, user)
        self._chain = sides.state.chain
        self._backlog = backlog
        if backlog is not None and self._chain.residue:
            backlog.replace(self._chain.residue)
        elif backlog is not None:
            self._chain.residue = backlog.data
        self._discarder: Discarder | None = None
        self._served: RunningQueue | None = None  # by the flow
        self._residue_writer: ResidueWriter | None = None
        self._record: memoryview | None = None  # of the residue, for a successor of this process

    @property
    def traffic(self) -> Traffic:
        """Return what has moved so far, without what was discarded."""
        writer = self._residue_writer
        return super().traffic + Traffic(bytes=0 if writer is None else writer.taken)

    def keep_with(self, record: memoryview | None) -> None:
        """Record what a socket takes of a residue, and leave out what it took by the record."""
        self._record = record
        if record is None:
            return
        number, gone = recorded(record)
        chain = self._chain
        if number == chain.number:
            chain.residue = chain.residue[max(gone - chain.gone, 0) :]
            chain.gone = max(gone, chain.gone)
        chain.number = max(number, chain.number)

    def start_queue(self, running: RunningQueue) -> None:
        super().start_queue(running)
        if self._chain.at == running.queue.avail_index:
            self._chain.residue = b""  # the chain goes on instead
        self._chain.at = None

    def owe(self, residue: bytes) -> None:
        """Owe the end these bytes, which are all that is owed."""
        self._chain.residue = residue
        if residue:
            self._chain.number += 1
            self._chain.gone = 0

    def update(self) -> None:
        try:
            super().update()
        finally:
            self._update_residue()

    def stop(self) -> None:
        mode, self._mode = self._mode, Mode.IDLE
        if self._discarder is not None:
            self._discarder.stop()
            self._discarder = None
        if self._flow is not None:
            flow, self._flow = self._flow, None
            residue = flow.detach(complete=self._record is None or self._sides.never_waits)
            if mode is Mode.LOG:
                pass  # it leaves nothing, and what an end is owed stays
            elif self._record is None or self._sides.never_waits:
                self.owe(residue)
                if self._backlog is not None and not self._chain.residue:
                    self._chain.residue = self._backlog.data
            else:
                self._keep_residue(residue)
            self._served = None
            self._before += flow.counters
            if self._sides.log is not None:
                self._sides.log.left_out += flow.counters.unlogged
        if mode is Mode.TRANSPORT:
            assert self._sides.session is not None
            self._sides.session.stop_transmitq()

    def _keep_residue(self, residue: bytes) -> None:
        """Have what is owed written down before the driver gets the chain back that it is from."""
        self.owe(residue)
        if not residue:
            return
        assert self._served is not None
        queue = self._served.queue
        self._chain.at = queue.avail_index
        self._user.residue_changed()
        with suppress(RingError):  # the driver broke it, which whoever serves it next finds
            chain = queue.pop()
            if chain is not None and queue.push(chain, 0):
                self._served.call()
            if self._sides.log is not None:
                self._sides.log.write(residue)
        self._chain.at = None

    def stop_residue(self) -> None:
        """Write no more of the residue to the end's descriptor, until the next :meth:`update`."""
        if self._residue_writer is not None:
            self._residue_writer.stop()
            self._before += Traffic(bytes=self._residue_writer.taken)
            self._residue_writer = None

    def _wanted(self, sides: Sides) -> Mode:
        if not sides.guest_ready:
            return Mode.IDLE
        if not sides.never_waits and sides.state.guest is PortState.READY:
            return Mode.DISCARD
        if isinstance(sides.end, DescriptorEnd) and not self._over:
            if sides.end.write_fd < 0:
                return self._without_end(sides)
            return Mode.IDLE if self._pays_first() else Mode.PUMP
        if sides.session is not None:
            return Mode.TRANSPORT
        return self._without_end(sides) if sides.never_waits else Mode.IDLE

    @staticmethod
    def _without_end(sides: Sides) -> Mode:
        return Mode.DISCARD if sides.log is None or sides.log.fd < 0 else Mode.LOG

    def _start(self, mode: Mode, running: RunningQueue) -> None:
        if mode is Mode.DISCARD:
            self._chain.delivered = 0
            self._discarder = Discarder(running, self.break_queue, self._reconsider)
        elif mode is Mode.PUMP:
            assert isinstance(self._sides.end, DescriptorEnd)
            self.stop_residue()
            end, backlog = self._sides.end, self._backlog_with_residue()
            residue = self._chain.residue if backlog is None else b""
            self._flow = self._make_flow(running, end, backlog, residue)
            self._chain.residue = b""
        elif mode is Mode.LOG:
            self._flow = self._make_flow(running, DescriptorEnd(-1, -1))
        else:
            assert self._sides.session is not None
            self._sides.session.start_transmitq(running, self._chain)

    @property
    def keeps_residue(self) -> bool:
        """Whether a successor of this process finds the chain's residue in the backlog."""
        if self._backlog is None or (self._flow is not None and self._mode is not Mode.LOG):
            return False
        return self._backlog.data == self._chain.residue

    def _backlog_with_residue(self) -> Backlog | None:
        """Return the backlog, with the residue in it; None if there is none, or it has no room."""
        if self._backlog is not None and self._backlog.replace(self._chain.residue):
            return self._backlog
        return None

    def _make_flow(
        self,
        running: RunningQueue,
        end: DescriptorEnd,
        backlog: Backlog | None = None,
        residue: bytes = b"",
    ) -> Flow:
        log = self._sides.log
        self._served = running
        return self._user.pump.guest_to_host(
            running.queue,
            write_fd=end.write_fd,
            kick_fd=running.kick_fd,
            call_fd=running.call_fd,
            on_event=self._flow_event,
            kept=end.kept,
            relay=end.write_relay,
            lossy=self._sides.never_waits,
            backlog=BACKLOG_MAX if backlog is None else backlog,
            residue=residue,
            log_fd=-1 if log is None else log.fd,
        )

    def _reconsider(self) -> None:
        """Look whether the driver has opened the port meanwhile, before bytes are discarded.

        Control messages and bytes come on queues of their own; a driver that opens the port and
        writes at once is known to have opened it only if its control queue is looked at afterwards.
        """
        if not self._sides.never_waits:
            self._user.poll_control()

    def _flow_event(self, event: FlowEvent, detail: int | RingError | None) -> None:
        if isinstance(detail, RingError):
            self.break_queue(detail)
        elif event == FlowEvent.OVERFLOW:
            self._user.output_dropped(detail or 0)
        elif event == FlowEvent.UNLOGGED:
            if self._sides.log is not None:
                self._sides.log.falls_behind()
        elif event == FlowEvent.INEXACT:
            self._user.end_is_inexact()
        else:
            self._ended(OSError(detail, os.strerror(detail)) if detail else None)

    def _update_residue(self) -> None:
        """Write the residue to the end also while no flow takes it along."""
        end = self._sides.end
        if (
            self._mode is Mode.PUMP
            or not isinstance(end, DescriptorEnd)
            or end.write_fd < 0
            or self._over
            or self._chain.at is not None
        ):
            self.stop_residue()
        elif self._chain.residue and self._residue_writer is None:
            self._residue_writer = ResidueWriter(
                end,
                self._chain,
                self._record if _is_socket(end.write_fd) else None,
                self._user.residue_changed,
                self._residue_written,
                self._backlog_with_residue(),
            )

    def _pays_first(self) -> bool:
        """Return whether the residue is written before the queue is served.

        What a flow has written of a residue is not recorded.
        """
        owes = bool(self._chain.residue) and not self._sides.never_waits
        return owes and self._record is not None

    def _residue_written(self, error: OSError | None) -> None:
        self.stop_residue()
        if error is not None:
            self._ended(error)
        else:
            self._user.residue_written()


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
