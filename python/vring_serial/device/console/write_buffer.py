"""Bytes that Python code wrote for the guest, and the receiveq that they go to."""

from __future__ import annotations

from collections.abc import Callable

from vring import RingError
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.served import BATCH_BYTES, BATCH_CHAINS, TURN_BATCHES, ServedQueue
from vring_serial.device.virtqueue import RunningQueue

#: Default limits of the write buffer in bytes, as asyncio's.
HIGH_WATER = 64 * 1024


class WriteBuffer:
    """Keeps bytes until the guest has buffers for them, with the marks of asyncio's flow control.

    It outlives the queue, which may stop and start again (a paused VM).

    Args:
        on_taken: called after the guest has got some of the bytes. May start and stop the queue.
        on_broken: called when the driver broke the queue, which is stopped then.
        data: what the guest has not got; kept up to date here.

    Attributes:
        data: the same; to be looked at only.
        low, high: the marks in bytes.
    """

    def __init__(
        self,
        on_taken: Callable[[], None],
        on_broken: Callable[[RingError], None],
        data: bytearray,
    ) -> None:
        self._on_taken = on_taken
        self._on_broken = on_broken
        self.data = data
        self._bytes = 0  # that the guest has got, and in how many buffers
        self._chains = 0
        self._served: ServedQueue | None = None
        self._full = False  # above the high mark, and not yet back at the low one
        self.set_limits()

    @property
    def traffic(self) -> Traffic:
        """Return what the guest has got so far."""
        return Traffic(bytes=self._bytes, chains=self._chains)

    def set_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks as asyncio does. Raises ValueError unless 0 <= low <= high."""
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high}) must be >= low ({low}) must be >= 0")
        self.high = high
        self.low = low

    def write(self, data: bytes | bytearray | memoryview) -> bool:
        """Add bytes; the guest gets at once what it has buffers for.

        Returns whether whoever writes should pause: the high mark was passed just now.
        """
        self.data += data
        if self._served is not None:
            self._served.run()
        if len(self.data) <= self.high or self._full:
            return False
        self._full = True
        return True

    def take_room(self) -> bool:
        """Return, once after each pause, whether writing may resume: the low mark is reached."""
        if not self._full or len(self.data) > self.low:
            return False
        self._full = False
        return True

    def clear(self) -> None:
        """Forget what the guest has not got."""
        self.data.clear()

    def start(self, running: RunningQueue) -> None:
        """Use this queue from now on. Raises OSError if its kick cannot be watched."""
        self._served = ServedQueue(running, self._serve, self._on_broken)

    def stop(self) -> None:
        """Leave the queue alone, with nothing in flight; the bytes wait for the next."""
        if self._served is not None:
            self._served.stop()
            self._served = None

    def _serve(self) -> bool:
        served = self._served
        assert served is not None
        queue = served.queue
        for _ in range(TURN_BATCHES):
            if not self.data:
                queue.disable_notifications()
                return False
            batch = queue.pop_many(BATCH_CHAINS)
            if not batch:
                if queue.enable_notifications():
                    continue
                return False
            with memoryview(self.data) as data, data[:BATCH_BYTES] as head:
                used, written = batch.scatter(head)
            notify = queue.push_many(batch, written, used)
            if batch:
                queue.unpop(batch)
            if notify:
                served.running.call()
            count = int(written.sum())
            del self.data[:count]
            self._bytes += count
            self._chains += used
            self._on_taken()
            if self._served is not served:
                return False
        return True
