"""A complete multiport virtio-serial device, and what the SPICE agent channel needs on it.

The names in ``__all__`` are public. So are :mod:`vring_serial.chardev` (host ends by the name of
their kind), :mod:`vring_serial.proto.agent` (the SPICE agent protocol without input or output) and
:mod:`vring_serial.device.testing` (drivers for tests of an emulator). Every other module may change
without notice.

A name is imported when it is first used: a process pays only for what it uses.
"""

# ruff: noqa: I001 - one import for each module, which isort would split for its "as"
from __future__ import annotations

from typing import TYPE_CHECKING

from vring import __version__ as __version__
from vring.lazy import exports

if TYPE_CHECKING:
    from vring.errors import Error as Error
    from vring_serial.agent.channel.clipboard import (
        ANY_SIZE as ANY_SIZE,
        StreamSource as StreamSource,
    )
    from vring_serial.agent.errors import (
        AgentError as AgentError,
        AgentGoneError as AgentGoneError,
        AgentRefusedError as AgentRefusedError,
        AgentTimeoutError as AgentTimeoutError,
        AgentUnsupportedError as AgentUnsupportedError,
        ClipboardEmptyError as ClipboardEmptyError,
        ClipboardTooLargeError as ClipboardTooLargeError,
        FileRefusedError as FileRefusedError,
        FileTransferError as FileTransferError,
    )
    from vring_serial.agent.events import (
        AgentEvent as AgentEvent,
        AgentGone as AgentGone,
        AgentReady as AgentReady,
        AgentTrouble as AgentTrouble,
        ClipboardGrabbed as ClipboardGrabbed,
        ClipboardReleased as ClipboardReleased,
        EventStream as EventStream,
        OtherMessage as OtherMessage,
    )
    from vring_serial.agent.guest import GuestAgent as GuestAgent
    from vring_serial.agent.host import HostAgent as HostAgent
    from vring_serial.agent.host_capabilities import HOST_CAPABILITIES as HOST_CAPABILITIES
    from vring_serial.agent.router.router import (
        AgentRouter as AgentRouter,
        RouterLoad as RouterLoad,
    )
    from vring_serial.chardev.base import (
        Chardev as Chardev,
        ChardevUser as ChardevUser,
        DescriptorEnd as DescriptorEnd,
        End as End,
        ProtocolEnd as ProtocolEnd,
    )
    from vring_serial.chardev.console import (
        ConsoleChardev as ConsoleChardev,
        ConsoleOptions as ConsoleOptions,
    )
    from vring_serial.chardev.file import FileChardev as FileChardev, FileOptions as FileOptions
    from vring_serial.chardev.null import NullChardev as NullChardev, NullOptions as NullOptions
    from vring_serial.chardev.pipe import PipeChardev as PipeChardev, PipeOptions as PipeOptions
    from vring_serial.chardev.protocol import ProtocolChardev as ProtocolChardev
    from vring_serial.chardev.pty import PtyChardev as PtyChardev, PtyOptions as PtyOptions
    from vring_serial.chardev.ringbuf import (
        RingbufChardev as RingbufChardev,
        RingbufOptions as RingbufOptions,
    )
    from vring_serial.chardev.serial import SerialChardev as SerialChardev
    from vring_serial.chardev.serial import SerialOptions as SerialOptions
    from vring_serial.chardev.socket import (
        SocketChardev as SocketChardev,
        SocketOptions as SocketOptions,
    )
    from vring_serial.chardev.stdio import (
        StdioChardev as StdioChardev,
        StdioOptions as StdioOptions,
    )
    from vring_serial.chardev.udp import UdpChardev as UdpChardev, UdpOptions as UdpOptions
    from vring_serial.device.base import VirtioDevice as VirtioDevice
    from vring_serial.device.console.controller import Controller as Controller
    from vring_serial.device.console.events import (
        DeviceEvent as DeviceEvent,
        DeviceReset as DeviceReset,
        DriverReady as DriverReady,
        EmergencyWrite as EmergencyWrite,
        FeaturesNegotiated as FeaturesNegotiated,
        MessageRefused as MessageRefused,
        OutputDropped as OutputDropped,
        PortAdded as PortAdded,
        PortClosed as PortClosed,
        PortOpened as PortOpened,
        PortReady as PortReady,
        PortRemoved as PortRemoved,
        QueueBroken as QueueBroken,
        Side as Side,
    )
    from vring_serial.device.console.port import Port as Port
    from vring_serial.device.pci import (
        Bar as Bar,
        InterruptSink as InterruptSink,
        PciDevice as PciDevice,
    )
    from vring_serial.device.queue_device import (
        QueueDevice as QueueDevice,
        QueueDeviceState as QueueDeviceState,
    )
    from vring_serial.device.registers.mmio import MmioDevice as MmioDevice
    from vring_serial.device.virtqueue import RunningQueue as RunningQueue
    from vring_serial.errors import (
        ConfigError as ConfigError,
        DependencyError as DependencyError,
        LocalProtocolError as LocalProtocolError,
        ProtocolError as ProtocolError,
        RemoteProtocolError as RemoteProtocolError,
        ResourceError as ResourceError,
        StateError as StateError,
        VringSerialError as VringSerialError,
    )
    from vring_serial.guest.errors import (
        BackendClosedError as BackendClosedError,
        BackendError as BackendError,
        BackendRefusedError as BackendRefusedError,
        BackendTimeoutError as BackendTimeoutError,
        GuestEndedError as GuestEndedError,
        GuestMemoryError as GuestMemoryError,
        GuestTimeoutError as GuestTimeoutError,
        PortBusyError as PortBusyError,
        PortRemovedError as PortRemovedError,
    )
    from vring_serial.guest.guest import (
        BackendLost as BackendLost,
        EmbeddedGuest as EmbeddedGuest,
        GuestEvent as GuestEvent,
    )
    from vring_serial.guest.port import GuestPort as GuestPort
    from vring_serial.guest.uml import UmlGuest as UmlGuest
    from vring_serial.proto.agent import (
        AgentFilter as AgentFilter,
        Capabilities as Capabilities,
        Capability as Capability,
        ClipboardType as ClipboardType,
        Monitor as Monitor,
        Selection as Selection,
    )
    from vring_serial.saving import StateFormat as StateFormat
    from vring_serial.spice.options import SpiceOptions as SpiceOptions
    from vring_serial.spice.server import SpiceServer as SpiceServer
    from vring_serial.transport.inprocess.fronts import (
        InProcessMmio as InProcessMmio,
        InProcessPci as InProcessPci,
        Window as Window,
    )
    from vring_serial.transport.inprocess.hosts import (
        LoopHost as LoopHost,
        PolledHost as PolledHost,
    )
    from vring_serial.transport.vfio_user.server import VfioUserServer as VfioUserServer
    from vring_serial.transport.vhost_user.backend import VhostUserBackend as VhostUserBackend

# Module → the public names that it has.
_EXPORTS = {
    "vring_serial.device.console.controller": "Controller",
    "vring_serial.device.console.port": "Port",
    "vring_serial.device.console.events": (
        "DeviceEvent DeviceReset DriverReady EmergencyWrite FeaturesNegotiated "
        "MessageRefused OutputDropped PortAdded PortClosed PortOpened PortReady PortRemoved "
        "QueueBroken Side"
    ),
    "vring_serial.chardev.udp": "UdpChardev UdpOptions",
    "vring_serial.device.base": "VirtioDevice",
    "vring_serial.device.queue_device": "QueueDevice QueueDeviceState",
    "vring_serial.device.virtqueue": "RunningQueue",
    "vring_serial.chardev.base": "Chardev ChardevUser DescriptorEnd End ProtocolEnd",
    "vring_serial.chardev.console": "ConsoleChardev ConsoleOptions",
    "vring_serial.chardev.file": "FileChardev FileOptions",
    "vring_serial.chardev.null": "NullChardev NullOptions",
    "vring_serial.chardev.pipe": "PipeChardev PipeOptions",
    "vring_serial.chardev.protocol": "ProtocolChardev",
    "vring_serial.chardev.pty": "PtyChardev PtyOptions",
    "vring_serial.chardev.ringbuf": "RingbufChardev RingbufOptions",
    "vring_serial.chardev.serial": "SerialChardev SerialOptions",
    "vring_serial.chardev.socket": "SocketChardev SocketOptions",
    "vring_serial.chardev.stdio": "StdioChardev StdioOptions",
    "vring_serial.transport.vhost_user.backend": "VhostUserBackend",
    "vring_serial.transport.vfio_user.server": "VfioUserServer",
    "vring_serial.transport.inprocess.fronts": "InProcessMmio InProcessPci Window",
    "vring_serial.transport.inprocess.hosts": "LoopHost PolledHost",
    "vring_serial.device.pci": "Bar InterruptSink PciDevice",
    "vring_serial.device.registers.mmio": "MmioDevice",
    "vring_serial.agent.host": "HostAgent",
    "vring_serial.agent.host_capabilities": "HOST_CAPABILITIES",
    "vring_serial.agent.router.router": "AgentRouter RouterLoad",
    "vring_serial.agent.guest": "GuestAgent",
    "vring_serial.agent.channel.clipboard": "ANY_SIZE StreamSource",
    "vring_serial.agent.events": (
        "AgentEvent AgentGone AgentReady AgentTrouble ClipboardGrabbed ClipboardReleased "
        "EventStream OtherMessage"
    ),
    "vring_serial.proto.agent": (
        "AgentFilter Capabilities Capability ClipboardType Monitor Selection"
    ),
    "vring_serial.guest.guest": "BackendLost EmbeddedGuest GuestEvent",
    "vring_serial.guest.port": "GuestPort",
    "vring_serial.guest.uml": "UmlGuest",
    "vring_serial.spice.options": "SpiceOptions",
    "vring_serial.spice.server": "SpiceServer",
    "vring_serial.saving": "StateFormat",
    "vring_serial.errors": (
        "ConfigError DependencyError LocalProtocolError ProtocolError RemoteProtocolError "
        "ResourceError StateError VringSerialError"
    ),
    "vring_serial.agent.errors": (
        "AgentError AgentGoneError AgentRefusedError AgentTimeoutError "
        "AgentUnsupportedError ClipboardEmptyError ClipboardTooLargeError FileRefusedError "
        "FileTransferError"
    ),
    "vring_serial.guest.errors": (
        "BackendClosedError BackendError BackendRefusedError BackendTimeoutError "
        "GuestEndedError GuestMemoryError GuestTimeoutError PortBusyError PortRemovedError"
    ),
    "vring.errors": "Error",
}

if not TYPE_CHECKING:  # type checkers take the imports above
    __getattr__, __dir__ = exports(__name__, _EXPORTS)
    __all__ = [name for names in _EXPORTS.values() for name in names.split()]
