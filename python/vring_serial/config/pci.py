"""PCI addresses of a domain: which are taken, and which one libvirt would choose next.

On a machine with one conventional bus (pc) that is the first free slot of bus 0, from 3 on: the
host bridge, the chipset's own functions and the first display have 0 to 2. On a PCI Express machine
(q35, virt) every device gets a root port, so it is slot 0 of the first free bus from 1 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vring_serial.config.topology import PciAddress
from vring_serial.errors import ConfigError

_FIRST_SLOT = 3
_LAST_SLOT = 31
_LAST_BUS = 255


class PciSlots:
    """Who has which address.

    Args:
        express: a PCI Express machine.
        bridges: on such a machine, buses that no root port makes; nothing is put there.

    Attributes:
        waiting: devices of others that have no address either and get theirs before ours.
    """

    def __init__(self, *, express: bool = False, bridges: Iterable[int] = ()) -> None:
        self.waiting = 0
        self._express = express
        self._bridges = frozenset(bridges)
        self._owners: dict[PciAddress, str] = {}
        self._slots: set[tuple[int, int, int]] = set()

    def note(self, address: PciAddress, where: str) -> None:
        """Somebody else's device has this address; whether it may is not ours to judge."""
        self._owners.setdefault(address, where)
        self._slots.add((address.domain, address.bus, address.slot))

    def take(self, address: PciAddress, where: str) -> None:
        """Give ``address`` to one of our controllers. Raises ConfigError if it is taken."""
        if (other := self._owners.get(address)) is not None:
            raise ConfigError(f"PCI address {address} is taken already ({other})", where)
        self.note(address, where)

    def assign_free(self) -> Iterator[PciAddress]:
        """Addresses for ours that have none, until no slot is free: past those in ``waiting``."""
        for address in self._candidates():
            if (address.domain, address.bus, address.slot) in self._slots:
                continue
            if self.waiting:
                self.waiting -= 1
            else:
                yield address

    def _candidates(self) -> Iterator[PciAddress]:
        if self._express:
            for bus in range(1, _LAST_BUS + 1):
                if bus not in self._bridges:
                    yield PciAddress(bus=bus)
        else:
            for slot in range(_FIRST_SLOT, _LAST_SLOT + 1):
                yield PciAddress(slot=slot)
