"""Workers that die at every step of a message that starts or stops a ring with bytes in it.

A process of its own for a test, as dying_session is. The ring is the transmitq of a port that the
guest has open, and the host end a file. Before it dies, a worker has time to move what it may.
In the end the file has every byte once, the guest every buffer, and the ring goes on. Prints at how
many calls a worker died.

Usage: dying_ring.py LAYOUT MESSAGE, or LAYOUT round
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support.dying_guest import (
    AVAIL,
    DESC,
    LENGTH,
    QUEUE,
    SIZE,
    USED,
    SendingGuest,
    make_controller,
)
from tests.transport.vhost_user import dying_session as dying
from tests.transport.vhost_user.dying_session import Said, World
from vring_serial.proto import vhost_user as vu
from vring_serial.proto.vhost_user import Request

PACKED = 1 << 34
#: Seconds for what moves without being asked: enough on a busy machine to find the fault mostly.
MOVES_SECONDS = 0.02

ENABLE: Said = (Request.SET_VRING_ENABLE, vu.VringState(QUEUE, 1), "")
DISABLE: Said = (Request.SET_VRING_ENABLE, vu.VringState(QUEUE, 0), "")
KICK: Said = (Request.SET_VRING_KICK, vu.VringDescriptor(QUEUE), "event")
CALL: Said = (Request.SET_VRING_CALL, vu.VringDescriptor(QUEUE), "event")
STOP: Said = (Request.GET_VRING_BASE, vu.VringState(QUEUE), "")
NUM: Said = (Request.SET_VRING_NUM, vu.VringState(QUEUE, SIZE), "")
ADDRESS = vu.VringAddress(QUEUE, 0, dying.USER + DESC, dying.USER + USED, dying.USER + AVAIL)
ADDR: Said = (Request.SET_VRING_ADDR, ADDRESS, "")

#: The last message after which the ring runs.
RUNS: Said = (Request.SET_VRING_ENABLE, vu.VringState(QUEUE, 1), "")

TABLE: Said = (Request.SET_MEM_TABLE, vu.MemoryTable((dying.REGION,)), "memory")
#: In which the ring is not.
OTHER: Said = (Request.SET_MEM_TABLE, vu.MemoryTable((dying.ADDED,)), "memory")
ADD: Said = (Request.ADD_MEM_REG, vu.SingleRegion(dying.REGION), "memory")
REMOVE: Said = (Request.REM_MEM_REG, vu.SingleRegion(dying.ADDED), "")

#: By name: what comes first, and what is sent then. The ring ran before, and was stopped.
CASES: dict[str, tuple[list[Said], list[Said]]] = {
    "SET_VRING_ENABLE": ([NUM, ADDR, CALL, KICK], [ENABLE]),
    "SET_VRING_KICK": ([NUM, ADDR, CALL, ENABLE], [KICK]),
    "SET_VRING_ADDR": ([NUM, KICK, CALL, ENABLE], [ADDR]),
    "SET_VRING_NUM": ([ADDR, KICK, CALL, ENABLE], [NUM]),
    "SET_VRING_KICK again": ([NUM, ADDR, CALL, KICK, RUNS], [KICK]),
    "SET_VRING_ENABLE 0": ([NUM, ADDR, CALL, KICK, RUNS], [DISABLE]),
    "GET_VRING_BASE": ([NUM, ADDR, CALL, KICK, RUNS], [STOP]),
    "SET_MEM_TABLE": ([NUM, ADDR, CALL, KICK, RUNS], [TABLE]),
    "SET_MEM_TABLE twice": ([NUM, ADDR, CALL, KICK, RUNS], [OTHER, TABLE]),
    "SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG together": (
        [NUM, ADDR, CALL, KICK, RUNS],
        [OTHER, ADD, REMOVE],
    ),
}


class Bench:
    """A guest and its ring, workers that serve it, and the file at the other end."""

    def __init__(self, directory: Path, packed: bool) -> None:
        self.guest = SendingGuest(packed)
        self._output = directory / "output"
        self._output.write_bytes(b"")
        self._kick = os.eventfd(0, os.EFD_CLOEXEC)
        self.world = World(
            directory,
            lambda keeping: make_controller(self._output, keeping),
            self._descriptors,
            MOVES_SECONDS,
        )
        self.say(
            (Request.SET_PROTOCOL_FEATURES, vu.U64(dying.PROTOCOL_FEATURES), ""),
            (Request.SET_OWNER, None, ""),
            (Request.SET_FEATURES, vu.U64(dying.FEATURES | (PACKED if packed else 0)), ""),
            (Request.SET_MEM_TABLE, vu.MemoryTable((dying.REGION,)), "memory"),
            *(NUM, ADDR, CALL, KICK, ENABLE),
        )

    def close(self) -> None:
        self.world.close()
        os.close(self._kick)
        os.close(self.guest.memfd)

    def say(self, *messages: Said) -> None:
        for said in messages:
            self.world.say([said])

    def stop(self, die: int = 0) -> None:
        """Stop the ring, and say where it is to go on."""
        answer = self.world.say([STOP], die)
        base = vu.VringState.unpack(answer[12:]).num
        self.say((Request.SET_VRING_BASE, vu.VringState(QUEUE, base), ""))

    def all_arrives(self) -> None:
        """Wait until the file has every byte once, and the guest all of its buffers."""
        end = time.monotonic() + 20
        while self.guest.driver.in_flight or self._output.read_bytes() != self.guest.sent:
            self.guest.driver.get_used()
            os.eventfd_write(self._kick, 1)
            got = self._output.read_bytes()
            if time.monotonic() > end or not self.guest.sent.startswith(got):
                wanted = len(self.guest.sent) // LENGTH
                text = f"{self.guest.driver.in_flight} in flight, of {wanted} {list(got[::LENGTH])}"
                raise AssertionError(text)
            time.sleep(0.001)

    def _descriptors(self, beside: str) -> list[int]:
        mine = {"memory": self.guest.memfd, "event": self._kick}
        return [os.dup(mine[beside])] if beside else []


def die_at(bench: Bench, name: str, die: int) -> int:
    """Send before, while and after the message is handled; return how many workers died."""
    guest = bench.guest
    guest.send(SIZE // 2 + 1)
    bench.all_arrives()
    bench.stop()
    bench.say((Request.SET_STATUS, vu.U64(0), ""))  # which forgets the setup, as QEMU's `stop`
    before, said = CASES[name]
    guest.send(SIZE // 4)
    bench.say(*before)
    if before[-1] is RUNS:
        bench.all_arrives()
        guest.send(SIZE // 4)
    if said == [STOP]:
        bench.stop(die)
    else:
        bench.world.say(said, die, apart=True)
    if said in ([STOP], [DISABLE]):
        bench.say(CALL, KICK, ENABLE)
    bench.all_arrives()
    guest.send(SIZE // 2)
    bench.all_arrives()
    return bench.world.deaths


def die_where_it_began(bench: Bench) -> int:
    """Have a worker die where the index is that of a fresh ring, which has come round."""
    bench.guest.send(SIZE // 2)
    bench.all_arrives()
    bench.stop()
    bench.say(CALL, KICK, ENABLE)
    for _ in range(3):
        bench.guest.send(SIZE // 2)
        bench.all_arrives()
    bench.world.replace_worker()
    bench.guest.send(SIZE // 2)
    bench.all_arrives()
    return 1


@contextmanager
def made(packed: bool) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as directory, closing(Bench(Path(directory), packed)) as it:
        yield it


def main(layout: str, name: str) -> None:
    packed = layout == "packed"
    logging.disable(logging.WARNING)  # without its memory the ring is refused
    if name == "round":
        with made(packed) as bench:
            print(die_where_it_began(bench))
        return
    call, deaths = 1, 1
    while deaths:
        with made(packed) as bench:
            try:
                deaths = die_at(bench, name, call)
            except AssertionError as error:
                raise AssertionError(f"call {call}: {error}") from None
        call += 1
    print(call - 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
