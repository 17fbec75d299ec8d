"""A device's interrupts as a vfio-user client sets them up, and how they reach it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

from vring import notify
from vring_serial.device.kicks import KickWatch
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vfio_user_wire import (
    IRQ_SET_ACTION,
    IRQ_SET_DATA,
    IrqFlag,
    IrqIndex,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)
from vring_serial.transport.closer import Closer
from vring_serial.transport.event_fds import check_event_descriptor
from vring_serial.transport.vfio_user.state import ClientState

_FLAGS: dict[int, int] = {
    IrqIndex.INTX: IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED,
    # Without NORESIZE: each vector may get its descriptor when the driver first uses it.
    IrqIndex.MSIX: IrqFlag.EVENTFD,
}

#: None of any type.
NO_DESCRIPTORS: Mapping[int, Sequence[int]] = MappingProxyType({})


class Interrupts:
    """The sink of a PCI function's interrupts (device.interrupts.InterruptSink).

    INTx masks itself when it has been told: the client unmasks it when the guest has answered, and
    is told again if the line is still asserted. The client keeps the masks of MSI-X vectors; one
    without a descriptor stays pending in the device.

    Args:
        vectors: of MSI-X.
        intx_level: whether the device asserts INTA#.
        vectors_changed: called when vectors have other descriptors than before.
        closer: closes descriptors.
        state: of the client; what it says of interrupts is kept up to date here.
        fds: the descriptors that ``state.irqs`` tells of, by type, in that order; taken over.
        unmask_fd: the descriptor that ``state.unmask_event`` tells of, or -1; taken over.

    Raises ValueError if ``fds`` are not those of the state; they are still the caller's then.
    """

    def __init__(
        self,
        vectors: int,
        intx_level: Callable[[], bool],
        vectors_changed: Callable[[], None],
        closer: Closer,
        state: ClientState,
        *,
        fds: Mapping[int, Sequence[int]] = NO_DESCRIPTORS,
        unmask_fd: int = -1,
    ) -> None:
        self._state = state
        self._close_all = closer.close
        self._intx_level = intx_level
        self._vectors_changed = vectors_changed
        # By type: the client's event descriptor of each interrupt, or -1.
        self._fds: dict[int, list[int]] = {
            IrqIndex.INTX: [-1],
            IrqIndex.MSI: [],
            IrqIndex.MSIX: [-1] * vectors,
        }
        for index, numbers in state.irqs.items():
            for number, fd in zip(numbers, fds.get(index, ()), strict=True):
                self._fds[index][number] = fd
        if state.unmask_event is not (unmask_fd >= 0):
            raise ValueError("the state and the descriptors differ on the event that unmasks INTx")
        self._unmask_fd = -1
        self._unmask_kicks: KickWatch | None = None
        if unmask_fd >= 0:
            self._watch_unmask(unmask_fd)

    # --- for the device

    def raise_msix(self, vector: int) -> bool:
        """See InterruptSink."""
        fd = self.msix_descriptor(vector)
        if fd >= 0:
            notify(fd)
        return fd >= 0

    def set_intx(self, level: bool) -> None:
        """See InterruptSink."""
        fd = self._fds[IrqIndex.INTX][0]
        if level and fd >= 0 and not self._state.intx_masked:
            self._state.intx_masked = True
            notify(fd)

    def msix_descriptor(self, vector: int) -> int:
        """See InterruptSink."""
        return self._fds[IrqIndex.MSIX][vector]

    # --- for the client

    def descriptors(self) -> dict[tuple[int, int], int]:
        """Return the client's descriptors by type and number; they stay this object's."""
        return {
            (index, number): fd
            for index, fds in self._fds.items()
            for number, fd in enumerate(fds)
            if fd >= 0
        }

    @property
    def unmask_fd(self) -> int:
        """The client's event that unmasks INTx, or -1; it stays this object's."""
        return self._unmask_fd

    @property
    def types(self) -> int:
        """Number of types. Larger indices (ERR, REQ) are refused, which QEMU ignores; if the answer
        were that they have no interrupts, it would warn."""
        return len(self._fds)

    def info(self, index: int) -> IrqInfo:
        """Describe an interrupt type. Raises RemoteProtocolError if there is no such type."""
        return IrqInfo(index, _FLAGS.get(index, 0), len(self._type(index)))

    def set(self, irqs: IrqSet, fds: list[int]) -> None:
        """Do DEVICE_SET_IRQS; descriptors that are kept are taken out of ``fds``.

        Raises:
            RemoteProtocolError: no such interrupts, an action that they do not have, or
                descriptors that do not fit; nothing is changed then.
        """
        present = len(self._type(irqs.index))
        if irqs.start + irqs.count > present:
            raise RemoteProtocolError(
                f"interrupts {irqs.start} to {irqs.start + irqs.count - 1} of {present}"
            )
        kind, action = IrqSetFlag(irqs.flags & IRQ_SET_DATA), irqs.flags & IRQ_SET_ACTION
        if fds and kind != IrqSetFlag.DATA_EVENTFD:
            raise RemoteProtocolError(f"{len(fds)} descriptors with {kind.name}")
        if action == IrqSetFlag.ACTION_TRIGGER:
            self._set_trigger(irqs, kind, fds)
        elif irqs.index != IrqIndex.INTX:
            raise RemoteProtocolError(f"type {irqs.index} cannot be masked")
        elif kind == IrqSetFlag.DATA_EVENTFD:
            self._set_unmask_event(action, fds)
        else:
            if _chosen(irqs):
                self._state.intx_masked = action == IrqSetFlag.ACTION_MASK
            self._tell_level()

    def close(self) -> None:
        """Close all descriptors; nobody is told anything. Safe to call twice."""
        self._watch_unmask(-1)
        for index, fds in self._fds.items():
            self._close_all(self._replace(index, 0, [-1] * len(fds)))

    # --- internals

    def _type(self, index: int) -> list[int]:
        try:
            return self._fds[index]
        except KeyError:
            raise RemoteProtocolError(f"there is no interrupt type {index}") from None

    def _set_trigger(self, irqs: IrqSet, kind: IrqSetFlag, fds: list[int]) -> None:
        if kind == IrqSetFlag.DATA_EVENTFD:
            if len(fds) not in (0, irqs.count):
                raise RemoteProtocolError(f"{len(fds)} descriptors for {irqs.count} interrupts")
            for fd in fds:
                check_event_descriptor(fd, writable=True)
            old = self._replace(irqs.index, irqs.start, fds or [-1] * irqs.count)
            fds.clear()
        elif irqs.count == 0 and kind == IrqSetFlag.DATA_NONE:
            old = self._replace(irqs.index, 0, [-1] * len(self._fds[irqs.index]))
        else:
            masked = irqs.index == IrqIndex.INTX and self._state.intx_masked
            for number in _chosen(irqs):
                fd = self._fds[irqs.index][number]
                if fd >= 0 and not masked:
                    notify(fd)
            return
        if irqs.index == IrqIndex.MSIX:
            self._vectors_changed()
        else:
            self._tell_level()
        self._close_all(old)  # at last: nothing else refers to them

    def _set_unmask_event(self, action: int, fds: list[int]) -> None:
        """Set or remove the client's event that unmasks INTx without a message."""
        if action == IrqSetFlag.ACTION_MASK or len(fds) > 1:
            raise RemoteProtocolError(
                "events can unmask INTx, one descriptor for it, and not mask it"
            )
        for fd in fds:
            check_event_descriptor(fd, writable=False)
        self._watch_unmask(fds[0] if fds else -1)
        fds.clear()

    def _watch_unmask(self, fd: int) -> None:
        kicks = KickWatch(fd, self._unmask_event) if fd >= 0 else None
        if self._unmask_kicks is not None:
            self._unmask_kicks.close()
            os.close(self._unmask_fd)
        self._unmask_fd, self._unmask_kicks = fd, kicks
        self._state.unmask_event = fd >= 0

    def _unmask_event(self) -> None:
        self._state.intx_masked = False
        self._tell_level()

    def _tell_level(self) -> None:
        with suppress(OSError):
            self.set_intx(self._intx_level())

    def _replace(self, index: int, start: int, fds: list[int]) -> list[int]:
        """Give interrupts other descriptors, unmasked, and return the old ones."""
        part = slice(start, start + len(fds))
        old = self._fds[index][part]
        self._fds[index][part] = fds
        self._state.irqs[index] = [nr for nr, fd in enumerate(self._fds[index]) if fd >= 0]
        if index == IrqIndex.INTX and fds:
            self._state.intx_masked = False
        return old


def _chosen(irqs: IrqSet) -> list[int]:
    """Return the numbers of the interrupts that the action is for."""
    numbers = range(irqs.start, irqs.start + irqs.count)
    if irqs.flags & IrqSetFlag.DATA_BOOL:
        return [number for number, wanted in zip(numbers, irqs.data, strict=True) if wanted]
    return list(numbers)
