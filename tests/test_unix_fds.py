"""Descriptors over a unix socket: none lost, none leaked, none inherited."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest

from tests.support.leaks import held
from vring_serial import unix_fds


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def test_descriptors_arrive_with_the_first_byte_and_are_not_inherited(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    a, b = pair
    reader, writer = os.pipe()
    assert unix_fds.send(a, b"head", [writer]) == 4
    assert unix_fds.send(a, b"tail") == 4
    first = unix_fds.receive(b, 2, 8)
    assert first.data == b"he"
    assert len(first.fds) == 1
    assert not first.truncated
    assert not os.get_inheritable(first.fds[0])
    os.write(first.fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    assert unix_fds.receive(b, 100, 8) == unix_fds.Received(b"adtail")
    unix_fds.close_all([reader, writer, *first.fds, -1])


def test_a_read_ends_with_the_message_that_has_descriptors(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    a, b = pair
    unix_fds.send(a, b"one")
    unix_fds.send(a, b"two", [0])
    unix_fds.send(a, b"three", [1])
    got = unix_fds.receive(b, 100, 8)
    assert got.data == b"onetwo"
    assert len(got.fds) == 1
    rest = unix_fds.receive(b, 100, 8)
    assert rest.data == b"three"
    unix_fds.close_all(got.fds + rest.fds)


def test_more_descriptors_than_a_message_may_have_are_told(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    a, b = pair
    before = held()
    unix_fds.send(a, b"x", [0] * 9)
    got = unix_fds.receive(b, 1, 8)
    assert got.truncated
    assert len(got.fds) == 9, "the kernel would close the others here"
    unix_fds.close_all(got.fds)
    assert held() == before


def test_descriptors_that_this_process_may_not_open_are_told(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    a, b = pair
    unix_fds.send(a, b"x", [0, 0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        got = unix_fds.receive(b, 1, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert got.truncated
    assert len(got.fds) == 1
    unix_fds.close_all(got.fds)


def test_end_of_stream_is_no_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    a, b = pair
    a.close()
    assert unix_fds.receive(b, 10, 8) == unix_fds.Received(b"")


def test_close_all_closes_the_others_if_one_fails() -> None:
    reader, writer = os.pipe()
    closed = os.dup(reader)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        unix_fds.close_all([reader, closed, -1, writer])
    for fd in (reader, writer):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
