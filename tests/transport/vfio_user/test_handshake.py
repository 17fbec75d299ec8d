"""A client that connects and says nothing keeps nobody out."""

from __future__ import annotations

import logging
import re
import select
from collections.abc import Callable
from typing import Any

import pytest

from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import Command
from vring_serial.transport import door


@pytest.mark.parametrize("words", [b"", b"\1\0\1\0\x60\0"], ids=["nothing", "a broken message"])
def test_the_next_one_gets_in(
    server: Any, connect: Callable[[], Any], words: bytes, log: Callable[[], list[str]]
) -> None:
    first = connect()
    first.send_bytes(words)
    second = connect()
    server.pass_time(door.HANDSHAKE_SECONDS)
    driver = second.boot(0)
    assert second.echo(driver, 0, b"served")
    assert first.is_sent_away()
    (line,) = log()
    assert "no first words in" in line


def test_one_who_has_said_its_version_stays(server: Any, connect: Callable[[], Any]) -> None:
    first = connect()
    first.negotiate()
    second = connect()
    second.send(Command.VERSION, Version())
    server.pass_time(door.HANDSHAKE_SECONDS)
    driver = first.driver()
    assert driver.status == 0
    assert not select.select([second.sock], [], [], 0)[0]
    first.close()
    assert second.receive().is_reply


def test_what_was_agreed_is_said_in_plain_words(
    connect: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    connect().negotiate()
    (line,) = [r.getMessage() for r in caplog.records if "agreed on" in r.getMessage()]
    words = line.partition("agreed on ")[2]
    assert re.fullmatch(r"[a-z_]+ [0-9a-fx]+(, [a-z_]+( [0-9a-fx]+)?)+", words), line
    assert "pgsizes 0x1000" in words
