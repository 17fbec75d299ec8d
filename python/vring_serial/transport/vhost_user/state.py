"""What a frontend has set up, apart from descriptors, mappings and what runs."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from vring import RECORD_SIZE
from vring_serial.errors import StateError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import (
    F_PROTOCOL_FEATURES,
    Inflight,
    LogArea,
    MemoryRegion,
    ProtocolFeature,
    VringAddress,
)
from vring_serial.saving import StateFormat, check_range
from vring_serial.transport.repeatable import Handled, check_handled
from vring_serial.transport.session import SESSION, SessionContext

#: Regions that a frontend may map in all (ADD_MEM_REG).
MAX_MEM_SLOTS = 64
NO_FEATURES = ProtocolFeature(0)


class Transfer(enum.Enum):
    """How far the device's state is on its way to or from another backend."""

    NONE = "none"
    """Not at all, or a queue was started since."""
    SAVING = "saving"
    """The frontend may read it."""
    SAVED = "saved"
    """The frontend has it."""
    LOADING = "loading"
    """The frontend may write it."""
    LOADED = "loaded"
    """It is the device's."""


@dataclass(slots=True)
class VringSetup:
    """The setup of one queue.

    Attributes:
        size: descriptors; 0 until SET_VRING_NUM.
        packed: the driver accepted RING_PACKED.
        base: available index to go on from, with the wrap counter in bit 15 if the ring is packed;
            None: it starts anew. While the ring runs, the device has the current one: see
            ``Vring.note_position``.
        used: used index of a packed ring likewise, None: the same as ``base``. That of a split ring
            is in guest memory.
        address: user addresses; None until SET_VRING_ADDR.
        enabled: None until SET_VRING_ENABLE.
        started: a kick descriptor or a kick has come since the ring was stopped.
        polled: the frontend does not kick.
        called: SET_VRING_CALL has come.
        reported: SET_VRING_ERR has come, with a descriptor.
        running: the device has the ring, or gets it once this is written down; the ring says itself
            where it is.
        resumes: it has not run in this session, and its record says how far another process was.
    """

    size: int = 0
    packed: bool = False
    base: int | None = None
    used: int | None = None
    address: VringAddress | None = None
    enabled: bool | None = None
    started: bool = False
    polled: bool = False
    called: bool = False
    reported: bool = False
    running: bool = False
    resumes: bool = False


@dataclass(slots=True)
class FrontendState:
    """The setup of the whole device.

    Attributes:
        features: as SET_FEATURES brought them, with F_PROTOCOL_FEATURES.
        protocol_features: those in use.
        paused: the status was last set to 0, and reads as 0 whatever the device's is.
        regions: guest memory, in the order in which it was mapped.
        serials: for each region the number under which its descriptor is kept.
        next_serial: the number of the next one.
        log: the dirty log in its descriptor's file; None: there is none.
        inflight: the region for the next backend in its descriptor's file; None: there is none.
        vrings: one setup for each queue of the device.
        transfer: how far the device's state is on its way.
        beside: a descriptor goes with the answer to the last message.
        handled: the message that was handled last, if it may still be in the socket.
    """

    features: int = 0
    protocol_features: ProtocolFeature = NO_FEATURES
    paused: bool = False
    regions: list[MemoryRegion] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)
    next_serial: int = 0
    log: LogArea | None = None
    inflight: Inflight | None = None
    vrings: list[VringSetup] = field(default_factory=list)
    transfer: Transfer = Transfer.NONE
    beside: bool = False
    handled: Handled = field(default_factory=Handled)

    @property
    def rings_start_disabled(self) -> bool:
        """Whether queues need SET_VRING_ENABLE: so if protocol features were negotiated."""
        return bool(self.features >> F_PROTOCOL_FEATURES & 1)


#: How the state is written down for a successor of this process.
FRONTEND = StateFormat("vhost-user frontend", 1, FrontendState)


def saved_state(context: SessionContext, queues: int) -> tuple[FrontendState, StateError | None]:
    """Return what a predecessor left, and None; or a new state, and why that is of no use."""
    fresh = FrontendState(vrings=[VringSetup() for _ in range(queues)])
    try:
        saved = context.keeping.read(SESSION) if context.keeping and context.resumed else None
        if saved is None:
            return fresh, None
        state = FRONTEND.unpack(saved)
        check_frontend(state, queues)
    except StateError as error:
        return fresh, error
    return state, None


def check_frontend(state: FrontendState, queues: int) -> None:
    """Check a frontend's setup that somebody else wrote down, for a device with so many queues.

    Whether its rings and memory can be used so, and the device agrees, is seen when they are.
    Raises StateError that names what does not fit.
    """
    if len(state.vrings) != queues:
        raise StateError(f"it has {len(state.vrings)} queues, and the device has {queues}")
    if len(state.regions) != len(state.serials) or len(state.regions) > MAX_MEM_SLOTS:
        raise StateError(f"{len(state.regions)} regions, {len(state.serials)} descriptors")
    if len(set(state.serials)) != len(state.serials):
        raise StateError("two regions have the same serial")
    for serial in (*state.serials, state.next_serial):
        check_range("a serial", serial, 64)
    check_range("features", state.features, 64)
    check_range("protocol_features", int(state.protocol_features), 64)
    for number, region in enumerate(state.regions):
        _check_numbers(f"region {number}", region)
    for name, part in (("the dirty log", state.log), ("inflight", state.inflight)):
        if part is not None:
            _check_numbers(name, part)
    for index, setup in enumerate(state.vrings):
        check_range(f"queue {index}: size", setup.size, 16)
        for name in ("base", "used"):
            check_range(f"queue {index}: {name}", getattr(setup, name) or 0, 16)
        if setup.address is not None:
            _check_numbers(f"queue {index}", setup.address)
    check_handled(state.handled)


def _check_numbers(what: str, message: MemoryRegion | LogArea | Inflight | VringAddress) -> None:
    """Check that a part of a message could have come as it is. Raises StateError."""
    try:
        message.pack()
    except struct.error:
        raise StateError(f"{what}: {message} cannot be") from None


def ring_records(keeping: Keeping | None, queues: int) -> Sequence[memoryview | None]:
    """Return the record of each queue, in memory that outlives the process; None: there is none."""
    if keeping is None:
        return [None] * queues
    area = keeping.area("rings", queues * RECORD_SIZE)
    return [area[i * RECORD_SIZE : (i + 1) * RECORD_SIZE] for i in range(queues)]
