"""A client of QMP, for the monitors of services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from os import PathLike
from typing import Any

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError


@asynccontextmanager
async def qmp_client(path: str | PathLike[str] = "qmp") -> AsyncIterator[QMPClient]:
    """A client of the monitor at a path; the monitor may be gone before it."""
    client = QMPClient("test")
    client.logger.disabled = True
    await client.connect(str(path))
    try:
        yield client
    finally:
        with suppress(QMPError, OSError, EOFError):
            await client.disconnect()


async def refused(client: QMPClient, command: str, **arguments: Any) -> tuple[str, str]:
    """Class and text of the error with which a command is refused."""
    with pytest.raises(ExecuteError) as caught:
        await client.execute(command, arguments)
    return caught.value.error_class, str(caught.value)


async def why_refused(client: QMPClient, command: str, **arguments: Any) -> str:
    """Text of the error with which a command is refused."""
    return (await refused(client, command, **arguments))[1]
