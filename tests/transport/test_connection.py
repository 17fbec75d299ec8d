"""Bytes of a peer's connection, and how long it is listened to while it does not read."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.waiting import turns, until
from vring_serial.transport.closer import Closer
from vring_serial.transport.connection import MAX_UNREAD, Connection
from vring_serial.unix_fds import Received


@pytest.mark.parametrize(
    ("max_unread", "heard"), [(MAX_UNREAD, False), (4 << 20, True)], ids=["default", "more"]
)
async def test_who_does_not_read_is_listened_to_so_long(max_unread: int, heard: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.setblocking(False)
    got: list[Received] = []
    connection = Connection(
        ours,
        read_size=4096,
        max_fds=0,
        closer=Closer(),
        received=lambda received: bool(got.append(received)),
        go_on=lambda: False,
        lost=lambda error: None,
        max_unread=max_unread,
    )
    try:
        connection.send(bytes(3 << 20))
        theirs.send(b"x")
        await turns()
        assert [each.data for each in got] == [b"x"] * heard
        # Once it reads, it is heard in either case.
        loop = asyncio.get_running_loop()
        left = 3 << 20
        while left:
            left -= len(await asyncio.wait_for(loop.sock_recv(theirs, 1 << 20), 10))
        await until(lambda: got)
        assert [each.data for each in got] == [b"x"]
    finally:
        connection.close()
        theirs.close()
