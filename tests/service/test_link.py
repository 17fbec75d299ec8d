"""Calls between processes of the service: none waits for one that is dead, slow or hostile."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tests.support.waiting import until
from vring_serial.service import link
from vring_serial.service.link import (
    Answerer,
    Caller,
    CallError,
    CallTimeoutError,
    Link,
    Links,
    make_link,
)


def refuse() -> None:
    raise CallError("DeviceNotFound", "there is none")


HANDLERS = {"double": lambda number: 2 * number, "refuse": refuse, "echo": lambda text: text}


async def test_a_call_is_answered_and_events_are_told():
    ours, theirs = make_link()
    events = []
    with (
        Caller(ours, lambda name, data: events.append((name, data)), "worker") as caller,
        Answerer(theirs, HANDLERS, "monitor") as answerer,
    ):
        assert await caller.call("double", number=21) == 42
        with pytest.raises(CallError, match="there is none") as caught:
            await caller.call("refuse")
        assert caught.value.error_class == "DeviceNotFound"
        with pytest.raises(CallError, match="there is no call nonsense"):
            await caller.call("nonsense")
        with pytest.raises(CallError, match="missing a required argument"):
            await caller.call("double", wrong=1)
        answerer.tell("happened", {"a": 1})
        await until(lambda: events == [("happened", {"a": 1})])


async def test_messages_of_many_packets_arrive_whole():
    ours, theirs = make_link()
    text = "x" * (20 * link.PACKET_BYTES)
    with Caller(ours, print, "worker") as caller, Answerer(theirs, HANDLERS, "monitor"):
        answers = await asyncio.gather(*(caller.call("echo", text=text + str(i)) for i in range(9)))
    assert answers == [text + str(i) for i in range(9)]


async def test_a_call_to_a_process_that_died_is_answered_by_the_next():
    ours, theirs = make_link()
    with Caller(ours, print, "worker") as caller:
        Answerer(theirs.dup(), HANDLERS, "monitor").close()  # it died before it read anything
        asked = asyncio.create_task(caller.call("double", number=1))
        with Answerer(theirs, HANDLERS, "monitor"):
            assert await asked == 2


async def test_a_message_that_a_dying_process_sent_in_part_is_dropped():
    ours, theirs = make_link()
    whole, spy = make_link()
    got = []
    with Link(ours, got.append, "worker"), Link(whole, got.append, "worker") as writer:
        writer.send({"text": "y" * (3 * link.PACKET_BYTES)})
        theirs.send(spy.recv(1 << 20))  # its first packet of four
        theirs.send(spy.recv(1 << 20))
        with Link(theirs, got.append, "monitor") as successor:
            successor.send({"n": 1})
            await until(lambda: got == [{"n": 1}])
    spy.close()


async def test_who_is_not_read_gets_an_error_and_memory_stays_bounded():
    ours, theirs = make_link()
    text = "x" * (1 << 20)
    with Caller(ours, print, "worker") as caller:
        calls = [
            asyncio.create_task(caller.call("echo", text=text, seconds=0.2)) for _ in range(20)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, CallTimeoutError) for result in results)
    assert any("reads nothing" in str(result) for result in results)
    theirs.close()


@pytest.mark.parametrize(
    "packet",
    [b"", b"x", bytes(16), bytes(16) + b"{}", (1).to_bytes(8, "little") + bytes(4) + b"\xff" * 4],
)
async def test_packets_that_nobody_of_ours_sent_are_dropped(packet):
    ours, theirs = make_link()
    got = []
    with Link(ours, got.append, "worker"):
        if packet:
            theirs.send(packet)
        theirs.send(os.urandom(100))
        not_an_object = (7).to_bytes(8, "little") + bytes(4) + (1).to_bytes(4, "little") + b"[1]"
        theirs.send(not_an_object)
        with Link(theirs, print, "monitor") as good:
            good.send({"n": 1})
            await until(lambda: got == [{"n": 1}])


async def test_a_process_has_its_own_ends_alone():
    before = len(os.listdir("/proc/self/fd"))
    links = Links(["a", "b"])
    end = links.for_worker(["a"])["a"]
    assert end is not None
    assert end.family == socket.AF_UNIX
    assert len(os.listdir("/proc/self/fd")) == before + 1
    end.close()
    ends = Links(["a", "b"]).for_monitor()
    assert sorted(ends) == ["a", "b"]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    for end in ends.values():
        end.close()
