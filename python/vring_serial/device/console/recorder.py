"""The console's state as it is written down for a successor, after each change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vring import RECORD_SIZE
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ConsoleState, ControllerState
from vring_serial.keeping import Keeping
from vring_serial.saving import Packer


class Recorder:
    """Writes a console's state down, if it is another one than before.

    Args:
        max_ports: of the device.
        keeping: where a successor of this process finds it, or None.
    """

    def __init__(self, max_ports: int, keeping: Keeping | None) -> None:
        self._max_ports = max_ports
        self._keeping = keeping
        self._write: Callable[[bytes], None] | None = None
        self._packer = Packer(CONSOLE)
        self._recorded = b""

    def write_with(self, write: Callable[[bytes], None] | None) -> None:
        """Write with this function as well from now on; None: no longer."""
        self._write = write
        self._recorded = b""

    def record(self, state: ControllerState, ports: Mapping[int, Port]) -> None:
        """Write the state down, before anybody is told of what changed.

        Connections of protocols end with this process, and begin anew in the next.
        """
        if self._keeping is None and self._write is None:
            return
        of_ports = {nr: port.recorded for nr, port in ports.items()}
        packed = self._packer.pack(ConsoleState(self._max_ports, state, of_ports))
        if packed == self._recorded:
            return
        if self._keeping is not None:
            self._keeping.write(CONSOLE.kind, packed)
        if self._write is not None:
            self._write(packed)
        self._recorded = packed

    def of_residue(self, nr: int) -> memoryview | None:
        """Return where a port notes how much of its residue was taken; None: nowhere."""
        return None if self._keeping is None else self._keeping.area(f"residue-{nr}", RECORD_SIZE)
