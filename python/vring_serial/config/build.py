"""Makes devices from a topology. Nothing is opened here: starting a controller does that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from vring import Backlog, Pump
from vring_serial import chardev
from vring_serial.chardev import Chardev, OutputLog
from vring_serial.chardev.mux import Mux, MuxFront
from vring_serial.config.topology import ChardevConfig, ControllerConfig, PortConfig
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ConsoleState, check_console
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.keeping import Keeping

#: Makes the protocol for one connection to the port.
ProtocolFactory = Callable[[], asyncio.Protocol]
#: By kind: the Python code behind host ends that are protocols, for a given port.
ProtocolFactories = Mapping[str, Callable[[PortConfig], ProtocolFactory]]
#: By kind: host ends that the caller makes itself, for a given port.
ChardevMakers = Mapping[str, Callable[[PortConfig], Chardev]]


#: Bytes of memory for what waits for a console's host end.
_BACKLOG_SIZE = 1 << 20


def make_chardev(config: ChardevConfig, factory: ProtocolFactory | None = None) -> Chardev:
    """Return a host end, not started.

    Args:
        factory: for kinds whose end is Python code.

    Raises:
        ConfigError: the host end is invalid; the message names its place in the configuration.
    """
    try:
        return chardev.make(config.kind, config.id, config.options, factory=factory, log=config.log)
    except ConfigError as error:
        raise ConfigError(str(error), config.where) from None


class Muxes:
    """The host ends of one VM that ports share.

    Args:
        on_exit: ends the service; who has its standard input may ask for that.
    """

    def __init__(self, on_exit: Callable[[], None] | None = None) -> None:
        self._on_exit = on_exit
        self._by_id: dict[str, Mux] = {}

    def front(
        self, config: ChardevConfig, keeping: Keeping | None, controller: str, nr: int, name: str
    ) -> MuxFront:
        """Return a port's part of a host end, not started.

        Args:
            config: of the host end.
            keeping: of it.
            controller: name of the port's controller.
            nr: the port's number; -1: of none yet.
            name: what the guest calls the port.

        Raises ConfigError: the host end is invalid, or has too many parts.
        """
        mux = self._by_id.get(config.id)
        if mux is None:
            on_exit = self._on_exit if config.kind == "stdio" else None
            mux = self._by_id[config.id] = Mux(make_chardev(config), keeping, on_exit)
        key = f"{controller}-{nr}" if nr >= 0 else "spare"
        scope = None if keeping is None else keeping.scoped(f"front-{key}")
        label = f"port {nr} of {controller}{f' ({name})' if name else ''}" if nr >= 0 else "no port"
        return mux.front(key, scope, label)


def make_controller(
    config: ControllerConfig,
    pump: Pump | None = None,
    protocol_factories: ProtocolFactories | None = None,
    chardev_makers: ChardevMakers | None = None,
    keeping: Keeping | None = None,
    chardev_keeping: Callable[[str], Keeping | None] = lambda id: None,
    muxes: Muxes | None = None,
) -> Controller:
    """Return a controller with its ports, not started.

    Raises as :func:`make_chardev`, and StateError if what a predecessor left is of another device.

    Args:
        pump: moves the bytes of ports whose host end is a descriptor; None: the controller makes
            its own.
        protocol_factories: see :data:`ProtocolFactories`; needed for spicevmc.
        chardev_makers: see :data:`ChardevMakers`; they take precedence over the factories.
        keeping: see Controller; the state that a predecessor process left there is continued.
        chardev_keeping: the same for each host end, by its id.
        muxes: host ends that ports share, also those of other controllers; None: new ones.
    """
    muxes = muxes or Muxes()
    factories = protocol_factories or {}
    makers = chardev_makers or {}
    saved = None if keeping is None else keeping.read(CONSOLE.kind)
    state = ConsoleState() if saved is None else CONSOLE.unpack(saved)
    controller = Controller(
        name=config.name,
        max_ports=config.max_ports,
        pump=pump,
        state=state.controller,
        keeping=keeping,
    )
    if saved is not None:
        check_console(
            state,
            max_ports=config.max_ports,
            ports=None,
            num_queues=controller.num_queues,
            features=controller.device_features,
        )
    for port in config.ports:
        if maker := makers.get(port.chardev.kind):
            end = maker(port)
            if port.chardev.log.logfile:
                end.log = OutputLog(port.chardev.id, port.chardev.log)
            end.keeping = chardev_keeping(port.chardev.id)
        elif port.chardev.mux:
            kept = chardev_keeping(port.chardev.id)
            end = muxes.front(port.chardev, kept, config.name, port.nr, port.name)
        else:
            choose = factories.get(port.chardev.kind)
            end = make_chardev(port.chardev, choose(port) if choose is not None else None)
            end.keeping = chardev_keeping(port.chardev.id)
        controller.add_port(
            Port(
                port.nr,
                port.name,
                end,
                console=port.console,
                state=state.ports.get(port.nr),
                backlog=_make_backlog(end.keeping) if port.console else None,
            )
        )
    return controller


def _make_backlog(keeping: Keeping | None) -> Backlog | None:
    """Return what holds a console's bytes for its host end; None without memory for it."""
    if keeping is None:
        return None
    try:
        return Backlog(keeping.area("backlog", _BACKLOG_SIZE))
    except ResourceError:
        return None
