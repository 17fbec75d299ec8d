"""Whose descriptors are that came beside several messages at once."""

from __future__ import annotations

import os
import socket
from itertools import pairwise
from typing import Any

import pytest

from tests.transport.dying_pieces import KICK, LAYOUTS, MAP, NUM, Layout
from vring_serial import unix_fds
from vring_serial.proto.vfio_user import VfioUserParser
from vring_serial.proto.vhost_user import VhostUserParser

CASES = [(protocol, layout) for protocol, layouts in LAYOUTS.items() for layout in layouts]


def make_parser(protocol: str) -> Any:
    return VhostUserParser() if protocol == "vhost-user" else VfioUserParser()


def messages_of(parser: Any) -> list[Any]:
    found = []
    while (message := parser.next_message()) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize(("protocol", "layout"), CASES)
@pytest.mark.parametrize("size", [1, 13, 40, 4096])
def test_each_message_has_its_own_however_they_are_read(
    protocol: str, layout: Layout, size: int
) -> None:
    """The kernel cuts and joins; with less than a message at once, all that is left is a header."""
    parser = make_parser(protocol)
    ours, theirs = socket.socketpair()
    sizes, count = [], 0
    with ours, theirs:
        for data, beside in layout[0]:
            fds = [os.memfd_create("beside") for _ in range(beside)]
            for fd in fds:
                count += 1
                os.ftruncate(fd, count)
            unix_fds.send(theirs, data, fds)
            unix_fds.close_all(fds)
        theirs.close()
        while (received := unix_fds.receive(ours, size, 8)).data:
            parser.receive_data(received.data, received.fds)
            for message in messages_of(parser):
                sizes.append([os.fstat(fd).st_size for fd in message.fds])
                unix_fds.close_all(message.fds)
    assert parser.take_fds() == ()
    assert [size for each in sizes for size in each] == list(range(1, count + 1))
    if size == 4096:
        assert [len(each) for each in sizes] == layout[1]


@pytest.mark.parametrize(
    ("protocol", "data", "count", "expected"),
    [
        ("vhost-user", KICK + NUM, 3, [1, 2]),
        ("vhost-user", KICK + KICK, 1, [0, 1]),
        ("vhost-user", NUM + NUM, 1, [0, 1]),
        ("vfio-user", MAP + MAP, 3, [1, 2]),
        ("vfio-user", MAP + MAP, 1, [0, 1]),
    ],
)
def test_what_no_message_can_take_is_refused_with_the_last(
    protocol: str, data: bytes, count: int, expected: list[int]
) -> None:
    parser = make_parser(protocol)
    parser.receive_data(data, range(count))
    messages = messages_of(parser)
    assert [len(message.fds) for message in messages] == expected
    given = [fd for message in messages for fd in message.fds]
    assert all(before < after for before, after in pairwise(given))


def test_messages_before_the_read_take_none_of_its_descriptors() -> None:
    parser = VfioUserParser()
    parser.receive_data(MAP)
    parser.receive_data(MAP[:20])
    parser.receive_data(MAP[20:] + MAP, [3, 4])
    assert [message.fds for message in messages_of(parser)] == [(), (3,), (4,)]
