"""The device's state on its way to another backend ("Migrating back-end state").

It goes through memory that this backend makes, and gives the frontend with its answer: a memfd of
fixed size, from which the frontend reads the state to its end, or into which it writes one. The
channel that the frontend offers is closed unused, as the specification allows: a pipe has a lock
that the frontend can hold for as long as it likes, and whatever it is, bytes in it would have to be
waited for. So nothing here waits, or is ever under way: CHECK_DEVICE_STATE finds all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vring_serial.device.base import VirtioDevice
from vring_serial.errors import LocalProtocolError, RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import (
    U64,
    DeviceStateTransfer,
    Empty,
    ProtocolFeature,
    Request,
)
from vring_serial.saving import saved_length
from vring_serial.transport.session import Handler
from vring_serial.transport.state_memory import MAX_STATE, check_memory, make_memory
from vring_serial.transport.vhost_user.state import FrontendState, Transfer
from vring_serial.transport.vhost_user.vring import Vring
from vring_serial.unix_fds import close_all

#: Role of the memory's descriptor (see Keeping).
STATE = "state"

_HEADER_SIZE = 20


class DeviceStates:
    """Moves the device's state for one frontend.

    A state that was moved away or brought here counts once a queue is started: until then the
    device stands still. If the frontend leaves instead, a device whose state was taken away, or
    only brought, forgets it: it goes on elsewhere.

    Args:
        device: whose state it is.
        vrings: none may run meanwhile.
        state: the frontend's; ``transfer`` is kept up to date here.
        keep: keeps a descriptor in a role for a successor of this process.
        answer_with: sends a descriptor, which it takes over, with the answer.
        tell: logs.
    """

    def __init__(
        self,
        device: VirtioDevice,
        vrings: Sequence[Vring],
        state: FrontendState,
        *,
        keep: Callable[[str, int], None],
        answer_with: Callable[[int], None],
        tell: Callable[[str], None],
    ) -> None:
        self._device = device
        self._vrings = vrings
        self._state = state
        self._keep = keep
        self._answer_with = answer_with
        self._tell = tell
        self._fd = -1

    @property
    def handlers(self) -> dict[int, Handler]:
        """What a frontend may ask about the state."""
        return {
            Request.SET_DEVICE_STATE_FD: self._begin,
            Request.CHECK_DEVICE_STATE: self._check,
        }

    @property
    def roles(self) -> set[str]:
        """In which roles descriptors are kept for a successor."""
        return {STATE} if self._fd >= 0 else set()

    def resume(self, keeping: Keeping) -> None:
        """Go on with a predecessor's transfer. Raises StateError: its memory is not there."""
        if self._state.transfer not in (Transfer.SAVING, Transfer.LOADING):
            return
        fd = keeping.take(STATE)
        if fd is None:
            raise StateError("the memory of a device state is not there")
        self._fd = fd
        check_memory(fd, _HEADER_SIZE)

    def started(self) -> None:
        """Note that a queue was started: the state counts here."""
        self._end(Transfer.NONE)

    def close(self) -> None:
        """Note that the frontend has left. Safe to call twice."""
        transfer = self._state.transfer
        self._end(Transfer.NONE)
        if transfer is Transfer.SAVING:
            self._device.release_state(gone=False)
        elif transfer in (Transfer.SAVED, Transfer.LOADED):
            self._device.release_state(gone=True)

    def _begin(self, transfer: DeviceStateTransfer, fds: list[int]) -> U64:
        self._check_stopped()
        if transfer.direction == transfer.SAVE:
            fd, after = self._save(), Transfer.SAVING
        else:
            fd, after = make_memory(MAX_STATE), Transfer.LOADING
        self._end(after)
        self._fd = fd
        self._keep(STATE, fd)
        self._answer_with(os.dup(fd))
        return U64(0)

    def _save(self) -> int:
        try:
            with self._device.settled():
                saved = self._device.save_state()
        except LocalProtocolError as error:  # a device that does not say what its state is
            raise RemoteProtocolError(str(error)) from None
        if len(saved) > MAX_STATE:
            self._device.release_state(gone=False)
            raise RemoteProtocolError(f"a state of {len(saved)} bytes; {MAX_STATE} are allowed")
        fd = make_memory(len(saved), saved)
        self._tell(f"the device's state is saved: {len(saved)} bytes")
        return fd

    def _check(self, _: Empty, fds: list[int]) -> U64:
        self._check_stopped()
        transfer = self._state.transfer
        if transfer is Transfer.SAVING:
            self._end(Transfer.SAVED)
        elif transfer is Transfer.LOADING:
            try:
                take_over = self._device.check_state(self._read())
            except (StateError, LocalProtocolError) as error:
                self._end(Transfer.NONE)
                raise RemoteProtocolError(f"the state is not taken: {error}") from None
            take_over()
            self._end(Transfer.LOADED)
            self._tell("the device goes on from a state that the frontend brought")
        else:
            raise RemoteProtocolError("no state is on its way")
        return U64(0)

    def _read(self) -> bytes:
        """Return a copy of the state that was written. Raises StateError if there is none."""
        header = os.pread(self._fd, _HEADER_SIZE, 0)
        length = saved_length(header)
        if length > MAX_STATE:
            raise StateError(f"it is said to have {length} bytes; {MAX_STATE} are allowed")
        return header + os.pread(self._fd, length - _HEADER_SIZE, _HEADER_SIZE)

    def _check_stopped(self) -> None:
        if ProtocolFeature.DEVICE_STATE not in self._state.protocol_features:
            raise RemoteProtocolError("DEVICE_STATE was not negotiated")
        running = next((vring for vring in self._vrings if vring.running), None)
        if running is not None:
            raise RemoteProtocolError(f"{running} is running")

    def _end(self, transfer: Transfer) -> None:
        self._state.transfer = transfer
        close_all([self._fd])
        self._fd = -1
