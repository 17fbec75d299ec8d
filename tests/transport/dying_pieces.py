"""Messages that come at once, with descriptors beside them, to a process that dies at every step.

A process of its own for a test. This process is the keeper and the peer; it sends layouts of
messages of one protocol. A worker answers each with the sizes of the files that came with it, and
dies when it enters a function that looks, keeps, writes down or takes off, at the first such call,
at the second, and so on; the next worker goes on. Prints how many workers died.

Usage: dying_pieces.py vhost-user|vfio-user
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import sys
from types import FrameType
from typing import Any

from vring_serial import unix_fds
from vring_serial.keeping import Keeping
from vring_serial.proto import vfio_user, vhost_user
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap
from vring_serial.proto.vfio_user_wire import Command, IrqSet, IrqSetFlag
from vring_serial.proto.vhost_user import Request
from vring_serial.service import shelf as shelves
from vring_serial.service.descriptor_store import DescriptorStore, Notifier
from vring_serial.service.journal import Journal
from vring_serial.transport import pieces, repeatable
from vring_serial.transport.closer import Closer
from vring_serial.transport.pieces import Pieces
from vring_serial.transport.repeatable import AREA_SIZE, Handled, RepeatableConnection
from vring_serial.unix_fds import Received

TRACED = {repeatable.__file__, pieces.__file__, shelves.__file__}
#: The functions of these that change what a successor finds, and those that begin such steps.
STEPS = {"keep", "drop", "write", "begin", "handled", "close", "_look", "_begin_piece"}
STEPS |= {"_before_answer", "_send_some", "_take_off"}
ANSWER = 8
STATE = struct.Struct("<QI")

KICK = vhost_user.request(Request.SET_VRING_KICK, vhost_user.VringDescriptor(1))
NUM = vhost_user.request(Request.SET_VRING_NUM, vhost_user.VringState(1, 64))
TWO = vhost_user.request(
    Request.SET_MEM_TABLE,
    vhost_user.MemoryTable(
        (vhost_user.MemoryRegion(0, 1, 0), vhost_user.MemoryRegion(4096, 1, 4096))
    ),
)
MAP = vfio_user.request(Command.DMA_MAP, 1, DmaMap(DmaFlag.READ, 0, 0, 4096))
IRQS = vfio_user.request(
    Command.DEVICE_SET_IRQS,
    2,
    IrqSet(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER, 2, 0, 2),
)
INFO = vfio_user.request(Command.DEVICE_RESET, 3)

#: A layout: pieces of the stream, each with its descriptors, and how many each message is to get.
Layout = tuple[list[tuple[bytes, int]], list[int]]
LAYOUTS: dict[str, list[Layout]] = {
    "vhost-user": [
        ([(KICK + KICK, 2)], [1, 1]),
        ([(KICK + TWO, 3), (KICK, 1)], [1, 2, 1]),
        ([(NUM + KICK + NUM, 1)], [0, 1, 0]),
        ([(NUM, 0), (KICK, 1)], [0, 1]),
        ([(KICK + TWO[:20], 2), (TWO[20:] + KICK, 2)], [1, 2, 1]),
    ],
    "vfio-user": [
        ([(MAP + MAP, 2)], [1, 1]),
        ([(MAP + IRQS, 3), (INFO, 0)], [1, 2, 0]),
        ([(INFO + MAP, 1)], [0, 1]),
        ([(MAP, 0), (MAP, 1)], [0, 1]),
    ],
}


def die_at(call: int) -> None:
    """Be killed when a traced function is entered for that time."""
    left = call

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        code = frame.f_code
        if code.co_filename in TRACED and code.co_name in STEPS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    if call:
        sys.settrace(trace)


async def serve(sock: socket.socket, keeping: Keeping, protocol: str) -> None:
    parser: Any = (
        vhost_user.VhostUserParser() if protocol == "vhost-user" else vfio_user.VfioUserParser()
    )
    saved = keeping.read("state") or STATE.pack(0, 0)
    number, size = STATE.unpack_from(saved)
    said, answered = saved[STATE.size :][:size], saved[STATE.size + size :]
    gone = asyncio.Event()
    closer = Closer()

    def received(got: Received) -> bool:
        parser.receive_data(got.data, got.fds)
        message = parser.next_message()
        sizes = bytes(os.fstat(fd).st_size for fd in message.fds)
        closer.close(message.fds)
        conn.send(sizes.rjust(ANSWER, b"\0"))
        return False

    def record(handled: Handled) -> None:
        head = STATE.pack(handled.number, len(handled.message))
        keeping.write("state", head + handled.message + handled.answer)

    own = Pieces(keeping, closer, number)
    assert own.damage is None, own.damage
    conn = RepeatableConnection(
        sock,
        size_of=parser.size_of,
        header_size=parser.header_size,
        fds_of=parser.fds_of,
        pieces=own,
        record=record,
        handled=Handled(number, said, answered),
        area=keeping.area("connection", AREA_SIZE),
        read_size=4096,
        max_fds=8,
        closer=closer,
        received=received,
        go_on=lambda: False,
        lost=lambda error: gone.set(),
    )
    await gone.wait()


class Keeper:
    """What is kept, and written down.

    Attributes:
        store: of descriptors; what workers sent is taken by :meth:`drain`.
    """

    def __init__(self) -> None:
        self.store = DescriptorStore(100)
        self._end, self._worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._journal = Journal.create()

    def drain(self) -> None:
        while self.store.receive(self._end) is not None:
            pass

    def open_shelf(self) -> shelves.Shelf:
        """Return a worker's shelf."""
        left = {name: [os.dup(fd) for fd in fds] for name, fds in self.store.descriptors.items()}
        return shelves.open_shelf(self._journal, Notifier(self._worker), left)

    def close(self) -> None:
        self.store.close()
        self._end.close()
        self._worker.close()
        os.close(self._journal)


def start(sock: socket.socket, keeper: Keeper, protocol: str, call: int) -> tuple[int, int]:
    """Serve in another process, which dies at that call; return it, and a pidfd."""
    keeper.drain()
    if pid := os.fork():
        return pid, os.pidfd_open(pid)
    try:
        with asyncio.Runner() as runner:
            runner.get_loop()
            die_at(call)
            runner.run(serve(sock, keeper.open_shelf(), protocol))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def expected(layout: Layout) -> bytes:
    size, answers = 1, b""
    for count in layout[1]:
        answers += bytes(range(size, size + count)).rjust(ANSWER, b"\0")
        size += count
    return answers


def send(sock: socket.socket, layout: Layout) -> None:
    size = 1
    for data, count in layout[0]:
        fds = []
        for _ in range(count):
            fds.append(os.memfd_create("beside"))
            os.ftruncate(fds[-1], size)
            size += 1
        unix_fds.send(sock, data, fds)
        unix_fds.close_all(fds)


def check(protocol: str, layout: Layout, call: int) -> bool:
    """Die there once; return whether there is such a call."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    keeper = Keeper()
    send(theirs, layout)
    wanted, got = expected(layout), b""
    died = False
    pid, pidfd = start(ours, keeper, protocol, call)
    while pid:
        waits_for = [pidfd] if len(got) == len(wanted) else [theirs, pidfd]
        ready = select.select(waits_for, [], [], 30)[0]
        assert ready, f"{layout}, call {call}: {got!r} and no more"
        if pidfd in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            assert status in ((0, -signal.SIGKILL) if not died else (0,)), status
            pid = 0
            if status:
                died = True
                pid, pidfd = start(ours, keeper, protocol, 0)
        else:
            data = theirs.recv(1 << 16)
            assert data, "the connection was closed"
            got += data
            if len(got) == len(wanted):
                theirs.shutdown(socket.SHUT_WR)  # it ends as soon as all is handled
    assert got == wanted, f"{layout}, call {call}: {got!r}, not {wanted!r}"
    keeper.drain()
    assert keeper.store.descriptors == {}, f"{layout}, call {call}: {keeper.store.descriptors}"
    theirs.close()
    ours.close()
    keeper.close()
    return died


def main(protocol: str) -> None:
    deaths = 0
    for layout in LAYOUTS[protocol]:
        call = 1
        while check(protocol, layout, call):
            call += 1
        deaths += call - 1
    print(deaths)


if __name__ == "__main__":
    main(sys.argv[1])
