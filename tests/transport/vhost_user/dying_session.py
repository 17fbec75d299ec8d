"""Workers that die at every step of one message of a frontend's: a process of its own for a test.

See tests/support/dying. At the end there is one answer, and what is written down and kept is the
same as without a death. Prints at how many calls a worker died.

Usage: dying_session.py MESSAGE
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.dying import DyingWorld
from vring_serial import unix_fds
from vring_serial.chardev.null import NullChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ConsoleState
from vring_serial.keeping import Keeping
from vring_serial.proto import vhost_user as vu
from vring_serial.proto.vhost_user import Request
from vring_serial.service.shelf import Shelf
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend
from vring_serial.transport.vhost_user.state import FRONTEND, FrontendState

SIZE = 1 << 20
USER = 0x7F00_0000_0000
FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 1
REGION = vu.MemoryRegion(0, SIZE, USER)
ADDED = vu.MemoryRegion(SIZE, SIZE, USER + SIZE)

#: What a message is: its kind, payload, and what descriptor comes with it.
Said = tuple[Request, vu.Payload | None, str]

NEGOTIATED: list[Said] = [
    (Request.SET_PROTOCOL_FEATURES, vu.U64(PROTOCOL_FEATURES), ""),
    (Request.SET_OWNER, None, ""),
    (Request.SET_FEATURES, vu.U64(FEATURES), ""),
    (Request.SET_MEM_TABLE, vu.MemoryTable((REGION,)), "memory"),
]
RING: list[Said] = [
    (Request.SET_VRING_NUM, vu.VringState(3, 64), ""),
    (Request.SET_VRING_BASE, vu.VringState(3, 0), ""),
    (Request.SET_VRING_ADDR, vu.VringAddress(3, 0, USER, USER + 0x2000, USER + 0x1000), ""),
    (Request.SET_VRING_CALL, vu.VringDescriptor(3), "event"),
    (Request.SET_VRING_ERR, vu.VringDescriptor(3), "event"),
    (Request.SET_VRING_KICK, vu.VringDescriptor(3), "event"),
    (Request.SET_VRING_ENABLE, vu.VringState(3, 1), ""),
]
RUNNING = NEGOTIATED + RING
STOPPED: list[Said] = [*RUNNING, (Request.GET_VRING_BASE, vu.VringState(3), "")]
AT_ONCE = "SET_VRING_CALL, NUM, KICK and ENABLE at once"
SAVE = vu.DeviceStateTransfer(vu.DeviceStateTransfer.SAVE)
LOAD = vu.DeviceStateTransfer(vu.DeviceStateTransfer.LOAD)


def _up_to(kind: Request) -> tuple[list[Said], list[Said]]:
    """A message of the usual sequence, and all before it."""
    kinds = [said[0] for said in STOPPED]
    at = kinds.index(kind)
    return STOPPED[:at], [STOPPED[at]]


#: By name: what was said before, and the messages that are sent at once.
CASES: dict[str, tuple[list[Said], list[Said]]] = {
    **{said[0].name: _up_to(said[0]) for said in STOPPED},
    AT_ONCE: ([*NEGOTIATED, *RING[:3]], [RING[3], RING[0], *RING[5:]]),
    "SET_MEM_TABLE and SET_BACKEND_REQ_FD at once": (
        NEGOTIATED[:3],
        [NEGOTIATED[3], (Request.SET_BACKEND_REQ_FD, None, "socket")],
    ),
    "GET_FEATURES": (RUNNING, [(Request.GET_FEATURES, None, "")]),
    "GET_CONFIG": (RUNNING, [(Request.GET_CONFIG, vu.ConfigAccess(0, bytes(12)), "")]),
    "SET_CONFIG": (RUNNING, [(Request.SET_CONFIG, vu.ConfigAccess(8, b"a\0\0\0"), "")]),
    "SET_STATUS": (RUNNING, [(Request.SET_STATUS, vu.U64(15), "")]),
    "SET_STATUS 0": (RUNNING, [(Request.SET_STATUS, vu.U64(0), "")]),
    "RESET_DEVICE": (RUNNING, [(Request.RESET_DEVICE, None, "")]),
    "SET_BACKEND_REQ_FD": (RUNNING, [(Request.SET_BACKEND_REQ_FD, None, "socket")]),
    "ADD_MEM_REG": (RUNNING, [(Request.ADD_MEM_REG, vu.SingleRegion(ADDED), "memory")]),
    "REM_MEM_REG": (
        [*RUNNING, (Request.ADD_MEM_REG, vu.SingleRegion(ADDED), "memory")],
        [(Request.REM_MEM_REG, vu.SingleRegion(ADDED), "")],
    ),
    "SET_LOG_BASE": (RUNNING, [(Request.SET_LOG_BASE, vu.LogArea(64), "memory")]),
    "SET_FEATURES with F_LOG_ALL": (
        [*RUNNING, (Request.SET_LOG_BASE, vu.LogArea(64), "memory")],
        [(Request.SET_FEATURES, vu.U64(FEATURES | 1 << vu.F_LOG_ALL), "")],
    ),
    "SET_VRING_ENABLE 0": (RUNNING, [(Request.SET_VRING_ENABLE, vu.VringState(3, 0), "")]),
    "SET_VRING_KICK again": (RUNNING, [(Request.SET_VRING_KICK, vu.VringDescriptor(3), "event")]),
    "SET_VRING_CALL again": (RUNNING, [(Request.SET_VRING_CALL, vu.VringDescriptor(3), "event")]),
    "GET_INFLIGHT_FD": (NEGOTIATED, [(Request.GET_INFLIGHT_FD, vu.Inflight(0, 0, 4, 64), "")]),
    "SET_DEVICE_STATE_FD save": (STOPPED, [(Request.SET_DEVICE_STATE_FD, SAVE, "event")]),
    "SET_DEVICE_STATE_FD load": (STOPPED, [(Request.SET_DEVICE_STATE_FD, LOAD, "event")]),
    "CHECK_DEVICE_STATE": (
        [*STOPPED, (Request.SET_DEVICE_STATE_FD, SAVE, "event")],
        [(Request.CHECK_DEVICE_STATE, None, "")],
    ),
}


def make_controller(keeping: Keeping) -> Controller:
    saved = keeping.read(CONSOLE.kind)
    state = ConsoleState() if saved is None else CONSOLE.unpack(saved)
    controller = Controller(max_ports=1 + 1, state=state.controller, keeping=keeping)
    controller.add_port(Port(1, "p", NullChardev("n"), state=state.ports.get(1)))
    return controller


class World(DyingWorld[Said]):
    """A frontend, and what it talks to.

    Args:
        directory: for the socket.
        make: makes the device, of what a predecessor left.
        descriptors: makes those that go with a message, by what is beside it.
        pause: see DyingWorld.
    """

    def __init__(
        self,
        directory: Path,
        make: Callable[[Keeping], Controller] = make_controller,
        descriptors: Callable[[str], list[int]] | None = None,
        pause: float = 0.0,
    ) -> None:
        self._make = make
        self._descriptors = descriptors or _descriptors
        super().__init__(directory, header=12, pause=pause)
        self.say([(Request.GET_FEATURES, None, "")])  # its connection is kept by now

    async def serve(self, shelf: Shelf) -> None:
        controller = self._make(shelf)
        async with controller, VhostUserBackend(controller, self._path, packed=True, keeping=shelf):
            await asyncio.get_running_loop().create_future()

    def pack(self, said: Said) -> tuple[bytes, list[int]]:
        kind, payload, beside = said
        return vu.request(kind, payload, need_reply=True), self._descriptors(beside)

    def answer_size(self, header: bytes) -> int:
        return 12 + int.from_bytes(header[8:12], sys.byteorder)

    def what_is_left(self) -> tuple[object, set[str]]:
        """What is written down, and the roles of what is kept."""
        for _ in range(2):  # what was before is taken off, and what that left over is dropped
            self.say([(Request.GET_FEATURES, None, "")])
        with self.left() as (journal, roles):
            state = FRONTEND.unpack(journal.read("session") or b"")
        state.handled = FrontendState().handled
        state.next_serial, state.serials = 0, [0] * len(state.serials)
        return state, roles


def _descriptors(beside: str) -> list[int]:
    if beside == "memory":
        fd = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return [fd]
    if beside == "event":
        return [unix_fds.make_eventfd()]
    if beside == "socket":
        ours, theirs = socket.socketpair()
        ours.detach()  # open as long as this process
        return [theirs.detach()]
    return []


def run(directory: Path, name: str, die: int) -> tuple[bytes, object, set[str], int]:
    """What is answered and left, and how many workers died."""
    before, said = CASES[name]
    world = World(directory)
    try:
        for each in before:
            world.say([each])
        answer = world.say(said, die)
        return answer, *world.what_is_left(), world.deaths
    finally:
        world.close()


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        *wanted, _ = run(Path(directory), name, 0)
        call, deaths = 1, 1
        while deaths:
            *got, deaths = run(Path(directory), name, call)
            for what, expected in zip(got, wanted, strict=True):
                assert what == expected, f"call {call}: {what}, not {expected}"
            call += 1
        print(call - 2)


if __name__ == "__main__":
    main(sys.argv[1])
