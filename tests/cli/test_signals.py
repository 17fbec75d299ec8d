from __future__ import annotations

import asyncio
import contextlib
import signal
import sys


async def test_the_second_signal_ends_at_once() -> None:
    script = (
        "import asyncio, time\n"
        "from vring_serial.cli.signals import stop_on_signals\n"
        "async def main():\n"
        "    stop = stop_on_signals()\n"
        "    print('ready', flush=True)\n"
        "    await stop.wait()\n"
        "    print('stopping', flush=True)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert await process.stdout.readline() == b"stopping\n"
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
