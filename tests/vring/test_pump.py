"""The pump over real descriptors: what goes in comes out, and only then is a buffer used."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from vring import FlowEvent


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("index", [0, 65530])
def test_guest_to_host(make_rig: Callable, sockets, event_idx: bool, index: int) -> None:
    rig = make_rig(writable=False, event_idx=event_idx, index=index)
    flow = rig.write_to(sockets[0].fileno())
    for i in range(20):
        message = os.urandom(1 + 300 * i)
        rig.send(message, [len(message) // 2, len(message) - len(message) // 2])
        assert sockets[1].recv(10000, socket.MSG_WAITALL | 0 if not message else 0) == message
        assert rig.wait_used(2) == [0, 0]
    assert flow.counters.chains == 40


def test_host_to_guest_then_end_of_file(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=True)
    rig.read_from(sockets[0].fileno())
    rig.offer()
    message = os.urandom(100_000)
    sockets[1].sendall(message)
    assert rig.receive(len(message)) == message
    sockets[1].close()
    assert rig.wait_event() == (FlowEvent.PEER_EOF, None)
