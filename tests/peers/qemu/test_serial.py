"""Serial lines: what stock QEMU makes of one, and what we make of one."""

from __future__ import annotations

import asyncio
import os
import pty
import termios
from pathlib import Path

from tests.support.processes import running
from tests.support.qemu_machine import QEMU
from tests.support.waiting import until
from vring_serial.chardev.serial import SerialChardev, SerialOptions


async def test_a_line_has_the_settings_that_stock_qemu_gives_it(tmp_path: Path) -> None:
    lines = [pty.openpty() for _ in range(2)]
    try:
        theirs, ours = (slave for _, slave in lines)
        found = termios.tcgetattr(theirs)
        end = ("-chardev", f"serial,id=c,path={os.ttyname(theirs)}")
        device = ("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=c")
        words = (*QEMU, "-machine", "q35", "-S", *end, *device)
        async with running(*words, cwd=tmp_path, stdin=asyncio.subprocess.DEVNULL):
            await until(lambda: termios.tcgetattr(theirs) != found)
            wanted = termios.tcgetattr(theirs)
        async with SerialChardev("c", SerialOptions(path=os.ttyname(ours))):
            got = termios.tcgetattr(ours)
        # All but the special characters, of which raw mode uses none but MIN and TIME.
        assert got[:6] == wanted[:6]
    finally:
        for master, slave in lines:
            os.close(master)
            os.close(slave)
