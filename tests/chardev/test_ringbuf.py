"""The ring buffer against a slow, obvious oracle, and its sizes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chardev_kinds import Guest
from tests.support.shelves import ShelfKeeper
from vring_serial.chardev.ringbuf import MAX_SIZE, RingbufChardev, RingbufOptions
from vring_serial.errors import ConfigError

STEPS = st.lists(
    st.one_of(st.binary(min_size=1, max_size=40), st.integers(min_value=-1, max_value=40)),
    max_size=30,
)


@given(exponent=st.integers(min_value=0, max_value=5), steps=STEPS, outlives=st.booleans())
def test_it_keeps_the_newest_bytes(exponent: int, steps: list[bytes | int], outlives: bool) -> None:
    """A step is what the guest writes, or how much is read."""

    async def play(keeper: ShelfKeeper) -> None:
        size = 1 << exponent

        def make() -> RingbufChardev:
            chardev = RingbufChardev("dut", RingbufOptions(size=size))
            chardev.keeping = keeper.begin() if outlives else None
            return chardev

        chardev = make()
        guest = Guest(chardev)
        await chardev.start()
        kept = b""
        lost = 0
        for step in steps:
            if isinstance(step, bytes):
                await guest.write(step)
                kept += step
                lost += max(len(kept) - size, 0)
                kept = kept[-size:]
            else:
                count = len(kept) if step < 0 else step
                assert chardev.read(step) == kept[:count]
                kept = kept[count:]
            assert len(chardev) == len(kept)
            assert chardev.overwritten == lost
        await chardev.aclose()
        if outlives:
            chardev = make()
            await chardev.start()
        assert chardev.read() == kept  # still to be had afterwards

    keeper = ShelfKeeper()
    try:
        asyncio.run(play(keeper))
    finally:
        keeper.close()


def test_counters_that_cannot_be_are_not_believed() -> None:
    keeper = ShelfKeeper()

    async def play() -> None:
        for removed, added in ((5, 4), (0, 17), (1 << 63, 0)):
            shelf = keeper.begin()
            area = shelf.area("ring", 32).cast("Q")
            area[0], area[1] = removed, added
            chardev = RingbufChardev("dut", RingbufOptions(size=16))
            chardev.keeping = shelf
            await chardev.start()
            assert len(chardev) == 0
            chardev.write(b"whole")
            assert chardev.read() == b"whole"

    try:
        asyncio.run(play())
    finally:
        keeper.close()


@pytest.mark.parametrize("size", [0, -1, 3, 1000, MAX_SIZE * 2])
def test_a_size_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match="power of two") as caught:
        RingbufOptions(size=size)
    assert caught.value.where == "size"


def test_the_default_is_that_of_qemu() -> None:
    assert RingbufChardev("dut").description == "ringbuf:65536 bytes"
