"""Clients that cut off the memory they map for DMA: they go, the device stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_wire import Command

MEMORY_SIZE = 1 << 20


@pytest.mark.parametrize("left", [0, 0x10000, 0x80000])
def test_the_client_is_sent_away_and_the_next_is_served(
    server: Any, connect: Callable[[], Any], log: Callable[[], list[str]], left: int
) -> None:
    """Nothing left, no ring left, no buffers left."""
    client = connect()
    driver = client.boot(0)
    assert client.echo(driver, 0, b"all is there")
    client.put(0, b"before it is cut off")
    os.ftruncate(client.memfd, left)
    with suppress(ConnectionError):  # it may be noticed before, or before the answer
        driver.notify(0)
    assert client.is_sent_away()
    *_, line = log()
    assert "its memory at guest address 0x0, 0x100000 bytes, is gone" in line
    server.wait_for("connected", "gone")
    following = connect()
    assert following.echo(following.boot(0), 0, b"served")


def test_what_the_client_unmapped_may_be_cut_off(client: Any, log: Callable[[], list[str]]) -> None:
    driver = client.boot(0)
    extra = os.memfd_create("extra")
    try:
        os.ftruncate(extra, 4096)
        for flags in (DmaFlag.READ, DmaFlag.READ | DmaFlag.WRITE):
            client.do(Command.DMA_MAP, DmaMap(flags, 0, 1 << 32, 4096), (extra,))
            client.ask(Command.DMA_UNMAP, DmaUnmap(1 << 32, 4096, 0), DmaUnmap)
        os.ftruncate(extra, 0)
    finally:
        os.close(extra)
    assert client.echo(driver, 0, b"still there")
    assert log() == []


def test_a_read_only_map_that_is_cut_off(client: Any, log: Callable[[], list[str]]) -> None:
    """Buffers in memory that the device maps as its own copy."""
    client.negotiate()
    rings = DmaFlag.READ | DmaFlag.WRITE
    client.do(Command.DMA_MAP, DmaMap(rings, 0, 0, MEMORY_SIZE // 2), (client.memfd,))
    half = MEMORY_SIZE // 2
    client.do(Command.DMA_MAP, DmaMap(DmaFlag.READ, half, half, half), (client.memfd,))
    driver = client.start_driver(0)
    client.put(0, b"before it is cut off")
    os.ftruncate(client.memfd, half)
    with suppress(ConnectionError):  # it may be noticed before, or before the answer
        driver.notify(0)
    assert client.is_sent_away()
    *_, line = log()
    assert "guest address 0x80000, 0x80000 bytes, is gone" in line
