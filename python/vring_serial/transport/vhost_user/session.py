"""One vhost-user frontend, from its connection to its end."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Sequence

from vring.errors import MemoryLostError, RingError, VringError
from vring_serial import unix_fds
from vring_serial.device.base import VirtioDevice
from vring_serial.errors import RemoteProtocolError, StateError
from vring_serial.proto.framing import BadMessageError
from vring_serial.proto.vhost_user import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    ConfigAccess,
    DeviceStateTransfer,
    Empty,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    VhostUserError,
    VhostUserParser,
    VringAddress,
    VringDescriptor,
    VringState,
    reply,
)
from vring_serial.proto.virtio import Feature, Status, feature_names
from vring_serial.saving import Packer
from vring_serial.transport.event_fds import check_event_descriptor
from vring_serial.transport.lost_memory import describe_loss
from vring_serial.transport.repeatable import Handled
from vring_serial.transport.session import SESSION, FatalError, Handler, Session, SessionContext
from vring_serial.transport.vhost_user.channel import BackendChannel, CallRelay
from vring_serial.transport.vhost_user.device_state import DeviceStates
from vring_serial.transport.vhost_user.inflight import Inflights
from vring_serial.transport.vhost_user.log import MigrationLog
from vring_serial.transport.vhost_user.memory import FrontendMemory
from vring_serial.transport.vhost_user.state import FRONTEND, ring_records, saved_state
from vring_serial.transport.vhost_user.vring import CALL, ERROR, KICK, Vring

#: Seconds between two looks at a queue whose frontend does not kick.
POLL_INTERVAL = 0.002
#: Bytes read in one turn of the loop.
READ_SIZE = 4096
#: Roles of the channel's descriptor, and of the one beside the last answer (see Keeping).
CHANNEL, ANSWER = "channel", "answer"

#: All roles in which a session keeps descriptors.
ROLES = re.compile(r"(memory|kick|call|error)\.[0-9]+|channel|answer|log|state|inflight")

#: Feature bits that are for the backend alone.
_BACKEND_BITS = 1 << F_PROTOCOL_FEATURES | 1 << F_LOG_ALL
_INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
#: A frontend that has sent one of them is there to stay: the others are sent by all who ask.
_GREETINGS = (Request.SET_OWNER, Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES)


class VhostUserSession(Session[Message]):
    """Serves the device to one frontend over a connected socket.

    Args:
        sock: connected and non-blocking; taken over.
        device: what is served. Its queues are stopped when the session ends; all else it keeps, for
            the frontend may come back and go on.
        context: of the backend.
        offered: protocol features.
        packed: offer packed rings.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: VirtioDevice,
        context: SessionContext,
        *,
        offered: ProtocolFeature,
        packed: bool,
    ) -> None:
        self._device = device
        self._offered = offered
        self._told: set[str] = set()  # warnings of this session that are not repeated
        self._features_offered = int(device.device_features)
        if packed:
            self._features_offered |= Feature.RING_PACKED
        self._keeping = context.keeping
        self._packer = Packer(FRONTEND)
        self._roles: set[str] = set()  # in which descriptors are kept
        self._queue_roles: set[str] = set()  # those of them that queues use
        self._state, self._damage = saved_state(context, device.num_queues)
        records = ring_records(context.keeping, device.num_queues)
        self._vrings = [
            Vring(index, setup, device, context.closer, record, self._queue_roles)
            for index, (setup, record) in enumerate(zip(self._state.vrings, records, strict=True))
        ]
        self._channel: BackendChannel | None = None
        self._beside: list[int] = []  # the descriptor that goes with the next answer
        self._inflight = Inflights(
            device,
            self._vrings,
            self._state,
            keep=self._keep,
            answer_with=self._send_beside,
            warn=self._warn_once,
        )
        self._device_states = DeviceStates(
            device,
            self._vrings,
            self._state,
            keep=self._keep,
            answer_with=self._send_beside,
            tell=self._tell,
        )
        self._calls = CallRelay(self._call_inband)
        self._poll_timer: asyncio.TimerHandle | None = None
        self._memory = FrontendMemory(
            self._state,
            watch=context.watch,
            closer=context.closer,
            keep=self._keep,
            stop=self._stop_all,
            run=self._run_all,
        )
        self._dirty_log = MigrationLog(
            self._state,
            memory=lambda: self._memory.mapped,
            watch=context.watch,
            closer=context.closer,
            keep=self._keep,
            restart=self._restart,
        )
        self._handlers = self._handler_table()
        super().__init__(
            sock,
            VhostUserParser(Request),
            context,
            read_size=READ_SIZE,
            handled=self._state.handled,
            handled_fds=self._handled_fds(context),
        )
        if context.resumed:  # in the loop's next turn: the server knows the session then
            self._loop.call_soon(self._resume)

    # --- what the device tells ------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the frontend that the configuration space changed."""
        if self._channel is not None and self._has(ProtocolFeature.CONFIG):
            self._channel.config_changed()

    def ring_broken(self, error: RingError) -> None:
        """Tell the frontend that the driver broke a ring; the device has set NEEDS_RESET."""
        if isinstance(error, MemoryLostError):
            return  # the watch tells, and of the cause
        self._log.warning("%s: the guest's driver broke %s", self._name, error)
        for vring in self._vrings:
            if repr(vring) == error.queue and not vring.report_error():
                self._tell_error_inband(vring)
        if self._has(ProtocolFeature.STATUS):
            self.config_changed()

    # --- what a successor of this process needs -------------------------------------------------

    def _resume(self) -> None:
        """Go on where a predecessor ended; if that cannot be, the session ends."""
        keeping = self._keeping
        assert keeping is not None
        if self._closed:
            return
        # With what it was about to drop when it died.
        self._roles |= {role for role in keeping.roles() if ROLES.fullmatch(role)}
        try:
            if self._damage is not None:
                raise self._damage
            self._memory.resume(keeping)
            self._dirty_log.resume(keeping)
            self._device_states.resume(keeping)
            ran = [vring for vring in self._vrings if vring.setup.running]
            for vring in self._vrings:
                vring.resume(keeping)
            self._inflight.resume(keeping)
            if (fd := keeping.take(CHANNEL)) is not None:
                self._open_channel(fd, resumed=True)
            self._run_all(ran)
            self._write()
            self._begin()
        except (StateError, RemoteProtocolError, VringError, OSError) as error:
            self.send_away(f"what the process before left cannot be gone on with: {error}")
            return
        self._greeted()
        for vring in self._vrings:
            if vring.running:
                vring.call()

    def _handled_fds(self, context: SessionContext) -> list[int]:
        """Return the descriptor that goes with what a predecessor answered, or was about to."""
        if context.keeping is None or not self._state.beside:
            return []
        self._roles.add(ANSWER)
        fd = context.keeping.take(ANSWER)
        return [] if fd is None else [fd]

    def _send_beside(self, fd: int) -> None:
        self._keep(ANSWER, fd)
        self._beside.append(fd)

    def _keep(self, role: str, fd: int) -> None:
        """Keep a descriptor until :meth:`_record` finds that it is not in use."""
        if self._keeping is not None:
            self._keeping.keep(role, fd)
            self._roles.add(role)

    def _record(self, handled: Handled) -> None:
        assert self._keeping is not None
        self._state.handled = handled
        self._write()
        used = self._memory.roles | self._dirty_log.roles | self._queue_roles
        used |= self._device_states.roles | self._inflight.roles
        if self._state.beside:
            used.add(ANSWER)
        if self._channel is not None and not self._channel.closed:
            used.add(CHANNEL)
        for role in self._roles - used:
            self._keeping.drop(role)
        self._roles &= used
        try:
            self._begin()
        except OSError as error:
            self.send_away(f"a queue cannot be served: {error}")

    def _write(self) -> None:
        assert self._keeping is not None
        self._keeping.write(SESSION, self._packer.pack(self._state))

    def _begin(self) -> None:
        """Hand the device the queues that are to run, now that this is written down."""
        for vring in self._vrings:
            vring.begin()

    # --- what a session needs -------------------------------------------------------------------

    def _release(self) -> None:
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        for role in self._roles:
            assert self._keeping is not None
            self._keeping.drop(role)
        self._inflight.close()  # what it says is for the next backend
        for vring in self._vrings:
            vring.reset()
        self._device_states.close()
        unix_fds.close_all(self._beside)
        self._memory.close()
        self._dirty_log.close()
        self._calls.close()
        if self._channel is not None:
            self._channel.close()

    def _loss(self) -> str | None:
        return self._dirty_log.loss or describe_loss(self._memory.mapped)

    def _warn_once(self, text: str) -> None:
        """Log what the frontend will go on doing for as long as it is there."""
        if text not in self._told:
            self._told.add(text)
            self._log.warning("%s: %s", self._name, text)

    def _tell(self, text: str) -> None:
        self._log.log(logging.INFO, "%s: %s", self._name, text)

    def _answer(self, message: Message, fds: list[int]) -> Payload | None:
        self._state.beside = False
        payload = message.decode()
        handler = self._handlers.get(message.kind)
        if handler is None:
            raise RemoteProtocolError("not supported")
        answer = handler(payload, fds)
        if message.kind in _GREETINGS:
            self._greeted()
        return answer

    def _reply(self, message: Message, answer: Payload | None) -> None:
        if answer is not None:
            fds, self._beside = self._beside, []
            self._state.beside = bool(fds)
            self._connection.send(reply(message.kind, answer), fds)
        elif self._wants_acknowledgement(message):
            self._connection.send(reply(message.kind, U64(0)))

    def _refusal(self, message: Message, error: Exception) -> BadMessageError:
        if isinstance(error, VhostUserError):
            return error
        cause = "out of memory" if isinstance(error, MemoryError) else str(error)
        return VhostUserError(message.name, cause)

    def _refuse(self, message: Message, error: BadMessageError) -> None:
        if message.kind == Request.GET_CONFIG:
            refusal: Payload = Empty()
        elif message.kind == Request.SET_DEVICE_STATE_FD:
            refusal = U64(DeviceStateTransfer.REFUSED)
        elif message.kind == Request.CHECK_DEVICE_STATE or self._wants_acknowledgement(message):
            refusal = U64(1)
        else:
            raise error
        self._log.warning("%s: refused %s", self._name, error)
        self._connection.send(reply(message.kind, refusal))

    def _wants_acknowledgement(self, message: Message) -> bool:
        """Return whether an acknowledgement is wanted, and no other reply answers the message."""
        if not message.need_reply or not self._has(ProtocolFeature.REPLY_ACK):
            return False
        return message.shape is None or message.shape.reply is None

    # --- negotiation ----------------------------------------------------------------------------

    def _handler_table(self) -> dict[int, Handler]:
        return {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_OWNER: self._ignore,
            # Deprecated, and meant differently by different frontends: best ignored, says the
            # specification.
            Request.RESET_OWNER: self._ignore,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_STATUS: self._get_status,
            Request.SET_STATUS: self._set_status,
            Request.GET_INFLIGHT_FD: self._inflight.get,
            Request.SET_INFLIGHT_FD: self._inflight.set,
            Request.RESET_DEVICE: self._reset_device,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.VRING_KICK: self._vring_kick,
            **self._memory.handlers,
            **self._dirty_log.handlers,
            **self._device_states.handlers,
        }

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self._state.protocol_features

    def _ignore(self, _: Empty, fds: list[int]) -> None:
        return

    def _get_features(self, _: Empty, fds: list[int]) -> U64:
        return U64(self._features_offered | _BACKEND_BITS)

    def _set_features(self, features: U64, fds: list[int]) -> None:
        bits = features.value & ~_BACKEND_BITS
        running = next((vring for vring in self._vrings if vring.running), None)
        if running is None:
            self._forget_broken_driver()
            self._accept_features(bits)
            if not self._has(ProtocolFeature.STATUS):
                self._device.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        elif bits != self._state.features & ~_BACKEND_BITS:
            raise RemoteProtocolError(f"other features while {running} runs")
        if not self._state.rings_start_disabled:
            # What runs because nobody spoke of enabling goes on running.
            for vring in self._vrings:
                if vring.running and vring.setup.enabled is None:
                    vring.setup.enabled = True
        if (features.value ^ self._state.features) >> F_LOG_ALL & 1:
            self._stop_all()
        self._state.features = features.value
        self._run_all()

    def _accept_features(self, bits: int) -> None:
        """Hand the driver's features to the device. Raises RemoteProtocolError on others."""
        packed = bool(bits & self._features_offered & Feature.RING_PACKED)
        self._device.set_driver_features(bits & ~int(Feature.RING_PACKED) if packed else bits)
        if packed and not self._state.features & Feature.RING_PACKED:
            text = "%s: the driver accepted of the rings %s"
            name = feature_names(Feature.RING_PACKED)
            self._log.log(logging.INFO, text, self._name, name)
        for vring in self._vrings:
            vring.setup.packed = packed

    def _get_protocol_features(self, _: Empty, fds: list[int]) -> U64:
        return U64(self._offered)

    def _set_protocol_features(self, features: U64, fds: list[int]) -> None:
        wanted = ProtocolFeature(features.value)
        # As numbers: the complement of flags has no bit that is not a flag.
        refused = features.value & ~int(self._offered)
        if refused:
            # Whether the answer may be an acknowledgement is just what failed to be agreed.
            raise FatalError(f"{ProtocolFeature(refused)!r} was not offered")
        if ProtocolFeature.INBAND_NOTIFICATIONS in wanted and _INBAND_NEEDS not in wanted:
            raise FatalError("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK")
        self._state.protocol_features = wanted
        self._log.log(logging.INFO, "%s: protocol features %s", self._name, wanted.name or "none")

    def _get_queue_num(self, _: Empty, fds: list[int]) -> U64:
        return U64(len(self._vrings))

    def _set_backend_req_fd(self, _: Empty, fds: list[int]) -> None:
        if not self._has(ProtocolFeature.BACKEND_REQ):
            raise RemoteProtocolError("BACKEND_REQ was not negotiated")
        if self._channel is not None:
            self._channel.leave()  # a predecessor may have kept the same one, and died
        self._open_channel(fds[0])
        self._keep(CHANNEL, fds.pop(0))

    def _open_channel(self, fd: int, *, resumed: bool = False) -> None:
        self._channel = BackendChannel(
            fd,
            acks=self._has(ProtocolFeature.REPLY_ACK),
            name=self._name,
            log=self._log,
            closer=self._closer,
            resumed=resumed,
        )

    # --- the device -----------------------------------------------------------------------------

    def _get_config(self, access: ConfigAccess, fds: list[int]) -> ConfigAccess:
        data = self._device.read_config(access.offset, len(access.data))
        return ConfigAccess(access.offset, data, access.flags)

    def _set_config(self, access: ConfigAccess, fds: list[int]) -> None:
        if access.flags & ~ConfigAccess.FOR_MIGRATION:
            raise RemoteProtocolError(f"unknown flags {access.flags:#x}")
        if access.flags != ConfigAccess.FOR_MIGRATION:
            self._device.write_config(access.offset, access.data)

    def _get_status(self, _: Empty, fds: list[int]) -> U64:
        return U64(0 if self._state.paused else self._device.status)

    def _set_status(self, status: U64, fds: list[int]) -> None:
        if status.value > 0xFF:
            raise RemoteProtocolError(f"status {status.value:#x} has more than 8 bits")
        # 0 comes for a reset and for a VM that is stopped and will go on, where it must not lose
        # its ports. The device itself notices a new driver, by its rings and its first words.
        self._state.paused = status.value == 0
        if self._state.paused:
            # Either way the frontend sets rings up again; until then their memory is the guest's.
            for vring in self._vrings:
                vring.forget_driver()
            self._forget_broken_driver()
        else:
            fresh = status.value & Status.DRIVER_OK & ~self._device.status
            self._device.set_status(status.value)
            if fresh and not self._memory.mapped.regions:
                self._warn_once("the driver is ready, but no guest memory is mapped")

    def _reset_device(self, _: Empty, fds: list[int]) -> None:
        for vring in self._vrings:
            vring.reset()
        self._inflight.forget()
        self._device.reset()

    def _forget_broken_driver(self) -> None:
        """Reset a device that needs it: a driver that broke a ring starts anew."""
        if self._device.status & Status.DEVICE_NEEDS_RESET:
            self._device.reset()

    # --- queues ---------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise RemoteProtocolError(f"queue {index} of {len(self._vrings)}")
        return self._vrings[index]

    def _set_vring_num(self, state: VringState, fds: list[int]) -> None:
        vring = self._vring(state.index)
        vring.set_size(state.num)
        self._run(vring)

    def _set_vring_base(self, state: VringState, fds: list[int]) -> None:
        self._vring(state.index).set_base(state.num)

    def _get_vring_base(self, state: VringState, fds: list[int]) -> VringState:
        vring = self._vring(state.index)
        vring.end()
        return VringState(vring.index, vring.get_base())

    def _set_vring_addr(self, address: VringAddress, fds: list[int]) -> None:
        vring = self._vring(address.index)
        if not vring.running or vring.setup.address != address:
            vring.set_address(address, self._memory.mapped)
            self._run(vring)

    def _set_vring_kick(self, descriptor: VringDescriptor, fds: list[int]) -> None:
        vring = self._vring(descriptor.index)
        if fds:
            check_event_descriptor(fds[0], writable=False)
            self._keep(KICK.format(vring.index), fds[0])
        vring.stop()
        vring.set_kick(fds.pop() if fds else -1, polled=descriptor.no_fd)
        self._run(vring)

    def _set_vring_call(self, descriptor: VringDescriptor, fds: list[int]) -> None:
        vring = self._vring(descriptor.index)
        if fds:
            check_event_descriptor(fds[0], writable=True)
            self._keep(CALL.format(vring.index), fds[0])
        vring.set_call(fds.pop() if fds else -1)

    def _set_vring_err(self, descriptor: VringDescriptor, fds: list[int]) -> None:
        vring = self._vring(descriptor.index)
        if fds:
            check_event_descriptor(fds[0], writable=True)
            self._keep(ERROR.format(vring.index), fds[0])
        vring.set_error(fds.pop() if fds else -1)

    def _set_vring_enable(self, state: VringState, fds: list[int]) -> None:
        vring = self._vring(state.index)
        if state.num not in (0, 1):
            raise RemoteProtocolError(f"{vring}: enable is {state.num} instead of 0 or 1")
        vring.setup.enabled = bool(state.num)
        if vring.setup.enabled:
            self._run(vring)
        else:
            vring.stop()

    def _vring_kick(self, state: VringState, fds: list[int]) -> None:
        vring = self._vring(state.index)
        if not self._has(ProtocolFeature.INBAND_NOTIFICATIONS):
            raise RemoteProtocolError("INBAND_NOTIFICATIONS was not negotiated")
        if not vring.setup.started:
            vring.set_kick(-1)
            self._run(vring)
        if not vring.setup.size or vring.setup.address is None:
            self._warn_once(
                "the driver notified a queue that it never set up: "
                "was this guest restored from a saved state?"
            )
        vring.kick()

    def _run(self, vring: Vring) -> None:
        """Hand the queue to the device if it is to run; see :meth:`Vring.run`."""
        if self._has(ProtocolFeature.INBAND_NOTIFICATIONS) and not vring.setup.called:
            vring.set_call(self._calls.descriptor(vring.index))
        enabled = not self._state.rings_start_disabled
        memory, features = self._memory.mapped, self._state.features
        if not vring.run(memory, features, self._dirty_log, enabled=enabled):
            if vring.may_run(enabled) and not memory.regions:
                self._warn_once("the driver is ready, but no guest memory is mapped")
            return
        self._inflight.note(vring)
        self._device_states.started()
        if not self._has(ProtocolFeature.STATUS):
            self._device.set_status(self._device.status | Status.DRIVER_OK)
        if vring.setup.polled and self._poll_timer is None:
            self._poll()
        if self._keeping is None:
            vring.begin()

    def _run_all(self, needed: Sequence[Vring] | None = None) -> None:
        """Run all that are to run, and then raise why one that is needed (None: any) cannot."""
        failed: RemoteProtocolError | VringError | None = None
        for vring in self._vrings:
            try:
                self._run(vring)
            except (RemoteProtocolError, VringError) as error:
                if needed is None or vring in needed:
                    failed = failed or error
        if failed is not None:
            raise failed

    def _stop_all(self) -> None:
        for vring in self._vrings:
            vring.stop()

    def _restart(self) -> None:
        self._stop_all()
        self._run_all()

    def _poll(self) -> None:
        """Kick the queues whose frontends do not, as long as there are any."""
        polled = [vring for vring in self._vrings if vring.setup.polled and vring.running]
        for vring in polled:
            vring.kick()
        self._poll_timer = self._loop.call_later(POLL_INTERVAL, self._poll) if polled else None

    def _call_inband(self, index: int) -> None:
        if self._channel is not None:
            self._channel.vring_call(index)

    def _tell_error_inband(self, vring: Vring) -> None:
        if self._channel is not None and self._has(ProtocolFeature.INBAND_NOTIFICATIONS):
            self._channel.vring_error(vring.index)
