"""A guest in one object: RAM, a vhost-user frontend and a virtio-console driver."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vring_serial.callbacks import Listener, tell
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.guest.driver import ConsoleDriver
from vring_serial.guest.errors import (
    BackendClosedError,
    BackendError,
    BackendRefusedError,
    BackendTimeoutError,
    PortRemovedError,
)
from vring_serial.guest.frontend import DEFAULT_TIMEOUT, Frontend
from vring_serial.guest.memory import PAGE, GuestRam
from vring_serial.guest.port import GuestPort
from vring_serial.guest.queue import DriverQueue
from vring_serial.lifetime import Starting
from vring_serial.proto.console import (
    CONTROL_TRANSMITQ,
    MAX_PORTS,
    ConsoleConfig,
    ConsoleFeature,
    queue_count,
)
from vring_serial.proto.control import DriverSideEvent
from vring_serial.proto.vhost_user import Inflight
from vring_serial.proto.virtio import QUEUE_SIZE_MAX, Feature, Status, feature_names
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: What the driver can do. EMERG_WRITE is for early boot messages, of which this guest has none.
DRIVER_FEATURES = (
    Feature.VERSION_1 | Feature.EVENT_IDX | ConsoleFeature.SIZE | ConsoleFeature.MULTIPORT
)
#: Seconds that a backend may take to let a guest leave in good order.
LEAVE_TIMEOUT = 3.0
#: Seconds between two attempts to reach the next backend.
RECONNECT_INTERVAL = 0.01
#: Queues whose descriptors vhost-user can pass: SET_VRING_KICK has 8 bits for the index.
MAX_QUEUES = 256
#: Bytes of the configuration space that a driver reads: cols, rows, max_nr_ports.
CONFIG_BYTES = 8


@dataclass(frozen=True, slots=True)
class BackendLost:
    """The connection to the backend ended.

    Attributes:
        error: why: the backend left, or violated the protocol and was disconnected.
    """

    error: Exception


GuestEvent = DriverSideEvent | BackendLost


class EmbeddedGuest(Starting):
    """One guest, driving one vhost-user console backend.

    Attributes:
        path: the backend's socket.
        features: the negotiated feature bits.
        config: the device's configuration space as read at the start.
        on_event: called with what the device says about ports, and once if it is
            :class:`BackendLost`. One listener at a time: setting another one raises
            LocalProtocolError, None removes it.
    """

    on_event = Listener[Callable[[GuestEvent], None]]()

    def __init__(
        self,
        path: str,
        *,
        memory: int = 128 << 20,
        queue_size: int = 256,
        max_ports: int = 64,
        receive_size: int = PAGE,
        packed: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
        reconnect: bool = False,
    ) -> None:
        """Touches nothing yet.

        Args:
            path: the backend's unix socket.
            memory: bytes of RAM. A port takes ``queue_size * receive_size``, and once it was open
                2 MiB more; on the host only what was touched counts.
            queue_size: descriptors per queue, a power of two up to 32768.
            max_ports: most ports to have queues for, whatever the device has; 1 to 127.
            receive_size: bytes of one receive buffer; Linux has one page.
            packed: take packed rings where the device offers them, as Linux does.
            timeout: seconds that the backend may take for an answer.
            reconnect: when the backend closes the connection, go on with the next one that listens
                at ``path``, however long that takes: with the same memory and rings, as Cloud
                Hypervisor does. A backend that breaks the protocol ends the guest as ever.

        Raises:
            ConfigError: a number that cannot be.
        """
        if not 0 < queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise ConfigError(
                f"queue size {queue_size} is not a power of two up to {QUEUE_SIZE_MAX}"
            )
        if not 0 < max_ports < MAX_QUEUES // 2:
            raise ConfigError(f"{max_ports} ports are not between 1 and {MAX_QUEUES // 2 - 1}")
        if not 0 < receive_size <= 1 << 20:
            raise ConfigError(f"receive buffers of {receive_size} bytes are not in 1 to 1 MiB")
        if memory < 1 << 20:
            raise ConfigError(f"{memory} bytes of RAM are less than 1 MiB")
        self.path = path
        self.features = Feature(0)
        self.config = ConsoleConfig()
        self._log = RateLimitedLog(log)
        self._memory = memory
        self._queue_size = queue_size
        self._max_ports = max_ports
        self._receive_size = receive_size
        self._packed = packed
        self._timeout = timeout
        self._frontend = Frontend(path, timeout=timeout)
        self._reconnects = reconnect
        self._inflight: tuple[int, Inflight] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._ram: GuestRam | None = None
        self._queues: dict[int, DriverQueue] = {}
        self._driver: ConsoleDriver | None = None
        self._changed = asyncio.Event()
        self._lost: Exception | None = None
        self._following: asyncio.Task[None] | None = None
        self._config_is_new = False

    @property
    def ram(self) -> GuestRam | None:
        """The memory that the device has mapped, from the start on."""
        return self._ram

    @property
    def frontend(self) -> Frontend:
        """The connection to the backend, for who moves the guest to another one."""
        return self._frontend

    @property
    def queues(self) -> Mapping[int, DriverQueue]:
        """The virtqueues that run, by index."""
        return self._queues

    @property
    def ports(self) -> Mapping[int, GuestPort]:
        """The ports that the device has announced, by number."""
        return self._driver.ports if self._driver is not None else {}

    @property
    def lost(self) -> Exception | None:
        """Why the backend is gone, or None while it is there."""
        return self._lost

    # --- the life of a guest

    async def start(self) -> None:
        """Connect, negotiate, set up all rings, say DRIVER_OK and DEVICE_READY.

        Ports appear afterwards, as the device announces them.

        Raises:
            ResourceError: nothing accepts at the path, or there is no memory.
            BackendError: the backend refused, broke the protocol, was too slow or left.
        """
        try:
            await self._start()
        except BaseException:
            self._release(BackendClosedError("the guest did not start"))
            raise

    async def _start(self) -> None:
        frontend = self._frontend
        frontend.on_closed = self._backend_lost
        frontend.on_config_change = self._config_changed
        await frontend.connect()
        await frontend.negotiate_protocol()
        await frontend.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        await self._negotiate_features()
        await self._read_config()
        self._ram = ram = GuestRam(self._memory)
        indices = self._make_queues(ram)
        await frontend.set_memory(ram)
        await self._set_inflight(frontend)
        for index in indices:
            await frontend.set_queue(self._queues[index], ram)
        await frontend.enable_queues(indices)
        self._driver = driver = ConsoleDriver(
            ram,
            self._queues,
            multiport=bool(self.features & ConsoleFeature.MULTIPORT),
            max_ports=self.config.max_nr_ports,
            receive_size=self._receive_size,
            timeout=self._timeout,
            on_event=self._driver_event,
            on_failure=self._driver_failed,
        )
        await frontend.set_status(self._status | Status.DRIVER_OK)
        driver.start()

    async def _set_inflight(self, frontend: Frontend) -> None:
        """Let backends leave what the next one needs, if there may be one."""
        if self._reconnects and self._inflight is None:
            self._inflight = await frontend.get_inflight(len(self._queues), self._queue_size)
        if self._inflight is not None:
            await frontend.set_inflight(*self._inflight)

    async def _reconnect(self) -> None:
        """Hand the rings as they are to the next backend."""
        while self._frontend.closed is not None:
            frontend = Frontend(self.path, timeout=self._timeout)
            try:
                await frontend.connect()
            except ResourceError:
                await asyncio.sleep(RECONNECT_INTERVAL)
                continue
            self._frontend = frontend
            try:
                await frontend.negotiate_protocol()
                await self._hand_over(frontend)
            except BackendClosedError:
                frontend.close()  # killed again: on to the next
            except BackendError as error:
                frontend.close()
                self._backend_lost(error)
                return
        self._frontend.on_closed = self._backend_lost
        self._frontend.on_config_change = self._config_changed
        self._config_changed()

    async def go_on(self, frontend: Frontend, bases: Mapping[int, int]) -> None:
        """Have a backend serve the rings from where they were stopped.

        For who moves the guest: ``frontend`` is that of the guest, or another one on which
        ``negotiate_protocol`` was called and which was given what ``save_state`` returned of the
        former one. That is closed then.

        Args:
            frontend: connected.
            bases: what ``stop_queues`` returned.

        Raises BackendError; the former one has the guest then.
        """
        await self._hand_over(frontend, bases)
        former, self._frontend = self._frontend, frontend
        if former is not frontend:
            former.close()
        frontend.on_closed = self._backend_lost
        frontend.on_config_change = self._config_changed
        self._config_changed()

    async def _hand_over(self, frontend: Frontend, bases: Mapping[int, int] | None = None) -> None:
        ram = self._ram
        assert ram is not None
        if self.features & ~frontend.offered:
            raise BackendRefusedError(f"{self.path}: the next backend offers fewer features")
        await frontend.set_features(self.features)
        if bases is None or frontend is not self._frontend:  # else it has the memory already
            await frontend.set_memory(ram)
        await self._set_inflight(frontend)
        for index, queue in self._queues.items():
            await frontend.set_queue(queue, ram, None if bases is None else bases[index])
        await frontend.enable_queues(list(self._queues))
        await frontend.set_status(self._status | Status.DRIVER_OK)

    _status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK

    async def _negotiate_features(self) -> None:
        frontend = self._frontend
        offered = frontend.offered
        log.info("%s: the device offers %s", self.path, feature_names(offered, ConsoleFeature))
        if not offered & Feature.VERSION_1:
            raise BackendRefusedError(f"{self.path}: the backend does not offer VERSION_1")
        wanted = DRIVER_FEATURES | (Feature.RING_PACKED if self._packed else Feature(0))
        if not frontend.has_config:
            # Without a configuration space nobody knows how many ports there are.
            wanted &= ~int(ConsoleFeature.MULTIPORT | ConsoleFeature.SIZE)
        self.features = Feature(offered & wanted)
        await frontend.set_features(self.features)
        await frontend.set_status(self._status)
        status = await frontend.get_status()
        if status is not None and not status & Status.FEATURES_OK:
            refused = feature_names(self.features, ConsoleFeature)
            raise BackendRefusedError(f"{self.path}: the device does not accept {refused}")

    async def _read_config(self) -> None:
        data = await self._frontend.read_config(0, CONFIG_BYTES)
        if data is None:
            return
        self.config = ConsoleConfig.unpack(data.ljust(ConsoleConfig.SIZE, b"\0"))
        multiport = bool(self.features & ConsoleFeature.MULTIPORT)
        if multiport and not 1 <= self.config.max_nr_ports <= MAX_PORTS:
            raise BackendError(
                f"{self.path}: max_nr_ports is {self.config.max_nr_ports}, not 1 to {MAX_PORTS}"
            )

    def _make_queues(self, ram: GuestRam) -> list[int]:
        """Rings for as many ports as device, backend and guest all have room for; their indices."""
        multiport = bool(self.features & ConsoleFeature.MULTIPORT)
        ports = min(self.config.max_nr_ports, self._max_ports) if multiport else 1
        count = queue_count(ports, multiport)
        limit = self._frontend.max_queues
        if limit is not None and limit < count:
            least = CONTROL_TRANSMITQ + 1 if multiport else 2
            if limit < least:
                raise BackendRefusedError(
                    f"{self.path}: the backend serves {limit} queues; a console needs {least}"
                )
            log.warning("%s: the backend serves %d queues of %d", self.path, limit, count)
            count = limit & ~1
        for index in range(count):
            self._queues[index] = DriverQueue(
                index,
                ram,
                self._queue_size,
                event_idx=Feature.EVENT_IDX in self.features,
                packed=Feature.RING_PACKED in self.features,
            )
        return list(self._queues)

    async def aclose(self) -> None:
        """Close all ports, stop the rings, reset the device and leave. Safe to call twice.

        If it is cancelled the guest leaves at once, as a killed one does.
        """
        error = PortRemovedError("the guest was stopped")
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._driver is not None:
            self._driver.stop(error)
        try:
            if self._driver is not None and self._frontend.closed is None:
                async with asyncio.timeout(min(self._timeout, LEAVE_TIMEOUT)):
                    await self._frontend.stop_queues(list(self._queues))
                    await self._frontend.reset()
        except (BackendError, TimeoutError) as left:
            log.info("%s: while leaving: %s", self.path, left)
        finally:
            self._release(error)

    def _release(self, error: Exception) -> None:
        self._frontend.close()
        for task in (self._following, self._reconnecting):
            if task is not None:
                task.cancel()
        if self._lost is None:
            self._lost = error
        if self._driver is not None:
            self._driver.stop(error)
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()
        if self._inflight is not None:
            os.close(self._inflight[0])
            self._inflight = None
        if self._ram is not None:
            self._ram.close()
        self._notify()

    # --- what happens

    def _driver_failed(self, error: Exception) -> None:
        if self._frontend.closed is None:
            self._frontend.fail(error)
        else:
            self._backend_lost(error)

    def _backend_lost(self, error: Exception) -> None:
        started = self._driver is not None and self._lost is None
        if self._reconnects and started and isinstance(error, BackendClosedError):
            loop = asyncio.get_running_loop()
            self._reconnecting = loop.create_task(self._reconnect())
            return
        self._lost = error
        if self._driver is not None:
            self._driver.stop(error)
        self._notify()
        if self._driver is not None:
            tell(self._log, "on_event", self.on_event, BackendLost(error))

    def _driver_event(self, event: DriverSideEvent) -> None:
        self._notify()
        tell(self._log, "on_event", self.on_event, event)

    def _config_changed(self) -> None:
        """However often the backend says so, one look at a time."""
        self._config_is_new = True
        if self._following is None or self._following.done():
            self._following = asyncio.get_running_loop().create_task(self._follow_config())

    async def _follow_config(self) -> None:
        """Something in the configuration space, or the device status, is new.

        Without control messages Linux takes the console's size from the configuration space.
        """
        while self._config_is_new:
            self._config_is_new = False
            try:
                status = await self._frontend.get_status()
                if status is not None and status & Status.DEVICE_NEEDS_RESET:
                    raise BackendError(f"{self.path}: the device asks for a reset")
                await self._read_config()
            except BackendError as error:
                self._frontend.fail(error)
                return
        if self._driver is not None and not self.features & ConsoleFeature.MULTIPORT:
            self._driver.resize_console(self.config.cols, self.config.rows)

    # --- for its user

    async def wait_port(
        self,
        nr: int | None = None,
        name: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> GuestPort:
        """Return the port with this number, or name, as soon as the device has added it.

        Raises:
            BackendTimeoutError: it did not in ``timeout`` seconds (None: no limit); the message
                lists the ports that there are.
            BackendError, PortRemovedError: the backend left, or the guest was stopped.
        """
        try:
            async with asyncio.timeout(timeout):
                while (port := self._find_port(nr, name)) is None:
                    if self._lost is not None:
                        raise self._lost
                    await self._changed.wait()
                return port
        except TimeoutError:
            assert timeout is not None
            raise self._no_port(nr, name, timeout) from None

    def _find_port(self, nr: int | None, name: str | None) -> GuestPort | None:
        for port in self.ports.values():
            if nr in (None, port.nr) and name in (None, port.name):
                return port
        return None

    def _no_port(self, nr: int | None, name: str | None, timeout: float) -> BackendTimeoutError:
        wanted = f"port {nr}" if name is None else f"port {name!r}"
        present = ", ".join(f"{p.nr} {p.name!r}" for p in self.ports.values()) or "none"
        return BackendTimeoutError(
            f"{self.path}: no {wanted} in {timeout:g} s; the device's ports: {present}"
        )

    async def settle(self, quiet: float = 0.3) -> None:
        """Until the device has said nothing for ``quiet`` seconds. Raises what ended the guest."""
        while self._lost is None:
            try:
                async with asyncio.timeout(quiet):
                    await self._changed.wait()
            except TimeoutError:
                return
        raise self._lost

    async def wait_lost(self) -> Exception:
        """Wait until the backend is gone or the guest is stopped; return why."""
        while self._lost is None:
            await self._changed.wait()
        return self._lost

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
