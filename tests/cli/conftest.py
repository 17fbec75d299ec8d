"""A running ``vring serve``."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.served import (
    Serve,
    Server,
)


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """``async with serve(*arguments) as server``: in ``tmp_path``, on the socket ``v`` there.

    ``through`` is the beginning of a command that runs it; ``elsewhere``: the domain says where.
    """

    @contextlib.asynccontextmanager
    async def run(
        *arguments: str,
        ready: str = "serving;",
        through: tuple[str, ...] = (),
        elsewhere: bool = False,
    ) -> AsyncIterator[Server]:
        if not elsewhere and not {"--vhost-user", "--vfio-user", "--config"} & set(arguments):
            arguments = ("--vhost-user", "v", *arguments)
        process = await asyncio.create_subprocess_exec(
            *(*through, sys.executable, "-m", "vring_serial", "serve", *arguments),
            cwd=tmp_path,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        server = Server(process)
        try:
            if ready:
                await server.logged(ready)
            yield server
        finally:
            await server.kill()

    return run
