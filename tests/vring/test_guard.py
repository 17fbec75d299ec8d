"""Guest memory whose file is cut off (SIGBUS): zeros, a mark and a message instead of death."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vring import Batch, FlowEvent, GuestMemory, MemoryWatch, Pump, Region, RingError
from vring.errors import MemoryLostError
from vring.testing import GuestQueue

SIZE = 1 << 20
QUEUE, SLOT = 64, 2048


class Guest:
    """A stream's end over a memfd that it can cut off, and the device's view of that."""

    def __init__(self, *, writable: bool) -> None:
        self.memfd = os.memfd_create("guest")
        size = -(-GuestQueue.bytes_needed(QUEUE, SLOT) // 4096) * 4096
        os.ftruncate(self.memfd, size)
        self.watch = MemoryWatch()
        self.own = Region.map(self.memfd, size, guest_addr=0)
        self.guest = GuestQueue(
            self.own, QUEUE, SLOT, writable=writable, event_idx=True, guest_addr=0
        )
        region = Region.map(self.memfd, size, guest_addr=0, watch=self.watch)
        self.queue = self.guest.device_queue(memory=GuestMemory([region]))
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def cut_off(self) -> None:
        os.ftruncate(self.memfd, 0)

    def told(self) -> bool:
        return bool(select.select([self.watch], [], [], 5)[0])

    def close(self) -> None:
        for fd in (self.memfd, self.kick_fd, self.call_fd):
            os.close(fd)


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(**options: bool) -> Guest:
        made.append(Guest(**options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def map_all(fd: int, **options: object) -> Region:
    return Region.map(fd, SIZE, guest_addr=0, **options)  # type: ignore[arg-type]


# --- one region


@pytest.mark.parametrize("private", [False, True])
def test_reads_zeros_is_marked_and_tells(memfd: int, private: bool) -> None:
    watch = MemoryWatch()
    region = map_all(memfd, private=private, watch=watch)
    memory = GuestMemory([region])
    memory.write(0x8000, b"there")
    assert (region.lost, memory.lost) == (False, False)
    os.ftruncate(memfd, 4096)
    assert memory.read(0x8000, 5) == bytes(5)
    assert (region.lost, memory.lost) == (True, True)
    assert os.eventfd_read(watch.fd) == 1
    watch.clear()
    assert not select.select([watch], [], [], 0)[0]


def test_lost_memory_is_memory_of_its_own(memfd: int) -> None:
    memory = GuestMemory([map_all(memfd)])
    os.ftruncate(memfd, 0)
    memory.write(SIZE - 5, b"still")
    assert memory.read(SIZE - 5, 5) == b"still"
    os.ftruncate(memfd, SIZE)
    assert os.pread(memfd, 5, SIZE - 5) == bytes(5)


def test_python_numpy_and_views(memfd: int) -> None:
    for access in (
        lambda memory: bytes(memory.view(0x4000, 4096)),
        lambda memory: np.frombuffer(memory.view(0x4000, 4096), np.uint8).sum(),
        lambda memory: memory.view(0x4000, 8).__setitem__(0, 1),
    ):
        os.ftruncate(memfd, SIZE)
        memory = GuestMemory([map_all(memfd)])
        os.ftruncate(memfd, 0)
        access(memory)
        assert memory.lost


def test_only_the_region_that_was_cut_off_is_lost(memfd: int) -> None:
    other = os.memfd_create("other")
    try:
        os.ftruncate(other, SIZE)
        regions = [map_all(memfd), Region.map(other, SIZE, guest_addr=SIZE)]
        memory = GuestMemory(regions)
        memory.write(SIZE, b"kept")
        os.ftruncate(memfd, 0)
        memory.read(0, 1)
        assert [region.lost for region in regions] == [True, False]
        assert memory.read(SIZE, 4) == b"kept"
        assert not GuestMemory(regions[1:]).lost
    finally:
        os.close(other)


def test_a_slot_serves_again(memfd: int) -> None:
    for _ in range(600):  # more than one block of slots, were they not used again
        memory = GuestMemory([map_all(memfd)])
        os.ftruncate(memfd, 0)
        memory.read(SIZE - 1, 1)
        assert memory.lost
        os.ftruncate(memfd, SIZE)


def test_more_regions_than_one_block_of_slots(memfd: int) -> None:
    regions = [Region.map(memfd, 4096, guest_addr=4096 * i) for i in range(600)]
    memory = GuestMemory(regions)
    os.ftruncate(memfd, 0)
    memory.read(4096 * 599, 1)
    memory.read(4096 * 3, 1)
    assert [i for i in range(600) if regions[i].lost] == [3, 599]


def test_an_offset_that_is_not_a_page(memfd: int) -> None:
    region = Region.map(memfd, 5000, offset=1234, guest_addr=0)
    memory = GuestMemory([region])
    os.pwrite(memfd, b"first", 1234)
    assert memory.read(0, 5) == b"first"
    os.ftruncate(memfd, 4096)
    assert memory.read(4990, 10) == bytes(10)
    assert region.lost


def test_in_many_threads_at_once(memfd: int) -> None:
    """Each access ends, whichever thread is the first."""
    for _ in range(50):
        os.ftruncate(memfd, SIZE)
        region = map_all(memfd)
        memory = GuestMemory([region])
        start = threading.Barrier(5)

        def access(memory: GuestMemory = memory, start: threading.Barrier = start) -> None:
            start.wait()
            for at in range(0, SIZE, 65536):
                memory.read(at, 65536)

        threads = [threading.Thread(target=access) for _ in range(4)]
        for thread in threads:
            thread.start()
        start.wait()
        os.ftruncate(memfd, 0)
        for thread in threads:
            thread.join()
        memory.read(0, 1)
        assert region.lost


def test_a_watch_outlives_its_owner(memfd: int) -> None:
    """What the handler writes to stays open as long as it may."""
    region = map_all(memfd, watch=MemoryWatch())
    os.ftruncate(memfd, 0)
    memory = GuestMemory([region])
    memory.read(0, 1)
    assert memory.lost


def test_huge_pages() -> None:
    size = 2 << 20
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        os.ftruncate(fd, 2 * size)
        region = Region.map(fd, size - 4096, offset=size, guest_addr=0)
    except Exception as error:
        pytest.skip(f"no huge pages here: {error}")
    try:
        memory = GuestMemory([region])
        memory.write(0, b"there")
        os.ftruncate(fd, size)
        assert memory.read(0, 5) == bytes(5)
        assert region.lost
    finally:
        os.close(fd)


# --- queues


def test_a_queue_says_that_its_memory_is_lost(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(writable=False)
    guest.guest.send(b"x" * 100, [100])
    guest.cut_off()
    with pytest.raises(MemoryLostError, match="cut off"):
        guest.queue.pop_many()
    assert isinstance(guest.queue.broken, MemoryLostError)
    assert guest.queue.in_flight == 0


@pytest.mark.parametrize(
    "take",
    [
        lambda batch: batch.gather(),
        lambda batch: batch.gather_into(bytearray(100)),
        lambda batch: batch[0].read(),
    ],
)
def test_zeros_are_not_taken_for_the_guests_bytes(
    make_guest: Callable[..., Guest], take: Callable[[Batch], object]
) -> None:
    guest = make_guest(writable=False)
    guest.guest.send(b"x" * 100, [100])
    batch = guest.queue.pop_many()
    assert batch.gather() == b"x" * 100
    guest.cut_off()
    with pytest.raises(MemoryLostError):
        take(batch)


# --- the pump


def wait_for(events: list[tuple[FlowEvent, object]], pump: Pump) -> tuple[FlowEvent, object]:
    until = time.monotonic() + 10
    while not events:
        assert time.monotonic() < until, "no event"
        select.select([pump.event_fd], [], [], 1)
        pump.dispatch()
    return events[0]


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("slots", ["small", "large"])
def test_the_pump_stops_and_says_why(
    make_guest: Callable[..., Guest], incoming: bool, slots: str
) -> None:
    """Small segments are copied (a signal), large ones given to a system call (EFAULT)."""
    length = 100 if slots == "small" else SLOT
    guest = make_guest(writable=incoming)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    events: list[tuple[FlowEvent, object]] = []
    arguments = {
        "kick_fd": guest.kick_fd,
        "call_fd": guest.call_fd,
        "on_event": lambda *event: events.append(event),
    }
    with ours, theirs, Pump() as pump:
        if incoming:
            guest.guest.offer()
            flow = pump.host_to_guest(guest.queue, read_fd=ours.fileno(), **arguments)
            theirs.sendall(b"h" * 10)
            time.sleep(0.05)
        else:
            flow = pump.guest_to_host(guest.queue, write_fd=ours.fileno(), **arguments)
        guest.cut_off()
        if incoming:
            theirs.sendall(b"h" * length)
        os.eventfd_write(guest.kick_fd, 1)
        event, detail = wait_for(events, pump)
        assert event is FlowEvent.RING_BROKEN
        assert isinstance(detail, MemoryLostError)
        assert guest.told()
        assert flow.detach() == b""
        if not incoming:
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("length", [100, SLOT])
def test_no_zeros_reach_the_host(
    make_guest: Callable[..., Guest], lossy: bool, length: int
) -> None:
    """Under traffic, again and again: what the host gets is what the guest sent, and no more."""
    for attempt in range(30):
        guest = make_guest(writable=False)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(10)
        events: list[tuple[FlowEvent, object]] = []
        sent = threading.Event()

        def send(guest: Guest = guest, sent: threading.Event = sent) -> None:
            while not sent.is_set() and not guest.own.lost:
                try:
                    guest.guest.collect()
                    n = guest.guest.driver.num_free
                    if guest.guest.send(b"g" * length * n, [length] * n):
                        os.eventfd_write(guest.kick_fd, 1)
                except RingError:
                    return

        with ours, theirs, Pump() as pump:
            flow = pump.guest_to_host(
                guest.queue,
                write_fd=ours.fileno(),
                kick_fd=guest.kick_fd,
                call_fd=guest.call_fd,
                on_event=lambda *event, events=events: events.append(event),
                lossy=lossy,
            )
            sender = threading.Thread(target=send)
            sender.start()
            received = theirs.recv(1 << 20)
            for _ in range(attempt):
                received += theirs.recv(1 << 20)
            theirs.settimeout(0.05)
            guest.cut_off()
            os.eventfd_write(guest.kick_fd, 1)
            until = time.monotonic() + 10
            while not any(event is FlowEvent.RING_BROKEN for event, _ in events):
                assert time.monotonic() < until
                try:
                    received += theirs.recv(1 << 20)
                except TimeoutError:
                    os.eventfd_write(guest.kick_fd, 1)
                pump.dispatch()
            sent.set()
            sender.join()
            flow.detach()
            assert isinstance(events[-1][1], MemoryLostError)
            assert received == b"g" * len(received)


class Apart:
    """A queue whose buffers alone are in memory that is cut off: nothing else finds that out."""

    LENGTH = 1 << 20
    FIRST = 1 << 32

    def __init__(self) -> None:
        self.memfd = os.memfd_create("buffers")
        os.ftruncate(self.memfd, self.LENGTH)
        rings = bytearray(GuestQueue.bytes_needed(QUEUE, 1))
        self.guest = GuestQueue(rings, QUEUE, 1, writable=False, guest_addr=0)
        buffers = Region.map(self.memfd, self.LENGTH, guest_addr=self.FIRST)
        self.queue = self.guest.device_queue(memory=GuestMemory([Region(0, rings), buffers]))
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def send(self, length: int, count: int = 1) -> None:
        """Chains of as many bytes each, which hold whatever is there."""
        for _ in range(count):
            self.guest.driver.add([(self.FIRST, length)], [])
        if self.guest.driver.publish():
            os.eventfd_write(self.kick_fd, 1)

    def close(self) -> None:
        for fd in (self.memfd, self.kick_fd, self.call_fd):
            os.close(fd)


@pytest.fixture
def apart() -> Iterator[Apart]:
    apart = Apart()
    yield apart
    apart.close()


@pytest.mark.parametrize("count", [1, 5])
def test_no_zeros_go_into_a_backlog(apart: Apart, count: int) -> None:
    os.pwrite(apart.memfd, b"kept", 0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    events: list[tuple[FlowEvent, object]] = []
    with ours, theirs, Pump() as pump:
        with contextlib.suppress(BlockingIOError):
            while ours.send(bytes(4096)):
                pass  # until it is full
        flow = pump.guest_to_host(
            apart.queue,
            write_fd=ours.fileno(),
            kick_fd=apart.kick_fd,
            call_fd=apart.call_fd,
            on_event=lambda *event: events.append(event),
            lossy=True,
        )
        apart.send(4)
        until = time.monotonic() + 10
        while not len(apart.guest.collect()):
            assert time.monotonic() < until
            time.sleep(0.001)
        os.ftruncate(apart.memfd, 0)
        apart.send(20, count)
        event, detail = wait_for(events, pump)
        assert event is FlowEvent.RING_BROKEN
        assert isinstance(detail, MemoryLostError)
        assert flow.detach() == b"kept"
        assert len(apart.guest.collect()) == 0


def test_no_zeros_become_residue(apart: Apart) -> None:
    os.pwrite(apart.memfd, b"g" * apart.LENGTH, 0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, Pump() as pump:
        flow = pump.guest_to_host(
            apart.queue,
            write_fd=ours.fileno(),
            kick_fd=apart.kick_fd,
            call_fd=apart.call_fd,
            on_event=lambda *event: None,
        )
        apart.send(apart.LENGTH)
        until = time.monotonic() + 10
        while not flow.counters.throttled_ns:
            assert time.monotonic() < until
            time.sleep(0.001)
        os.ftruncate(apart.memfd, 0)
        assert flow.detach() == b""
        taken = flow.counters.bytes
        assert 0 < taken < apart.LENGTH
        assert flow.counters.dropped == apart.LENGTH - taken
        assert theirs.recv(taken, socket.MSG_WAITALL) == b"g" * taken
        assert len(apart.guest.collect()) == 0


# --- what is not ours


def run(script: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with a region mapped, `foreign` a mapping that is not."""
    setup = """
        import ctypes, faulthandler, mmap, os, signal, sys
        import vring
        def guard():
            fd = os.memfd_create("ours")
            os.ftruncate(fd, 4096)
            return fd, vring.Region.map(fd, 4096, guest_addr=0)
        def foreign():
            fd = os.memfd_create("foreign")
            os.ftruncate(fd, 4096)
            mapped = mmap.mmap(fd, 4096)
            os.ftruncate(fd, 0)
            return mapped[0]
        def lose(fd, region):
            os.ftruncate(fd, 0)
            assert bytes(memoryview(region)[:1]) == bytes(1)
            assert region.lost
            print("lost", flush=True)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)", "signal.raise_signal(7)"]
)
@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGBUS, signal.SIG_DFL)"])
def test_a_foreign_sigbus_kills(cause: str, before: str) -> None:
    done = run(f"""
        {before}
        fd, region = guard()
        lose(fd, region)
        {cause}
        print("survived")
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


def test_faulthandler_still_says_where() -> None:
    done = run("""
        faulthandler.enable()
        fd, region = guard()
        lose(fd, region)
        foreign()
    """)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
    assert "in foreign" in done.stderr


def test_an_ignored_signal_is_ignored_and_an_ignored_fault_is_not() -> None:
    done = run("""
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        lose(*guard())
        os.kill(os.getpid(), signal.SIGBUS)
        print("ignored", flush=True)
        foreign()
    """)
    assert (done.stdout, done.returncode) == ("lost\nignored\n", -signal.SIGBUS)


def test_a_handler_in_python_is_called() -> None:
    done = run("""
        signal.signal(signal.SIGBUS, lambda number, frame: print("told", number, flush=True))
        lose(*guard())
        os.kill(os.getpid(), signal.SIGBUS)
        lose(*guard())
    """)
    assert (done.stdout, done.returncode) == ("lost\ntold 7\nlost\n", 0)


def test_a_handler_with_siginfo_gets_it() -> None:
    """Installed with sigaction, as only other languages can."""
    done = run("""
        class Action(ctypes.Structure):
            _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_int * 32), ctypes.c_void_p)
        def handler(number, info, context):
            address = ctypes.cast(info, ctypes.POINTER(ctypes.c_uint64))[2]
            print("told", number, info.contents[2], address == base, flush=True)
            os._exit(3)
        action = Action(ctypes.cast(handler, ctypes.c_void_p), (ctypes.c_ulong * 16)(), 4, None)
        libc = ctypes.CDLL(None)
        assert libc.sigaction(signal.SIGBUS, ctypes.byref(action), None) == 0
        lose(*guard())
        fd = os.memfd_create("foreign")
        os.ftruncate(fd, 4096)
        mapped = mmap.mmap(fd, 4096)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        os.ftruncate(fd, 0)
        mapped[0]
    """)
    assert (done.stdout, done.returncode) == ("lost\ntold 7 2 True\n", 3)


TAKEN = "another handler of SIGBUS was installed over vring's"


@pytest.mark.parametrize("times", [1, 40])
def test_faulthandler_that_comes_later_is_noticed_at_the_next_map(times: int) -> None:
    done = run(f"""
        first = guard()
        for _ in range({times}):
            faulthandler.enable()
            lose(*guard())
            faulthandler.disable()
            faulthandler.enable()
            lose(*guard())
        lose(*first)
        foreign()
    """)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "lost\n" * (2 * times + 1)
    assert done.stderr.count(TAKEN) == 1
    assert done.stderr.count("Fatal Python error: Bus error") == 1
    assert "in foreign" in done.stderr


def test_handlers_that_come_later_are_called() -> None:
    done = run("""
        faulthandler.enable()
        fd, region = guard()
        for name in ("one", "two"):
            signal.signal(signal.SIGBUS, lambda number, frame, name=name: print(name, flush=True))
            lose(*guard())
            os.kill(os.getpid(), signal.SIGBUS)
        lose(fd, region)
    """)
    assert (done.stdout, done.returncode) == ("lost\none\nlost\ntwo\nlost\n", 0)
    assert done.stderr.count(TAKEN) == 1


@pytest.mark.parametrize("cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_a_default_that_comes_later_kills(cause: str) -> None:
    done = run(f"""
        signal.signal(signal.SIGBUS, lambda number, frame: print("told", flush=True))
        guard()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        lose(*guard())
        {cause}
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


@pytest.mark.parametrize("cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_a_handler_that_calls_the_one_before_it_is_called_once(cause: str) -> None:
    """As handlers in C do: ours passes on to it, it passes on to ours."""
    done = run(f"""
        class Action(ctypes.Structure):
            _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        @kind
        def handler(number, info, context):
            print("told", number, flush=True)
            kind(before.handler)(number, info, context)
        action = Action(ctypes.cast(handler, ctypes.c_void_p), (ctypes.c_ulong * 16)(), 4, None)
        before = Action()
        fd, region = guard()
        libc = ctypes.CDLL(None)
        libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(before))
        lose(*guard())
        lose(fd, region)
        {cause}
    """)
    assert (done.stdout, done.returncode) == ("lost\nlost\ntold 7\n", -signal.SIGBUS)


def test_an_unmapped_region_is_foreign_again() -> None:
    done = run("""
        fd, region = guard()
        lose(fd, region)
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        del region
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 5
        assert libc.mmap(base, 4096, 3, 0x11, fd, 0) == base
        ctypes.c_char.from_address(base).value
        print("survived")
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


def test_a_child_of_fork_is_guarded_too() -> None:
    done = run("""
        fd, region = guard()
        child = os.fork()
        if child == 0:
            lose(fd, region)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        assert not region.lost
        lose(fd, region)
    """)
    assert (done.stdout, done.returncode, done.stderr) == ("lost\nlost\n", 0, "")
