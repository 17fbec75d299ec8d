"""What a worker answers to those who look at the service and change it while it runs."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vring_serial.chardev import Chardev, DescriptorEnd
from vring_serial.chardev.mux import MuxFront
from vring_serial.chardev.options import base_id
from vring_serial.chardev.ringbuf import RingbufChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.events import DeviceEvent, PortClosed, PortOpened, Side
from vring_serial.device.console.port import Port
from vring_serial.errors import ResourceError
from vring_serial.proto.virtio import Status
from vring_serial.service.changes import Changes
from vring_serial.service.link import CallError, Handler
from vring_serial.transport.server import Server

#: Most bytes that one call reads of a ring buffer.
READ_MAX = 1 << 20

#: Told of an event: its name and data.
Tell = Callable[[str, Mapping[str, Any]], None]

_GENERIC = "GenericError"
_NOT_FOUND = "DeviceNotFound"


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """One controller and the way in which a guest reaches it.

    Attributes:
        controller: the device.
        server: its transport.
        socket: path of that.
        protocol: ``vhost-user`` or ``vfio-user``.
    """

    controller: Controller
    server: Server[Any]
    socket: str
    protocol: str


class Answers:
    """Answers calls about the controllers of one process; see :class:`.link.Answerer`.

    Args:
        served: the controllers.
        restarts: how many processes served them before this one.
        changes: knows the names of devices, and host ends without a port.
        set_log_level: takes a name of ``cli.logs.LEVELS``.
    """

    def __init__(
        self,
        served: Sequence[Served],
        restarts: int,
        changes: Changes,
        set_log_level: Callable[[str], None],
    ) -> None:
        self._served = served
        self._restarts = restarts
        self._changes = changes
        self._set_log_level = set_log_level
        self._tell: Tell = lambda name, data: None
        self._ask_restart: Callable[[], None] | None = None

    def handlers(self) -> dict[str, Handler]:
        """Return what is called, by name."""
        return {
            "describe": self.describe,
            "ringbuf-read": self.ringbuf_read,
            "ringbuf-write": self.ringbuf_write,
            "disconnect-chardev": self.disconnect_chardev,
            "disconnect-frontend": self.disconnect_frontend,
            "log-level": self.log_level,
            "send-break": self.send_break,
            "queues": self.queues,
            "restart": self.restart,
        }

    def listen(self, tell: Tell) -> None:
        """Tell of what happens to the devices from now on."""
        self._tell = tell
        for served in self._served:
            served.controller.on_event = _listener(served.controller, self._event)
            served.server.on_peer = self._peer_listener(served)

    def serving(self, ask_restart: Callable[[], None], *, died: bool) -> None:
        """Note that everything has started, and tell of it if another process served before.

        Args:
            ask_restart: asks for a process that goes on from this one.
            died: the process before died, and did not hand over.
        """
        self._ask_restart = ask_restart
        if self._restarts:
            reason = "died" if died else "replaced"
            self._tell("worker", {"restarts": self._restarts, "reason": reason})

    # --- calls

    def describe(self) -> dict[str, Any]:
        """Return how often the process was followed by another, and every controller."""
        controllers = [self._describe(served) for served in self._served]
        spare = [
            {
                "chardev": id,
                "description": chardev.description,
                "filename": chardev.filename,
                "behind": _behind(chardev),
            }
            for id, chardev in self._changes.spare.items()
        ]
        return {"restarts": self._restarts, "controllers": controllers, "spare": spare}

    def ringbuf_read(self, chardev: str, size: int, format: str) -> str:
        """Take up to ``size`` of the oldest bytes; base64, or UTF-8 with bad bytes replaced."""
        data = self._ringbuf(chardev).read(min(size, READ_MAX))
        if format == "base64":
            return base64.b64encode(data).decode()
        return data.decode("utf-8", "replace")

    def ringbuf_write(self, chardev: str, data: str, format: str) -> None:
        """Put bytes into a ring buffer, as if the guest had written them."""
        raw = data.encode()
        if format == "base64":
            try:
                raw = base64.b64decode(data, validate=True)
            except binascii.Error as error:
                raise CallError(_GENERIC, f"Base64 data '{data}' is not valid: {error}") from None
        self._ringbuf(chardev).write(raw)

    def disconnect_chardev(self, chardev: str) -> bool:
        """Send the peer of a host end away; return whether there was one."""
        return self._chardev(chardev).send_away()

    def send_break(self, chardev: str) -> None:
        """Send a break on a host end's line, if it has one."""
        try:
            self._chardev(chardev).send_break()
        except ResourceError as error:
            raise CallError(_GENERIC, str(error)) from None

    def disconnect_frontend(self, controller: str) -> bool:
        """End the session of a controller's frontend; return whether there was one."""
        return self._find(controller).server.disconnect("an operator asked for it")

    def log_level(self, level: str) -> None:
        """Log from this level on."""
        self._set_log_level(level)

    def queues(self, controller: str, queue: int) -> dict[str, Any]:
        """Return where one queue is."""
        device = self._find(controller).controller
        if not 0 <= queue < device.num_queues:
            raise CallError(_GENERIC, f"Invalid virtqueue number {queue}")
        found = device.running.get(queue)
        if found is None:
            stopped = device.state.stopped_at.get(queue, 0)
            at = {"running": False, "size": 0, "avail": stopped, "used": stopped}
        else:
            ring = found.queue
            at = {
                "running": True,
                "size": ring.size,
                "avail": ring.avail_index,
                "used": ring.used_index,
            }
        return {"size_max": device.queue_size_max, **at}

    def restart(self) -> int:
        """Ask for a process that goes on from this one; return how many were before this one."""
        if self._ask_restart is None:
            raise CallError(_GENERIC, "the worker does not serve yet")
        self._ask_restart()
        return self._restarts

    # --- internals

    def _find(self, controller: str) -> Served:
        for served in self._served:
            if served.controller.name == controller:
                return served
        raise CallError(_NOT_FOUND, f"Device '{controller}' not found")

    def _chardev(self, id: str) -> Chardev:
        ends = [port.chardev for s in self._served for port in s.controller.ports.values()]
        for end in (*self._changes.spare.values(), *ends):
            if end.id == id:
                return end
            if isinstance(end, MuxFront) and base_id(end.id) == id:
                return end.mux.base
        raise CallError(_GENERIC, f"Chardev '{id}' not found")

    def _ringbuf(self, device: str) -> RingbufChardev:
        try:
            chardev = self._chardev(device)
        except CallError:
            raise CallError(_GENERIC, f"Device '{device}' not found") from None
        if not isinstance(chardev, RingbufChardev):
            raise CallError(_GENERIC, f"{device} is not a ringbuf device")
        return chardev

    def _describe(self, served: Served) -> dict[str, Any]:
        device = served.controller
        return {
            "id": device.name,
            "socket": served.socket,
            "protocol": served.protocol,
            "frontend": served.server.has_peer,
            "frontend_connects": served.server.connects,
            "max_ports": device.max_ports,
            "num_queues": device.num_queues,
            "status": device.status,
            "needs_reset": bool(device.status & Status.DEVICE_NEEDS_RESET),
            "offered": device.device_features,
            "features": device.driver_features,
            "ports": [
                {"id": self._changes.device_id(device.name, port.nr), **_describe_port(port)}
                for port in device.ports.values()
            ],
        }

    def _event(self, controller: Controller, event: DeviceEvent) -> None:
        if isinstance(event, (PortOpened, PortClosed)) and event.side is Side.GUEST:
            port = controller.ports.get(event.nr)
            if port is not None:
                is_open = isinstance(event, PortOpened)
                id = self._changes.device_id(controller.name, port.nr)
                self._tell("port", {"device": id, "open": is_open})

    def _peer_listener(self, served: Served) -> Callable[[str], None]:
        return lambda state: self._tell(
            "frontend", {"controller": served.controller.name, "state": state}
        )


def _listener(
    controller: Controller, function: Callable[[Controller, DeviceEvent], None]
) -> Callable[[DeviceEvent], None]:
    return lambda event: function(controller, event)


def _behind(chardev: Chardev) -> str:
    """Return the file name of what is behind a host end that ports share; "" if it is not one."""
    return chardev.mux.base.filename if isinstance(chardev, MuxFront) else ""


def _describe_port(port: Port) -> dict[str, Any]:
    out, back = port.traffic
    chardev = port.chardev
    return {
        "nr": port.nr,
        "name": port.name.decode(errors="backslashreplace"),
        "console": port.console,
        "chardev": chardev.id,
        "description": chardev.description,
        "filename": chardev.filename,
        "behind": _behind(chardev),
        "focus": not isinstance(chardev, MuxFront) or chardev.has_focus,
        "guest_open": port.guest_open,
        "guest_ready": port.guest_ready,
        "host_open": port.host_open,
        "host_connects": port.host_connects,
        "descriptor": isinstance(chardev.end, DescriptorEnd),
        "size": port.size,
        "out": dataclasses.asdict(out),
        "in": dataclasses.asdict(back),
    }
