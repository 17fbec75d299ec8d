"""The control queues: messages between the guest's buffers and the control protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vring import Chain, RingError
from vring_serial.device.served import ServedQueue
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.proto.console import CONTROL_RECEIVEQ, CONTROL_TRANSMITQ
from vring_serial.proto.control import ControlDevice, DeviceSideEvent, Refused
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.turns import Turn

log = logging.getLogger(__name__)

#: A longer message is refused unread; those of drivers have 8 bytes.
MESSAGE_MAX = 4096


class ControlQueues:
    """Serves the control queues of a :class:`ControlDevice`.

    A message of the driver is acted upon before its buffer is completed, so that a driver that
    waits for that (Linux does, spinning) finds done what it asked for; and always at once.

    Args:
        control: the protocol.
        on_events: takes what each message made happen.
        on_broken: takes the index of a queue that the driver broke, and how.
    """

    def __init__(
        self,
        control: ControlDevice,
        on_events: Callable[[list[DeviceSideEvent]], None],
        on_broken: Callable[[int, RingError], None],
    ) -> None:
        self._control = control
        self._on_events = on_events
        self._on_broken = on_broken
        self._receive: ServedQueue | None = None
        self._transmit: ServedQueue | None = None
        self._acting: Chain | None = None
        self._failed = RateLimitedLog(log)

    def start(self, index: int, running: RunningQueue) -> None:
        """Serve control queue ``index``. Raises OSError if its kick cannot be watched."""
        if index == CONTROL_RECEIVEQ:
            self._receive = ServedQueue(running, self._serve_receive, self._broken_receive)
        else:
            self._transmit = ServedQueue(running, self._serve_transmit, self._broken_transmit)

    def stop(self, index: int) -> None:
        """Serve it no more; nothing is in flight when this returns."""
        if index == CONTROL_RECEIVEQ:
            if self._receive is not None:
                self._receive.stop()
                self._receive = None
        elif self._transmit is not None:
            self._transmit.stop()
            if self._acting is not None:
                # Stopped by what one of its messages led to: that message is done.
                chain, self._acting = self._acting, None
                if self._transmit.queue.push(chain, 0):
                    self._transmit.running.call()
            self._transmit = None

    def flush(self) -> None:
        """Hand waiting messages to the driver, as far as it has buffers."""
        if self._receive is not None:
            self._receive.run()

    def poll(self) -> None:
        """Act on what the driver sent, without waiting for its kick."""
        if self._transmit is not None:
            self._transmit.run()

    def _serve_transmit(self) -> bool:
        served = self._transmit
        assert served is not None
        notify = False
        try:
            turn = Turn()
            while turn.another():
                chain = served.queue.pop()
                if chain is None:
                    if served.queue.enable_notifications():
                        continue
                    return False
                self._acting = chain
                try:
                    self._on_events(self._receive_message(chain))
                except RingError:
                    raise
                except Exception as error:
                    # Linux spins until its message is completed: it is, whatever came of it.
                    text = "control queue: a message could not be acted upon"
                    self._failed.log(logging.ERROR, text, exc_info=error)
                if self._acting is not chain:
                    return False
                self._acting = None
                notify |= served.queue.push(chain, 0)
            return True
        finally:
            if notify:
                served.running.call()

    def _receive_message(self, chain: Chain) -> list[DeviceSideEvent]:
        if chain.readable_bytes > MESSAGE_MAX:
            return [
                Refused(f"control message: {chain.readable_bytes} bytes, at most {MESSAGE_MAX}")
            ]
        return self._control.receive_message(chain.read())

    def _serve_receive(self) -> bool:
        served = self._receive
        assert served is not None
        outbox = self._control.outbox
        notify = False
        try:
            turn = Turn()
            while turn.another():
                message = outbox.peek()
                if message is None:
                    served.queue.disable_notifications()
                    return False
                chain = served.queue.pop()
                if chain is None:
                    if served.queue.enable_notifications():
                        continue
                    return False
                if chain.writable_bytes >= len(message):
                    chain.write(message)
                    outbox.sent()
                    notify |= served.queue.push(chain)
                    continue
                # No message is cut: it waits for a buffer that takes it whole.
                self._on_events(
                    [
                        Refused(
                            f"control buffer: {chain.writable_bytes} bytes, {len(message)} needed"
                        )
                    ]
                )
                notify |= served.queue.push(chain, 0)
            return True
        finally:
            if notify:
                served.running.call()

    def _broken_receive(self, error: RingError) -> None:
        self._on_broken(CONTROL_RECEIVEQ, error)

    def _broken_transmit(self, error: RingError) -> None:
        self._on_broken(CONTROL_TRANSMITQ, error)
