"""What the monitor's commands do: they ask the workers, and put their answers into QMP's words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from vring_serial.chardev import kinds
from vring_serial.chardev.options import base_id
from vring_serial.proto.console import DEVICE_ID, ConsoleFeature
from vring_serial.proto.qmp import QEMU_VERSION, ErrorClass, QmpError
from vring_serial.proto.virtio import Feature, Status, feature_names
from vring_serial.service.link import CallError, CallTimeoutError
from vring_serial.service.qmp.commands import COMMANDS, EVENTS, EVENTS_OF_SERVICE, OF_SERVICE
from vring_serial.service.qmp.schema import check_arguments, introspect, not_found
from vring_serial.service.qmp.vm import ANSWER_SECONDS, Vm
from vring_serial.service.vms import Vms

_CLASSES = {error_class.value: error_class for error_class in ErrorClass}
_PATH = "/machine/peripheral/{}/virtio-backend"
_PORTS = ("virtserialport", "virtconsole")
_RING_FEATURES = Feature.INDIRECT_DESC | Feature.EVENT_IDX


class Monitor:
    """Carries out the commands of one monitor.

    If the service began with one VM, the chardevs and controllers of that have their own names;
    those of others are preceded by the VM's name and a slash. A monitor of one VM alone knows no
    others, and no prefix.

    Args:
        name: what ``query-name`` answers.
        package: our name and version.
        vms: the VMs.
        only: name of the VM that the service began with; "" if there were several.
        vm: name of the only VM that it sees; "" for all.

    Attributes:
        vm: see above.
        commands: what its clients may execute, by name.
    """

    def __init__(self, name: str, package: str, vms: Vms, only: str, vm: str = "") -> None:
        self.vm = vm
        left_out = OF_SERVICE if vm else frozenset()
        self.commands = {name: found for name, found in COMMANDS.items() if name not in left_out}
        self._name = name
        self._package = package
        self._all = vms
        self._only = vm or only
        self._handlers: dict[str, Callable[..., Awaitable[Any]]] = {
            "query-version": self._query_version,
            "query-commands": self._query_commands,
            "query-qmp-schema": self._query_qmp_schema,
            "query-status": self._query_status,
            "query-name": self._query_name,
            "query-chardev": self._query_chardev,
            "query-chardev-backends": self._query_chardev_backends,
            "chardev-add": self._chardev_add,
            "chardev-change": self._chardev_change,
            "chardev-remove": self._chardev_remove,
            "device_add": self._device_add,
            "device_del": self._device_del,
            "chardev-send-break": self._chardev_send_break,
            "ringbuf-read": self._ringbuf_read,
            "ringbuf-write": self._ringbuf_write,
            "device-list-properties": self._device_list_properties,
            "x-query-virtio": self._query_virtio,
            "x-query-virtio-status": self._query_virtio_status,
            "x-query-virtio-queue-status": self._query_virtio_queue_status,
            "x-vring-status": self._vring_status,
            "x-vring-disconnect": self._vring_disconnect,
            "x-vring-log-level": self._vring_log_level,
            "x-vring-restart": self._vring_restart,
            "x-vring-vm-add": self._vring_vm_add,
            "x-vring-vm-remove": self._vring_vm_remove,
        }

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Return what a known command answers. Raises QmpError."""
        check_arguments(self.commands[command], arguments)
        if command == "qmp_capabilities":
            return _negotiate(arguments)
        names = {name.replace("-", "_"): value for name, value in arguments.items()}
        try:
            return await self._handlers[command](**names)
        except CallError as error:
            raise QmpError(
                error.desc, _CLASSES.get(error.error_class, ErrorClass.GENERIC)
            ) from None
        except CallTimeoutError as error:
            raise QmpError(str(error)) from None

    def has(self, vm: str) -> bool:
        """Return whether this monitor is for a VM."""
        return any(known.name == vm for known in self._vms)

    def public_name(self, vm: str, name: str) -> str:
        """Return what clients of this monitor call a chardev or controller of a VM."""
        return self._prefix(vm) + name

    # --- about QMP

    async def _query_version(self) -> dict[str, Any]:
        major, minor, micro = QEMU_VERSION
        return {
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": self._package,
        }

    async def _query_commands(self) -> list[dict[str, str]]:
        return [{"name": name} for name in self.commands]

    async def _query_qmp_schema(self) -> list[dict[str, Any]]:
        left_out = EVENTS_OF_SERVICE if self.vm else frozenset()
        events = [event for event in EVENTS if event.name not in left_out]
        return introspect([*self.commands.values(), *events])

    # --- about the service

    async def _query_name(self) -> dict[str, str]:
        return {"name": self._name}

    async def _query_status(self) -> dict[str, Any]:
        controllers = [c for _, c in _controllers(await self._describe())]
        running = any(controller["frontend"] for controller in controllers)
        return {"running": running, "status": "running" if running else "prelaunch"}

    async def _query_chardev(self) -> list[dict[str, Any]]:
        described = await self._describe()
        ends = [
            (vm, port, port["guest_open"] and port["focus"])
            for vm, controller in _controllers(described)
            for port in controller["ports"]
        ]
        ends += [
            (vm.name, end, False)
            for vm, found in described
            for end in (found or {}).get("spare", [])
        ]
        infos: dict[str, dict[str, Any]] = {}
        for vm, end, is_open in ends:
            label = self.public_name(vm, end["chardev"])
            info = {"label": label, "filename": end["filename"], "frontend-open": is_open}
            if infos.setdefault(label, info)["frontend-open"] is not is_open:
                infos[label]["frontend-open"] = True  # the port that has the focus counts
            if end["behind"]:
                base = {"label": base_id(label), "filename": end["behind"], "frontend-open": True}
                infos[base_id(label)] = base
        return list(infos.values())

    async def _query_chardev_backends(self) -> list[dict[str, str]]:
        return [{"name": kind} for kind in kinds()]

    async def _chardev_send_break(self, id: str) -> dict[str, Any]:
        """Send a break on a serial line; others have none, and it does nothing, as in QEMU."""
        vm, name = self._split(id, _no_chardev)
        await vm.caller.call("send-break", chardev=name)
        return {}

    async def _chardev_add(self, id: str, backend: dict[str, Any]) -> Any:
        vm, name = self._split(id, _no_vm)
        return await vm.caller.call("chardev-add", id=name, backend=backend)

    async def _chardev_change(self, id: str, backend: dict[str, Any]) -> Any:
        vm, name = self._split(id, lambda id: QmpError(f"Chardev '{id}' does not exist"))
        return await vm.caller.call("chardev-change", id=name, backend=backend)

    async def _chardev_remove(self, id: str) -> dict[str, Any]:
        vm, name = self._split(id, _no_chardev)
        await vm.caller.call("chardev-remove", id=name)
        return {}

    async def _device_add(self, driver: str, **properties: Any) -> dict[str, Any]:
        if driver not in _PORTS:
            raise QmpError(f"'{driver}' is not a valid device model name")
        given = _port_properties(driver, properties)
        found: dict[str, Vm] = {}
        for key in ("bus", "chardev", "id"):
            if key in given:
                vm, given[key] = self._split(given[key], _no_vm)
                found[vm.name] = vm
        if len(found) > 1:
            raise QmpError(f"They are not of one VM, but of {' and '.join(found)}")
        vm = next(iter(found.values()), self._first())
        await vm.caller.call("device-add", driver=driver, **given)
        return {}

    async def _device_del(self, id: str) -> dict[str, Any]:
        name = id.removeprefix("/machine/peripheral/")
        missing = QmpError(f"Device '{id}' not found", ErrorClass.DEVICE_NOT_FOUND)
        vm, name = self._split(name, lambda _: missing)
        await vm.caller.call("device-del", id=name)
        return {}

    async def _ringbuf_read(self, device: str, size: int, format: str = "utf8") -> str:
        if size <= 0:
            raise QmpError("size must be greater than zero")
        vm, name = self._split(device, _no_device)
        data = await vm.caller.call("ringbuf-read", chardev=name, size=size, format=format)
        return str(data)

    async def _ringbuf_write(self, device: str, data: str, format: str = "utf8") -> dict[str, Any]:
        vm, name = self._split(device, _no_device)
        await vm.caller.call("ringbuf-write", chardev=name, data=data, format=format)
        return {}

    async def _device_list_properties(self, typename: str) -> list[dict[str, Any]]:
        if typename not in _PORTS:
            raise QmpError(f"Device '{typename}' not found", ErrorClass.DEVICE_NOT_FOUND)
        text = "ID of a chardev to use as a backend"
        return [
            {"name": "nr", "type": "uint32", "default-value": (1 << 32) - 1},
            {"name": "chardev", "type": "str", "description": text},
            {"name": "name", "type": "str"},
        ]

    # --- x-query-virtio

    async def _query_virtio(self) -> list[dict[str, str]]:
        return [
            {
                "path": _PATH.format(self.public_name(vm, controller["id"])),
                "name": "virtio-serial",
            }
            for vm, controller in _controllers(await self._describe())
        ]

    async def _query_virtio_status(self, path: str) -> dict[str, Any]:
        _, controller = await self._controller_at(path)
        running = bool(controller["status"] & Status.DRIVER_OK)
        offered = _features(controller["offered"])
        return {
            "name": "virtio-serial",
            "device-id": DEVICE_ID,
            "vhost-started": False,
            "device-endian": "little",
            "guest-features": _features(controller["features"]),
            "host-features": offered,
            "backend-features": offered,
            "num-vqs": controller["num_queues"],
            "status": _statuses(controller["status"]),
            "isr": 0,
            "queue-sel": 0,
            "vm-running": controller["frontend"],
            "broken": controller["needs_reset"],
            "disabled": False,
            "use-started": True,
            "started": running,
            "start-on-kick": False,
            "disable-legacy-check": False,
            "bus-name": controller["id"],
            "use-guest-notifier-mask": True,
        }

    async def _query_virtio_queue_status(self, path: str, queue: int) -> dict[str, Any]:
        vm, controller = await self._controller_at(path)
        found = await vm.caller.call("queues", controller=controller["id"], queue=queue)
        return {
            "name": "virtio-serial",
            "queue-index": queue,
            "inuse": (found["avail"] - found["used"]) & 0xFFFF,
            "vring-num": found["size"],
            "vring-num-default": found["size_max"],
            "vring-align": 4096,
            "vring-desc": 0,
            "vring-avail": 0,
            "vring-used": 0,
            "last-avail-idx": found["avail"],
            "shadow-avail-idx": found["avail"],
            "used-idx": found["used"],
            "signalled-used": 0,
            "signalled-used-valid": False,
        }

    # --- what QEMU has no word for

    async def _vring_status(self) -> list[dict[str, Any]]:
        return [
            {"name": vm.name, "answers": found is not None, "restarts": 0, "controllers": []}
            | (found or {})
            | {"prefix": self._prefix(vm.name)}
            for vm, found in await self._describe()
        ]

    async def _vring_disconnect(self, chardev: str = "", controller: str = "") -> dict[str, Any]:
        if bool(chardev) == bool(controller):
            raise QmpError("Parameters 'chardev' and 'controller': give one of them")
        if chardev:
            vm, name = self._split(chardev, _no_chardev)
            done = await vm.caller.call("disconnect-chardev", chardev=name)
        else:
            vm, name = self._split(controller, _no_device)
            done = await vm.caller.call("disconnect-frontend", controller=name)
        if not done:
            raise QmpError(f"'{chardev or controller}' has nobody connected")
        return {}

    async def _vring_log_level(self, level: str) -> dict[str, Any]:
        await asyncio.gather(*(vm.caller.call("log-level", level=level) for vm in self._vms))
        return {}

    async def _vring_restart(self, vm: str | None = None) -> dict[str, Any]:
        chosen = [known for known in self._vms if vm in (None, known.name)]
        if not chosen:
            raise not_found("VM", str(vm))
        await asyncio.gather(*(known.restart() for known in chosen))
        return {}

    async def _vring_vm_add(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        await self._all.add(name, config)
        return {}

    async def _vring_vm_remove(self, name: str) -> dict[str, Any]:
        await self._all.remove(name)
        return {}

    # --- internals

    @property
    def _vms(self) -> Sequence[Vm]:
        """The VMs that it sees: one, or all, or none if its own was removed."""
        if not self.vm:
            return self._all.known
        return [vm for vm in self._all.known if vm.name == self.vm]

    def _first(self) -> Vm:
        if not (vms := self._vms):
            raise not_found("VM", self.vm)
        return vms[0]

    def _prefix(self, vm: str) -> str:
        return "" if vm == self._only else f"{vm}/"

    async def _describe(self) -> list[tuple[Vm, dict[str, Any] | None]]:
        """Return what every worker says of itself; None for one that does not answer."""
        vms = tuple(self._vms)  # others may come meanwhile

        async def ask(vm: Vm) -> dict[str, Any] | None:
            try:
                found = await vm.caller.call("describe", seconds=ANSWER_SECONDS)
            except CallTimeoutError:
                return None
            return found if isinstance(found, dict) else None

        return list(zip(vms, await asyncio.gather(*(ask(vm) for vm in vms)), strict=True))

    def _split(self, name: str, error: Callable[[str], QmpError]) -> tuple[Vm, str]:
        """Return the VM of a public name, and the name within it."""
        wanted, slash, rest = name.partition("/")
        for vm in self._vms:
            if slash and vm.name == wanted and wanted != self._only:
                return vm, rest
        for vm in self._vms:
            if vm.name == self._only:
                return vm, name
        raise error(name)

    async def _controller_at(self, path: str) -> tuple[Vm, dict[str, Any]]:
        found = {vm.name: vm for vm in self._vms}
        for vm, controller in _controllers(await self._describe()):
            if path == _PATH.format(self.public_name(vm, controller["id"])):
                return found[vm], controller
        raise QmpError(f"Path {path} is not a realized VirtIODevice")


def _negotiate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if wanted := arguments.get("enable"):
        raise QmpError(f"Capability '{wanted[0]}' is not available")
    return {}


def _controllers(
    described: Sequence[tuple[Vm, dict[str, Any] | None]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    for vm, found in described:
        for controller in (found or {}).get("controllers", []):
            yield vm.name, controller


def _no_chardev(name: str) -> QmpError:
    return QmpError(f"Chardev '{name}' not found")


def _no_device(name: str) -> QmpError:
    return QmpError(f"Device '{name}' not found")


def _no_vm(name: str) -> QmpError:
    return QmpError(f"'{name}' does not begin with the name of a VM and a slash")


def _port_properties(driver: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties of a new port, checked as QEMU checks them."""
    given: dict[str, Any] = {}
    for key, value in properties.items():
        if key in ("bus", "id", "chardev", "name"):
            if not isinstance(value, str):
                raise QmpError(f"Invalid parameter type for '{key}', expected: string")
        elif key == "nr":
            if isinstance(value, str) and value.isdecimal():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int):
                raise QmpError(f"Invalid parameter type for '{key}', expected: integer")
        else:
            raise QmpError(f"Property '{driver}.{key}' not found")
        given[key] = value
    return given


def _features(bits: int) -> dict[str, Any]:
    """Return feature bits by their names in the specification."""
    transports, others = [], []
    for bit in range(bits.bit_length()):
        if not bits >> bit & 1:
            continue
        name = feature_names(1 << bit, ConsoleFeature)
        if bit < 24:
            others.append(f"VIRTIO_CONSOLE_F_{name}")
        elif 1 << bit & _RING_FEATURES:
            transports.append(f"VIRTIO_RING_F_{name}")
        else:
            transports.append(f"VIRTIO_F_{name}")
    return {"transports": transports, "dev-features": others}


def _statuses(bits: int) -> dict[str, Any]:
    names = [f"VIRTIO_CONFIG_S_{s.name}" for s in Status if bits & s]
    unknown = bits & ~sum(Status)
    return {"statuses": names} | ({"unknown-statuses": unknown} if unknown else {})
