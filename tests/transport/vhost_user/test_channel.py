"""The backend channel: what goes over it, and that its loss costs nothing but itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

import pytest

from tests.support.waiting import DEADLINE, turns
from vring_serial.proto.vhost_user import BackendRequest, Empty, ProtocolFeature, Request
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES

OFFERED = int(PROTOCOL_FEATURES)


def nothing_waits(channel: socket.socket) -> bool:
    try:
        channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


async def test_configuration_changes_are_told_once_until_acknowledged(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED)
    device.on_config_change()  # Nobody can be told yet.
    await frontend.open_channel()
    for _ in range(10):
        device.on_config_change()
    for _ in range(2):
        message = await frontend.asked()
        assert message.kind == BackendRequest.CONFIG_CHANGE_MSG
        assert message.need_reply
        assert message.decode() == Empty()
        assert nothing_waits(frontend.channel)
        frontend.acknowledge(message.kind)
    await frontend.ask(Request.GET_FEATURES)
    assert nothing_waits(frontend.channel)


async def test_without_reply_ack_nothing_is_waited_for(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    features = OFFERED & ~ProtocolFeature.REPLY_ACK
    frontend.send_bytes(bytes.fromhex("100000000100000008000000") + features.to_bytes(8, "little"))
    frontend.channel, theirs = socket.socketpair()
    frontend.channel.setblocking(False)
    with theirs:
        frontend.send(Request.SET_BACKEND_REQ_FD, None, (theirs.fileno(),))
        await frontend.ask(Request.GET_FEATURES)
    for _ in range(3):
        device.on_config_change()
        assert not (await frontend.asked()).need_reply


async def test_frontends_that_do_not_know_configuration_are_not_told(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED & ~ProtocolFeature.CONFIG)
    await frontend.open_channel()
    device.on_config_change()
    await frontend.ask(Request.GET_FEATURES)
    assert nothing_waits(frontend.channel)


async def test_a_full_channel_is_written_to_when_there_is_room(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += theirs.send(bytes(1000))
    with theirs:
        assert await frontend.acked(Request.SET_BACKEND_REQ_FD, None, (theirs.fileno(),)) == 0
    device.on_config_change()
    await turns()
    while filled:
        filled -= len(ours.recv(min(filled, 1 << 16)))
    ours.setblocking(False)
    frontend.channel = ours
    assert (await frontend.asked()).kind == BackendRequest.CONFIG_CHANGE_MSG


async def test_a_refusal_is_logged(
    frontend: Any, device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.open_channel()
    device.on_config_change()
    frontend.acknowledge((await frontend.asked()).kind, 7)
    device.on_config_change()
    await frontend.asked()
    assert "the frontend refused CONFIG_CHANGE_MSG: status 7" in caplog.text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the frontend closed its backend channel"),
        (b"\xff" * 12, "version 3 instead of 1"),
        (bytes.fromhex("0200000005000000ffffffff"), "payload of 4294967295 bytes"),
        (bytes.fromhex("020000000500000000000000"), "payload of 0 bytes instead of 8"),
        (bytes.fromhex("0200000005000000080000000000000000000000"), "which was not asked"),
    ],
)
async def test_the_loss_of_the_channel_costs_nothing_else(
    data: bytes, why: str, frontend: Any, device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vring_serial")
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    await frontend.open_channel()
    if data:
        frontend.channel.send(data)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            assert await loop.sock_recv(frontend.channel, 10) == b""
    frontend.channel.close()
    await frontend.ask(Request.GET_FEATURES)
    await frontend.ask(Request.GET_FEATURES)
    (line,) = [line for line in caplog.messages if "backend channel" in line]
    assert why in line
    device.on_config_change()
    assert await frontend.echo(0, b"unharmed")
    # Another may be given.
    await frontend.open_channel()
    device.on_config_change()
    assert (await frontend.asked()).kind == BackendRequest.CONFIG_CHANGE_MSG


async def test_only_unix_stream_sockets_are_taken(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await frontend.negotiate(OFFERED)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fds = (sock.fileno(),)
        assert await frontend.acked(Request.SET_BACKEND_REQ_FD, None, fds) != 0
    assert "SET_BACKEND_REQ_FD: its descriptor is not a unix stream socket" in caplog.text


async def test_it_has_to_be_negotiated(frontend: Any, caplog: pytest.LogCaptureFixture) -> None:
    await frontend.negotiate(OFFERED & ~ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = (theirs.fileno(),)
        assert await frontend.acked(Request.SET_BACKEND_REQ_FD, None, fds) != 0
    assert "SET_BACKEND_REQ_FD: BACKEND_REQ was not negotiated" in caplog.text


async def test_channels_of_garbage_in_a_loop_fill_no_log(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await frontend.negotiate(OFFERED)
    for _ in range(200):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await frontend.acked(Request.SET_BACKEND_REQ_FD, None, (theirs.fileno(),))
            ours.send(b"garbage that is no message of the protocol")
            async with asyncio.timeout(DEADLINE):
                with contextlib.suppress(ConnectionError):
                    while await asyncio.to_thread(ours.recv, 1):
                        pass
    assert any("backend channel" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) <= 70
