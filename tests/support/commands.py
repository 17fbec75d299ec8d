"""Commands that a person types, run to their ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import end
from tests.support.waiting import DEADLINE


async def run_command(
    *command: str | Path, given: str = "", timeout: float = DEADLINE, **options: Any
) -> tuple[int, str, str]:
    """Run a command; return its status, what it printed, and its errors.

    Args:
        command: the program and its arguments.
        given: what is typed to it.
        timeout: seconds within which it ends.
        options: of ``create_subprocess_exec``.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(given.encode())
    except BaseException:
        await end(process)
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def run_vring(*arguments: str | Path, **options: Any) -> tuple[int, str, str]:
    """Run ``vring`` with these arguments; see :func:`run_command`."""
    return await run_command(sys.executable, "-m", "vring_serial", *arguments, **options)
