"""Everything that a stock client does with an agent, through our server and our device."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHORT = "52 bytes: naïve café, 日本語, and so on till it"
SELECTIONS = [(0, "clipboard"), (1, "primary"), (2, "secondary")]
MEBIBYTE = 1 << 20


async def connected(bench):
    client = await bench.connect()
    await client.wait_agent()
    return client


async def test_a_client_connects_and_sets_the_resolution(bench):
    client = await connected(bench)
    client.do("resize", 1280, 720)
    await client.wait("resized", True)
    await bench.guest.resized(1280, 720)
    # What an old daemon rejects leaves the channel whole.
    client.do("grab", 0, "after")
    await bench.guest.pasted("after", "clipboard")


@pytest.mark.parametrize(("number", "name"), SELECTIONS)
async def test_a_short_text_both_ways(bench, number, name):
    assert len(SHORT.encode()) == 52
    client = await connected(bench)
    client.do("grab", number, SHORT)
    if name not in bench.guest.selections:
        client.do("request", number)
        assert await client.wait("received", number) == [0, ""]
        return
    await bench.guest.pasted(SHORT, name)
    await bench.guest.copy(SHORT[::-1], name)
    assert await client.wait("grabbed", number) == [[1]]
    assert (await client.receive(number)).decode() == SHORT[::-1]


async def test_release_both_ways(bench):
    client = await connected(bench)
    client.do("grab", 0, "mine")
    await bench.guest.pasted("mine", "clipboard")
    client.do("release", 0)
    await bench.guest.pasted(None, "clipboard")
    await bench.guest.copy("the guest's", "clipboard")
    await client.wait("grabbed", 0)
    await bench.guest.release("clipboard")
    await client.wait("released", 0)


@pytest.mark.parametrize(("number", "name"), SELECTIONS)
async def test_a_mebibyte_both_ways(bench, number, name):
    if name not in bench.guest.selections:
        pytest.skip("the real agent knows two selections; test_a_short_text shows what it answers")
    client = await connected(bench)
    text = "".join(chr(32 + i * i % 95) for i in range(4096)) * (MEBIBYTE // 4096)
    client.do("grab", number, text)
    await bench.guest.pasted(text, name)
    await bench.guest.copy(text[::-1], name)
    await client.wait("grabbed", number)
    assert (await client.receive(number)).decode() == text[::-1]


@pytest.mark.parametrize(("name", "size"), [("whole", 5 * MEBIBYTE), ("empty", 0)])
async def test_a_file(bench, tmp_path, name, size):
    client = await connected(bench)
    data = os.urandom(size)
    (tmp_path / name).write_bytes(data)
    client.do("send", name, str(tmp_path / name))
    await client.wait("sent", name)
    assert await bench.guest.file(name) == data


async def test_a_file_that_is_refused(bench, sparse):
    client = await connected(bench)
    client.do("send", "large", str(sparse(8 << 40)))
    await client.wait("not-sent", "large")
    assert await bench.guest.file("sparse") is None
    client.do("grab", 0, "after a refusal")
    await bench.guest.pasted("after a refusal", "clipboard")


async def test_a_transfer_that_is_cancelled(bench, sparse, tmp_path):
    client = await connected(bench)
    client.do("send", "long", str(sparse(256 * MEBIBYTE)))
    await client.wait("progress", "sparse")
    client.do("cancel", "long")
    await client.wait("not-sent", "long")
    (tmp_path / "next").write_bytes(b"next")
    client.do("send", "next", str(tmp_path / "next"))
    await client.wait("sent", "next")
    assert await bench.guest.file("next") == b"next"
    assert await bench.guest.file("sparse") is None


async def test_disconnect_and_connect_again(bench):
    for text in ("first", "second"):
        client = await connected(bench)
        client.do("grab", 0, text)
        await bench.guest.pasted(text, "clipboard")
        client.do("disconnect")
        await client.wait("channel-event", "MainChannel", "closed")
        await bench.guest.pasted(None, "clipboard")


async def test_the_agent_stops_and_starts_under_a_client(bench):
    client = await connected(bench)
    await bench.guest.stop_agent()
    await client.wait("agent", False)
    client.events.clear()
    await bench.guest.start_agent()
    await client.wait_negotiated()
    client.do("grab", 0, "again")
    await bench.guest.pasted("again", "clipboard")


async def test_a_second_client_takes_over(bench):
    first = await connected(bench)
    first.do("grab", 0, "first's")
    await bench.guest.pasted("first's", "clipboard")
    second = await bench.connect()
    await first.wait("channel-event", "MainChannel", "closed")
    await second.wait_agent()
    second.do("grab", 0, "second's")
    await bench.guest.pasted("second's", "clipboard")


async def test_a_client_that_is_killed_in_a_transfer_leaves_the_next_whole(bench, sparse, tmp_path):
    first = await connected(bench)
    first.do("send", "long", str(sparse(256 * MEBIBYTE)))
    for _ in range(5):
        await first.wait("progress", "sparse")
    await first.kill()
    second = await connected(bench)
    data = os.urandom(5 * MEBIBYTE)
    (tmp_path / "after").write_bytes(data)
    second.do("send", "after", str(tmp_path / "after"))
    second.do("grab", 0, "whole")
    await bench.guest.pasted("whole", "clipboard")
    await second.wait("sent", "after")
    assert await bench.guest.file("after") == data
    assert await bench.guest.file("sparse") is None
