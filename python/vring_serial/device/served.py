"""Queues that are served in the event loop, a bounded piece of work at a turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vring import Batch, RingError
from vring_serial.device.kicks import KickWatch
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.ratelimit import RateLimitedLog

#: At most so many chains, and, as far as one chain allows, so many bytes in one batch.
BATCH_CHAINS = 64
BATCH_BYTES = 256 * 1024
#: At most so many batches before other work in the event loop gets its turn.
TURN_BATCHES = 4


def _serve_nothing() -> bool:
    return False


# One for all: a guest can have it happen as often as it likes.
_log = RateLimitedLog(logging.getLogger(__name__))


class ServedQueue:
    """Calls ``serve`` when the driver kicks, and again in the next turn while there is more to do.

    Args:
        running: the queue. Its ``kick_fd`` is watched until :meth:`stop`.
        serve: does bounded work; returns whether there is more. Before it returns False it has
            asked the driver for a kick, or told it that none is needed. Whatever else than a
            RingError it raises breaks the queue as well.
        on_broken: called, after the queue was stopped, with what ``serve`` met.

    Raises:
        OSError: ``kick_fd`` cannot be watched.
    """

    def __init__(
        self,
        running: RunningQueue,
        serve: Callable[[], bool],
        on_broken: Callable[[RingError], None],
    ) -> None:
        self.running = running
        self.queue = running.queue
        self._serve = serve
        self._on_broken = on_broken
        self._inside = False
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._kicks = KickWatch(running.kick_fd, self.run)
        # Kicks from before the queue ran may be gone: look once without one.
        self._turn: asyncio.Handle | None = self._loop.call_soon(self.run)

    def run(self) -> None:
        """Serve now: something other than a kick made work possible."""
        if self._stopped or self._inside:
            # What happens inside `serve` is seen by its own loop.
            return
        if self._turn is not None:
            self._cancel_turn()
        self._inside = True
        try:
            more = self._serve()
        except RingError as error:
            self.stop()
            self._on_broken(error)
            return
        except Exception as error:
            # Its driver may wait for a kick that was never asked for: nothing goes on here.
            self.stop()
            text = f"serving it failed: {type(error).__name__}: {error}"
            _log.log(logging.ERROR, "%s", f"queue {self.queue.name}: {text}", exc_info=error)
            self._on_broken(RingError(self.queue.name, 0, text))
            return
        finally:
            self._inside = False
        if more and not self._stopped:
            self._turn = self._loop.call_soon(self.run)

    def stop(self) -> None:
        """Watch and serve no more. Chains in flight are the caller's to complete or give back."""
        if not self._stopped:
            self._stopped = True
            # Who serves mostly holds this object, and the cycle would keep the guest's memory
            # mapped until it is collected.
            self._serve = _serve_nothing
            self._cancel_turn()
            self._kicks.close()

    def _cancel_turn(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None


class Discarder:
    """Completes whatever the driver sends, unread.

    Args:
        running: the queue.
        on_broken: see ServedQueue.
        reconsider: called when chains were popped and before they are completed; it may call
            :meth:`stop`, and then they stay with the driver, to be popped by someone else.
    """

    def __init__(
        self,
        running: RunningQueue,
        on_broken: Callable[[RingError], None],
        reconsider: Callable[[], None] = lambda: None,
    ) -> None:
        self._batch: Batch | None = None
        self._reconsider = reconsider
        self._served = ServedQueue(running, self._serve, on_broken)

    def stop(self) -> None:
        """Discard no more; nothing is in flight when this returns."""
        self._served.stop()
        if self._batch is not None:
            self._served.queue.unpop(self._batch)
            self._batch = None

    def _serve(self) -> bool:
        queue = self._served.queue
        for _ in range(TURN_BATCHES):
            batch = queue.pop_many(BATCH_CHAINS)
            if not batch:
                if queue.enable_notifications():
                    continue
                return False
            self._batch = batch
            self._reconsider()
            if self._batch is None:
                return False
            self._batch = None
            if queue.push_many(batch):
                self._served.running.call()
        return True
