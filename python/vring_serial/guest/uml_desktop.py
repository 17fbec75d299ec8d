"""The real SPICE agent and an X server in a User-Mode Linux guest, from the host's root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil

from vring_serial.errors import DependencyError, ResourceError
from vring_serial.guest.errors import GuestTimeoutError
from vring_serial.guest.uml import UmlGuest

#: RAM that the kernel, the X server and the agent need, in MiB.
MEMORY_MIB = 768
#: The X screen's first size; RandR cannot grow past it.
SCREEN = "2560x1600x24"

#: Program → Debian package that brings it.
PROGRAMS = {
    "Xvfb": "xvfb",
    "spice-vdagentd": "spice-vdagent",
    "spice-vdagent": "spice-vdagent",
    "xclip": "xclip",
    "xrandr": "x11-xserver-utils",
}

START_X = """\
mkdir -p /tmp/.X11-unix /tmp/downloads
: >/tmp/uinput
Xvfb :0 -screen 0 {screen} -nolisten tcp >/tmp/xvfb.log 2>&1 &
for i in $(seq 200); do [ -S /tmp/.X11-unix/X0 ] && break; sleep 0.1; done
[ -S /tmp/.X11-unix/X0 ]
"""

START_AGENT = """\
pkill -9 -x 'spice-vdagentd?' && sleep 0.2
rm -f /tmp/session.sock
spice-vdagentd -x -d -d -X -f -u /tmp/uinput -s {port} -S /tmp/session.sock \\
    >/tmp/vdagentd.log 2>&1 &
for i in $(seq 100); do [ -S /tmp/session.sock ] && break; sleep 0.1; done
spice-vdagent -x -d -s {port} -S /tmp/session.sock -f /tmp/downloads -o 0 >/tmp/vdagent.log 2>&1 &
[ -S /tmp/session.sock ]
"""


def require_programs() -> None:
    """Raise DependencyError naming the packages of the programs that this machine lacks."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = sorted({p for name, p in PROGRAMS.items() if shutil.which(name, path=path) is None})
    if missing:
        raise DependencyError(
            f"the real agent needs Debian's {', '.join(missing)} (`make peers` installs all peers)"
        )


class UmlDesktop:
    """An X session with the real SPICE agent on a port of a booted guest.

    Args:
        guest: a started UmlGuest with MEMORY_MIB of RAM.
        port: the agent channel's device in the guest.
    """

    def __init__(self, guest: UmlGuest, port: str = "/dev/vport0p1") -> None:
        require_programs()
        self._guest = guest
        self._port = port
        self._copies = 0

    async def start(self) -> None:
        """Start the X server and both halves of the agent. Raises ResourceError with their logs."""
        if await self._run(START_X.format(screen=SCREEN)) is None:
            raise ResourceError(f"the X server did not start in the guest: {await self.logs()}")
        await self.restart_agent()

    async def restart_agent(self) -> None:
        """Kill both halves of the agent, if they run, and start them anew."""
        if await self._run(START_AGENT.format(port=self._port)) is None:
            raise ResourceError(f"the agent did not start in the guest: {await self.logs()}")

    async def _run(self, script: str) -> str | None:
        result = await self._guest.run(f"export DISPLAY=:0 NO_AT_BRIDGE=1\n{script}")
        return result.output if result.status == 0 else None

    async def resolution(self) -> tuple[int, int]:
        """Return the X screen's size in pixels, as xrandr tells it."""
        output = await self._run("xrandr") or ""
        match = re.search(r"current (\d+) x (\d+)", output)
        if match is None:
            raise ResourceError(f"xrandr in the guest says no size: {output!r}")
        return int(match[1]), int(match[2])

    async def wait_resolution(self, width: int, height: int, timeout: float = 15) -> None:
        """Wait until the X screen has this size. Raises GuestTimeoutError with the size it has."""
        size = (0, 0)
        try:
            async with asyncio.timeout(timeout):
                while size != (width, height):
                    # xrandr fails when the mode changes under it: ask again.
                    with contextlib.suppress(ResourceError):
                        size = await self.resolution()
        except TimeoutError:
            raise GuestTimeoutError(
                f"the guest's screen is {size[0]}x{size[1]}, not {width}x{height}"
            ) from None

    async def copy(self, text: str, selection: str = "clipboard") -> None:
        """Own a selection with this text, as an application in the guest that copies does."""
        # A new file each time, since the guest may have the old one in its page cache.
        self._copies += 1
        (self._guest.share / f"copied.{self._copies}").write_text(text)
        name = shlex.quote(selection)
        await self._run(f"xclip -in -selection {name} /mnt/copied.{self._copies}")

    async def paste(self, selection: str = "clipboard") -> str | None:
        """Return the text of a selection as an application pastes it; None if there is none."""
        name = shlex.quote(selection)
        return await self._run(f"timeout 10 xclip -out -selection {name} -target UTF8_STRING")

    async def wait_paste(
        self, text: str, selection: str = "clipboard", timeout: float = 15
    ) -> None:
        """Wait until this text can be pasted. Raises GuestTimeoutError with what there is."""
        pasted: str | None = None
        try:
            async with asyncio.timeout(timeout):
                while pasted != text:
                    pasted = await self.paste(selection)
        except TimeoutError:
            raise GuestTimeoutError(f"what is pasted in the guest is {pasted!r}") from None

    async def logs(self) -> str:
        """Return what the X server and the agent wrote to their logs."""
        return await self._run("tail -n 20 /tmp/*.log") or ""
