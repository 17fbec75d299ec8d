"""A transmitq's bytes for Python code: batches of chains, and large chains in pieces."""

from __future__ import annotations

from collections.abc import Callable

from vring import Batch, RingError
from vring_serial.device.console.state import ChainState
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.served import BATCH_BYTES, BATCH_CHAINS, TURN_BATCHES, ServedQueue
from vring_serial.device.virtqueue import RunningQueue


class Delivery:
    """Takes the guest's bytes from a transmitq, for as long as somebody wants them.

    It outlives the queue, which may stop and start again (a paused VM).

    Args:
        wants: return whether bytes are taken now; while not, the guest's buffers stay the guest's.
        take: take these bytes, whose chains are completed already, but for a part of a large one.
            May start and stop the queue.
        on_last: called once after everything before :meth:`end_here` has been taken.
        on_broken: called when the driver broke the queue, which is stopped then.
    """

    def __init__(
        self,
        wants: Callable[[], bool],
        take: Callable[[bytes], None],
        on_last: Callable[[], None],
        on_broken: Callable[[RingError], None],
    ) -> None:
        self._wants = wants
        self._take = take
        self._on_last = on_last
        self._on_broken = on_broken
        self._served: ServedQueue | None = None
        self._bytes = 0  # so far, and of how many chains
        self._chains = 0
        self._large: Batch | None = None  # one chain, delivered in pieces
        self._chain = ChainState()  # what was delivered of it, or of the chain popped next
        self._last_chains: int | None = None  # how many are left before the end; None: no end

    @property
    def has_queue(self) -> bool:
        """Return whether there is a queue now."""
        return self._served is not None

    @property
    def ending(self) -> bool:
        """Return whether an end was set and not all before it has been taken."""
        return self._last_chains is not None

    @property
    def traffic(self) -> Traffic:
        """Return what was taken so far."""
        return Traffic(bytes=self._bytes, chains=self._chains)

    def start(self, running: RunningQueue, chain: ChainState) -> None:
        """Take the bytes of this queue, but for those delivered of ``chain``, from now on.

        ``chain`` is kept up to date until :meth:`stop`. Raises OSError if its kick cannot be
        watched.
        """
        self._chain = chain
        self._served = ServedQueue(running, self._serve, self._on_broken)

    def stop(self) -> None:
        """Leave the queue alone, with nothing in flight; the chain's state says how far it is."""
        if self._served is not None:
            self._served.stop()
            if self._large is not None:
                self._served.queue.unpop(self._large)
                self._large = None
            self._served = None

    def run(self) -> None:
        """Go on: bytes that were not wanted may be wanted now."""
        if self._served is not None:
            self._served.run()

    def end_here(self) -> bool:
        """Take no more than the driver has made available by now.

        For a queue that runs. Returns whether there is something; ``on_last`` follows only then.
        """
        assert self._served is not None
        self._last_chains = self._served.queue.available() + (self._large is not None)
        return self._last_chains > 0

    def forget_end(self) -> None:
        """Do not call ``on_last`` any more."""
        self._last_chains = None

    def _serve(self) -> bool:
        served = self._served
        assert served is not None
        queue = served.queue
        for _ in range(TURN_BATCHES):
            if not self._wants():
                queue.disable_notifications()
                return False
            if self._large is not None:
                self._serve_large(served, self._large)
            else:
                limit = BATCH_CHAINS if self._last_chains is None else self._last_chains
                batch = queue.pop_many(min(limit, BATCH_CHAINS), BATCH_BYTES)
                if not batch:
                    if queue.enable_notifications():
                        continue
                    return False
                if self._chain.delivered or (
                    len(batch) == 1 and batch[0].readable_bytes > BATCH_BYTES
                ):
                    # After a delivered part only its own chain may come.
                    if len(batch) > 1:
                        queue.unpop(batch)
                        batch = queue.pop_many(1)
                    self._large = batch
                    continue
                self._serve_batch(served, batch)
            if self._served is not served:
                return False
        return True

    def _serve_batch(self, served: ServedQueue, batch: Batch) -> None:
        count = len(batch)
        data = batch.gather()
        # Completed first: what is done with the bytes may stop the queue.
        if served.queue.push_many(batch):
            served.running.call()
        self._bytes += len(data)
        self._chains += count
        self._take(data)
        self._count_last(count)

    def _serve_large(self, served: ServedQueue, batch: Batch) -> None:
        """Deliver the next piece of a chain too large to be copied at once."""
        piece = bytearray()
        passed = 0
        for view in batch[0].readable:
            start = max(0, self._chain.delivered - passed)
            passed += len(view)
            if start < len(view):
                piece += view[start : start + BATCH_BYTES - len(piece)]
            if len(piece) == BATCH_BYTES:
                break
        if served.queue.memory.lost:
            served.queue.pop_many()  # raises: the piece may be zeros that the guest did not send
        self._chain.delivered += len(piece)
        done = self._chain.delivered >= batch[0].readable_bytes
        if done:
            self._large = None
            self._chain.delivered = 0
            if served.queue.push_many(batch):
                served.running.call()
        self._bytes += len(piece)
        self._chains += done
        self._take(bytes(piece))
        if done:
            self._count_last(1)

    def _count_last(self, count: int) -> None:
        if self._last_chains is not None:
            self._last_chains -= count
            if self._last_chains <= 0:
                self._on_last()
