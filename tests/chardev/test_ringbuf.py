"""The ring buffer against a slow, obvious oracle, and its sizes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chardev_kinds import Guest
from vring_serial.chardev.ringbuf import MAX_SIZE, RingbufChardev, RingbufOptions
from vring_serial.errors import ConfigError

STEPS = st.lists(
    st.one_of(st.binary(min_size=1, max_size=40), st.integers(min_value=-1, max_value=40)),
    max_size=30,
)


@given(exponent=st.integers(min_value=0, max_value=5), steps=STEPS)
def test_it_keeps_the_newest_bytes(exponent: int, steps: list[bytes | int]) -> None:
    """A step is what the guest writes, or how much is read."""

    async def play() -> None:
        size = 1 << exponent
        chardev = RingbufChardev("dut", RingbufOptions(size=size))
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
        assert chardev.read() == kept  # still to be had afterwards

    asyncio.run(play())


@pytest.mark.parametrize("size", [0, -1, 3, 1000, MAX_SIZE * 2])
def test_a_size_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match="power of two") as caught:
        RingbufOptions(size=size)
    assert caught.value.where == "size"


def test_the_default_is_that_of_qemu() -> None:
    assert RingbufChardev("dut").description == "ringbuf:65536 bytes"
