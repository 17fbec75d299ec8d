"""Ending the processes that tests start, whatever they still have to say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.support.waiting import DEADLINE


async def end(
    process: asyncio.subprocess.Process,
    reading: asyncio.Task[None] | None = None,
    *,
    session: bool = False,
) -> int:
    """Kill a process if it still runs, wait until it is gone, and return its status.

    asyncio tells of an exit only once all pipes from the process were read to their ends: what is
    left in them is read here and dropped, or ``wait`` could last for ever.

    Args:
        process: nobody waits for its output any more.
        reading: whoever reads its output for the test, and ends with it.
        session: the process was started with one of its own, all of which is killed.

    Raises:
        AssertionError: somebody else holds its pipes, such as a process that it started.
        Exception: what ``reading`` ended with.
    """
    _kill_with_workers(process)
    if session:
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(DEADLINE):
            if reading is not None:
                await asyncio.wait([reading])
            for stream in (process.stdout, process.stderr):
                while stream is not None and await stream.read(1 << 16):
                    pass
            status = await process.wait()
    except TimeoutError:
        raise AssertionError(f"process {process.pid} was killed, and its pipes are open") from None
    if reading is not None:
        await reading
    return status


def _kill_with_workers(process: asyncio.subprocess.Process | subprocess.Popen[Any]) -> None:
    """Kill a process; if it is the keeper of ``vring serve``, its workers, which would serve on."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids: list[int] = []
    if process.returncode is None:
        with contextlib.suppress(OSError):
            pids += map(int, children.read_text().split())
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("vring "):
                os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """Return the processes in the session of this one, which may have ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: state, parent, group, session.
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(process.name))
    return found


@contextlib.asynccontextmanager
async def running(*command: Any, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process for a block, with options of ``create_subprocess_exec``; then ``end`` it."""
    process = await asyncio.create_subprocess_exec(*command, **options)
    try:
        yield process
    finally:
        await end(process, session=bool(options.get("start_new_session")))


def end_now(process: subprocess.Popen[Any]) -> None:
    """Do what ``end`` does where no event loop runs."""
    _kill_with_workers(process)
    process.communicate(timeout=DEADLINE)


def number_of(program: Path, *arguments: str) -> int:
    """Run a program of Python's that says nothing but a number; return that.

    It may import what is in tests.
    """
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, program, *arguments],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-4000:]
    return int(result.stdout)
