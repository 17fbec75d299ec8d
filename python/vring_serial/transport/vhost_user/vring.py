"""One queue as a vhost-user frontend sets it up, and when it runs ("Ring states")."""

from __future__ import annotations

import os

from vring import GuestMemory, PackedDriver, SplitDriver, VirtQueue, notify
from vring import layout as ring
from vring.errors import AddressError
from vring_serial.device.base import VirtioDevice
from vring_serial.device.virtqueue import FRESH_PACKED_INDEX, RunningQueue, is_fresh, make_queue
from vring_serial.errors import RemoteProtocolError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import VringAddress
from vring_serial.transport.closer import Closer
from vring_serial.transport.event_fds import check_kept
from vring_serial.transport.vhost_user.log import MigrationLog
from vring_serial.transport.vhost_user.state import VringSetup
from vring_serial.unix_fds import make_eventfd

_SPLIT_ALIGNMENTS = (ring.DESC_ALIGN, ring.AVAIL_ALIGN, ring.USED_ALIGN)
_PACKED_ALIGNMENTS = (ring.DESC_ALIGN, ring.EVENT_ALIGN, ring.EVENT_ALIGN)
_SPLIT_AREAS = ("descriptor table", "available ring", "used ring")
_PACKED_AREAS = ("descriptor ring", "driver event suppression", "device event suppression")

#: Roles of a queue's descriptors (see Keeping).
KICK, CALL, ERROR = "kick.{}", "call.{}", "error.{}"


class Vring:
    """A queue's configuration, its descriptors, and whether the device has it.

    A ring runs when it is *started* (SET_VRING_KICK, or a VRING_KICK in band), *enabled* and
    configured; it is handed to the device then, without waiting for a kick. If this process has a
    successor, that it runs is written down before: what the device has moved cannot be taken back.

    Args:
        index: which queue.
        setup: kept up to date here.
        device: which the queue belongs to.
        closer: closes the frontend's descriptors.
        record: see VirtQueue; None: there is no successor of this process.
        roles: kept up to date here: of the frontend's descriptors that are in use.

    Attributes:
        index: which queue.
        setup: what the frontend has set up.
    """

    def __init__(
        self,
        index: int,
        setup: VringSetup,
        device: VirtioDevice,
        closer: Closer,
        record: memoryview | None = None,
        roles: set[str] | None = None,
    ) -> None:
        self._close = closer.close
        self._roles = set() if roles is None else roles
        self.index = index
        self.setup = setup
        self._device = device
        self._queue: VirtQueue | None = None  # while the device has it, or is to have it next
        self._waits = False  # the device is to have it, and has not
        self._record = record
        self._kick_fd = -1
        self._kick_ours = False
        # The device keeps the number of the call descriptor while the ring runs, and frontends
        # change the descriptor under it: the number stays, what it stands for is exchanged.
        self._call_fd = -1
        self._error_fd = -1

    def __repr__(self) -> str:
        return f"queue {self.index}"

    @property
    def running(self) -> bool:
        """Whether the device has it, or gets it by :meth:`begin`."""
        return self._queue is not None

    @property
    def used_index(self) -> int:
        """Where it is, or was stopped: used index, packed with the wrap counter in bit 15."""
        if self._queue is not None:
            return int(self._queue.used_index)
        return (self.setup.base if self.setup.used is None else self.setup.used) or 0

    def resume(self, keeping: Keeping) -> None:
        """Take the descriptors that a predecessor left; a ring that ran then goes on there.

        Raises StateError: one is not what it was.
        """
        setup = self.setup
        kick, call, error = (self._take(role, keeping) for role in (KICK, CALL, ERROR))
        if setup.started:
            self.set_kick(-1 if kick is None else kick, polled=setup.polled)
        elif kick is not None:
            self._close([kick])
        if setup.called and call is not None:
            self.set_call(call)
        else:
            setup.called = False
            self._close([-1 if call is None else call])
        if setup.reported and error is not None:
            self.set_error(error)
        else:
            setup.reported = False
            self._close([-1 if error is None else error])
        setup.resumes |= setup.running
        setup.running = False

    def _take(self, role: str, keeping: Keeping) -> int | None:
        fd = keeping.take(role.format(self.index))
        if fd is not None:
            try:
                check_kept(fd, role.format(self.index), writable=role != KICK)
            except BaseException:
                self._close([fd])
                raise
        return fd

    def adopt(self, record: memoryview | None, *, resumes: bool) -> None:
        """Take another record for the ring, which does not run; ``resumes``: it has gone on."""
        self._record = record
        self.setup.resumes = resumes

    def may_run(self, enabled: bool) -> bool:
        """Return whether it is started and enabled; ``enabled`` counts without SET_VRING_ENABLE."""
        return self.setup.started and (
            enabled if self.setup.enabled is None else self.setup.enabled
        )

    def set_size(self, size: int) -> None:
        """Set the size. Raises RemoteProtocolError if it runs, or the size is not offered."""
        self._refuse_while_running()
        largest = self._device.queue_size_max
        if not 0 < size <= largest or (size & (size - 1) and not self.setup.packed):
            kind = "a size" if self.setup.packed else "a power of two"
            raise RemoteProtocolError(f"{self}: size {size} is not {kind} up to {largest}")
        self.setup.size = size

    def set_base(self, base: int) -> None:
        """Set where to go on.

        A packed ring's base has the used index in its upper half. They differ if buffers are in
        flight elsewhere, which this device will not complete. Frontends that say nothing there
        mean that none are.

        Raises:
            RemoteProtocolError: it runs, or a split ring's index has more than 16 bits.
        """
        self._refuse_while_running()
        if base > 0xFFFF and not self.setup.packed:
            raise RemoteProtocolError(f"{self}: available index {base} has more than 16 bits")
        self.setup.base = base & 0xFFFF
        self.setup.used = base >> 16 or None

    def get_base(self) -> int:
        """Return the answer to GET_VRING_BASE for a ring that does not run."""
        if self.setup.packed:
            base = FRESH_PACKED_INDEX if self.setup.base is None else self.setup.base
            return base | (base if self.setup.used is None else self.setup.used) << 16
        return self.setup.base or 0

    def set_kick(self, fd: int, *, polled: bool = False) -> None:
        """Take ``fd`` over, or with -1 make one of our own; start the ring. It must not run."""
        new = make_eventfd() if fd < 0 else fd
        self._close([self._kick_fd])
        self._kick_ours = fd < 0
        self._use(KICK, fd)
        self._kick_fd = new
        self.setup.polled = polled
        self.setup.started = True

    def set_call(self, fd: int) -> None:
        """Take ``fd`` over, also while the ring runs; -1 when the frontend polls."""
        self.setup.called = True
        self._use(CALL, fd)
        new = make_eventfd() if fd < 0 else fd
        if self._call_fd < 0:
            self._call_fd = new
            return
        try:
            old = os.dup(self._call_fd)  # dup2 would wait for what closing it takes
            os.dup2(new, self._call_fd, inheritable=False)
        finally:
            os.close(new)
        self._close([old])
        if self.running:
            # What the old descriptor was told may never have been read.
            notify(self._call_fd)

    def set_error(self, fd: int) -> None:
        """Take ``fd`` over; -1 for none."""
        self._close([self._error_fd])
        self._error_fd = fd
        self.setup.reported = fd >= 0
        self._use(ERROR, fd)

    def kick(self) -> bool:
        """Kick the device for a frontend without a descriptor; return False if it has one."""
        if self._kick_ours:
            notify(self._kick_fd)
        return self._kick_ours

    def call(self) -> None:
        """Tell the driver, in case a predecessor owed it that."""
        if self._call_fd >= 0:
            notify(self._call_fd)

    def report_error(self) -> bool:
        """Signal that the ring broke; return False if the frontend gave no descriptor for that."""
        if self._error_fd >= 0:
            notify(self._error_fd)
        return self._error_fd >= 0

    def set_address(self, address: VringAddress, memory: GuestMemory) -> None:
        """Set where the parts are; a ring that runs is stopped, to be run again.

        Raises:
            RemoteProtocolError: size and memory are known and the parts cannot be there; the ring
                goes on as it was.
        """
        if self.setup.size and memory.regions:
            self._translate(memory, address)
        self.stop()
        self.setup.address = address

    def run(
        self,
        memory: GuestMemory,
        features: int,
        log: MigrationLog | None = None,
        *,
        enabled: bool,
    ) -> bool:
        """Make the ring ready for the device, which gets it by :meth:`begin`, if it is to run.

        Args:
            memory: the guest's, which the queue keeps until it is stopped.
            features: what the driver accepted.
            log: has writes marked if that is asked for.
            enabled: counts if SET_VRING_ENABLE never came.

        Returns:
            Whether it runs now and did not before.

        Raises:
            RemoteProtocolError, VringError: the parts cannot be where they are said to be.
        """
        if (
            self.running
            or not self.may_run(enabled)
            or not self.setup.size
            or self.setup.address is None
        ):
            return False
        areas = self._translate(memory, self.setup.address)
        queue = make_queue(
            memory,
            self.setup.size,
            areas,
            features,
            index=self.setup.base,
            used_index=self._used_index(memory, areas[2]),
            name=repr(self),
            record=self._record,
            resume=self.setup.resumes,
        )
        self.setup.resumes = False
        if log is not None:
            log.give(queue, self.setup.address)
        if self._call_fd < 0:
            self._call_fd = make_eventfd()
        self._queue = queue
        self._waits = self.setup.running = True
        return True

    def begin(self) -> None:
        """Hand the ring to the device if that waits for it.

        Raises OSError: its kick descriptor cannot be watched; the ring does not run then.
        """
        if self._queue is None or not self._waits:
            return
        running = RunningQueue(self._queue, self._kick_fd, self._call_fd)
        try:
            self._device.start_queue(self.index, running)
        except BaseException:
            self.stop()
            raise
        self._waits = False
        if not is_fresh(self._queue):
            self.call()  # whoever had the ring before may have owed it

    def stop(self) -> None:
        """Take the ring back from the device; it stays as it is configured."""
        if self._queue is None:
            return
        queue, self._queue = self._queue, None
        waited, self._waits = self._waits, False
        self.setup.running = False
        self.setup.base = queue.avail_index if waited else self._device.stop_queue(self.index)
        self.setup.used = queue.used_index if self.setup.packed else None

    def note_position(self) -> None:
        """Write into ``setup`` where the ring is now, if it runs.

        Exact while nothing is in flight, as inside ``Controller.settled``.
        """
        if self._queue is not None:
            self.setup.base = self._queue.avail_index
            self.setup.used = self._queue.used_index if self.setup.packed else None

    def end(self) -> None:
        """Stop until started anew with new descriptors (GET_VRING_BASE)."""
        self.stop()
        self.setup.started = self.setup.polled = self.setup.called = False
        self._close([self._kick_fd, self._call_fd])
        self._kick_fd = self._call_fd = -1
        self._use(KICK, -1)
        self._use(CALL, -1)
        self._kick_ours = False

    def forget_driver(self) -> None:
        """Stop until set up anew: the driver has reset the device.

        Where it stood stays, for a paused VM looks like this too and goes on there.
        """
        self.end()
        self.setup.size = 0
        self.setup.address = self.setup.enabled = None

    def reset(self) -> None:
        """Forget all setup and close all descriptors."""
        self.forget_driver()
        self.set_error(-1)
        self.setup.base = self.setup.used = None

    def _used_index(self, memory: GuestMemory, device_area: int) -> int | None:
        if self.setup.packed or self.setup.base is None:
            return self.setup.used
        return memory.load16(device_area + ring.USED_INDEX)

    def _use(self, role: str, fd: int) -> None:
        """Note that the frontend's descriptor in this role is ``fd``; -1 for none."""
        name = role.format(self.index)
        if fd >= 0:
            self._roles.add(name)
        else:
            self._roles.discard(name)

    def _refuse_while_running(self) -> None:
        if self.running:
            raise RemoteProtocolError(f"{self} is running")

    def _translate(self, memory: GuestMemory, address: VringAddress) -> tuple[int, int, int]:
        """Return the guest addresses of the three areas (2.6)."""
        found = []
        for part, user, length, alignment in zip(
            _PACKED_AREAS if self.setup.packed else _SPLIT_AREAS,
            (address.descriptor, address.available, address.used),
            (PackedDriver if self.setup.packed else SplitDriver).layout(self.setup.size),
            _PACKED_ALIGNMENTS if self.setup.packed else _SPLIT_ALIGNMENTS,
            strict=True,
        ):
            where = f"{self}: {part} at user address {user:#x}"
            if user % alignment:
                raise RemoteProtocolError(f"{where} is not aligned to {alignment} bytes")
            try:
                found.append(memory.user_to_guest(user, length))
            except AddressError:
                raise RemoteProtocolError(f"{where}, {length} bytes: not in guest memory") from None
        return found[0], found[1], found[2]
