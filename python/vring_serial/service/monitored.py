"""Where the monitor's process of a service listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vring_serial.chardev.endpoint import Listener
from vring_serial.chardev.kept import KeptSockets
from vring_serial.chardev.socket import SocketOptions
from vring_serial.errors import ResourceError
from vring_serial.keeping import Keeping
from vring_serial.unix_socket import SocketPathError


@dataclass(frozen=True, slots=True)
class Monitored:
    """Addresses of the monitor's process, which is there if there is one.

    Attributes:
        qmp: of the monitors that speak QMP, for all VMs.
        metrics: where metrics are served.
        vms: of the monitors of single VMs, by the VM's name; each has one at least.
    """

    qmp: tuple[SocketOptions, ...] = ()
    metrics: tuple[SocketOptions, ...] = ()
    vms: Mapping[str, tuple[SocketOptions, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def all(self) -> tuple[SocketOptions, ...]:
        """Return all addresses."""
        of_vms = (options for addresses in self.vms.values() for options in addresses)
        return (*self.qmp, *self.metrics, *of_vms)


async def listen(option: str, options: SocketOptions, keeping: Keeping) -> Listener:
    """Return a listener: a predecessor's sockets, or new ones.

    Args:
        option: its name or place, for errors.
        options: the address.
        keeping: of this address alone.

    Raises ResourceError.
    """
    kept = KeptSockets(keeping, f"{option} {options.address}")
    listener = Listener()
    try:
        if sockets := kept.take_listeners():
            listener.adopt(options.address, sockets)
        else:
            await listener.listen(options.address)
            kept.keep_listeners(listener.sockets)
    except SocketPathError as error:
        raise ResourceError(f"{option}: {error}") from None
    except OSError as error:
        raise ResourceError(f"{option} {options.address}: {error.strerror}") from None
    return listener
