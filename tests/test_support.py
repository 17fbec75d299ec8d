"""Helpers of the tests notice what they are there for."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.examples import names_of
from tests.support.leaks import held
from tests.support.processes import end, end_now, running
from tests.support.shared import Shared
from tests.support.waiting import LoopClock, turns, until, until_file_says, until_gives, wait_until


def test_what_is_not_closed_is_held() -> None:
    before = held()
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 16)
    with_descriptor = held()
    assert with_descriptor != before
    mapping = mmap.mmap(fd, 1 << 16)
    os.close(fd)
    assert held() != before
    assert held().mapped("memfd:guest") == before.mapped("memfd:guest") + 1
    mapping.close()
    assert held() == before


def test_threads_that_run_are_held() -> None:
    before, ends = held(), threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    assert held() != before
    ends.set()
    thread.join()
    assert held() == before


class Owner:
    """Holds a descriptor, and itself."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.itself = self

    def __del__(self) -> None:
        os.close(self.fd)


def test_cycles_of_before_are_not_counted() -> None:
    before = held()
    Owner()
    assert held() == before


async def test_what_does_not_come_is_named() -> None:
    with pytest.raises(AssertionError, match="no answer"):
        await until(lambda: False, "no answer", timeout=0.01)
    with pytest.raises(AssertionError, match="not in time"):
        wait_until(lambda: False, timeout=0.01)


async def test_what_comes_ends_the_wait() -> None:
    came = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, came.set)
    await until(came.is_set)


async def test_a_wait_that_is_given_up_says_why() -> None:
    with pytest.raises(AssertionError, match="answer: it has ended"):
        await until(lambda: False, "answer", unless=lambda: "it has ended")
    with pytest.raises(AssertionError, match="it has ended"):
        wait_until(lambda: False, unless=lambda: "it has ended")


async def test_a_condition_may_be_awaited() -> None:
    answers = iter([False, True])

    async def answer() -> bool:
        await turns(1)
        return next(answers)

    await until(answer)
    assert not list(answers)


async def test_an_answer_that_does_not_come_is_told_with_the_last() -> None:
    answers = iter(range(100_000))

    async def answer() -> int:
        return next(answers)

    await until_gives(answer, 2)
    assert next(answers) == 3
    with pytest.raises(AssertionError, match=r"-1 and not \[\d+\]: not in time"):
        await until_gives(answer, -1, timeout=0.01)


async def test_a_file_is_waited_for_with_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "log"
    waiting = asyncio.ensure_future(until_file_says(path, "line", 2))
    for text in ("", "line\n", "line\nline\n"):
        await turns()
        assert not waiting.done()
        path.write_text(text)
    await waiting
    with pytest.raises(AssertionError, match=r"'other' is not 1 times in log(.|\n)*line\nline"):
        await until_file_says(path, "other", unless=lambda: "enough")


async def test_a_clock_that_is_put_forward_makes_timers_due(clock: LoopClock) -> None:
    loop = asyncio.get_running_loop()
    came: list[str] = []
    loop.call_later(1000, came.append, "first")
    loop.call_later(3000, came.append, "second")
    await clock.forward(1000)
    assert came == ["first"]
    await clock.forward(2000)
    assert came == ["first", "second"]


TALKS = (sys.executable, "-c", "while True: print('x' * 1000)")
#: It ends at once, and leaves a process that has its output.
LEAVES = ("sh", "-c", "sleep 1000 & echo $!")


async def test_a_process_ends_whatever_it_says() -> None:
    """asyncio tells of the end behind what was said, which is more than it reads by itself."""
    pipe = asyncio.subprocess.PIPE
    async with running(*TALKS, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        await process.stdout.readline()
    assert process.returncode is not None
    assert await end(process) == process.returncode


async def test_a_process_ends_behind_its_reader() -> None:
    async def read() -> None:
        assert process.stdout is not None
        await process.stdout.readline()
        raise ValueError("a line that it did not expect")

    process = await asyncio.create_subprocess_exec(*TALKS, stdout=asyncio.subprocess.PIPE)
    reading = asyncio.create_task(read())
    with pytest.raises(ValueError, match="did not expect"):
        await end(process, reading)
    assert process.returncode is not None


async def test_a_session_ends_whole() -> None:
    async with running(*LEAVES, stdout=asyncio.subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        left = int(await process.stdout.readline())
    await until(lambda: not is_running(left))


def is_running(pid: int) -> bool:
    """Return whether a process is there, and no zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_ends_where_no_loop_runs() -> None:
    process = subprocess.Popen(TALKS, stdout=subprocess.PIPE)
    end_now(process)
    assert process.returncode is not None


class Machine:
    """What tests share; ``left`` is what the next test would find."""

    def __init__(self) -> None:
        self.left: bool | Exception = False
        self.ended = False

    @classmethod
    async def start(cls) -> Machine:
        return cls()

    async def settle(self) -> bool:
        if isinstance(self.left, Exception):
            raise self.left
        return not self.left

    async def aclose(self) -> None:
        self.ended = True


async def test_what_is_shared_is_started_once() -> None:
    shared = Shared(Machine.start)
    async with shared.turn(lambda: False) as first:
        pass
    async with shared.turn(lambda: False) as second:
        assert second is first
    assert not first.ended
    await shared.aclose()
    assert first.ended


@pytest.mark.parametrize(
    ("left", "failed"),
    [(True, False), (OSError("it is gone"), False), (False, True)],
    ids=["not as before", "cannot be settled", "failed"],
)
async def test_what_a_test_has_spoiled_is_replaced(left: bool | Exception, failed: bool) -> None:
    shared = Shared(Machine.start)
    async with shared.turn(lambda: failed) as first:
        first.left = left
    assert first.ended
    async with shared.turn(lambda: False) as second:
        assert second is not first
        assert not second.ended
    await shared.aclose()


def test_the_names_of_an_example_are_had_without_running_it() -> None:
    assert names_of("custom_device.py")["Entropy"]().device_id == 4
