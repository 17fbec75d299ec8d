"""What `vring_serial` exports: these names, each where type checkers see it, and nothing costly."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vring
import vring_serial

NAMES = """
Controller Port
DeviceEvent DeviceReset DriverReady EmergencyWrite FeaturesNegotiated MessageRefused
OutputDropped
PortAdded PortClosed PortOpened PortReady PortRemoved QueueBroken Side
VirtioDevice QueueDevice QueueDeviceState RunningQueue StateFormat
Chardev ChardevUser DescriptorEnd End ProtocolEnd
FileChardev FileOptions NullChardev NullOptions PipeChardev PipeOptions ProtocolChardev
ConsoleChardev ConsoleOptions PtyChardev
PtyOptions RingbufChardev RingbufOptions SerialChardev SerialOptions SocketChardev SocketOptions
StdioChardev StdioOptions UdpChardev UdpOptions
VhostUserBackend VfioUserServer
InProcessMmio InProcessPci Window LoopHost PolledHost
Bar InterruptSink MmioDevice PciDevice
HostAgent HOST_CAPABILITIES AgentRouter RouterLoad GuestAgent ANY_SIZE StreamSource
AgentEvent AgentGone AgentReady AgentTrouble ClipboardGrabbed ClipboardReleased EventStream
OtherMessage
AgentFilter Capabilities Capability ClipboardType Monitor Selection
EmbeddedGuest GuestPort GuestEvent BackendLost UmlGuest
SpiceOptions SpiceServer
Error VringSerialError ConfigError ResourceError DependencyError StateError
ProtocolError RemoteProtocolError LocalProtocolError
AgentError AgentGoneError AgentRefusedError AgentTimeoutError AgentUnsupportedError
ClipboardEmptyError ClipboardTooLargeError FileTransferError FileRefusedError
BackendError BackendClosedError BackendRefusedError BackendTimeoutError
GuestEndedError GuestMemoryError GuestTimeoutError PortBusyError PortRemovedError
"""
EXPORTED = set(NAMES.split())


def imports_of_type_checkers() -> dict[str, str]:
    """Name → module, as the block for type checkers says; each name is re-exported explicitly."""
    assert vring_serial.__file__ is not None
    tree = ast.parse(Path(vring_serial.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
    homes = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name
            homes[alias.name] = str(node.module)
    return homes


def test_the_exported_names() -> None:
    assert sorted(vring_serial.__all__) == sorted(EXPORTED)
    assert set(dir(vring_serial)) >= EXPORTED


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_a_name_is_what_type_checkers_see(name: str) -> None:
    module = imports_of_type_checkers()[name]
    # Where a type checker finds it is where it comes from.
    expected = getattr(__import__(module, fromlist=[name]), name)
    assert getattr(vring_serial, name) is expected


def test_type_checkers_see_no_other_name() -> None:
    assert set(imports_of_type_checkers()) == EXPORTED


def test_the_version_is_that_of_vring() -> None:
    assert vring_serial.__version__ is vring.__version__


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'vring_serial' has no attribute 'Kontroller'"
    ):
        vring_serial.Kontroller  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Kontroller'"):
        from vring_serial import Kontroller  # noqa: F401


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_import_alone_loads_nothing_of_others() -> None:
    for module in ("vring_serial", "vring_serial.errors", "vring"):
        loaded = loaded_by(f"import {module}")
        assert not loaded & {"numpy", "asyncio", "lxml", "rich", "cffi", "click"}


def test_no_name_but_the_spice_servers_loads_cffi() -> None:
    names = ", ".join(sorted(EXPORTED - {"SpiceServer"}))
    loaded = loaded_by(f"from vring_serial import {names}")
    assert not loaded & {"lxml", "rich", "cffi", "click"}
