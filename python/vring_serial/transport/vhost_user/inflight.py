"""The region that a frontend keeps for the next backend ("Inflight I/O tracking").

The backend decides how large it is, and makes it (GET_INFLIGHT_FD); the frontend keeps it while
backends come and go (SET_INFLIGHT_FD). Little-endian; a page is the machine's:

================  ==================================================================================
from              contents
================  ==================================================================================
0                 for each queue, 64-byte aligned, what the specification says: a head of 32 bytes,
                  and 32 bytes for each descriptor (16 in a split ring)
the next page     for each queue a page, whose start is all of its record but the kernel's pointers
                  (``vring.SharedRecords``)
the next page     ``VRINGINF``, version (4), device type (4), queues (4), queue size (4)
the next page     the device's state, in two halves of 1 MiB: sequence number (8), length (8), and a
                  saved state. The half with the higher number counts; the number is stored last.
================  ==================================================================================

No chain is in flight between two turns of the device, which completes them in order, so no entry of
the specification's part is ever marked: whoever goes on begins at the used index. That of a packed
ring is in its record at every moment, and in the specification's head after a ring was stopped.

The frontend may write to all of it at any time. What is read is copied first, checked then.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from vring import SharedRecords
from vring_serial.device.base import VirtioDevice
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import Inflight, ProtocolFeature
from vring_serial.transport.vhost_user.state import FrontendState
from vring_serial.transport.vhost_user.vring import Vring

MAGIC = b"VRINGINF"
LAYOUT_VERSION = 1
#: Version of the specification's part of a queue.
REGION_VERSION = 1
#: Bytes of one half of the state.
HALF_SIZE = 1 << 20

#: Role of the region's descriptor (see Keeping).
REGION = "inflight"

_IDENTITY = struct.Struct("<8sIIII")
_SPLIT_HEAD = struct.Struct("<QHHHH16x")  # features, version, desc_num, last_batch_head, used_idx
#: features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, wrap counters.
_PACKED_HEAD = struct.Struct("<QHHHHHHBB10x")
_SIZE_OF_QUEUE = struct.Struct("<8xHH")  # version, desc_num
_HALF = struct.Struct("<QQ")
_NUMBER = struct.Struct("<Q")
_ENTRY_SIZE = 32
_ALIGNMENT = 64
_WRAP = 1 << 15
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@runtime_checkable
class Resumable(Protocol):
    """A device that can go on with a driver which set up its ports with another process."""

    def save_with(self, write: Callable[[bytes], None] | None) -> None:
        """Have ``write`` called with the saved state now, and after each change; None: no more."""

    def restore(self, saved: bytes) -> bool:
        """Go on from a saved state, before a queue starts.

        Returns False if the device knows its driver already. Raises StateError.
        """


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class _Layout:
    """Where the parts are: offsets in bytes."""

    def __init__(self, queues: int, queue_size: int) -> None:
        self.stride = _round_up(_PACKED_HEAD.size + _ENTRY_SIZE * queue_size, _ALIGNMENT)
        self.records = _round_up(queues * self.stride, mmap.PAGESIZE)
        self.identity = self.records + queues * mmap.PAGESIZE
        self.state = self.identity + mmap.PAGESIZE
        self.size = self.state + 2 * HALF_SIZE


def _check(wanted: Inflight, queues: int, largest: int) -> _Layout:
    if not 0 < wanted.num_queues <= queues:
        raise RemoteProtocolError(f"{wanted.num_queues} queues of {queues}")
    if not 0 < wanted.queue_size <= largest:
        raise RemoteProtocolError(f"queue size {wanted.queue_size} is not 1 to {largest}")
    return _Layout(wanted.num_queues, wanted.queue_size)


def make_region(
    wanted: Inflight, *, device_id: int, queues: int, largest: int
) -> tuple[int, Inflight]:
    """Return the descriptor of a new region, which is the caller's, and its description.

    Args:
        wanted: number of queues, and their size.
        device_id: the device's type.
        queues: of the device.
        largest: queue size that it offers.

    Raises:
        RemoteProtocolError: the device has fewer or smaller queues.
        OSError: there is no memory.
    """
    layout = _check(wanted, queues, largest)
    fd = os.memfd_create("vring-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, layout.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        os.pwrite(fd, _identity(wanted, device_id), layout.identity)
    except BaseException:
        os.close(fd)
        raise
    answer = Inflight(layout.size, 0, wanted.num_queues, wanted.queue_size, wanted.padded)
    return fd, answer


def _identity(wanted: Inflight, device_id: int) -> bytes:
    return _IDENTITY.pack(MAGIC, LAYOUT_VERSION, device_id, wanted.num_queues, wanted.queue_size)


class InflightRegion:
    """A region that a frontend handed over.

    Args:
        fd: of the region; stays the caller's.
        given: as SET_INFLIGHT_FD describes it.
        device_id, queues, largest: see :func:`make_region`.

    Attributes:
        num_queues: those that the region is for.
        known: another process of ours wrote it, for a device of this type.

    Raises:
        RemoteProtocolError: it has not the size that :func:`make_region` gives it, or can shrink.
        OSError, MemoryMapError: it cannot be mapped.
    """

    def __init__(
        self, fd: int, given: Inflight, *, device_id: int, queues: int, largest: int
    ) -> None:
        self._layout = layout = _check(given, queues, largest)
        if given.mmap_size != layout.size or given.mmap_offset:
            raise RemoteProtocolError(
                f"a region of {given.mmap_size} bytes at {given.mmap_offset:#x}, "
                f"not of {layout.size} at 0"
            )
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed or os.fstat(fd).st_size < layout.size:
            raise RemoteProtocolError("the region is not a memfd of its size that cannot shrink")
        self.num_queues = given.num_queues
        self._records = SharedRecords(fd, layout.records, given.num_queues)
        self._map = mmap.mmap(fd, layout.size)
        identity = _identity(given, device_id)
        self.known = self._map[layout.identity : layout.identity + len(identity)] == identity
        if not self.known:
            for index in range(given.num_queues):
                self.forget(index)
            self._map[layout.state : layout.state + _HALF.size] = bytes(_HALF.size)
            other = layout.state + HALF_SIZE
            self._map[other : other + _HALF.size] = bytes(_HALF.size)
            self._map[layout.identity : layout.identity + len(identity)] = identity

    def close(self) -> None:
        """Unmap the region; records stay mapped while queues have them."""
        self._map.close()

    def record(self, index: int) -> memoryview:
        """Return the record of a queue (see VirtQueue)."""
        return self._records.record(index)

    def size_of(self, index: int) -> int:
        """Return the size of the ring that was recorded last, 0 if none was."""
        version, size = _SIZE_OF_QUEUE.unpack_from(self._map, index * self._layout.stride)
        return int(size) if version == REGION_VERSION else 0

    def forget(self, index: int) -> None:
        """Record that no ring runs in the queue, nor did."""
        _PACKED_HEAD.pack_into(self._map, index * self._layout.stride, *(0,) * 9)

    def note(self, index: int, size: int, used: int, *, packed: bool) -> None:
        """Write the specification's head of a queue.

        Args:
            index: of the queue.
            size: descriptors.
            used: used index, with the wrap counter in bit 15 if the ring is packed.
            packed: the layout.
        """
        at = index * self._layout.stride
        if not packed:
            _SPLIT_HEAD.pack_into(self._map, at, 0, REGION_VERSION, size, 0, used)
            return
        slot, wrap = used & ~_WRAP, used >> 15
        _PACKED_HEAD.pack_into(self._map, at, 0, REGION_VERSION, size, 0, 0, slot, slot, wrap, wrap)

    def read(self) -> bytes | None:
        """Return a copy of the state that was written last; None if there is none."""
        number, length, at = max(self._halves())
        if number == 0 or length > HALF_SIZE - _HALF.size:
            return None
        return self._map[at + _HALF.size : at + _HALF.size + length]

    def write(self, saved: bytes) -> None:
        """Write a state in the place of the one before. One that is too long is not there."""
        halves = self._halves()
        number, _, newest = max(halves)
        at = next(half for _, _, half in halves if half != newest)
        if len(saved) > HALF_SIZE - _HALF.size:
            saved = b""
        _NUMBER.pack_into(self._map, at, 0)
        self._map[at + _HALF.size : at + _HALF.size + len(saved)] = saved
        _HALF.pack_into(self._map, at, 0, len(saved))
        _NUMBER.pack_into(self._map, at, (number + 1) % (1 << 64))

    def _halves(self) -> list[tuple[int, int, int]]:
        """Return number, length and offset of each half."""
        starts = (self._layout.state, self._layout.state + HALF_SIZE)
        return [(*_HALF.unpack_from(self._map, at), at) for at in starts]


class Inflights:
    """What a session has to do with the region of its frontend.

    Args:
        device: whose state is written to it, if it is Resumable.
        vrings: their records are in it, once it is there.
        state: the frontend's; ``inflight`` is kept up to date here.
        keep: keeps a descriptor in a role for a successor of this process.
        answer_with: sends a descriptor, which it takes over, with the answer.
        warn: logs.
    """

    def __init__(
        self,
        device: VirtioDevice,
        vrings: Sequence[Vring],
        state: FrontendState,
        *,
        keep: Callable[[str, int], None],
        answer_with: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._device = device
        self._vrings = vrings
        self._state = state
        self._keep = keep
        self._answer_with = answer_with
        self._warn = warn
        self._region: InflightRegion | None = None

    @property
    def roles(self) -> set[str]:
        """In which roles descriptors are kept for a successor."""
        return set() if self._region is None else {REGION}

    def resume(self, keeping: Keeping) -> None:
        """Go on with a predecessor's region, before the rings run.

        Raises:
            StateError: its descriptor is not there.
            RemoteProtocolError, OSError, MemoryMapError: it cannot be the region any more.
        """
        if self._state.inflight is None:
            return
        fd = keeping.take(REGION)
        if fd is None:
            raise StateError("the region for inflight requests is not there")
        try:
            self._region = region = self._open(fd, self._state.inflight)
        finally:
            os.close(fd)
        for vring in self._vrings[: region.num_queues]:
            vring.adopt(region.record(vring.index), resumes=vring.setup.resumes)
        if isinstance(self._device, Resumable):
            self._device.save_with(region.write)

    def get(self, wanted: Inflight, fds: list[int]) -> Inflight:
        """Answer GET_INFLIGHT_FD. Raises RemoteProtocolError, OSError."""
        self._check()
        fd, answer = make_region(
            wanted,
            device_id=self._device.device_id,
            queues=len(self._vrings),
            largest=self._device.queue_size_max,
        )
        self._answer_with(fd)
        return answer

    def set(self, given: Inflight, fds: list[int]) -> None:
        """Use a region from now on, and go on from what is in it (SET_INFLIGHT_FD).

        Raises RemoteProtocolError, OSError, MemoryMapError: the one before, if any, stays.
        """
        self._check()
        running = next((vring for vring in self._vrings if vring.running), None)
        if running is not None:
            raise RemoteProtocolError(f"{running} is running")
        region = self._open(fds[0], given)
        self.close()
        self._keep(REGION, fds[0])
        self._region, self._state.inflight = region, given
        for index in range(region.num_queues):
            resumes = region.size_of(index) > 0
            self._vrings[index].adopt(region.record(index), resumes=resumes)
        if isinstance(self._device, Resumable):
            if saved := region.read():
                try:
                    self._device.restore(saved)
                except StateError as error:
                    self._warn(f"the state that the backend before left is ignored: {error}")
            self._device.save_with(region.write)

    def _open(self, fd: int, given: Inflight) -> InflightRegion:
        return InflightRegion(
            fd,
            given,
            device_id=self._device.device_id,
            queues=len(self._vrings),
            largest=self._device.queue_size_max,
        )

    def note(self, vring: Vring) -> None:
        """Write down that a ring runs now."""
        if self._region is not None and vring.index < self._region.num_queues:
            setup = vring.setup
            self._region.note(vring.index, setup.size, vring.used_index, packed=setup.packed)

    def forget(self) -> None:
        """Write down that no ring runs, nor did: the device was reset."""
        if self._region is not None:
            for index in range(self._region.num_queues):
                self._region.forget(index)

    def close(self) -> None:
        """Stop all rings, and write to the region no more. Safe to call twice."""
        for vring in self._vrings:
            vring.stop()
        region, self._region = self._region, None
        self._state.inflight = None
        if region is None:
            return
        if isinstance(self._device, Resumable):
            self._device.save_with(None)
        for vring in self._vrings[: region.num_queues]:
            vring.adopt(None, resumes=False)
            if size := region.size_of(vring.index):
                region.note(vring.index, size, vring.used_index, packed=vring.setup.packed)
        region.close()

    def _check(self) -> None:
        if ProtocolFeature.INFLIGHT_SHMFD not in self._state.protocol_features:
            raise RemoteProtocolError("INFLIGHT_SHMFD was not negotiated")
