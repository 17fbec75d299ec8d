"""The real SPICE agent in a real Linux guest, and our host end of the channel."""

from __future__ import annotations

import pytest

from tests.support.waiting import until
from vring_serial import HostAgent
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.guest.uml_desktop import MEMORY_MIB, UmlDesktop
from vring_serial.proto.agent import Capability, Monitor, Selection

pytestmark = pytest.mark.peer("spice-vdagentd", "spice-vdagent", "Xvfb", "xclip", "xrandr")

TEXT = "naïve café, 日本語, 🖥\nsecond line"


@pytest.fixture
async def desktop(bench):
    """A desktop in the guest whose agent talks to ``desktop.host``."""
    host = HostAgent(timeout=20)
    bench.add_port(1, "com.redhat.spice.0", ProtocolChardev("agent", host.protocol_factory))
    await bench.serve()
    guest = await bench.boot(MEMORY_MIB)
    desktop = UmlDesktop(guest)
    await desktop.start()
    desktop.host = host
    try:
        yield desktop
    finally:
        await host.aclose()


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
