"""To whom the REPLYs belong of an agent that answers in order, late, or not at all."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.waiting import turns
from vring_serial.agent.channel import replies as replies_module
from vring_serial.agent.channel.replies import Replies


async def sent():
    """A message that goes out at once."""


async def ask(replies, asker):
    async with asyncio.timeout(1):
        await replies.ask(asker, sent)


async def test_one_asker_after_another():
    replies = Replies()
    await ask(replies, "a")
    await ask(replies, "a")  # its own answers come in order
    waiting = asyncio.ensure_future(ask(replies, "b"))
    await turns()
    assert replies.answered() == "a"
    await turns()
    assert not waiting.done()
    assert replies.answered() == "a"
    await waiting
    assert replies.answered() == "b"
    assert replies.answered() is None


async def test_an_agent_that_says_nothing(monkeypatch):
    monkeypatch.setattr(replies_module, "REPLY_WAIT", 0.05)
    replies = Replies()
    await ask(replies, "a")
    await ask(replies, "b")
    assert replies.answered() == "b"


async def test_who_leaves_before_its_turn_has_asked_nothing():
    replies = Replies()
    await ask(replies, "a")
    leaving = asyncio.ensure_future(ask(replies, "b"))
    await turns()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert replies.clear() == ["a"]
    await ask(replies, "c")
    assert replies.clear() == ["c"]


async def test_a_message_that_is_not_sent_is_not_answered():
    replies = Replies()

    async def fails():
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await replies.ask("a", fails)
    await ask(replies, "b")
    assert replies.answered() == "b"
