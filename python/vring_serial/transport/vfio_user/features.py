"""Migration of the function: its states, its data, and the log of what it writes.

A client stops the function, reads its state piece by piece (STOP_COPY), and writes it to another
one (RESUMING), which runs then. What is read and written is a PciSnapshotState. The device stands
still in all states but RUNNING: it has no memory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.state import PCI_SNAPSHOT
from vring_serial.errors import LocalProtocolError, RemoteProtocolError, StateError
from vring_serial.proto.framing import Empty
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.proto.vfio_user_features import (
    DeviceFeature,
    FeatureIndex,
    FeatureMethod,
    LoggingControl,
    LoggingReport,
    MigrationData,
    MigrationFlag,
    MigrationPhase,
    MigrationState,
    MigrationSupport,
)
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.transport.session import Handler
from vring_serial.transport.state_memory import MAX_STATE
from vring_serial.transport.vfio_user.dirty import DmaLog
from vring_serial.transport.vfio_user.moved import MovedState
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.state import PHASES, ClientState

_GET, _SET = FeatureMethod.GET, FeatureMethod.SET
_METHODS = {
    FeatureIndex.MIGRATION: _GET,
    FeatureIndex.MIG_DEVICE_STATE: _GET | _SET,
    FeatureIndex.DMA_LOGGING_START: _SET,
    FeatureIndex.DMA_LOGGING_STOP: _SET,
    FeatureIndex.DMA_LOGGING_REPORT: _GET,
}


class DeviceFeatures:
    """Answers a client that migrates the function.

    Args:
        pci: the function.
        rings: between it and its device.
        state: the client's; ``phase`` and ``elsewhere`` are kept up to date here.
        log: of its writes.
        moved: has the function's state on its way.
        set_running: gives the function the client's memory, or takes it away.
        tell: logs.
    """

    def __init__(
        self,
        pci: PciDevice,
        rings: RemoteRings,
        state: ClientState,
        log: DmaLog,
        moved: MovedState,
        *,
        set_running: Callable[[bool], None],
        tell: Callable[[str], None],
    ) -> None:
        self._pci = pci
        self._rings = rings
        self._state = state
        self._log = log
        self._moved = moved
        self._set_running = set_running
        self._tell = tell

    @property
    def handlers(self) -> dict[int, Handler]:
        """What a client may ask."""
        return {
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._read,
            Command.MIG_DATA_WRITE: self._write,
        }

    @property
    def running(self) -> bool:
        """Whether the function runs, as it does unless a client migrates it."""
        return self._state.phase is MigrationState.RUNNING

    def resume(self, take: Callable[[int], int | None]) -> None:
        """Go on where a predecessor was; see MovedState."""
        self._moved.resume(take)

    def reset(self) -> None:
        """Return to RUNNING, as the client resets the function."""
        if not self.running:
            self._forget()
            self._set_running(True)

    def close(self) -> None:
        """Note that the client has left: what it took away, or only brought, goes on elsewhere."""
        if not self.running:
            self._forget()

    # --- features

    def _feature(self, asked: DeviceFeature, fds: list[int]) -> DeviceFeature:
        try:
            index = FeatureIndex(asked.index)
        except ValueError:
            raise VfioUserError(
                "DEVICE_FEATURE", f"there is no feature {asked.index}", errno.ENOTTY
            ) from None
        wanted = asked.methods & (_GET | _SET)
        if wanted & ~_METHODS[index]:
            raise RemoteProtocolError(f"{index.name} has {_METHODS[index]!r} alone")
        if asked.methods & FeatureMethod.PROBE:
            return asked
        if wanted & _SET:
            self._check_room(asked.argsz, len(asked.data))
            data = self._set(index, asked.data)
        else:
            data = self._get(index, asked)
        return DeviceFeature(asked.flags, data, DeviceFeature.SIZE + len(data))

    def _check_room(self, argsz: int, size: int) -> None:
        if argsz < DeviceFeature.SIZE + size:
            raise RemoteProtocolError(f"argsz is {argsz}; the reply has {size} bytes of data")

    def _get(self, index: FeatureIndex, asked: DeviceFeature) -> bytes:
        if index is FeatureIndex.DMA_LOGGING_REPORT:
            report = LoggingReport.unpack(asked.data)
            self._check_room(asked.argsz, LoggingReport.STRUCT.size + report.bitmap_size)
            return self._log.report(report, self._most).pack()
        Empty.unpack(asked.data)
        if index is FeatureIndex.MIGRATION:
            data = MigrationSupport(MigrationFlag.STOP_COPY).pack()
        else:
            data = MigrationPhase(self._state.phase).pack()
        self._check_room(asked.argsz, len(data))
        return data

    def _set(self, index: FeatureIndex, data: bytes) -> bytes:
        if index is FeatureIndex.MIG_DEVICE_STATE:
            asked = MigrationPhase.unpack(data)
            self._go_to(asked.state)
            return data
        control = LoggingControl.unpack(data)
        if index is FeatureIndex.DMA_LOGGING_START:
            return self._log.start(control).pack()
        return self._log.stop(control).pack()

    @property
    def _most(self) -> int:
        assert self._state.agreed is not None
        return self._state.agreed.max_data_xfer_size

    # --- states

    def _go_to(self, wanted: int) -> None:
        """Take the function to another state, by STOP unless that is one end of the way."""
        if wanted not in PHASES:
            raise RemoteProtocolError(f"state {wanted} cannot be asked for")
        target = MigrationState(wanted)
        if self._state.phase is MigrationState.ERROR:
            raise RemoteProtocolError("the function is in ERROR, and must be reset")
        if target is self._state.phase:
            return
        if self._state.phase is not MigrationState.STOP:
            self._stop()
        if target is not MigrationState.STOP:
            self._leave_stop(target)

    def _stop(self) -> None:
        phase = self._state.phase
        if phase is MigrationState.RUNNING:
            if self._rings.any_remote:
                # The client is still asked to write what the device has used.
                raise VfioUserError(
                    "DEVICE_FEATURE",
                    "rings are in memory that is not shared: the function cannot be migrated",
                    errno.EOPNOTSUPP,
                )
            self._set_running(False)
        elif phase is MigrationState.RESUMING:
            self._take_over()
        self._begin(MigrationState.STOP)

    def _leave_stop(self, target: MigrationState) -> None:
        device = self._pci.device
        if target is MigrationState.RUNNING:
            self._begin(target)
            self._state.elsewhere = False
            self._set_running(True)
            device.release_state(gone=False)
            self._pci.tell_again()
            return
        self._moved.begin(self._snapshot() if target is MigrationState.STOP_COPY else None)
        self._state.phase = target

    def _snapshot(self) -> bytes:
        try:
            with self._pci.device.settled():
                self._pci.note_positions()
                saved = PCI_SNAPSHOT.pack(self._pci.snapshot())
        except LocalProtocolError as error:  # a device that does not say what its state is
            raise RemoteProtocolError(str(error)) from None
        if len(saved) > MAX_STATE:
            raise RemoteProtocolError(f"a state of {len(saved)} bytes; {MAX_STATE} are allowed")
        self._tell(f"the function's state is saved: {len(saved)} bytes")
        return saved

    def _take_over(self) -> None:
        """Go on from what was written; a function that cannot is in ERROR."""
        try:
            take_over = self._pci.check_snapshot(PCI_SNAPSHOT.unpack(self._moved.whole()))
        except (StateError, LocalProtocolError) as error:
            self._begin(MigrationState.ERROR)
            raise RemoteProtocolError(f"the state is not taken: {error}") from None
        take_over()
        self._state.elsewhere = True
        self._tell("the function goes on from a state that the client brought")

    def _begin(self, phase: MigrationState) -> None:
        """Go to a state in which nothing is on its way."""
        self._state.phase = phase
        self._moved.end()

    def _forget(self) -> None:
        gone, self._state.elsewhere = self._state.elsewhere, False
        self._begin(MigrationState.RUNNING)
        self._pci.device.release_state(gone=gone)

    # --- data

    def _read(self, asked: MigrationData, fds: list[int]) -> MigrationData:
        self._check_phase(MigrationState.STOP_COPY, asked)
        if asked.data:
            raise RemoteProtocolError("data in a request to read")
        if asked.argsz < MigrationData.SIZE + asked.size:
            raise RemoteProtocolError(f"argsz is {asked.argsz}, for {asked.size} bytes of data")
        data = self._moved.read(asked.size)
        if self._moved.all_read:
            self._state.elsewhere = True  # unless it runs here again
        return MigrationData(len(data), data, MigrationData.SIZE + len(data))

    def _write(self, asked: MigrationData, fds: list[int]) -> None:
        self._check_phase(MigrationState.RESUMING, asked)
        if len(asked.data) != asked.size:
            raise RemoteProtocolError(f"{len(asked.data)} bytes of data instead of {asked.size}")
        if self._state.length + asked.size > MAX_STATE:
            raise VfioUserError(
                "MIG_DATA_WRITE", f"more than {MAX_STATE} bytes of state", errno.ENOSPC
            )
        self._moved.write(asked.data)

    def _check_phase(self, phase: MigrationState, asked: MigrationData) -> None:
        if self._state.phase is not phase:
            raise RemoteProtocolError(f"in state {self._state.phase.name}, not {phase.name}")
        if asked.size > self._most:
            raise RemoteProtocolError(f"{asked.size} bytes at once; {self._most} are allowed")
