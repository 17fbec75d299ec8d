"""One vfio-user client, from its connection to its end."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from typing import Any

from vring.errors import VringError
from vring_serial import unix_fds
from vring_serial.device.pci import PciDevice
from vring_serial.device.registers.interrupts import NoInterrupts
from vring_serial.device.registers.state import QUEUE_AREAS
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.framing import BadMessageError, Empty, Payload
from vring_serial.proto.vfio_user import (
    MAX_PAYLOAD,
    Message,
    VfioUserError,
    VfioUserParser,
    error_reply,
    reply,
)
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_regions import NUM_REGIONS, RegionIoFds
from vring_serial.proto.vfio_user_version import MAJOR, MINOR, Capabilities, Version
from vring_serial.proto.vfio_user_wire import (
    IRQ_SET_ACTION,
    IRQ_SET_DATA,
    Command,
    DeviceFlag,
    DeviceInfo,
    Header,
    IrqIndex,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)
from vring_serial.transport.connection import MAX_UNREAD, Connection
from vring_serial.transport.event_fds import check_kept
from vring_serial.transport.lost_memory import describe_loss
from vring_serial.transport.repeatable import (
    AREA_SIZE,
    ATOMIC_SIZE,
    Handled,
    RepeatableConnection,
)
from vring_serial.transport.session import FatalError, Handler, Session, SessionContext
from vring_serial.transport.vfio_user.capabilities import agree
from vring_serial.transport.vfio_user.dirty import DmaLog
from vring_serial.transport.vfio_user.dma import DmaTable
from vring_serial.transport.vfio_user.features import DeviceFeatures
from vring_serial.transport.vfio_user.function_memory import FunctionMemory
from vring_serial.transport.vfio_user.irqs import NO_DESCRIPTORS, Interrupts
from vring_serial.transport.vfio_user.moved import MovedState
from vring_serial.transport.vfio_user.regions import Regions
from vring_serial.transport.vfio_user.remote import WINDOW_BYTES, RemoteMemory
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.shadow import ClientMemory
from vring_serial.transport.vfio_user.state import MAX_DMA_MAPS, ClientState
from vring_serial.transport.vfio_user.written import Left, Writer
from vring_serial.unix_fds import stream_socket
from vring_serial.unix_socket import refuse_descriptors

#: Bytes read in one turn of the loop.
READ_SIZE = 64 * 1024
#: The client is listened to while a whole window of ours waits for it to read: it may itself wait
#: for us to read its answers.
MAX_UNREAD_BY_CLIENT = MAX_UNREAD + 2 * WINDOW_BYTES
#: Roles of descriptors (see Keeping): a region of memory, the copy of one that is not shared, an
#: interrupt by type and number, the event that unmasks INTx, both ends of the socket for our
#: requests, a queue's kick, the memory of a state on its way.
MEMORY, COPY, IRQ, UNMASK = "memory.{}", "copy.{}", "irq.{}.{}", "unmask"
TWIN, TWIN_OF_CLIENT = "twin", "twin.client"
KICK, STATE = "kick.{}", "state.{}"
#: Matches all of them.
ROLES = re.compile(r"(memory|copy|kick|state)\.[0-9]+|irq\.[0-9]+\.[0-9]+|unmask|twin(\.client)?")


class NotThereError(VfioUserError):
    """The client asked for something optional that this device lacks; not logged as a warning."""


class VfioUserSession(Session[Message]):
    """Serves a PCI function to one client over a connected socket.

    Args:
        sock: connected and non-blocking; taken over.
        pci: what is served. It is reset when the session ends: queues that went on with the next
            client's memory would write into what is another guest's.
        rings: between ``pci`` and its device.
        context: of the server.
        left: what a predecessor of this process left of the session, with which ``pci`` was made;
            or why that cannot be gone on with. None: nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        pci: PciDevice,
        rings: RemoteRings,
        context: SessionContext,
        left: Left | StateError | None = None,
    ) -> None:
        self._pci = pci
        self._rings = rings
        self._keeping = context.keeping
        rings.puts_off = context.keeping is not None
        self._roles: set[str] = set()  # in which descriptors are kept
        self._files: dict[unix_fds.FileId, int] = {}  # serials of MEMORY, as far as those are kept
        self._client_changed = False  # what it has set up, since that was written down
        before = left if isinstance(left, Left) else None
        self._state = ClientState() if before is None else before.client
        self._writer: Writer | None = None
        handled = Handled() if before is None else before.handled
        if context.keeping is not None:
            self._writer = Writer(context.keeping, pci, rings.state, before)
        self._twin: Connection | None = None
        # A successor takes replies off the socket only when they are whole: no longer ones come.
        self._twin_parser = VfioUserParser(MAX_PAYLOAD if self._writer is None else ATOMIC_SIZE)
        self._dma = DmaTable(
            MAX_DMA_MAPS,
            context.watch,
            self._state.regions,
            None if context.keeping is None else self._keep_copy,
        )
        self._memory = FunctionMemory(pci, self._dma, self._state, self._rings_started)
        self._dirty = DmaLog(self._state, self._dma, rings, self._memory.restart)
        self._features = DeviceFeatures(
            pci,
            rings,
            self._state,
            self._dirty,
            MovedState(self._state, lambda number, fd: self._keep(STATE.format(number), fd)),
            set_running=self._memory.set_running,
            tell=lambda text: self._log.log(logging.INFO, "%s: %s", self._name, text),
        )
        self._beside: list[int] = []  # descriptors that go with the next reply
        # A predecessor's are put back in the loop's next turn: see _resume.
        self._closer = context.closer
        self._interrupts = self._make_interrupts(None if left is None else ClientState())
        self._regions = Regions(
            pci, self._state, keep_kick=self._keep_kick, send_beside=self._send_beside
        )
        self._handlers = self._handler_table()
        pci.set_irq_sink(self._interrupts, client_masks=True)
        super().__init__(
            sock,
            VfioUserParser(),
            context,
            read_size=READ_SIZE,
            max_unread=MAX_UNREAD_BY_CLIENT,
            handled=handled,
            handled_fds=self._answered_fds(handled),
            longest=Header.SIZE + MAX_PAYLOAD,
        )
        if left is not None:  # in the loop's next turn: the server knows the session then
            self._loop.call_soon(self._resume, left)

    # --- what a successor of this process needs

    def _resume(self, left: Left | StateError) -> None:
        """Go on where a predecessor ended; if that cannot be, the session ends."""
        keeping = self._keeping
        assert keeping is not None
        if self._closed:
            return
        self._roles = self._used_roles()
        try:
            if isinstance(left, StateError):
                raise left
            self._state.life += 1
            self._resume_interrupts(keeping)
            self._resume_memory(keeping)
            self._features.resume(lambda number: keeping.take(STATE.format(number)))
            self._resume_requests(keeping)
            self._resume_queues(left)
        except (StateError, RemoteProtocolError, VringError, OSError, LookupError) as error:
            self.send_away(f"what the process before left cannot be gone on with: {error}")
            return
        self._write_down(left.handled, self._state)  # for the next one: that there was this one
        self._greeted()
        self._pci.tell_again()

    def _resume_interrupts(self, keeping: Keeping) -> None:
        state = self._state
        # It may have been unmasked by an event that nobody sees again.
        state.intx_masked = False
        with ExitStack() as stack:
            fds: dict[int, list[int]] = {}
            for index, numbers in state.irqs.items():
                roles = [IRQ.format(index, number) for number in numbers]
                fds[index] = [self._take_event(keeping, role, stack, True) for role in roles]
            unmask = -1
            if state.unmask_event:
                unmask = self._take_event(keeping, UNMASK, stack, False)
            self._interrupts = self._make_interrupts(fds=fds, unmask_fd=unmask)
            stack.pop_all()
        self._pci.set_irq_sink(self._interrupts, client_masks=True)

    def _resume_memory(self, keeping: Keeping) -> None:
        with ExitStack() as stack:

            @cache
            def take_memory(serial: int) -> int:
                return self._take(keeping, MEMORY.format(serial), stack)

            def take_copy(serial: int) -> int:
                fd = keeping.take(COPY.format(serial))
                if fd is None:
                    return -1
                stack.callback(os.close, fd)
                return fd

            self._dma.resume(take_memory, take_copy)

    def _resume_requests(self, keeping: Keeping) -> None:
        if self._state.agreed is None:
            return
        if self._state.agreed.twin_socket:
            fd = keeping.take(TWIN)
            twin = None if fd is None else stream_socket(fd, listening=False)
            if twin is None:
                raise StateError(f"the descriptor {TWIN} is not there, or no connection")
            self._twin = self._make_twin(twin)
        self._begin_requests(self._state.agreed)

    def _resume_queues(self, left: Left) -> None:
        queues = left.function.registers.queues
        for queue in (queues[index] for index in left.running):
            if not all(self._dma.has_copy(getattr(queue, area)) for area in QUEUE_AREAS):
                # What the device took and gave was in a copy, of which nothing is left.
                raise StateError(f"the ring of queue {queue.index} is in memory that is not shared")
        failed = {queue.index for queue in queues if queue.failed}
        self._dirty.resume()
        if self._state.regions and self._features.running:
            with self._rings.resuming():
                self._memory.set_running(True)
        for queue in queues:
            if queue.failed and queue.index not in failed:
                raise StateError(f"queue {queue.index} cannot run")

    def _take(self, keeping: Keeping, role: str, stack: ExitStack) -> int:
        """Return the descriptor that a predecessor left; ``stack`` closes it."""
        fd = keeping.take(role)
        if fd is None:
            raise StateError(f"the descriptor {role} is not there")
        stack.callback(self._closer.close, [fd])
        return fd

    def _take_event(self, keeping: Keeping, role: str, stack: ExitStack, writable: bool) -> int:
        fd = self._take(keeping, role, stack)
        check_kept(fd, role, writable=writable)
        return fd

    def _keep(self, role: str, fd: int) -> None:
        """Keep a descriptor until :meth:`_write_down` finds that it is not in use."""
        if self._keeping is not None:
            self._keeping.keep(role, fd)
            self._roles.add(role)

    def _keep_kick(self, queue: int, fd: int) -> None:
        if (role := KICK.format(queue)) not in self._roles:
            self._keep(role, fd)

    def _keep_copy(self, serial: int, fd: int) -> None:
        self._keep(COPY.format(serial), fd)

    def _record(self, handled: Handled) -> None:
        changed, self._client_changed = self._client_changed, False
        self._write_down(handled, self._state if changed else None)
        message = handled.message
        if message and VfioUserParser.command_of(message) != Command.VERSION:
            self._drop({TWIN_OF_CLIENT} & self._roles)
        self._rings.begin()

    def _answered_fds(self, handled: Handled) -> list[int]:
        """Return the descriptors that go with what a predecessor answered, or was about to."""
        if not handled.message or self._keeping is None:
            return []
        command = VfioUserParser.command_of(handled.message)
        if command == Command.VERSION:
            twin = self._keeping.take(TWIN_OF_CLIENT)
            return [] if twin is None else [twin]
        if command == Command.DEVICE_GET_REGION_IO_FDS:
            with suppress(RemoteProtocolError):
                asked = RegionIoFds.unpack(handled.message[Header.SIZE :])
                self._regions.get_io_fds(asked, [])
        fds, self._beside = self._beside, []
        return fds

    def _write_down(self, handled: Handled, client: ClientState | None) -> None:
        assert self._writer is not None
        self._writer.write(handled, client)
        if client is not None:
            self._drop(self._roles - self._used_roles())

    def _used_roles(self) -> set[str]:
        state = self._state
        used = {
            MEMORY.format(each.descriptor) if each.shared else COPY.format(each.serial)
            for each in state.regions.values()
        }
        used |= {IRQ.format(index, nr) for index, numbers in state.irqs.items() for nr in numbers}
        used |= {KICK.format(index) for index in self._pci.shared_kicks}
        if state.unmask_event:
            used.add(UNMASK)
        if state.memory is not None:
            used.add(STATE.format(state.memory))
        if state.agreed is not None and state.agreed.twin_socket:
            used |= {TWIN, TWIN_OF_CLIENT}  # the latter until the answer that brings it is read
        return used

    def _drop(self, roles: set[str]) -> None:
        for role in roles:
            assert self._keeping is not None
            self._keeping.drop(role)
        self._roles -= roles

    # --- what a session needs

    def _release(self) -> None:
        self._drop(set(self._roles))
        if self._twin is not None:
            self._twin.close()
        self._pci.set_irq_sink(NoInterrupts())
        self._memory.close()
        self._features.close()
        self._rings.log = None
        self._pci.reset()
        self._dma.close()
        if self._rings.client is not None:
            self._rings.client.remote.close()
            self._rings.client = None
        self._interrupts.close()

    def _loss(self) -> str | None:
        return describe_loss(self._dma.mapped)

    def _handle(self, message: Message) -> None:
        if message.is_reply:
            self._handle_reply(message)
            return
        try:
            super()._handle(message)
        finally:
            unix_fds.close_all(self._beside)
            self._beside = []

    def _handle_reply(self, message: Message) -> None:
        self._closer.close(message.fds)
        try:
            if self._rings.client is None:
                raise RemoteProtocolError("a reply that nobody asked for")
            self._rings.client.remote.handle_reply(message)
        except RemoteProtocolError as error:
            raise FatalError(f"{message.name}: {error}") from None

    def _answer(self, message: Message, fds: list[int]) -> Payload | None:
        if self._state.agreed is None and message.command != Command.VERSION:
            raise FatalError("it came before VERSION")
        payload = message.decode()
        handler = self._handlers.get(message.command)
        if handler is None:
            raise VfioUserError(message.name, "not supported", errno.EOPNOTSUPP)
        if message.command not in (Command.DMA_MAP, Command.DMA_UNMAP):
            self._memory.settle(self._dirty, complete=True)
        if message.command in self._features.handlers:
            self._client_changed = True
        return handler(payload, fds)

    def _reply(self, message: Message, answer: Payload | None) -> None:
        if not message.no_reply:
            data = reply(message.command, message.message_id, answer)
            self._connection.send(data, self._beside)
            self._beside = []

    def _send_beside(self, fd: int) -> None:
        """Have a descriptor go with the next reply; taken over."""
        self._beside.append(fd)

    def _refusal(self, message: Message, error: Exception) -> VfioUserError:
        if isinstance(error, VfioUserError):
            return error
        cause, number = str(error), errno.EINVAL
        if isinstance(error, MemoryError):
            cause, number = "out of memory", errno.ENOMEM
        elif isinstance(error, OSError):
            cause, number = error.strerror or str(error), error.errno or errno.EIO
        return VfioUserError(message.name, cause, number)

    def _refuse(self, message: Message, error: BadMessageError) -> None:
        assert isinstance(error, VfioUserError)
        level = logging.DEBUG if isinstance(error, NotThereError) else logging.WARNING
        self._log.log(level, "%s: refused %s", self._name, error)
        if not message.no_reply:
            self._connection.send(error_reply(message.command, message.message_id, error.errno))

    def _handler_table(self) -> dict[int, Handler]:
        return {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._device_reset,
            **self._regions.handlers,
            **self._features.handlers,
        }

    # --- negotiation and description

    def _version(self, version: Version, fds: list[int]) -> Version:
        if self._state.agreed is not None:
            raise RemoteProtocolError("it came twice")
        proposed = version.capabilities
        agreed = self._state.agreed = agree(version)
        self._client_changed = True
        if agreed.twin_socket:
            self._twin = self._open_twin()
            agreed = replace(agreed, twin_fd_index=0)
        self._begin_requests(self._state.agreed)
        self._log.log(logging.INFO, "%s: agreed on %s", self._name, agreed)
        self._greeted()
        return Version(MAJOR, MINOR, agreed if proposed is not None else None)

    def _open_twin(self) -> Connection:
        """Make the socket for the server's requests; the client's end goes with the reply."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._beside.append(theirs.detach())
        self._keep(TWIN, ours.fileno())
        self._keep(TWIN_OF_CLIENT, self._beside[-1])
        return self._make_twin(ours)

    def _make_twin(self, ours: socket.socket) -> Connection:
        ours.setblocking(False)
        refuse_descriptors(ours)
        arguments: dict[str, Any] = {
            "read_size": READ_SIZE,
            "max_fds": 0,
            "closer": self._closer,
            "received": self._twin_received,
            "go_on": self._handle_replies,
            "lost": self._lost,
            "max_unread": MAX_UNREAD_BY_CLIENT,
        }
        if self._keeping is None:
            return Connection(ours, **arguments)
        return RepeatableConnection(
            ours,
            size_of=self._twin_parser.size_of,
            header_size=self._twin_parser.header_size,
            fds_of=self._twin_parser.fds_of,
            pieces=None,
            record=lambda _: None,  # a reply changes nothing that is written down
            handled=Handled(),
            area=self._keeping.area(TWIN, AREA_SIZE),
            **arguments,
        )

    def _begin_requests(self, agreed: Capabilities) -> None:
        """Let rings ask the client for memory."""
        send = (self._twin or self._connection).ask
        piece, life = agreed.max_data_xfer_size, None
        if self._keeping is not None:
            piece, life = min(piece, ATOMIC_SIZE - DmaAccess.SIZE - Header.SIZE), self._state.life
        self._rings.client = ClientMemory(self._dma, RemoteMemory(send, piece, life))

    def _twin_received(self, received: unix_fds.Received) -> bool:
        self._closer.close(received.fds)
        self._twin_parser.receive_data(received.data)
        return self._handle_replies()

    def _handle_replies(self) -> bool:
        return self._take_turn(self._twin_parser, self._handle_twin)

    def _handle_twin(self, message: Message) -> None:
        if not message.is_reply:
            raise FatalError(f"{message.name}: a command on the socket for replies")
        self._handle_reply(message)

    def _get_info(self, _: DeviceInfo, fds: list[int]) -> DeviceInfo:
        return DeviceInfo(DeviceFlag.PCI | DeviceFlag.RESET, NUM_REGIONS, self._interrupts.types)

    # --- interrupts

    def _get_irq_info(self, asked: IrqInfo, fds: list[int]) -> IrqInfo:
        if asked.index in (IrqIndex.ERR, IrqIndex.REQ):
            raise NotThereError("DEVICE_GET_IRQ_INFO", "no error recovery, no requests for release")
        return self._interrupts.info(asked.index)

    def _set_irqs(self, irqs: IrqSet, fds: list[int]) -> None:
        self._interrupts.set(irqs, fds)
        self._client_changed = True
        if self._keeping is None or irqs.flags & IRQ_SET_DATA != IrqSetFlag.DATA_EVENTFD:
            return
        if irqs.flags & IRQ_SET_ACTION != IrqSetFlag.ACTION_TRIGGER:
            if self._interrupts.unmask_fd >= 0:
                self._keep(UNMASK, self._interrupts.unmask_fd)
            return
        for (index, number), fd in self._interrupts.descriptors().items():
            if index == irqs.index and irqs.start <= number < irqs.start + irqs.count:
                self._keep(IRQ.format(index, number), fd)

    def _make_interrupts(
        self,
        state: ClientState | None = None,
        fds: Mapping[int, Sequence[int]] = NO_DESCRIPTORS,
        unmask_fd: int = -1,
    ) -> Interrupts:
        """Return what delivers interrupts as ``state`` says; None: this session's."""
        pci = self._pci
        return Interrupts(
            pci.vectors,
            lambda: pci.intx_level,
            pci.vectors_changed,
            self._closer,
            state or self._state,
            fds=fds,
            unmask_fd=unmask_fd,
        )

    # --- memory

    def _dma_map(self, asked: DmaMap, fds: list[int]) -> None:
        fd = fds[0] if fds else -1
        serial, of = self._state.next_serial, -1
        file = unix_fds.file_of(fd) if fds and self._keeping is not None else None
        if file is not None and MEMORY.format(known := self._files.get(file, -1)) in self._roles:
            of = known  # one descriptor is kept, however many pieces of the file are mapped
        self._dma.map(asked, fd, serial, of)
        self._memory.note_change()
        self._client_changed = True
        self._state.next_serial += 1
        if file is not None and of < 0:
            self._keep(MEMORY.format(serial), fd)
            if len(self._files) >= MAX_DMA_MAPS:
                self._files.clear()
            self._files[file] = serial

    def _dma_unmap(self, asked: DmaUnmap, fds: list[int]) -> DmaUnmap:
        self._memory.note_change(self._dma.unmap(asked))
        self._client_changed = True
        return asked

    def _settle(self) -> None:
        self._memory.settle(self._dirty, complete=False)

    def _rings_started(self) -> None:
        """Have rings begin that started between two messages."""
        if self._writer is not None:
            self._writer.write_function()
            self._rings.begin()

    def _device_reset(self, _: Empty, fds: list[int]) -> None:
        self._pci.reset()
        self._features.reset()
        self._client_changed = True
