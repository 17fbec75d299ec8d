"""Who may use a pump, its flows and their queues: other threads, children of fork, nobody twice."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.support.port_rig import PortRig
from tests.support.waiting import DEADLINE, wait_until
from vring import Flow, FlowEvent, LocalMisuseError, Pump, VirtQueue


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Who waits for a thread that is not there waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


# --- descriptors that are closed too early


def watched(epoll_fd: int) -> int:
    with open(f"/proc/self/fdinfo/{epoll_fd}") as info:
        return sum(line.startswith("tfd:") for line in info)


def epoll_fds() -> set[int]:
    return {
        int(fd)
        for fd in os.listdir("/proc/self/fd")
        if fd.isdigit()
        and os.path.exists(f"/proc/self/fdinfo/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]"
    }


@pytest.mark.parametrize("what", ["kick_fd", "write_fd", "read_fd"])
def test_a_descriptor_that_is_closed_before_its_flow_is_detached(
    make_rig: Callable, sockets, descriptors: Callable, what: str
) -> None:
    """Somebody else has the file still: what it does there is not about the flow any more."""
    before = epoll_fds()
    ours, theirs = sockets
    reader, writer = os.pipe2(os.O_NONBLOCK)
    descriptors(reader, writer)
    with Pump() as pump:
        (epoll_fd,) = epoll_fds() - before
        idle = watched(epoll_fd)
        rig = make_rig(pump=pump, writable=what == "read_fd")
        data = descriptors(os.dup(ours.fileno()))
        flow = rig.read_from(data) if what == "read_fd" else rig.write_to(data)
        number = rig.kick_fd if what == "kick_fd" else data
        copy = descriptors(os.dup(number))
        os.dup2(writer, number)  # who has the number now gets neither the bytes nor the kicks
        if what == "read_fd":
            rig.offer()
            theirs.send(b"still the flow's")
            wait_until(lambda: rig.guest.receive() == b"still the flow's")
        else:
            rig.guest.send(b"still the flow's", [16])
            os.eventfd_write(copy if what == "kick_fd" else rig.kick_fd, 1)
            assert theirs.recv(100) == b"still the flow's"
        assert flow.detach() == b""
        assert watched(epoll_fd) == idle
        os.write(copy, bytes(8))
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)


def test_a_number_that_is_reused_while_its_flow_is_attached(
    make_rig: Callable, sockets, descriptors: Callable
) -> None:
    """The next flow that is given the number has what it stands for then."""
    first, second = make_rig(writable=False), make_rig(writable=False)
    kick = os.eventfd(0)
    copy = descriptors(os.dup(kick))
    first.write_to(sockets[0].fileno(), kick_fd=kick)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        theirs.settimeout(DEADLINE)
        os.dup2(second.kick_fd, kick)
        second.write_to(ours.fileno(), kick_fd=descriptors(kick))
        for _ in range(3):
            second.send(b"second")
            assert theirs.recv(10) == b"second"
            second.wait_used(1)
            first.guest.send(b"first", [5])
            os.eventfd_write(copy, 1)
            assert sockets[1].recv(10) == b"first"
            first.wait_used(1)
        second.flow.detach()
        first.flow.detach()


# --- forks


def in_child(function: Callable[[], None]) -> None:
    """Run it in a child of fork, which does nothing else; it must return, and raise nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_has_no_part_in_its_parents_pump(make_rig: Callable, sockets, pump: Pump) -> None:
    rig, other = make_rig(writable=False), make_rig(writable=True)
    flow = rig.write_to(sockets[0].fileno())
    told = make_rig(writable=True)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    told.read_from(ours.fileno())
    theirs.close()
    assert select.select([pump.event_fd], [], [], DEADLINE)[0]

    def detach() -> None:
        assert not flow.attached
        assert flow.detach() == b""

    def attach() -> None:
        with pytest.raises(LocalMisuseError, match="closed"):
            other.read_from(sockets[0].fileno())

    def dispatch() -> None:
        pump.dispatch()
        assert told.events == []

    def close() -> None:
        pump.close()
        pump.close()
        assert pump.event_fd == -1
        detach()

    def forget() -> None:
        pump.__del__()

    def count() -> None:
        assert flow.counters.chains == 0

    for use in (detach, attach, dispatch, close, forget, count):
        in_child(use)
    with ours:
        assert told.wait_event() == (FlowEvent.PEER_EOF, None)
        told.flow.detach()
    assert flow.attached
    rig.send(b"the parent's still")
    assert sockets[1].recv(100) == b"the parent's still"


# --- threads


def test_closing_while_others_attach(sockets) -> None:
    for _ in range(100):
        pump = Pump()
        rigs = [PortRig(pump, writable=False) for _ in range(6)]
        flows: list[Flow] = []
        started = threading.Barrier(3)

        def attach(rigs: list, flows: list[Flow] = flows, started=started) -> None:
            started.wait()
            with suppress(LocalMisuseError):  # it is closed, or being closed
                for rig in rigs:
                    flows.append(rig.write_to(sockets[0].fileno()))

        threads = [threading.Thread(target=attach, args=(rigs[n::2],)) for n in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        pump.close()
        for thread in threads:
            thread.join()
        assert not any(flow.attached for flow in flows)
        for rig in rigs:
            rig.queue.available()  # nobody has it any more
            rig.close()


@pytest.mark.parametrize("what", ["detach", "close"])
def test_of_several_who_end_it_each_returns_when_it_is_over(sockets, what: str) -> None:
    for _ in range(100):
        pump = Pump()
        rig = PortRig(pump, writable=False)
        flow = rig.write_to(sockets[0].fileno())
        end = flow.detach if what == "detach" else pump.close

        def work(end: Callable = end, rig=rig) -> None:
            end()
            assert rig.queue.available() == 0  # raises while a flow has it

        errors: list[BaseException] = []

        def guarded(work: Callable = work, errors: list = errors) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert not flow.attached
        pump.close()
        rig.close()


def test_they_cannot_be_subclassed() -> None:
    """What an overriding method left out would be missing under the running thread."""
    for base in (Pump, Flow):
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Sub", (base,), {"close": lambda self: None})


# --- queues


def uses(queue: VirtQueue) -> dict[str, Callable[[], object]]:
    empty = queue.pop_many()
    return {
        "pop_many": queue.pop_many,
        "push_many": lambda: queue.push_many(empty),
        "unpop": lambda: queue.unpop(empty),
        "pop": queue.pop,
        "iteration": lambda: next(iter(queue)),
        "enable_notifications": queue.enable_notifications,
        "disable_notifications": queue.disable_notifications,
        "available": queue.available,
        "reset": queue.reset,
        "memory": lambda: setattr(queue, "memory", queue.memory),
    }


def test_a_queue_has_one_user(make_rig: Callable, sockets) -> None:
    rig = make_rig(writable=False)
    ways = uses(rig.queue)
    flow = rig.write_to(sockets[0].fileno())
    for use in ways.values():
        with pytest.raises(LocalMisuseError, match="until it is detached"):
            use()
    with Pump() as other:
        for pump in (rig.pump, other):
            with pytest.raises(LocalMisuseError, match=r"port 1.*until it is detached"):
                pump.guest_to_host(rig.queue, write_fd=-1, **rig.notifiers())
            with pytest.raises(LocalMisuseError, match=r"port 1.*until it is detached"):
                pump.host_to_guest(rig.queue, read_fd=sockets[0].fileno(), **rig.notifiers())
        rig.send(b"unharmed")
        assert sockets[1].recv(100) == b"unharmed"
        flow.detach()
        # One that could not be attached leaves it free.
        reader, writer = os.pipe()
        with pytest.raises(LocalMisuseError, match="blocking"):
            other.guest_to_host(rig.queue, write_fd=writer, **rig.notifiers())
        os.close(reader)
        os.close(writer)
        next_flow = other.guest_to_host(rig.queue, write_fd=-1, **rig.notifiers())
        flow.detach()  # once more: the queue is another's now
        with pytest.raises(LocalMisuseError, match="until it is detached"):
            rig.queue.available()
    assert not next_flow.attached
    assert rig.queue.pop() is None
