"""The real SPICE agent in a real Linux guest, and our host end of the channel."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.support.bench import DeviceBench
from tests.support.shared import Shared
from tests.support.uml import boot_uml
from tests.support.waiting import until
from vring_serial import HostAgent
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.guest.uml_desktop import MEMORY_MIB, UmlDesktop
from vring_serial.proto.agent import Capability, Monitor, Selection

pytestmark = [
    pytest.mark.peer("spice-vdagentd", "spice-vdagent", "Xvfb", "xclip", "xrandr"),
    pytest.mark.asyncio(loop_scope="module"),
]

TEXT = "naïve café, 日本語, 🖥\nsecond line"


class Desktop(UmlDesktop):
    """A desktop in a guest whose agent talks to ``host``."""

    def __init__(self, bench, guest, host):
        super().__init__(guest)
        self.host = host
        self._bench = bench

    @classmethod
    async def boot(cls, directory):
        host = HostAgent(timeout=20)
        bench = DeviceBench(directory)
        bench.add_port(1, "com.redhat.spice.0", ProtocolChardev("agent", host.protocol_factory))
        try:
            await bench.serve()
            desktop = cls(bench, await boot_uml(bench, MEMORY_MIB), host)
            await desktop.start()
        except BaseException:
            await bench.aclose()
            raise
        return desktop

    async def settle(self):
        """What is in the clipboards is of no interest to the next test."""
        await self.host.wait_ready(30)
        return True

    async def aclose(self):
        await self.host.aclose()
        await self._bench.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_desktop(tmp_path_factory):
    shared = Shared(lambda: Desktop.boot(tmp_path_factory.mktemp("desktop")))
    yield shared
    await shared.aclose()


@pytest_asyncio.fixture(loop_scope="module")
async def desktop(shared_desktop, failed):
    async with shared_desktop.turn(failed) as desktop:
        yield desktop


async def test_capabilities_resolution_and_clipboard(desktop):
    host = desktop.host
    capabilities = await host.wait_ready(30)
    assert Capability.MONITORS_CONFIG in capabilities
    assert Capability.CLIPBOARD_SELECTION in capabilities

    await host.set_monitors([Monitor(1920, 1080)])
    await desktop.wait_resolution(1920, 1080)
    await host.set_monitors([Monitor(1024, 768)])
    await desktop.wait_resolution(1024, 768)

    for selection, name in ((Selection.CLIPBOARD, "clipboard"), (Selection.PRIMARY, "primary")):
        await host.set_clipboard(f"{TEXT} {name}", selection)
        await desktop.wait_paste(f"{TEXT} {name}", name)
        await desktop.copy(f"guest's {TEXT} {name}", name)
        await until(lambda selection=selection: host.clipboard_types(selection))
        assert await host.get_clipboard(selection) == f"guest's {TEXT} {name}"


async def test_agent_that_restarts_is_taken_up_again(desktop):
    host = desktop.host
    await host.wait_ready(30)
    await desktop.restart_agent()
    await host.wait_ready(30)
    await host.set_monitors([Monitor(1280, 720)])
    await desktop.wait_resolution(1280, 720)
