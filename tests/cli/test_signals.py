from __future__ import annotations

import asyncio
import signal
import sys

from tests.support.processes import running
from tests.support.waiting import DEADLINE


async def test_the_second_signal_ends_at_once() -> None:
    script = (
        "import asyncio, signal\n"
        "from vring_serial.cli.signals import stop_on_signals\n"
        "async def main():\n"
        "    stop = stop_on_signals()\n"
        "    print('ready', flush=True)\n"
        "    await stop.wait()\n"
        "    print('stopping', flush=True)\n"
        "    signal.pause()\n"
        "asyncio.run(main())\n"
    )
    command = (sys.executable, "-c", script)
    async with running(*command, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            assert await process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert await process.stdout.readline() == b"stopping\n"
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM
