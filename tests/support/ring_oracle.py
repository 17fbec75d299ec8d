"""Split and packed rings, the device's side, slow and obvious: what `vring` is compared with.

Written from the specification (virtio 1.3, 2.7 and 2.8) with bytes, ints and lists only. It reads
the same guest memory as the queue under test, and says what a pop must give and what a push must
leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15

#: guest address, length -> bytes, or None if a byte is outside memory
Read = Callable[[int, int], bytes | None]


class FaultError(Exception):
    """The ring is malformed; the message is the name of the error class in `vring.errors`."""


@dataclass
class OracleChain:
    head: int
    slots: int
    buffers: list[tuple[int, int, bool]] = field(default_factory=list)  # address, length, writable

    def total(self, writable: bool) -> int:
        return sum(length for _, length, w in self.buffers if w == writable)

    def add(self, read: Read, address: int, length: int, flags: int, size: int) -> None:
        if len(self.buffers) == size:
            raise FaultError("ChainError")
        writable = bool(flags & WRITE)
        if not writable and any(w for _, _, w in self.buffers):
            raise FaultError("ChainOrderError")
        if length and not inside(read, address, length):
            raise FaultError("BufferAddressError")
        self.buffers.append((address, length, writable))


def inside(read: Read, address: int, length: int) -> bool:
    """Whether all bytes are in memory; asks for one byte of each 4 KiB, regions are no smaller."""
    end = address + length
    if end > 1 << 64 or read(end - 1, 1) is None:
        return False
    return all(read(at, 1) is not None for at in range(address, end, 0x1000))


def number(data: bytes | None, what: str = "IndirectError") -> int:
    if data is None:
        raise FaultError(what)
    return int.from_bytes(data, "little")


@dataclass
class Layout:
    read: Read
    size: int
    desc: int
    avail: int
    used: int
    event_idx: bool = False
    indirect: bool = False

    def word(self, address: int) -> int:
        return number(self.read(address, 2))

    def check_table(self, flags: int, length: int) -> None:
        if not self.indirect:
            raise FaultError("DescriptorFlagsError")
        if flags & NEXT or length == 0 or length % 16:
            raise FaultError("IndirectError")


@dataclass
class SplitOracle(Layout):
    next_avail: int = 0
    next_used: int = 0
    in_flight: int = 0

    def descriptor(self, address: int) -> tuple[int, int, int, int]:
        raw = self.read(address, 16)
        parts = (0, 8), (8, 12), (12, 14), (14, 16)
        a, n, f, x = (number(raw and raw[i:j]) for i, j in parts)
        return a, n, f, x

    def pop(self, limit: int) -> list[OracleChain]:
        """Up to `limit` chains; FaultError only if the very first is malformed."""
        ready = (self.word(self.avail + 2) - self.next_avail) % 65536
        if ready + self.in_flight > self.size:
            raise FaultError("AvailableIndexError")
        chains: list[OracleChain] = []
        for _ in range(min(ready, limit)):
            try:
                chain = self.chain(self.word(self.avail + 4 + 2 * (self.next_avail % self.size)))
            except FaultError:
                if chains:
                    break
                raise
            chains.append(chain)
            self.next_avail = (self.next_avail + 1) % 65536
            self.in_flight += 1
        return chains

    def chain(self, head: int) -> OracleChain:
        if head >= self.size:
            raise FaultError("HeadError")
        chain = OracleChain(head, 1)
        table, entries, at, inside_table = self.desc, self.size, head, False
        while True:
            address, length, flags, following = self.descriptor(table + 16 * at)
            if flags & INDIRECT:
                if inside_table:
                    raise FaultError("IndirectError")
                self.check_table(flags, length)
                table, entries, at, inside_table = address, length // 16, 0, True
                continue
            chain.add(self.read, address, length, flags, self.size)
            if not flags & NEXT:
                break
            if following >= entries:
                raise FaultError("ChainError")
            at = following
        if chain.total(True) + chain.total(False) >= 1 << 32:
            raise FaultError("ChainError")
        return chain

    def unpop(self, chains: list[OracleChain]) -> None:
        self.next_avail = (self.next_avail - len(chains)) % 65536
        self.in_flight -= len(chains)

    def push(self, chains: list[OracleChain], written: list[int]) -> bool:
        """Checks what the queue under test wrote for these chains; whether it had to notify."""
        before = self.next_used
        for chain, length in zip(chains, written, strict=True):
            at = self.used + 4 + 8 * (self.next_used % self.size)
            assert number(self.read(at, 4)) == chain.head
            assert number(self.read(at + 4, 4)) == length
            self.next_used = (self.next_used + 1) % 65536
            self.in_flight -= 1
        assert self.word(self.used + 2) == self.next_used
        if not chains:
            return False
        if not self.event_idx:
            return not self.word(self.avail) & 1
        event = self.word(self.avail + 4 + 2 * self.size)
        return any((before + i) % 65536 == event for i in range(len(chains)))

    def check_enabled(self) -> bool:
        """Checks the wish for notifications in memory; whether more is available already."""
        if self.event_idx:
            assert self.word(self.used + 4 + 8 * self.size) == self.next_avail
        else:
            assert self.word(self.used) & 1 == 0
        return self.word(self.avail + 2) != self.next_avail

    def check_disabled(self) -> None:
        assert self.event_idx or self.word(self.used) & 1


@dataclass
class PackedOracle(Layout):
    avail_slot: int = 0
    avail_wrap: bool = True
    used_slot: int = 0
    used_wrap: bool = True
    slots_in_flight: int = 0

    def descriptor(self, address: int) -> tuple[int, int, int, int]:
        """address, length, flags, id"""
        raw = self.read(address, 16)
        parts = (0, 8), (8, 12), (14, 16), (12, 14)
        a, n, f, i = (number(raw and raw[s:e]) for s, e in parts)
        return a, n, f, i

    def available(self) -> bool:
        flags = self.word(self.desc + 16 * self.avail_slot + 14)
        return bool(flags & AVAIL) == self.avail_wrap and bool(flags & USED) != self.avail_wrap

    def step(self, slot: int, wrap: bool, slots: int) -> tuple[int, bool]:
        for _ in range(slots):
            slot += 1
            if slot == self.size:
                slot, wrap = 0, not wrap
        return slot, wrap

    def pop(self, limit: int) -> list[OracleChain]:
        chains: list[OracleChain] = []
        while len(chains) < limit and self.available():
            try:
                chain = self.chain()
            except FaultError:
                if chains:
                    break
                raise
            chains.append(chain)
            self.avail_slot, self.avail_wrap = self.step(
                self.avail_slot, self.avail_wrap, chain.slots
            )
            self.slots_in_flight += chain.slots
        return chains

    def chain(self) -> OracleChain:
        chain = OracleChain(0, 0)
        while True:
            if chain.slots == self.size - self.slots_in_flight:
                raise FaultError("ChainError" if chain.slots else "AvailableIndexError")
            slot = (self.avail_slot + chain.slots) % self.size
            address, length, flags, chain.head = self.descriptor(self.desc + 16 * slot)
            chain.slots += 1
            if flags & INDIRECT:
                if chain.slots > 1:
                    raise FaultError("IndirectError")
                self.check_table(flags, length)
                if length // 16 > self.size:
                    raise FaultError("ChainError")
                for entry in range(length // 16):
                    a, n, f, _ = self.descriptor(address + 16 * entry)
                    if f & INDIRECT:
                        raise FaultError("IndirectError")
                    chain.add(self.read, a, n, f, self.size)
                break
            chain.add(self.read, address, length, flags, self.size)
            if not flags & NEXT:
                break
        if chain.total(True) + chain.total(False) >= 1 << 32:
            raise FaultError("ChainError")
        return chain

    def unpop(self, chains: list[OracleChain]) -> None:
        for chain in chains:
            self.slots_in_flight -= chain.slots
            for _ in range(chain.slots):
                if self.avail_slot == 0:
                    self.avail_slot, self.avail_wrap = self.size, not self.avail_wrap
                self.avail_slot -= 1

    def push(self, chains: list[OracleChain], written: list[int]) -> bool:
        passed: list[tuple[int, bool]] = []
        for chain, length in zip(chains, written, strict=True):
            _, used_length, flags, used_id = self.descriptor(self.desc + 16 * self.used_slot)
            assert (used_id, used_length) == (chain.head, length)
            assert bool(flags & AVAIL) == bool(flags & USED) == self.used_wrap
            assert bool(flags & WRITE) == (length > 0)
            for _ in range(chain.slots):
                passed.append((self.used_slot, self.used_wrap))
                self.used_slot, self.used_wrap = self.step(self.used_slot, self.used_wrap, 1)
            self.slots_in_flight -= chain.slots
        if not chains:
            return False
        event, flags = self.word(self.avail), self.word(self.avail + 2) & 3
        if flags == 2 and self.event_idx:
            return (event & 0x7FFF, bool(event >> 15)) in passed
        return flags != 1

    def check_enabled(self) -> bool:
        if self.event_idx:
            assert self.word(self.used + 2) == 2
            assert self.word(self.used) == self.avail_slot | self.avail_wrap << 15
        else:
            assert self.word(self.used + 2) == 0
        return self.available()

    def check_disabled(self) -> None:
        assert self.word(self.used + 2) == 1
