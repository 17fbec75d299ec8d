"""What both directions of a port share: a queue, and the way in which it is served now."""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass
from typing import ClassVar, Protocol

from vring import Flow, Pump, RingError
from vring_serial.chardev.base import End
from vring_serial.chardev.log import OutputLog
from vring_serial.device.console.port_transport import PortTransport
from vring_serial.device.console.state import DevicePortState
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.control import PortState


class Mode(enum.Enum):
    """How a direction's queue is served."""

    IDLE = "not at all: the driver's buffers stay its own"
    DISCARD = "completed unread"
    PUMP = "by a flow of the pump, to or from descriptors"
    LOG = "by a flow of the pump, to the log alone"
    TRANSPORT = "by the transport that a protocol is connected to"


@dataclass(slots=True)
class Sides:
    """Both sides of a port as they are now: all that decides which bytes move.

    Attributes:
        console: the port is a console.
        state: the port's; what of it must survive.
        end: the connected host end.
        session: the connection to the end's protocol, if the end is one.
        log: what the guest's output goes to as well.
    """

    console: bool
    state: DevicePortState
    end: End | None = None
    session: PortTransport | None = None
    log: OutputLog | None = None

    @property
    def never_waits(self) -> bool:
        """Return whether the guest has a console on the port, whose driver nothing may hold up."""
        return self.console or self.state.single

    @property
    def guest_ready(self) -> bool:
        """Return whether the guest's driver can use the port."""
        state = self.state
        return state.single or state.guest in (PortState.READY, PortState.OPEN, PortState.CLOSED)

    @property
    def guest_open(self) -> bool:
        """Return whether the guest takes bytes: it has the port open, or has a console on it."""
        return self.guest_ready if self.never_waits else self.state.guest is PortState.OPEN


class DirectionUser(Protocol):
    """What a direction needs of its port; it calls this in the event loop's thread."""

    @property
    def pump(self) -> Pump:
        """Return the pump that moves bytes for descriptor ends."""
        ...

    def poll_control(self) -> None:
        """Act on control messages that the driver made available; update the directions then."""

    def end_is_over(self, reason: OSError | None) -> None:
        """Tell the chardev that a descriptor gave end of file (None) or failed; update."""

    def end_is_inexact(self) -> None:
        """Take note that what moves to or from the descriptors is not recorded."""

    def queue_broken(self, direction: Direction, error: RingError) -> None:
        """Tell the device that the driver broke the direction's queue; update."""

    def residue_changed(self) -> None:
        """Have it written down what the end is owed."""

    def residue_written(self) -> None:
        """Note that the end has taken the residue; update."""

    def output_dropped(self, count: int) -> None:
        """Tell that so many bytes of the guest in all have been dropped so far."""


class Direction(abc.ABC):
    """One direction of a port: at most one queue, served in one :class:`Mode` at a time.

    Args:
        sides: both sides of the port, which the port keeps up to date; :meth:`update` reads them.
        user: the port.

    Attributes:
        queue: the queue, while it runs. Set by :meth:`start_queue` and :meth:`stop_queue`.
    """

    is_transmit: ClassVar[bool]

    def __init__(self, sides: Sides, user: DirectionUser) -> None:
        self.queue: RunningQueue | None = None
        self._sides = sides
        self._user = user
        self._mode = Mode.IDLE
        self._flow: Flow | None = None
        self._before = Traffic()  # what flows and connections moved that are over
        self._broken = False  # the driver broke the queue: it is left alone until it starts again
        # The end's descriptor for this direction gave end of file, or failed; the end may stay for
        # the other direction. All states of a peer that leaves: chardev/hangup.py.
        self._over = False

    @property
    def traffic(self) -> Traffic:
        """Return what has moved so far, without what was discarded."""
        session = self._sides.session
        traffic = self._before
        if self._flow is not None:
            traffic += self._flow.counters
        return traffic if session is None else traffic + session.traffic(self.is_transmit)

    def count_session(self, session: PortTransport) -> None:
        """Count what a connection moved that is over now."""
        self._before += session.traffic(self.is_transmit)

    def start_queue(self, running: RunningQueue) -> None:
        """Take the queue; :meth:`update` serves it."""
        self.queue = running

    def stop_queue(self) -> None:
        """Leave the queue alone: nothing is in flight when this returns."""
        self.queue = None
        self._broken = False
        self.stop()

    def end_opened(self) -> None:
        """Use the end that has just been connected, whatever became of the one before."""
        self._over = False

    def update(self) -> None:
        """Serve the queue as the two sides want it now.

        Raises:
            OSError: no descriptor or memory is left, or the queue's kick cannot be watched; the
                queue is idle then.
        """
        wanted = self._wanted(self._sides)
        if self.queue is None or self._broken:
            wanted = Mode.IDLE
        if wanted is self._mode:
            return
        self.stop()
        if wanted is not Mode.IDLE:
            assert self.queue is not None
            self._start(wanted, self.queue)
            self._mode = wanted

    def break_queue(self, error: RingError) -> None:
        """Leave a queue alone that the driver broke, until it stops, and tell the device."""
        self._broken = True
        self._user.queue_broken(self, error)

    @abc.abstractmethod
    def stop(self) -> None:
        """Serve the queue no longer, until the next :meth:`update`; nothing is in flight then."""

    @abc.abstractmethod
    def _wanted(self, sides: Sides) -> Mode:
        """Return how a queue that is whole should be served."""

    @abc.abstractmethod
    def _start(self, mode: Mode, running: RunningQueue) -> None:
        """Serve the queue in this mode, which is not IDLE. Raises OSError as :meth:`update`."""

    def _ended(self, reason: OSError | None) -> None:
        self._over = True
        self._user.end_is_over(reason)
