"""A connection whose process dies at every line in turn: run by a test as a process of its own.

Messages have 8 bytes, the second half of which is the length of the answer, or LONG bytes that
begin so; answers of BESIDE bytes have descriptors beside them. This process keeps the socket and
the journal; it writes all messages, and reads the answers. Prints how many lines there were to die
at.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios
from types import FrameType
from typing import Any

from vring_serial import unix_fds
from vring_serial.service.journal import Journal
from vring_serial.transport import connection, repeatable
from vring_serial.transport.closer import Closer
from vring_serial.transport.repeatable import (
    AREA_SIZE,
    LOOKED_AT,
    Handled,
    RepeatableConnection,
)
from vring_serial.unix_fds import Received

#: Two are the same and have no answer, one has an answer that is more than fits, one is long and
#: comes in two pieces.
BESIDE = 300
TO_LONG = 500
LENGTHS = [0, 0, BESIDE, TO_LONG, 250_000]
LONG = LOOKED_AT + 5
STATE = struct.Struct("<QQQ")
TRACED = {connection.__file__, repeatable.__file__}


def message(length: int) -> bytes:
    if length == TO_LONG:
        return b"long" + length.to_bytes(4, "little") + bytes(i & 0xFF for i in range(LONG - 8))
    return b"what" + length.to_bytes(4, "little")


def answer(count: int, length: int) -> bytes:
    """The answer to the message of this number."""
    return bytes((count * 31 + i) & 0xFF for i in range(256)) * (length // 256 + 1)


def fds_beside(length: int) -> list[int]:
    """Descriptors that go with an answer of that length."""
    return [os.dup(2) for _ in range(2 if length == BESIDE else 0)]


def die_at(line: int) -> None:
    """Be killed before the line of that number is run."""
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace if frame.f_code.co_filename in TRACED else None

    sys.settrace(trace)


async def serve(sock: socket.socket, journal: Journal) -> None:
    state = journal.read("state") or STATE.pack(0, 0, 0)
    number, count, size = STATE.unpack_from(state)
    said, answered = state[STATE.size :][:size], state[STATE.size :][size:]
    gone = asyncio.Event()

    def received(got: Received) -> bool:
        nonlocal count
        unix_fds.close_all(got.fds)
        length = int.from_bytes(got.data[4:8], "little")
        assert got.data == message(length)
        count += 1
        conn.send(answer(count, length)[:length], fds_beside(length))
        return False

    def record(handled: Handled) -> None:
        head = STATE.pack(handled.number, count, len(handled.message))
        journal.write("state", head + handled.message + handled.answer)

    conn = RepeatableConnection(
        sock,
        size_of=lambda data: LONG if data[:4] == b"long" else 8,
        header_size=8,
        fds_of=lambda _: range(2),
        pieces=None,
        record=record,
        handled=Handled(number, said, answered),
        handled_fds=fds_beside(len(answered)),
        area=journal.area("connection", AREA_SIZE),
        room=lambda: journal.area("message", 2 * LONG),
        read_size=4096,
        max_fds=4,
        closer=Closer(),
        received=received,
        go_on=lambda: False,
        lost=lambda error: gone.set(),
    )
    await gone.wait()


def unread(sock: socket.socket) -> int:
    """How much memory that has which was sent and not taken off yet."""
    size = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(size, sys.byteorder)


def start(sock: socket.socket, journal_fd: int, line: int) -> int:
    """Serve in another process, which dies at that line; 0: which goes on to the end."""
    if pid := os.fork():
        return pid
    try:
        with Journal(journal_fd) as journal, asyncio.Runner() as runner:
            runner.get_loop()
            die_at(line)
            runner.run(serve(sock, journal))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def check(line: int) -> bool:
    """Die there once; return whether there is such a line."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    journal = Journal.create()
    reader, writer = os.pipe()
    for i, length in enumerate(LENGTHS):
        data = message(length)
        if length == TO_LONG:
            unix_fds.send(theirs, data[: LONG // 2])
            rest = [data[LONG // 2 :], message(LENGTHS[-1])]  # sent once that is taken off
            break
        unix_fds.send(theirs, data, [writer] if i % 2 else [])
    wanted = b"".join(answer(i + 1, n)[:n] for i, n in enumerate(LENGTHS))
    got = b""
    beside = 0
    died = False
    pid = start(ours, journal, line)
    pidfd = os.pidfd_open(pid)
    while pid:
        if rest and len(got) >= BESIDE and not unread(theirs):
            for data in rest:
                unix_fds.send(theirs, data)
            rest = []
        waiting = [theirs, pidfd] if len(got) < len(wanted) else [pidfd]
        ready = select.select(waiting, [], [], 0.01 if rest else 30)[0]
        if not ready:
            assert rest, "nothing happens"
        elif pidfd in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            assert status in ((0, -signal.SIGKILL) if not died else (0,)), status
            pid = 0
            if status:
                died = True
                pid = start(ours, journal, 0)
                pidfd = os.pidfd_open(pid)
        else:
            received = unix_fds.receive(theirs, 1 << 16, 9)
            assert received.data, "the connection was closed"
            got += received.data
            beside += len(received.fds)
            unix_fds.close_all(received.fds)
            if len(got) >= len(wanted):
                theirs.shutdown(socket.SHUT_WR)  # it ends as soon as all is handled
    ours.close()
    while data := theirs.recv(1 << 16):
        got += data
    assert len(got) == len(wanted), f"{line}: {len(got)} of {len(wanted)} bytes"
    assert got == wanted, line
    assert beside == 2, f"{line}: {beside} descriptors"
    theirs.close()
    for fd in (journal, reader, writer):
        os.close(fd)
    return died


if __name__ == "__main__":
    line = 1
    while check(line):
        line += 1
    print(line - 1)
