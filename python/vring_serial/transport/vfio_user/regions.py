"""The regions of the function: what a client learns of them, and its accesses to registers."""

from __future__ import annotations

import os
from collections.abc import Callable

from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.config_space import SIZE as CONFIG_SIZE
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vfio_user_regions import (
    NUM_REGIONS,
    IoEventFd,
    RegionFlag,
    RegionIndex,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    WriteMulti,
    WriteMultiDone,
)
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.transport.session import Handler
from vring_serial.transport.vfio_user.state import ClientState

_ACCESS = RegionFlag.READ | RegionFlag.WRITE


class Regions:
    """Answers what a client asks about regions, and does what it does to their registers.

    Args:
        pci: the function.
        state: the client's, with what was agreed on.
        keep_kick: keeps the eventfd of a queue for a successor of this process.
        send_beside: sends a descriptor with the next answer; takes it over.
    """

    def __init__(
        self,
        pci: PciDevice,
        state: ClientState,
        *,
        keep_kick: Callable[[int, int], None],
        send_beside: Callable[[int], None],
    ) -> None:
        self._pci = pci
        self._state = state
        self._keep_kick = keep_kick
        self._send_beside = send_beside
        self._bars = {bar.index: bar.size for bar in pci.bars}

    @property
    def handlers(self) -> dict[int, Handler]:
        """What a client may ask about regions."""
        return {
            Command.DEVICE_GET_REGION_INFO: self._get_info,
            Command.DEVICE_GET_REGION_IO_FDS: self.get_io_fds,
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_multi,
        }

    def get_io_fds(self, asked: RegionIoFds, fds: list[int]) -> RegionIoFds:
        """Return where queues are notified, with eventfds for clients that can trap the writes.

        Raises:
            RemoteProtocolError: the device has no such region.
        """
        if asked.sub_regions:
            raise RemoteProtocolError("sub-regions in a request")
        if not self._size(asked.index):
            raise RemoteProtocolError(f"the device has no region {asked.index}")
        assert self._state.agreed is not None
        # The other queues are notified by messages.
        places = [place for place in self._pci.notify_offsets if place.bar == asked.index]
        places = places[: self._state.agreed.max_msg_fds]
        needed = RegionIoFds.needed(len(places))
        if asked.argsz < needed:
            return RegionIoFds(asked.index, (), needed)
        for place in places:
            fd = self._pci.kick_fd(place.queue)
            self._keep_kick(place.queue, fd)
            self._send_beside(os.dup(fd))
        # Size 0: drivers write 2 bytes, or 4 with NOTIFICATION_DATA.
        found = (IoEventFd(place.offset, 0, nr) for nr, place in enumerate(places))
        return RegionIoFds(asked.index, tuple(found), needed)

    def _size(self, index: int) -> int:
        """Return the region's bytes; 0 if this device does not have it."""
        if index == RegionIndex.CONFIG:
            return CONFIG_SIZE
        if index >= NUM_REGIONS:
            raise RemoteProtocolError(f"there is no region {index}")
        return self._bars.get(index, 0)

    def _get_info(self, asked: RegionInfo, fds: list[int]) -> RegionInfo:
        size = self._size(asked.index)
        return RegionInfo(asked.index, _ACCESS if size else 0, size)

    def _read(self, asked: RegionRead, fds: list[int]) -> RegionWrite:
        self._check_access(asked.region, asked.offset, asked.count)
        if asked.region == RegionIndex.CONFIG:
            value = self._pci.config_read(asked.offset, asked.count)
        else:
            value = self._pci.bar_read(asked.region, asked.offset, asked.count)
        data = value.to_bytes(asked.count, "little")
        return RegionWrite(asked.offset, asked.region, asked.count, data)

    def _write(self, asked: RegionWrite, fds: list[int]) -> RegionRead:
        self._do_write(asked)
        return RegionRead(asked.offset, asked.region, asked.count)

    def _write_multi(self, asked: WriteMulti, fds: list[int]) -> WriteMultiDone:
        for write in asked.writes:
            self._check_access(write.region, write.offset, write.count)
        for write in asked.writes:
            self._do_write(write)
        return WriteMultiDone(len(asked.writes))

    def _do_write(self, asked: RegionWrite) -> None:
        self._check_access(asked.region, asked.offset, asked.count)
        value = int.from_bytes(asked.data, "little")
        if asked.region == RegionIndex.CONFIG:
            self._pci.config_write(asked.offset, value, asked.count)
        else:
            self._pci.bar_write(asked.region, asked.offset, value, asked.count)

    def _check_access(self, region: int, offset: int, count: int) -> None:
        size = self._size(region)
        if not count or offset + count > size:
            raise RemoteProtocolError(
                f"{count} bytes at {offset:#x} of region {region}, which has {size}"
            )
