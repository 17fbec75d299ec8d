"""Python code as the end: who opens and closes it, and when there is a new protocol."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.chardev_kinds import Guest
from vring_serial.chardev.protocol import ProtocolChardev, SpicevmcOptions
from vring_serial.errors import ConfigError


class Handler(asyncio.Protocol):
    pass


async def test_the_program_opens_and_closes() -> None:
    chardev = ProtocolChardev("dut", Handler, connected=False)
    guest = Guest(chardev)
    await chardev.start()
    assert guest.events == []
    chardev.connect()
    first = guest.protocol
    chardev.connect()
    assert guest.events == ["opened"]
    chardev.disconnect()
    chardev.disconnect()
    chardev.connect()
    assert guest.events == ["opened", "closed", "opened"]
    assert guest.protocol is not first
    await chardev.aclose()


async def test_open_before_start_is_done_then() -> None:
    chardev = ProtocolChardev("dut", Handler, connected=False)
    guest = Guest(chardev)
    chardev.connect()
    assert guest.events == []
    await chardev.start()
    assert guest.events == ["opened"]
    await chardev.aclose()


async def test_a_protocol_that_hung_up_is_followed_by_another_when_the_guest_closes() -> None:
    chardev = ProtocolChardev("dut", Handler)
    guest = Guest(chardev)
    await chardev.start()
    first = guest.protocol
    chardev.peer_gone()
    chardev.guest_opened(True)
    assert guest.events == ["opened", "closed"]
    chardev.guest_opened(False)
    assert guest.events == ["opened", "closed", "opened"]
    assert guest.protocol is not first
    await chardev.aclose()


async def test_what_the_program_closed_the_guest_does_not_open() -> None:
    chardev = ProtocolChardev("dut", Handler)
    guest = Guest(chardev)
    await chardev.start()
    chardev.disconnect()
    chardev.guest_opened(False)
    assert guest.events == ["opened", "closed"]
    await chardev.aclose()
    chardev.connect()
    assert guest.events == ["opened", "closed"], "it is stopped"


def test_the_description_names_the_code() -> None:
    assert ProtocolChardev("dut", Handler).description == "python:Handler"
    assert ProtocolChardev("dut", Handler, description="agent").description == "agent"


def test_only_the_agents_channel_is_served() -> None:
    with pytest.raises(ConfigError, match="usbredir") as caught:
        SpicevmcOptions(name="usbredir")
    assert caught.value.where == "name"
