"""Workers that die at every step of one message of a frontend's: a process of its own for a test.

This process is the keeper and the frontend. Workers die when they enter a function that keeps,
writes down, answers or takes off something, at the first such call, at the second, and so on; the
next worker goes on. At the end there is one answer, and what is written down and kept is the same
as without a death. Prints at how many calls a worker died.

Usage: dying_session.py MESSAGE
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vring_serial import unix_fds
from vring_serial.chardev.null import NullChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.device.console.state import CONSOLE, ConsoleState
from vring_serial.keeping import Keeping
from vring_serial.proto import vhost_user as vu
from vring_serial.proto.vhost_user import Request
from vring_serial.service import shelf as shelves
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal
from vring_serial.transport import pieces, repeatable
from vring_serial.transport import session as sessions
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend
from vring_serial.transport.vhost_user.state import FRONTEND, FrontendState

TRACED = {repeatable.__file__, pieces.__file__, shelves.__file__}
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


def die_at(call: int, count: int, pause: float) -> None:
    """Be killed when a traced function is entered for that time since the first message came.

    Not once more than ``count`` messages have come. Other threads have ``pause`` seconds before
    that.
    """
    left, messages = call, 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left, messages
        code = frame.f_code
        messages += code.co_filename == sessions.__file__ and code.co_name == "_handle"
        if 1 <= messages <= count and code.co_filename in TRACED:
            left -= 1
            if not left:
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGKILL)

    if call:
        sys.settrace(trace)


def make_controller(keeping: Keeping) -> Controller:
    saved = keeping.read(CONSOLE.kind)
    state = ConsoleState() if saved is None else CONSOLE.unpack(saved)
    controller = Controller(max_ports=1 + 1, state=state.controller, keeping=keeping)
    controller.add_port(Port(1, "p", NullChardev("n"), state=state.ports.get(1)))
    return controller


async def serve(path: str, shelf: shelves.Shelf, make: Callable[[Keeping], Controller]) -> None:
    controller = make(shelf)
    async with controller, VhostUserBackend(controller, path, packed=True, keeping=shelf):
        await asyncio.get_running_loop().create_future()


class World:
    """A keeper, its worker, and a frontend.

    Args:
        directory: for the socket.
        make: makes the device, of what a predecessor left.
        descriptors: makes those that go with a message, by what is beside it.
        pause: seconds that a dying worker's other threads have before its end.
    """

    def __init__(
        self,
        directory: Path,
        make: Callable[[Keeping], Controller] = make_controller,
        descriptors: Callable[[str], list[int]] | None = None,
        pause: float = 0.0,
    ) -> None:
        self._path = str(directory / "v")
        self._make = make
        self._descriptors = descriptors or _descriptors
        self._pause = pause
        self._journal = Journal.create()
        self._store = DescriptorStore(1000)
        self._keeper, self._worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._frontend: socket.socket | None = None
        self._pid = self._pidfd = -1
        self.deaths = 0
        self._start(0)
        self._wait(lambda: "listener" in self._kept)
        self._frontend = socket.socket(socket.AF_UNIX)
        self._frontend.connect(self._path)
        self.say([(Request.GET_FEATURES, None, "")])  # its connection is kept by now

    def close(self) -> None:
        self._kill()
        self._store.close()
        for sock in (self._keeper, self._worker, self._frontend):
            assert sock is not None
            sock.close()
        os.close(self._journal)
        os.unlink(self._path)

    @property
    def _kept(self) -> set[str]:
        return {name.partition("#")[0] for name in self._store.descriptors}

    def say(self, said: Sequence[Said], die: int = 0) -> bytes:
        """Send messages at once, and return the answers; ``die`` in the worker that gets them."""
        if die:
            self._kill()
        data = b"".join(vu.request(kind, payload, need_reply=True) for kind, payload, _ in said)
        fds = [fd for _, _, beside in said for fd in self._descriptors(beside)]
        assert self._frontend is not None
        unix_fds.send(self._frontend, data, fds)
        unix_fds.close_all(fds)
        if die:
            self._start(die, len(said))
        answers = b""
        for _ in said:
            answer = self._receive(12)
            answers += answer + self._receive(int.from_bytes(answer[8:12], sys.byteorder))
        return answers

    def left(self) -> tuple[object, set[str]]:
        """What is written down, and the roles of what is kept."""
        for _ in range(2):  # what was before is taken off, and what that left over is dropped
            self.say([(Request.GET_FEATURES, None, "")])
        self._kill()
        with Journal(os.dup(self._journal)) as journal:
            state = FRONTEND.unpack(journal.read("session") or b"")
        state.handled = FrontendState().handled
        state.next_serial, state.serials = 0, [0] * len(state.serials)
        roles = {role.rstrip("0123456789") for role in self._kept}
        self._start(0)
        return state, roles

    def replace_worker(self) -> None:
        """Have the worker die now, and another one go on."""
        self._kill()
        self._start(0)

    def _receive(self, count: int) -> bytes:
        data = b""
        assert self._frontend is not None
        while len(data) < count:
            self._wait(lambda: bool(select.select([self._frontend], [], [], 0)[0]))
            received = unix_fds.receive(self._frontend, count - len(data), 8)
            unix_fds.close_all(received.fds)
            assert received.data, "the connection was closed"
            data += received.data
        return data

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Keep what the worker stores, and replace one that dies, until the condition holds."""
        while not condition():
            waiting: list[Any] = [self._keeper, self._pidfd]
            if self._frontend is not None:
                waiting.append(self._frontend)
            ready = select.select(waiting, [], [], 30)[0]
            assert ready, "nothing happens"
            self._drain()
            if self._pidfd in ready:
                status = self._reap()
                assert status == -signal.SIGKILL, status
                self.deaths += 1
                self._start(0)
        self._drain()

    def _drain(self) -> None:
        while self._store.receive(self._keeper) is not None:
            pass

    def _reap(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._pidfd)
        self._drain()
        return status

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._reap()

    def _start(self, die: int, count: int = 1) -> None:
        fds = self._store.descriptors
        left = {name: [os.dup(fd) for fd in kept] for name, kept in fds.items()}
        self._pid = os.fork()
        if not self._pid:
            try:
                self._store.forsake()  # no helper: it would share, and keep, what this process has
                self._keeper.close()
                if self._frontend is not None:
                    self._frontend.close()
                shelf = shelves.open_shelf(self._journal, Notifier(self._worker), left)
                die_at(die, count, self._pause)
                asyncio.run(serve(self._path, shelf, self._make))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        for kept in left.values():
            unix_fds.close_all(kept)
        self._pidfd = os.pidfd_open(self._pid)


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
        return answer, *world.left(), world.deaths
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
