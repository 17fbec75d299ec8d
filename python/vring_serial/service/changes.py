"""Changes while a service runs: host ends and ports that come and go.

What changed is written down for a successor process before it is done, so that the next one serves
the same ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vring_serial.chardev import Chardev
from vring_serial.chardev.file import FileOptions
from vring_serial.chardev.mux import MuxFront
from vring_serial.chardev.options import base_id
from vring_serial.chardev.pty import PtyChardev
from vring_serial.config.build import Muxes, make_chardev
from vring_serial.config.draft import log_paths
from vring_serial.config.qemu_options import parse_chardev
from vring_serial.config.qmp_backend import KINDS, option_of
from vring_serial.config.topology import ChardevConfig, PortConfig, Topology
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError, StateError
from vring_serial.keeping import Keeping
from vring_serial.saving import StateFormat
from vring_serial.service.link import CallError, Handler

log = logging.getLogger(__name__)

#: Chardevs that one VM may have.
CHARDEVS_MAX = 4096
#: Seconds that a new host end has to connect.
START_SECONDS = 3.0

_GENERIC, _NOT_FOUND = "GenericError", "DeviceNotFound"
_DRIVERS = ("virtserialport", "virtconsole")


@dataclasses.dataclass(frozen=True, slots=True)
class ChardevRecord:
    """A host end.

    Attributes:
        id: its name.
        option: the value of ``--chardev``; "" for one that is as configured.
        number: no other one has had it; what it keeps is found by it.
    """

    id: str
    option: str
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class PortRecord:
    """A port.

    Attributes:
        id: the device's name.
        controller: name of its controller.
        nr: its number.
        name: what the guest calls it.
        console: whether it is a console.
        chardev: id of its host end.
    """

    id: str
    controller: str
    nr: int
    name: str
    console: bool
    chardev: str


@dataclasses.dataclass(frozen=True, slots=True)
class ChangesState:
    """All host ends and ports of one VM.

    Attributes:
        chardevs: in the order in which they were made.
        ports: likewise.
        next_number: of the next host end.
    """

    chardevs: tuple[ChardevRecord, ...] = ()
    ports: tuple[PortRecord, ...] = ()
    next_number: int = 0


CHANGES = StateFormat("changes", 1, ChangesState)


class Setup:
    """What is served: as configured, and as changed since by this process or one before it.

    Args:
        topology: the configuration.
        keeping: of the whole process; None: nothing can be changed for good.
        resumed: a process before this one served it: files are not emptied again.

    Attributes:
        state: all host ends and ports, as they are now.
    """

    def __init__(self, topology: Topology, keeping: Keeping | None, *, resumed: bool) -> None:
        self._configured = topology
        self._keeping = keeping
        ports = [(c.name, port) for c in topology.controllers for port in c.ports]
        self._base = {port.chardev.id: port.chardev for _, port in ports}
        self.state = ChangesState(
            tuple(ChardevRecord(id, "", number) for number, id in enumerate(self._base)),
            tuple(
                PortRecord(id, name, p.nr, p.name, p.console, p.chardev.id)
                for id, (name, p) in zip(_device_ids(ports), ports, strict=True)
            ),
            len(self._base),
        )
        saved = None if keeping is None else keeping.read(CHANGES.kind)
        if saved is not None:
            self.state = CHANGES.unpack(saved)
            self._check()
        # Files of these are not emptied again.
        self._resumed = {record.number for record in self.state.chardevs} if resumed else set()

    def _check(self) -> None:
        known = {record.id for record in self.state.chardevs}
        for record in self.state.chardevs:
            if not record.option and record.id not in self._base:
                raise StateError(f"the configuration has no chardev {record.id}")
        for port in self.state.ports:
            if port.chardev not in known:
                raise StateError(f"port {port.id} has no chardev {port.chardev}")

    def write(self, state: ChangesState) -> None:
        """Take ``state`` for what is served now, and write it down."""
        if self._keeping is not None:
            self._keeping.write(CHANGES.kind, CHANGES.pack(state))
        self.state = state

    def config(self, id: str) -> ChardevConfig:
        """Return the configuration of one of the host ends."""
        record = next(record for record in self.state.chardevs if record.id == id)
        config = parse_chardev(record.option) if record.option else self._base[id]
        if record.number in self._resumed:
            options, log = config.options, config.log
            if isinstance(options, FileOptions):
                options = dataclasses.replace(options, append=True)
            log = dataclasses.replace(log, logappend=bool(log.logfile))
            config = dataclasses.replace(config, options=options, log=log)
        return config

    def keeping(self, id: str) -> Keeping | None:
        """Return where one of the host ends keeps what a successor needs."""
        return self.keeping_of(next(r for r in self.state.chardevs if r.id == id))

    def keeping_of(self, record: ChardevRecord) -> Keeping | None:
        """Return where a host end keeps what a successor needs, whether it is there or not."""
        return None if self._keeping is None else self._keeping.scoped(f"chardev-{record.number}")

    @property
    def topology(self) -> Topology:
        """Return the configuration with the ports that there are now."""
        controllers = []
        for controller in self._configured.controllers:
            ports = [
                PortConfig(port.nr, port.name, self.config(port.chardev), port.console)
                for port in self.state.ports
                if port.controller == controller.name
            ]
            ports.sort(key=lambda port: port.nr)
            controllers.append(dataclasses.replace(controller, ports=tuple(ports)))
        return dataclasses.replace(self._configured, controllers=tuple(controllers))

    @property
    def unused(self) -> list[str]:
        """Return the host ends that are no port's."""
        used = {port.chardev for port in self.state.ports}
        return [record.id for record in self.state.chardevs if record.id not in used]


class Changes:
    """Carries out changes of one VM, one at a time.

    Args:
        setup: what is served.
        controllers: the devices.
        muxes: host ends that their ports share.

    Attributes:
        spare: host ends that are no port's, by id; started.
        on_deleted: told the id of each device that was removed.
    """

    def __init__(
        self, setup: Setup, controllers: Sequence[Controller], muxes: Muxes | None = None
    ) -> None:
        self._setup = setup
        self._muxes = muxes or Muxes()
        self._controllers = {controller.name: controller for controller in controllers}
        self._lock = asyncio.Lock()
        self.spare: dict[str, Chardev] = {}
        self.on_deleted: Callable[[str], None] = lambda id: None

    async def start(self) -> None:
        """Start the host ends that are no port's; one that cannot be started is left out."""
        for id in self._setup.unused:
            try:
                self.spare[id] = await self._make(id)
            except (ResourceError, ConfigError, TimeoutError) as error:
                log.warning("chardev %s is left out: %s", id, error)
                self._forget(id)

    async def aclose(self) -> None:
        """Stop those host ends."""
        while self.spare:
            await self.spare.popitem()[1].aclose_with_log()

    def handlers(self) -> dict[str, Handler]:
        """Return what the monitor calls, by name."""
        return {
            "chardev-add": self._one_at_a_time(self._chardev_add),
            "chardev-change": self._one_at_a_time(self._chardev_change),
            "chardev-remove": self._one_at_a_time(self._chardev_remove),
            "device-add": self._one_at_a_time(self._device_add),
            "device-del": self._one_at_a_time(self._device_del),
        }

    def device_id(self, controller: str, nr: int) -> str:
        """Return the name of a port's device."""
        found = (p.id for p in self._ports if (p.controller, p.nr) == (controller, nr))
        return next(found, "")

    # --- chardevs

    async def _chardev_add(self, id: str, backend: Mapping[str, Any]) -> dict[str, str]:
        if id in self._names():
            raise CallError(_GENERIC, f"Chardev with id '{id}' already exists")
        if len(self._setup.state.chardevs) >= CHARDEVS_MAX:
            raise CallError(_GENERIC, f"Failed to add chardev '{id}': there are {CHARDEVS_MAX}")
        with _failing("add", id):
            option = self._option(id, backend)
            self._remember(id, option)
            try:
                self.spare[id] = chardev = await self._make(id)
            except BaseException:
                self._forget(id)
                raise
        return {"pty": chardev.path} if isinstance(chardev, PtyChardev) else {}

    async def _chardev_change(self, id: str, backend: Mapping[str, Any]) -> dict[str, str]:
        self._check_no_base(id, "Chardev user does not support chardev hotswap")
        before = self._record(id, "Chardev '{}' does not exist")
        if self._setup.config(id).mux:
            text = "For mux or hub device hotswap is not supported yet"
            raise CallError(_GENERIC, text)
        if self._configured_kind(id) not in KINDS:
            raise CallError(_GENERIC, f"Chardev '{id}' cannot be changed while it is in use")
        with _failing("change", id):
            option = self._option(id, backend)
            self._replace(id, option)
            try:
                chardev = await self._make(id)
            except BaseException:
                self._put_back(before)
                raise
        port = next((port for port in self._ports if port.chardev == id), None)
        if port is None:
            old = self.spare.pop(id)
            self.spare[id] = chardev
            await old.aclose_with_log()
        else:
            await self._controllers[port.controller].change_chardev(port.nr, chardev)
        self._clear(before)
        return {"pty": chardev.path} if isinstance(chardev, PtyChardev) else {}

    async def _chardev_remove(self, id: str) -> None:
        self._check_no_base(id, f"Chardev '{id}' is busy")
        self._record(id, "Chardev '{}' not found")
        if id not in self.spare:
            raise CallError(_GENERIC, f"Chardev '{id}' is busy")
        await self.spare.pop(id).aclose_with_log()
        self._forget(id)

    # --- devices

    async def _device_add(
        self,
        driver: str,
        id: str = "",
        bus: str = "",
        chardev: str = "",
        nr: int | None = None,
        name: str = "",
    ) -> None:
        controller = self._bus(bus)
        if id and any(port.id == id for port in self._ports):
            raise CallError(_GENERIC, f"Duplicate device ID '{id}'")
        console = driver == "virtconsole"
        nr = self._number(controller, nr, console)
        if name and any(p.name == name for p in self._ports if p.controller == controller.name):
            raise CallError(_GENERIC, f"virtio-serial-bus: A port already exists by name {name}")
        what = f"Property '{driver}.chardev'"
        made = ""
        if not chardev:
            made = chardev = f"none-{controller.name}-{nr}"
            self._remember(chardev, f"null,id={chardev}")
            self.spare[chardev] = await self._make(chardev)
        elif not any(record.id == chardev for record in self._setup.state.chardevs):
            raise CallError(_GENERIC, f"{what} can't find value '{chardev}'")
        elif chardev not in self.spare and not self._setup.config(chardev).mux:
            raise CallError(
                _GENERIC,
                f"{what} can't take value '{chardev}': chardev '{chardev}' is already in use",
            )
        end = await self._end_for(chardev, controller, nr, name, what)
        state = self._setup.state
        id = id or _free_id(chardev, controller.name, nr, [port.id for port in self._ports])
        record = PortRecord(id, controller.name, nr, name, console, chardev)
        self._setup.write(dataclasses.replace(state, ports=(*state.ports, record)))
        try:
            controller.add_port(Port(nr, name, end, console=console))
        except LocalProtocolError as error:
            self._setup.write(state)
            if made:
                await self._chardev_remove(made)
            if isinstance(end, MuxFront):
                await end.aclose()
            raise CallError(_GENERIC, str(error)) from None
        spare = self.spare.pop(chardev, end)
        if spare is not end:  # of a host end that ports share
            await spare.aclose()

    async def _end_for(
        self, chardev: str, controller: Controller, nr: int, name: str, what: str
    ) -> Chardev:
        """Return the host end for a new port, started."""
        config = self._setup.config(chardev)
        if not config.mux:
            return self.spare[chardev]
        keeping = self._setup.keeping(chardev)
        try:
            front = self._muxes.front(config, keeping, controller.name, nr, name)
            await front.start()
        except (ConfigError, ResourceError) as error:
            text = error.why if isinstance(error, ConfigError) else str(error)
            raise CallError(_GENERIC, f"{what} can't take value '{chardev}': {text}") from None
        return front

    async def _device_del(self, id: str) -> None:
        port = next((port for port in self._ports if port.id == id), None)
        if port is None:
            raise CallError(_NOT_FOUND, f"Device '{id}' not found")
        state = self._setup.state
        left = tuple(other for other in state.ports if other is not port)
        self._setup.write(dataclasses.replace(state, ports=left))
        controller = self._controllers[port.controller]
        chardev = controller.ports[port.nr].chardev
        if not isinstance(chardev, MuxFront):
            await controller.remove_port(port.nr, keep_chardev=True)
            self.spare[port.chardev] = chardev
        else:
            if all(other.chardev != port.chardev for other in left):
                await self._keep_shared(port.chardev)
            await controller.remove_port(port.nr)
        # The answer goes first, as QEMU's.
        asyncio.get_running_loop().call_soon(self.on_deleted, id)

    def _bus(self, bus: str) -> Controller:
        name = bus.removesuffix(".0")
        if not bus:
            return next(iter(self._controllers.values()))
        if name not in self._controllers:
            raise CallError(_GENERIC, f"Bus '{bus}' not found")
        return self._controllers[name]

    def _number(self, controller: Controller, nr: int | None, console: bool) -> int:
        """Return the number of a new port: what is asked for, or the first that is free."""
        taken = {p.nr for p in self._ports if p.controller == controller.name}
        if nr is None:
            first = 0 if console else 1
            free = (n for n in range(first, controller.max_ports) if n not in taken)
            nr = next(free, None)
            if nr is None:
                text = "virtio-serial-bus: Maximum port limit for this device reached"
                raise CallError(_GENERIC, text)
        elif nr >= controller.max_ports or nr < 0:
            most = controller.max_ports - 1
            text = f"virtio-serial-bus: Out-of-range port id specified, max. allowed: {most}"
            raise CallError(_GENERIC, text)
        elif nr in taken:
            raise CallError(_GENERIC, f"virtio-serial-bus: A port already exists at id {nr}")
        elif nr == 0 and not console:
            text = "Port number 0 on virtio-serial devices reserved for virtconsole devices"
            raise CallError(_GENERIC, f"{text} for backward compatibility.")
        return nr

    # --- internals

    async def _keep_shared(self, id: str) -> None:
        """Have a host end that ports share go on without a port."""
        spare = self._muxes.front(self._setup.config(id), self._setup.keeping(id), "", -1, "")
        await spare.start()
        self.spare[id] = spare

    def _names(self) -> set[str]:
        """Return what chardevs are called, those behind shared ones too."""
        ids = [record.id for record in self._setup.state.chardevs]
        return {*ids, *(base_id(id) for id in ids if self._setup.config(id).mux)}

    def _check_no_base(self, id: str, text: str) -> None:
        """Raise CallError if it is the name of what is behind a shared host end."""
        if id in self._names() and all(r.id != id for r in self._setup.state.chardevs):
            raise CallError(_GENERIC, text)

    @property
    def _ports(self) -> tuple[PortRecord, ...]:
        return self._setup.state.ports

    def _one_at_a_time(self, handler: Handler) -> Handler:
        async def carry_out(**arguments: Any) -> Any:
            async with self._lock:
                return await handler(**arguments)

        return carry_out

    def _option(self, id: str, backend: Mapping[str, Any]) -> str:
        """Return what ``--chardev`` would say. Raises ConfigError: it cannot be, or not here."""
        option = option_of(id, backend)
        logs = set(log_paths(parse_chardev(option)))
        for record in self._setup.state.chardevs:
            if record.id != id:
                for path in logs.intersection(log_paths(self._setup.config(record.id))):
                    raise ConfigError(f"{path} is in use already (the log of {record.id})")
        return option

    def _configured_kind(self, id: str) -> str:
        return self._setup.config(id).kind

    def _record(self, id: str, error: str) -> ChardevRecord:
        for record in self._setup.state.chardevs:
            if record.id == id:
                return record
        raise CallError(_GENERIC, error.format(id))

    def _remember(self, id: str, option: str) -> None:
        state = self._setup.state
        number = state.next_number
        chardevs = (*state.chardevs, ChardevRecord(id, option, number))
        self._setup.write(ChangesState(chardevs, state.ports, number + 1))

    def _replace(self, id: str, option: str) -> None:
        state = self._setup.state
        new = ChardevRecord(id, option, state.next_number)
        chardevs = tuple(new if old.id == id else old for old in state.chardevs)
        self._setup.write(ChangesState(chardevs, state.ports, new.number + 1))

    def _put_back(self, record: ChardevRecord) -> None:
        """Go back to a host end that could not be replaced."""
        state = self._setup.state
        failed = next(other for other in state.chardevs if other.id == record.id)
        chardevs = tuple(record if other is failed else other for other in state.chardevs)
        self._setup.write(dataclasses.replace(state, chardevs=chardevs))
        self._clear(failed)

    def _forget(self, id: str) -> None:
        state = self._setup.state
        chardevs = tuple(record for record in state.chardevs if record.id != id)
        self._setup.write(dataclasses.replace(state, chardevs=chardevs))
        for record in state.chardevs:
            if record.id == id:
                self._clear(record)

    def _clear(self, record: ChardevRecord) -> None:
        """Keep nothing more of a host end that has gone."""
        if (keeping := self._setup.keeping_of(record)) is not None:
            keeping.clear()

    async def _make(self, id: str) -> Chardev:
        """Return one of the host ends, started.

        Raises ConfigError, ResourceError; TimeoutError if its peer does not answer.
        """
        config = self._setup.config(id)
        chardev: Chardev
        if config.mux:
            chardev = self._muxes.front(config, self._setup.keeping(id), "", -1, "")
        else:
            chardev = make_chardev(config)
            chardev.keeping = self._setup.keeping(id)
        async with asyncio.timeout(START_SECONDS):
            await chardev.start_with_log()
        return chardev


def _device_ids(ports: Sequence[tuple[str, PortConfig]]) -> list[str]:
    """Return names for the devices of ports, each with the name of its controller."""
    ids: list[str] = []
    for controller, port in ports:
        ids.append(_free_id(port.chardev.id, controller, port.nr, ids))
    return ids


def _free_id(chardev: str, controller: str, nr: int, taken: Sequence[str]) -> str:
    """Return what a port's device is called that has no name: as its chardev, if none is yet."""
    return chardev if chardev not in taken else f"{chardev}-{controller}-{nr}"


@contextlib.contextmanager
def _failing(verb: str, id: str) -> Iterator[None]:
    """Answer errors of a new chardev as QEMU does, when it failed to do this with it."""
    what = f"Failed to {verb} chardev '{id}'"
    try:
        yield
    except ConfigError as error:
        raise CallError(_GENERIC, f"{what}: {error.why}") from None
    except ResourceError as error:
        text = str(error).removeprefix(f"chardev {id}: ")
        raise CallError(_GENERIC, f"{what}: {text}") from None
    except TimeoutError:
        text = f"nobody answered in {START_SECONDS:g} s"
        raise CallError(_GENERIC, f"{what}: {text}") from None
