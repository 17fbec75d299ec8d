"""Residues that a predecessor process left, and may have begun to write."""

from __future__ import annotations

import asyncio
import os

import numpy as np

from vring import Backlog
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.relay import Relay
from vring_serial.device.console.residue import ResidueWriter
from vring_serial.device.console.state import ChainState


async def test_what_a_predecessor_wrote_is_not_written_again():
    area = np.zeros(4096, np.uint8)
    Backlog(area).replace(b"01234567")
    area.view(np.uint64)[8], area.view(np.uint64)[12] = 4, 8  # 8 bytes were in the relay
    (out, into), relay = pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    os.write(relay[1], b"567")
    backlog = Backlog(area)
    chain = ChainState(backlog.data)
    done = asyncio.get_running_loop().create_future()
    end = DescriptorEnd(-1, into, kept=True, write_relay=Relay(*relay))
    writer = ResidueWriter(end, chain, None, lambda: None, done.set_result, backlog)
    assert await done is None
    writer.stop()
    assert os.read(out, 99) == b"567"
    assert chain.residue == backlog.data == b""
    for fd in (fd for pair in pipes for fd in pair):
        os.close(fd)
