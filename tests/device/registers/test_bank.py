"""Registers side by side, against an obvious model: bytes, and who owns them."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vring_serial.device.registers.bank import RegisterBank


class Register:
    def __init__(self, value: int) -> None:
        self.value = value
        self.writes: list[int] = []

    def read(self) -> int:
        return self.value

    def write(self, value: int) -> None:
        self.writes.append(value)


def make() -> tuple[RegisterBank, dict[int, tuple[int, Register]], bytearray]:
    """A bank of 48 bytes: registers of every width, a window at 32, and gaps."""
    bank = RegisterBank(48)
    registers: dict[int, tuple[int, Register]] = {}
    for offset, width in ((0, 4), (4, 2), (6, 1), (7, 1), (8, 4), (12, 4), (20, 2), (26, 2)):
        register = Register(int.from_bytes(bytes(range(offset + 1, offset + 1 + width)), "little"))
        registers[offset] = (width, register)
        bank.register(offset, width, register.read, register.write)
    memory = bytearray(range(33, 45))

    def write(offset: int, value: int, size: int) -> None:
        memory[offset : offset + size] = value.to_bytes(size, "little")

    def read(offset: int, size: int) -> int:
        assert 0 < size <= len(memory) - offset
        return int.from_bytes(memory[offset : offset + size], "little")

    bank.window(32, len(memory), read, write)
    return bank, registers, memory


OWNED = [at + 1 if at < 16 or at in (20, 21, 26, 27) or 32 <= at < 44 else 0 for at in range(48)]


@given(st.integers(0, 60), st.integers(1, 64))
@settings(max_examples=300)
def test_reading_gives_the_bytes_that_are_there(offset, size):
    bank, _, _ = make()
    expected = bytes(OWNED[at] if at < 48 else 0 for at in range(offset, offset + size))
    assert bank.read(offset, size).to_bytes(size, "little") == expected


@given(st.integers(0, 60), st.integers(1, 64), st.integers(0, 2**600))
@settings(max_examples=300)
def test_writing_reaches_what_it_covers_whole(offset, size, value):
    bank, registers, memory = make()
    bank.write(offset, value, size)
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    for at, (width, register) in registers.items():
        whole = offset <= at and at + width <= offset + size
        part = data[at - offset : at - offset + width] if whole else b""
        assert register.writes == ([int.from_bytes(part, "little")] if whole else [])
    for at in range(12):
        inside = offset <= 32 + at < offset + size
        assert memory[at] == (data[32 + at - offset] if inside else 33 + at)


def test_reading_twice_has_no_effect_but_the_registers_own():
    bank = RegisterBank(8)
    reads = []
    bank.register(4, 1, lambda: reads.append(1) or 7)
    assert bank.read(0, 4) == 0
    assert bank.read(5, 1) == 0
    assert reads == []
    assert bank.read(4, 1) == 7
    assert bank.read(0, 8) == 7 << 32
    assert reads == [1, 1]


def test_narrower_writes_count_where_that_is_wanted():
    bank = RegisterBank(8)
    writes = []
    bank.register(0, 4, None, writes.append, also_written_as=(1, 2))
    for size in (1, 2, 3, 4):
        bank.write(0, 0x12345678, size)
    bank.write(1, 0, 2)
    assert writes == [0x78, 0x5678, 0x12345678]
    assert bank.read(0, 4) == 0


@pytest.mark.parametrize("size", [3, 9], ids=["small", "large"])
def test_a_guest_that_tries_all_accesses_fills_no_memory(size: int) -> None:
    bank = RegisterBank(1 << 20)

    def access(offsets: range) -> None:
        for offset in offsets:
            bank.read(offset, size)
            bank.write(offset, 1, size)

    access(range(5000))
    tracemalloc.start()
    try:
        access(range(5000, 8000))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100_000  # remembering each access would take more than 1 MB
