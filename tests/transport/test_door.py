"""A door whose process has no descriptors left."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from pathlib import Path

import pytest

from vring_serial.transport import door
from vring_serial.transport.door import Door


async def test_accepting_is_tried_ever_less_often_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "ACCEPT_PAUSE", 0.005)
    monkeypatch.setattr(door, "ACCEPT_PAUSE_MOST", 0.05)
    caplog.set_level(logging.WARNING)
    came: asyncio.Queue[socket.socket] = asyncio.Queue()
    path = str(tmp_path / "door")
    tested = Door(path, name="test", peer="guest", came=came.put_nowait)
    tested.open()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as peer:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            peer.connect(path)
            await asyncio.sleep(0.2)
            assert came.empty()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        (record,) = caplog.records
        assert "cannot accept a guest: Too many open files" in record.getMessage()
        async with asyncio.timeout(5):
            (await came.get()).close()
    tested.close()
